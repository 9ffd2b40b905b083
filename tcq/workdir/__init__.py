"""The workdir of a training run: which config and which images it is for.

A workdir holds config.json, data.json (digests of images and split), changes.jsonl, skipped.jsonl, checkpoints/,
metrics.jsonl and tensorboard/; evaluation adds results.json and pictures.
"""

import json
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tcq import config as configs
from tcq.data import protocols, splits
from tcq.data.source import Source
from tcq.runtime import storage

CONFIG, DATA, CHANGES, SKIPPED = "config.json", "data.json", "changes.jsonl", "skipped.jsonl"

logger = logging.getLogger(__name__)


class WorkdirError(ValueError):
    """The workdir cannot be used; the message says why."""


def read_config(workdir: str | Path) -> ConfigDict:
    """The config of the run in a workdir. Raises WorkdirError if there is none, ConfigError if it cannot be read."""
    text = storage.read(storage.join(workdir, CONFIG))
    if text is None:
        raise WorkdirError(f"{str(workdir)!r} holds no {CONFIG}: is it the --workdir of a training run?")
    return configs.from_json(text.decode())


def claim(
    folder: Path,
    workdir: str | Path,
    config: ConfigDict,
    source: Source,
    split: protocols.Split,
    *,
    allow_changes: bool,
) -> list[str]:
    """Writes config and data to a new workdir, or checks that it holds this run; returns changes of the config.

    `folder` is the local mirror of `workdir`. Changes are recorded by `record_changes`, once the checkpoint fits them.
    Raises ConfigError if the config differs and changes are not allowed, WorkdirError if the folder is not writable,
    ProtocolError if the images differ.
    """
    stored = storage.read(folder / CONFIG)
    changes = configs.differences(configs.from_json(stored.decode()), config) if stored else []
    if changes and not allow_changes:
        raise configs.ConfigError(
            f"{str(workdir)!r} holds a run with another config: use another --workdir, the same values, or "
            f"--allow_changes\n" + _bullets(changes)
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not changes:
            storage.write_text(folder / CONFIG, configs.to_json(config))
        if source.skipped:
            storage.write_text(folder / SKIPPED, json_lines(source.skipped))
        claim_data(folder, source, split)
    except OSError as error:
        raise WorkdirError(f"--workdir {str(workdir)!r} cannot be written: {error.strerror or error}") from None
    return changes


def claim_data(folder: Path, source: Source, split: protocols.Split) -> None:
    """Writes digests of images and split into the workdir. Raises ProtocolError if it holds others.

    Otherwise an image that is added to a folder would silently turn training images into queries.
    """
    data = {"images": len(source.names), "names_sha256": splits.names_digest(source)}
    data["split_sha256"] = protocols.digest(split)
    stored = storage.read(folder / DATA)
    if stored is None:
        storage.write_text(folder / DATA, json.dumps(data, indent=2) + "\n")
    elif json.loads(stored) != data:
        raise protocols.ProtocolError(
            f"the images have changed since this run began: {json.loads(stored)['images']:,} then, {data['images']:,} "
            f"now, which changes the split: restore the images, or train in a new --workdir"
        )


def record_changes(folder: Path, config: ConfigDict, changes: list[str]) -> None:
    """Stores a changed config as that of the run, and appends the changes to changes.jsonl."""
    logger.warning("the config has changed:\n" + _bullets(changes))
    with open(folder / CHANGES, "a") as file:
        file.write(json.dumps({"time": time.time(), "changes": changes}) + "\n")
    storage.write_text(folder / CONFIG, configs.to_json(config))


def json_lines(rows: Iterable[Any]) -> str:
    """One line of JSON for each row."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"  - {line}" for line in lines)
