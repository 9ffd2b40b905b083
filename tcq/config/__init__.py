"""Configs: reading a config file with overrides, checking it, and storing it as JSON.

Every key has its default and unit in configs/base.py, its allowed values in checks.py, and its meaning, where it has to
be computed, in derived.py.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tcq.config import checks, embedded, files, overrides, pretrained
from tcq.config.checks import check_run
from tcq.config.derived import (
    ClipRule,
    Conventions,
    bits,
    clip_rule,
    conventions,
    query_norm,
    total_steps,
    warmup_steps,
)
from tcq.config.overrides import ConfigError, flatten
from tcq.data import folders
from tcq.models import weights as published
from tcq.runtime import modules, storage

__all__ = [
    "OPERATIONAL",
    "ClipRule",
    "ConfigError",
    "Conventions",
    "base",
    "bits",
    "check_run",
    "clip_rule",
    "conventions",
    "differences",
    "flatten",
    "from_json",
    "identity",
    "load",
    "query_norm",
    "to_json",
    "total_steps",
    "warmup_steps",
    "with_eval",
]
# These keys do not change what a run computes, apart from rounding; a workdir can be resumed with other values of them.
OPERATIONAL = (
    "data.threads",
    "data.resident",
    "data.cache_dir",
    "data.cache_gib",
    "data.tfds_dir",
    "model.attention",
    "model.remat",
    "model.scan",
    "loss.block_size",
    "loss.gather",
    "train.log_every_steps",
    "train.compare_every_steps",
    "train.max_skipped",
    "train.microbatches",
    "eval.batch_size",
    "checkpoint.keep",
)
# The module configs/base.py: `from tcq.config import base`.
base: Any = modules.execute(files.SHIPPED / "base.py", "tcq_config_base")


def load(path: str, overrides: Iterable[str] = (), *, workdir: str | Path | None = None) -> ConfigDict:
    """The config of a file, with overrides such as "loss.clip=64", checked.

    The file is "path.py" or "path.py:argument".

    Args:
      path: a file; a name such as "digits" or a path in configs/ also finds the files that come with tcq.
      overrides: see `overrides.parse`.
      workdir: of a run. If it holds one with the same `model.weights`, what these decided is taken from there, so that
        the run can be resumed after the weights were deleted. What `model.embedder` gave is also taken from there, if
        it gives nearly the same now; libraries and machines round differently.

    Raises:
      ConfigError: the file is missing or fails, a key is unknown, or a value is not allowed.
    """
    config = files.read(path)
    defaults = base.get_config()
    checks.check_types(config, defaults)
    values = _parse(overrides, defaults)
    config.update_from_flattened_dict(values)
    if embedded.applies(config):
        checks.check_types(config, defaults)
        embedded.apply(config, _stored(workdir), overridden=values)
    if config.model.weights:  # decides keys that are checked below
        config.model.weights = _absolute(config.model.weights)
        before = _keys_of_workdir(config, workdir)
        pretrained.apply(config, before or _keys_of(config.model.weights), overridden=values)
        checks.check(config, defaults)
        if not before:
            pretrained.check(config)
    else:
        checks.check(config, defaults)
    kind, _, folder = config.data.source.partition(":")
    if kind == "folder" and folder and not storage.is_url(folder):
        config.data.source = f"folder:{_absolute(folder)}"  # a workdir stores it, and is used from other directories
    if config.data.labels not in folders.LABELS:
        config.data.labels = _absolute(config.data.labels)
    return config


_parse = overrides.parse


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _stored(workdir: str | Path | None) -> ConfigDict | None:
    """The config of the run in a workdir, if there is one."""
    text = storage.read(storage.join(workdir, "config.json")) if workdir else None
    return from_json(text.decode()) if text else None


def _keys_of_workdir(config: ConfigDict, workdir: str | Path | None) -> pretrained.Keys | None:
    """The keys of the run in a workdir, if it has the same weights."""
    run = _stored(workdir)
    return pretrained.of_run(run) if run and run.model.weights == config.model.weights else None


def _keys_of(path: str) -> pretrained.Keys:
    if not published.is_workdir(path):
        return pretrained.of_weights(path)
    try:
        return pretrained.of_run(from_json(Path(path, "config.json").read_text()))
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"model.weights: {error}") from None


def from_json(text: str) -> ConfigDict:
    """The config of a text that `to_json` has written, checked. Raises ConfigError."""
    config = base.get_config()
    known = flatten(config)
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ConfigError(f"the stored config is a {type(values).__name__}, must be a JSON object")
        for key, value in flatten(ConfigDict(values)).items():
            if key not in known:
                raise ConfigError(f"{key} is unknown{overrides.suggestion(key, known)}")
            config.update_from_flattened_dict({key: value})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the stored config cannot be read: {error}") from None
    checks.check(config, base.get_config())
    return config


def to_json(config: ConfigDict) -> str:
    """The config as JSON text with sorted keys."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def with_eval(config: ConfigDict, overrides: Iterable[str]) -> ConfigDict:
    """A copy of a stored config with overrides such as "eval.ties=index", checked.

    Raises ConfigError, also for keys of other groups.
    """
    copy = from_json(to_json(config))
    values = _parse(overrides, copy)
    other = [key for key in values if not key.startswith("eval.")]
    if other:
        raise ConfigError(f"--config.{other[0]} cannot be changed after training: only --config.eval.<key>=<value> can")
    copy.update_from_flattened_dict(values)
    checks.check(copy, base.get_config())
    return copy


def identity(config: ConfigDict) -> dict[str, Any]:
    """The keys that determine what a run computes: all but the `OPERATIONAL` ones."""
    return {key: value for key, value in flatten(config).items() if key not in OPERATIONAL}


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """The keys of `identity` that differ between two configs, one line each."""
    before, after = identity(old), identity(new)
    return [
        f"{key}: {before.get(key)!r} stored, {after.get(key)!r} given"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
