"""Loading a config and storing it. The values derived from it and its checks are in checks.py, and offered here too."""

import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from tcq.config.checks import (
    ConfigError,
    bits,
    check,
    check_run,
    check_types,
    clip_count,
    flatten,
    nearest,
    total_steps,
)
from tcq.models import retriever, vit
from tcq.models import weights as pretrained
from tcq.runtime import storage as buckets

__all__ = [
    "ConfigError",
    "bits",
    "check_run",
    "clip_count",
    "differences",
    "from_json",
    "load",
    "to_json",
    "total_steps",
    "with_eval",
]
# Changing these does not change what a run computes, but for rounding; a workdir may go on with other values of them.
OPERATIONAL = (
    "data.threads",
    "data.resident",
    "data.cache_dir",
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
_DECIDED = (
    "name",
    "width",
    "depth",
    "heads",
    "patch",
    "positions",
    "mlp_ratio",
    "class_token",
    "registers",
    "layer_scale",
    "gelu",
    "norm_eps",
    "stem",
)


def load(path: str, overrides: Iterable[str] = (), *, workdir: str | Path | None = None) -> ConfigDict:
    """The config of a file "path.py" or "path.py:argument", with overrides such as "loss.clip=64", checked.

    A bare name, or one below configs/, is also looked for among the configs that come with tcq. A workdir that holds a run
    from the same `model.weights` tells what they decided, so that the run can go on where they are gone.
    Raises ConfigError for a missing or failing file, an unknown key, a wrong type, and all that `check` refuses.
    """
    file, colon, argument = path.partition(":")
    file = str(_find(file))
    arguments = [f"--config={file}{colon}{argument}", *(_as_flag(o) for o in overrides)]
    known = flatten(_base())
    for override in arguments[1:]:
        key = override.partition("=")[0].removeprefix("--no").removeprefix("--").removeprefix("config.")
        if key not in known:
            raise ConfigError(f"--config.{key}: there is no such key{nearest(key, known)}")
        if "=" not in override and not isinstance(known[key], bool):
            raise ConfigError(f"{override}: a value is missing, write {override}=...")
    config = _read(file, arguments)
    if not flatten(config).get("model.weights"):  # with weights it is whole only when they have been read
        check(config, _base())
    else:
        check_types(config, _base())
        config.model.weights = os.path.abspath(os.path.expanduser(config.model.weights))
        stored = buckets.read(buckets.join(workdir, "config.json")) if workdir else None
        begun = from_json(stored.decode()) if stored else None
        if begun and begun.model.weights == config.model.weights:
            _take_from_weights(config, arguments[1:], _of_run(begun))
            check(config, _base())
        else:
            _take_from_weights(config, arguments[1:], _of_weights(config.model.weights))
            check(config, _base())
            _check_weights(config)
    kind, _, folder = config.data.source.partition(":")
    if kind == "folder" and folder and not buckets.is_url(folder):
        # the workdir stores it, and may be used from elsewhere
        config.data.source = f"folder:{os.path.abspath(os.path.expanduser(folder))}"
    return config


def _take_from_weights(config: ConfigDict, overrides: list[str], found: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Sets what `model.weights` decides, and what it suggests where the command line does not say otherwise.

    Raises ConfigError where they are missing, unknown, or of another model than the config or the command line names.
    """
    m, (decided, suggested) = config.model, found
    told = {o.partition("=")[0].removeprefix("--no").removeprefix("--").removeprefix("config.") for o in overrides}
    names = _names_of(decided)
    if m.name and m.name not in names:
        fits = f"which is {' or '.join(names)}" if names else "which has no name: leave model.name empty"
        numbers = {k: decided[k] for k in ("width", "depth", "heads", "patch") if k in decided}
        raise ConfigError(f"model.name is {m.name}, but the weights {m.weights!r} are of a model of {numbers}, {fits}")
    other = [
        f"model.{k} is {m[k]!r}, the weights {m.weights!r} have {v!r}: leave it out"
        for k, v in decided.items()
        if f"model.{k}" in told and m[k] != v and k != "name"
    ]
    if other:
        raise ConfigError("\n".join(other))
    m.update({k: v for k, v in decided.items() if k != "name" or v})
    config.update_from_flattened_dict({k: v for k, v in suggested.items() if k not in told})
    if m.pooling == "attention" != suggested.get("model.pooling", m.pooling):
        raise ConfigError("model.pooling attention has a learned query, which the weights lack: use cls, mean or flat")


def _check_weights(config: ConfigDict) -> None:
    """Raises ConfigError where published weights do not fit the model, before any image is looked at."""
    path, side = config.model.weights, config.data.image_size
    if pretrained.is_workdir(path):
        return  # fits, for its config is taken over; restored when the run begins
    like = retriever.shapes(retriever.from_config(config).backbone, side)
    try:
        pretrained.variables(pretrained.read(path), like, image_size=side)
    except pretrained.WeightsError as error:
        raise ConfigError(f"model.weights: {error}") from None


def _of_weights(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys of config.model that weights decide, and the flat keys that they suggest."""
    try:
        if pretrained.is_workdir(path):
            return _of_run(from_json(Path(path, "config.json").read_text()))
        weights = pretrained.read(path)
    except (pretrained.WeightsError, OSError, UnicodeError) as error:
        raise ConfigError(f"model.weights: {error}") from None
    f, decided = weights.family, dict(weights.model)
    suggested = {
        "model.mean": f.mean,
        "model.std": f.std,
        "data.resize": f.resize,
        "data.interpolation": f.interpolation,
        "data.crop_share": f.crop_share,
    }
    if "pooling" in decided:
        suggested["model.pooling"] = decided.pop("pooling")
    return decided, suggested


def _of_run(config: ConfigDict) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `_of_weights` says, of a training run of ours."""
    decided = {k: config.model[k] for k in _DECIDED}
    decided["class_token"] |= config.model.pooling == "cls"
    same = ("model.pooling", "model.mean", "model.std", "data.resize", "data.interpolation", "data.crop_share")
    return decided, {k: v for k, v in flatten(config).items() if k in same}


def _names_of(model: dict[str, Any]) -> list[str]:
    """The names that a model of these keys goes by."""
    if model["name"]:
        return [model["name"]]
    size = vit.Size(model["width"], model["depth"], model["heads"]), model["patch"]
    return [name for name, named in vit.NAMED.items() if named == size]


def from_json(text: str) -> ConfigDict:
    """The config that `to_json` wrote, checked. Raises ConfigError."""
    config = _base()
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ConfigError(f"the stored config is a {type(values).__name__}, not a JSON object")
        for key, value in flatten(ConfigDict(values)).items():
            if key not in flatten(config):
                raise ConfigError(f"{key}: there is no such key{nearest(key, flatten(config))}")
            config.update_from_flattened_dict({key: value})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the stored config cannot be read: {error}") from None
    check(config, _base())
    return config


def with_eval(config: ConfigDict, overrides: Iterable[str]) -> ConfigDict:
    """A copy of a stored config with overrides such as "eval.ties=index", checked. Raises ConfigError, also for other groups."""
    values = json.loads(to_json(config))
    for override in overrides:
        flag = (
            f"--config.{override.removeprefix('--noconfig.')}=false" if override.startswith("--noconfig.") else override
        )
        key, equals, text = flag.removeprefix("--").removeprefix("config.").partition("=")
        group, _, name = key.partition(".")
        if group != "eval":
            raise ConfigError(f"{override}: a trained run takes only --config.eval.<key>=<value>")
        if name not in values["eval"]:
            raise ConfigError(f"--config.{key}: there is no such key{nearest(key, flatten(_base()))}")
        kind = type(values["eval"][name])
        try:
            values["eval"][name] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            raise ConfigError(f"{override}: must be {kind.__name__}") from None
        if not equals:
            raise ConfigError(f"{override}: a value is missing, write {override}=...")
    return from_json(json.dumps(values))


def to_json(config: ConfigDict) -> str:
    """The config as JSON text, keys sorted."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def identity(config: ConfigDict) -> dict[str, Any]:
    """What makes a run of a config another run than one of another: all keys but the `OPERATIONAL` ones."""
    return {key: value for key, value in flatten(config).items() if key not in OPERATIONAL}


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """What of two configs would make another run, one line each; see `OPERATIONAL`."""
    before, after = identity(old), identity(new)
    return [
        f"{key}: {before.get(key)!r} there, {after.get(key)!r} now"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _read(file: str, arguments: list[str]) -> ConfigDict:
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    try:
        with _command_line(["tcq", *arguments]), _importable_configs(), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message=".*load_module", category=DeprecationWarning
            )  # ml_collections 1.1
            values(sys.argv)
    except flags.Error as error:
        raise ConfigError(str(error).removeprefix("flag ")) from None
    except Exception as error:  # whatever a config file may raise
        raise ConfigError(f"{arguments[0].removeprefix('--config=')}: {type(error).__name__}: {error}") from None
    config = values.config
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{file}: get_config returned a {type(config).__name__}, not an ml_collections.ConfigDict")
    return config


def _as_flag(override: str) -> str:
    return override if override.startswith(("--config.", "--noconfig.")) else f"--config.{override.removeprefix('--')}"


def _home() -> Path:
    """The folder `configs`: beside the package in a checkout, inside it where tcq is installed."""
    here = Path(__file__).resolve().parent.parent
    return next((p for p in (here.parent / "configs", here / "configs") if (p / "base.py").is_file()), here / "configs")


def _find(file: str) -> Path:
    shipped = _home() / Path(file).name if str(Path(file).parent) in (".", "configs") else Path(file)
    for candidate in (Path(file), shipped, shipped.with_name(f"{shipped.name}.py")):
        if candidate.is_file() and candidate.suffix == ".py":
            return candidate
    known = ", ".join(sorted(p.name for p in _home().glob("*.py") if p.name != "__init__.py"))
    raise ConfigError(f"config file {file!r} does not exist; those that come with tcq: {known}")


def _base() -> ConfigDict:
    spec = importlib.util.spec_from_file_location("tcq_base_config", _home() / "base.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


@contextmanager
def _command_line(arguments: list[str]) -> Iterator[None]:
    """ml_collections reads overrides from sys.argv."""
    before, sys.argv = sys.argv, arguments
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def _importable_configs() -> Iterator[None]:
    """A config file may `from configs import base`, wherever it lies and wherever tcq is installed."""
    sys.path.insert(0, str(_home().parent))
    try:
        yield
    finally:
        sys.path.remove(str(_home().parent))
