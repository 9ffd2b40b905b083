"""Published checkpoints as variables of our backbones.

They are recognized by content, mapped by name and checked tensor by tensor. Nothing is unpickled. Apart from the
backbone a file may hold only a head. The formats are in layouts.py.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from tcq.models.weights import files, names
from tcq.models.weights.layouts import HALF, LAYOUTS, Family, Layout, ShapeError, WeightsError, number
from tcq.models.weights.positions import resample

# The preprocessing of our own training runs is in their config.
OWN = Family("tcq workdir", *HALF, "crop", "bicubic", 1.0, "bicubic_antialias", "")
MAX_PROBLEMS = 100


class Weights(NamedTuple):
    """A checkpoint that has been read."""

    path: Path
    family: Family
    model: dict[str, Any]  # the keys of `config.model` that it decides
    variables: dict[str, np.ndarray]  # by our own names, joined with "/"
    problems: list[str]  # tensors that are missing, have another shape (both are NaN above) or are unexpected


def read(path: str | Path) -> Weights:
    """Reads a weights file, or the only one of a folder.

    Raises WeightsError if it is not of a known family, or the size of its model cannot be determined.
    """
    file = files.find(Path(path).expanduser())
    try:
        tensors = names.plain(files.tensors(file))
    except WeightsError as error:
        raise WeightsError(f"{str(file)!r}: {error}" if str(file) not in str(error) else str(error)) from None
    layout = next((layout for layout in LAYOUTS if layout.matches(tensors)), None)
    if layout is None:
        known = ", ".join(layout.family.name for layout in LAYOUTS)
        raise WeightsError(
            f"{str(file)!r} is not of a known family ({known}); its first tensors are {', '.join(sorted(tensors)[:5])}"
        )
    record = _TensorRecord(tensors)
    try:
        metadata = {} if file.suffix == ".npz" else files.metadata(file.parent)
        model = layout.model(record, metadata)
        width = number(metadata, "hidden_size", 1, 1e9)
        if width and width != model.get("width", width):
            raise WeightsError(
                f"config.json beside the weights describes another model: hidden_size {width:g}, not {model['width']}"
            )
        family = files.preprocessing(layout.family, metadata)
        converted, problems = _convert(layout, record, model)
    except (WeightsError, KeyError) as error:
        reason = f"tensor {error} not found" if isinstance(error, KeyError) else error
        raise WeightsError(f"{str(file)!r} ({layout.family.name}) cannot be used: {reason}") from None
    problems += [
        f"unexpected: {k} {v.shape}"
        for k, v in sorted(tensors.items())
        if k not in record.used and not re.fullmatch(layout.family.head, k)
    ]
    return Weights(file, family, model, converted, problems)


def is_workdir(path: str | Path) -> bool:
    """Whether a path is the workdir of one of our own training runs."""
    return (Path(path).expanduser() / "checkpoints").is_dir()


def variables(weights: Weights, template: Mapping[str, Any], *, image_size: int) -> dict[str, Any]:
    """The variables of a backbone with the shapes of `template`.

    Its positions are resampled to its image size. Raises WeightsError that lists every variable which is missing,
    unexpected, or has another shape.
    """
    problems = list(weights.problems)
    have = {k: v for k, v in weights.variables.items() if not (problems and v.dtype.kind == "f" and np.isnan(v).all())}
    expected = {k: tuple(v.shape) for k, v in traverse_util.flatten_dict(dict(template), sep="/").items()}
    for key in expected.keys() & (weights.variables.keys() - have.keys()):
        del expected[key]  # already in the list of problems
    key = "params/positions"
    if key in have and key in expected and have[key].shape != expected[key]:
        grid = image_size // weights.model["patch"]
        try:
            have[key] = resample(have[key], (grid, grid), rule=weights.family.positions)
        except ValueError as error:
            problems.append(f"other shape: {key}: {error}")
            del expected[key], have[key]
    problems += [f"missing: {k} {expected[k]}" for k in sorted(expected.keys() - have.keys())]
    problems += [f"unexpected: {k} {have[k].shape}" for k in sorted(have.keys() - expected.keys())]
    problems += [
        f"other shape: {k} {have[k].shape} in the file, {expected[k]} in the model"
        for k in sorted(have.keys() & expected.keys())
        if have[k].shape != expected[k]
    ]
    problems += [f"not floating-point: {k} {v.dtype}" for k, v in sorted(have.items()) if v.dtype.kind != "f"]
    problems += [
        f"not finite: {k}" for k, v in sorted(have.items()) if v.dtype.kind == "f" and not np.isfinite(v).all()
    ]
    if problems:
        raise WeightsError(
            f"{str(weights.path)!r} ({weights.family.name}) does not fit the model:\n  " + "\n  ".join(problems)
        )
    return traverse_util.unflatten_dict({k: np.ascontiguousarray(v, np.float32) for k, v in have.items()}, sep="/")


class _TensorRecord(dict[str, np.ndarray]):
    """Tensors by name, with a record of the names that were looked up."""

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        super().__init__(tensors)
        self.used: set[str] = set()

    def __getitem__(self, key: str) -> np.ndarray:
        self.used.add(key)
        return super().__getitem__(key)


def _convert(layout: Layout, tensors: _TensorRecord, model: dict[str, Any]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Our variables, NaN where a tensor is missing or has another shape; and these problems.

    At most `MAX_PROBLEMS` problems are returned.
    """
    problems: list[str] = []
    converted: dict[str, np.ndarray] = {}
    while len(problems) < MAX_PROBLEMS:
        try:
            converted = layout.convert(tensors, model)
            break
        except KeyError as error:  # try again with that tensor of another block, to find all problems
            key = str(error.args[0])
            problems.append(f"missing: {key}")
            similar = (v for k, v in tensors.items() if re.sub(r"[0-9]+", "#", k) == re.sub(r"[0-9]+", "#", key))
            tensors[key] = np.full_like(next(similar, np.zeros((1, 1, 1), np.float32)), np.nan)
        except ShapeError as error:
            if f"missing: {error.key}" not in problems:
                shape = tensors[error.key].shape
                problems.append(f"other shape: {error.key} {shape} in the file, {error.expected} expected")
            tensors[error.key] = np.full(error.expected, np.nan, np.float32)
        except (ValueError, IndexError) as error:
            problems.append(str(error))
            break
    return converted, problems
