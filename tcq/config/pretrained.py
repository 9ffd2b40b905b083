"""The keys that `model.weights` sets: always, or only where the command line does not."""

from collections.abc import Container
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from tcq.config.overrides import ConfigError, flatten
from tcq.models import retriever, vit
from tcq.models import weights as published

DECIDED = (
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
SUGGESTED = ("model.pooling", "model.mean", "model.std", "data.resize", "data.interpolation", "data.crop_share")


class Keys(NamedTuple):
    """Values that weights give to keys of the config."""

    decided: dict[str, Any]  # by the keys of `config.model`
    suggested: dict[str, Any]  # by keys such as "model.mean"


def of_weights(path: str) -> Keys:
    """The keys of published weights. Raises ConfigError if they cannot be read."""
    try:
        weights = published.read(path)
    except (published.WeightsError, OSError) as error:
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
    return Keys(decided, suggested)


def of_run(config: ConfigDict) -> Keys:
    """The keys of one of our own training runs, by its config."""
    decided = {k: config.model[k] for k in DECIDED}
    decided["class_token"] |= config.model.pooling == "cls"
    return Keys(decided, {k: v for k, v in flatten(config).items() if k in SUGGESTED})


def apply(config: ConfigDict, keys: Keys, *, overridden: Container[str]) -> None:
    """Sets what weights decide, and what they suggest except for keys that are overridden.

    Raises ConfigError if the weights are of another model than the config or the overrides say.
    """
    m = config.model
    names = _names_of(keys.decided)
    if m.name and m.name not in names:
        fits = f"which is {' or '.join(names)}" if names else "which has no name: leave model.name empty"
        numbers = {k: keys.decided[k] for k in ("width", "depth", "heads", "patch") if k in keys.decided}
        raise ConfigError(f"model.name is {m.name}, but the weights {m.weights!r} are of a model of {numbers}, {fits}")
    conflicts = [
        f"model.{k} is {m[k]!r}, but {v!r} in the weights {m.weights!r}: remove this override"
        for k, v in keys.decided.items()
        if f"model.{k}" in overridden and m[k] != v and k != "name"
    ]
    if conflicts:
        raise ConfigError("\n".join(conflicts))
    m.update({k: v for k, v in keys.decided.items() if k != "name" or v})
    config.update_from_flattened_dict({k: v for k, v in keys.suggested.items() if k not in overridden})
    if m.pooling == "attention" != keys.suggested.get("model.pooling", m.pooling):
        raise ConfigError("model.pooling attention has a learned query, which the weights lack: use cls, mean or flat")


def check(config: ConfigDict) -> None:
    """Raises ConfigError if published weights do not fit the model.

    Weights of our own runs fit, by their config.
    """
    path, side = config.model.weights, config.data.image_size
    if published.is_workdir(path):
        return
    template = retriever.shapes(retriever.from_config(config).backbone, side)
    try:
        published.variables(published.read(Path(path)), template, image_size=side)
    except published.WeightsError as error:
        raise ConfigError(f"model.weights: {error}") from None


def _names_of(model: dict[str, Any]) -> list[str]:
    """The names of a model with these keys."""
    if model["name"]:
        return [model["name"]]
    size = vit.Size(model["width"], model["depth"], model["heads"]), model["patch"]
    return [name for name, named in vit.NAMED.items() if named == size]
