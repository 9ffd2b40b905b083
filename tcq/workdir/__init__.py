"""The workdir of a training run: which config and which images it is for.

A workdir holds config.json, data.json (digests of images and split), images.npz (names and contents of the images),
changes.jsonl, skipped.jsonl, repaired.jsonl, checkpoints/, metrics.jsonl and tensorboard/; evaluation adds
results.json, queries.jsonl and pictures.
"""

import hashlib
import json
import logging
import time
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from tcq import config as configs
from tcq.data import protocols, splits
from tcq.data.rows import take
from tcq.data.source import Source
from tcq.runtime import processes, storage

CONFIG, DATA, CHANGES, SKIPPED = "config.json", "data.json", "changes.jsonl", "skipped.jsonl"
REPAIRED, IMAGES = "repaired.jsonl", "images.npz"
SHOWN = 5  # names of images in a message

logger = logging.getLogger(__name__)


class WorkdirError(ValueError):
    """The workdir cannot be used; the message says why."""


def read_config(workdir: str | Path) -> ConfigDict:
    """The config of the run in a workdir.

    Raises WorkdirError if there is none, ConfigError if it cannot be read.
    """
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
    """Writes config and data to a new workdir, or checks that it holds this run.

    Returns changes of the config. `folder` is the local mirror of `workdir`. A folder of images that was moved is no
    change. Changes are recorded by `record_changes`, once the checkpoint fits them.
    Raises ConfigError if the config differs and changes are not allowed, WorkdirError if the folder is not writable,
    ProtocolError if the images differ.
    """
    changes = compare_config(folder, workdir, config, allow_changes=allow_changes)
    moved = _moved_from(folder, config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        claim_data(folder, source, split)
        if not changes:
            storage.write_text(folder / CONFIG, configs.to_json(config))
        if moved:
            logger.info(f"the images of this run have moved: {moved} -> {config.data.source}")
        for name, rows in ((SKIPPED, source.skipped), (REPAIRED, source.repaired)):
            if rows:
                storage.write_text(folder / name, json_lines(rows))
    except OSError as error:
        raise WorkdirError(f"--workdir {str(workdir)!r} cannot be written: {error.strerror or error}") from None
    return changes


def compare_config(folder: Path, workdir: str | Path, config: ConfigDict, *, allow_changes: bool) -> list[str]:
    """What differs between a config and that of the run in the folder, if it holds one.

    A folder of images that was moved is no change. Raises ConfigError if there are changes, and they are not allowed.
    """
    stored = storage.read(folder / CONFIG)
    before = configs.from_json(stored.decode()) if stored else config
    changes = configs.differences(before, with_source(config, _moved_from(folder, config) or config.data.source))
    if changes and not allow_changes:
        raise configs.ConfigError(
            f"{str(workdir)!r} holds a run with another config: use another --workdir, the same values, or "
            f"--allow_changes\n" + _bullets(changes)
        )
    return changes


def _moved_from(folder: Path, config: ConfigDict) -> str:
    """Where the folder of images of the run was, if it was elsewhere."""
    stored = storage.read(folder / CONFIG)
    before = configs.from_json(stored.decode()) if stored else config
    moved = before.data.source != config.data.source and all(_is_folder(c) for c in (before, config))
    return str(before.data.source) if moved else ""


def in_order(folder: Path, source: Source) -> Source:
    """The source in the run's order of images, if these have the same contents; else as it is.

    Files that were renamed or moved within the collection thus keep their places in the split.
    """
    stored = _read_images(folder)
    if stored is None or source.digests is None or sorted(stored[1]) != sorted(source.digests):
        return source
    places: dict[bytes, list[int]] = {}
    for i, digest in enumerate(source.digests):
        places.setdefault(digest, []).append(i)
    names = {name: i for i, name in enumerate(source.names)}
    own = [names[n] if n in names and source.digests[names[n]] == d else -1 for n, d in zip(*stored, strict=True)]
    taken = set(own)
    free = {d: iter([i for i in where if i not in taken]) for d, where in places.items()}
    order = np.array([i if i >= 0 else next(free[d]) for i, d in zip(own, stored[1], strict=True)], np.int64)
    return source_rows(source, order)


def unchanged(folder: Path, data: ConfigDict, source: Source) -> Source:
    """The source in the run's order of images.

    Raises ProtocolError if the images or their split are not those of the run, and ProcessError if they differ between
    its processes.
    """
    source = in_order(folder, source)
    split = splits.of_source(source, data)
    processes.require_same("images", {"names": splits.names_digest(source), "split": protocols.digest(split)})
    processes.on_first(lambda: _compare(folder, source, _described(source, split)))
    return source


def source_rows(source: Source, order: np.ndarray) -> Source:
    """A source with its items in another order."""
    if (order == np.arange(len(source.names))).all():
        return source
    return source._replace(
        images=take(source.images, order),
        labels=None if source.labels is None else source.labels[order],
        names=[source.names[i] for i in order],
        views=None if source.views is None else take(source.views, order),
        pictures=None if source.pictures is None else take(source.pictures, order),
        digests=None if source.digests is None else [source.digests[i] for i in order],
    )


def claim_data(folder: Path, source: Source, split: protocols.Split) -> None:
    """Writes digests of images and split into the workdir.

    Raises ProtocolError if it holds others. Otherwise an image that is added to a folder would silently turn training
    images into queries.
    """
    data = _described(source, split)
    if storage.read(folder / DATA) is None:
        storage.write_text(folder / DATA, json.dumps(data, indent=2) + "\n")
        if source.digests is not None:
            _write_images(folder, source)
    _compare(folder, source, data)


def _described(source: Source, split: protocols.Split) -> dict[str, Any]:
    data: dict[str, Any] = {"images": len(source.names), "names_sha256": splits.names_digest(source)}
    data["split_sha256"] = protocols.digest(split)
    if source.digests is not None:
        data["contents_sha256"] = hashlib.sha256(b"".join(source.digests)).hexdigest()
    return data


def _compare(folder: Path, source: Source, data: dict[str, Any]) -> None:
    """Raises ProtocolError if the workdir holds digests of other images or of another split."""
    text = storage.read(folder / DATA)
    if text is None:
        return
    stored = json.loads(text)
    by_contents = "contents_sha256" in stored and "contents_sha256" in data
    compared = ("images", "split_sha256", "contents_sha256" if by_contents else "names_sha256")
    different = [key for key in compared if stored.get(key) != data[key]]
    if different == ["split_sha256"]:
        raise protocols.ProtocolError(
            "the images are those of this run, but their split has changed: restore data.protocol, data.split_seed, "
            "data.query, data.validation and the labels, or train in a new --workdir"
        )
    if different:
        raise protocols.ProtocolError(
            f"the images have changed since this run began: {stored['images']:,} then, {data['images']:,} now"
            f"{_differences(folder, source)}. That changes the split: restore the images, or train in a new --workdir"
        )


def _write_images(folder: Path, source: Source) -> None:
    """Stores names and contents of the images, for messages, and for images that are renamed."""
    assert source.digests is not None
    names = np.frombuffer(zlib.compress(json.dumps(source.names).encode()), np.uint8)
    digests = np.frombuffer(b"".join(source.digests), np.uint8).reshape(len(source.digests), -1)
    with storage.atomic(folder / IMAGES) as temporary, open(temporary, "wb") as file:
        np.savez(file, names=names, digests=digests)


def _read_images(folder: Path) -> tuple[list[str], list[bytes]] | None:
    try:
        with open(folder / IMAGES, "rb") as file, np.load(file, allow_pickle=False) as saved:
            names = json.loads(zlib.decompress(saved["names"].tobytes()))
            return names, [row.tobytes() for row in saved["digests"]]
    except (OSError, ValueError, KeyError, zlib.error, zipfile.BadZipFile):
        return None


def _differences(folder: Path, source: Source) -> str:
    """Which images are new, gone or edited, in words; "" if it is not known."""
    stored = _read_images(folder)
    if stored is None or source.digests is None:
        return ""
    then, now = dict(zip(*stored, strict=True)), dict(zip(source.names, source.digests, strict=True))
    kinds = {
        "new": [n for n in now if n not in then],
        "gone": [n for n in then if n not in now],
        "edited": [n for n in now if n in then and then[n] != now[n]],
    }
    listed = [
        f"{kind}: {', '.join(names[:SHOWN])}{f' and {len(names) - SHOWN:,} more' if len(names) > SHOWN else ''}"
        for kind, names in kinds.items()
        if names
    ]
    return f" ({'; '.join(listed)})" if listed else ""


def move_images(folder: Path, config: ConfigDict) -> None:
    """Stores the new place of the images, which `claim_data` has compared."""
    stored = configs.from_json((folder / CONFIG).read_text())
    storage.write_text(folder / CONFIG, configs.to_json(with_source(stored, config.data.source)))


def _is_folder(config: ConfigDict) -> bool:
    return bool(config.data.source.startswith("folder:"))


def with_source(config: ConfigDict, source: str) -> ConfigDict:
    """A copy of a config with another `data.source`."""
    copied = configs.from_json(configs.to_json(config))
    copied.data.source = source
    return copied


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
