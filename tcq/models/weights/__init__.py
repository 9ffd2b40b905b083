"""Published checkpoints as parameters of our backbones: recognised by content, mapped by name, checked key by key.

Nothing is unpickled. What a file holds beside the backbone may only be a head. The formats are in layouts.py.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from tcq.models.weights.layouts import HALF, LAYOUTS, Family, Layout, OtherShape, WeightsError, number
from tcq.models.weights.positions import resample

OWN = Family("tcq workdir", *HALF, "crop", "bicubic", 1.0, "bicubic_antialias", "")  # its config tells the rest


class Weights(NamedTuple):
    """A checkpoint, read."""

    path: Path
    family: Family
    model: dict[str, Any]  # keys of `config.model` that it decides
    variables: dict[str, np.ndarray]  # by the flat names of our own
    problems: list[str]  # tensors that are missing, of another shape or left over; NaN stands for the first two


def read(path: str | Path) -> Weights:
    """Reads a file, or the one weights file of a folder.

    Raises WeightsError if it is no checkpoint that we know, or it cannot be told of which size.
    """
    file = _find(Path(path).expanduser())
    tensors = _tensors(file)
    layout = next((layout for layout in LAYOUTS if layout.looks_like(tensors)), None)
    if layout is None:
        known = ", ".join(layout.family.name for layout in LAYOUTS)
        raise WeightsError(
            f"{str(file)!r} is of none of the families that tcq knows ({known}); its first tensors are "
            f"{', '.join(sorted(tensors)[:5])}"
        )
    asked = _Asked(tensors)
    try:
        told = {} if file.suffix == ".npz" else _facts(file.parent)
        model = layout.model(asked, told)
        width = number(told, "hidden_size", 1, 1e9)
        if width and width != model.get("width", width):
            raise WeightsError(
                f"config.json beside it is of another model: hidden_size {width:g}, not {model['width']}"
            )
        family = _told(layout.family, told)
        variables, problems = _convert(layout, asked, model)
    except (WeightsError, KeyError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise WeightsError(f"{str(file)!r} ({layout.family.name}) cannot be used: {what}") from None
    problems += [
        f"unexpected: {k} {v.shape}"
        for k, v in sorted(tensors.items())
        if k not in asked.names and not re.fullmatch(layout.family.left_out, k)
    ]
    return Weights(file, family, model, variables, problems)


def is_workdir(path: str | Path) -> bool:
    """Whether this is the folder of one of our own training runs."""
    return (Path(path).expanduser() / "checkpoints").is_dir()


def variables(weights: Weights, like: Mapping[str, Any], *, image_size: int) -> dict[str, Any]:
    """Variables of a backbone whose shapes `like` gives, with positions resampled to its image size.

    Raises WeightsError listing every one that is missing, left over, or of another shape.
    """
    problems = list(weights.problems)
    made = {k: v for k, v in weights.variables.items() if not (problems and v.dtype.kind == "f" and np.isnan(v).all())}
    want = {k: tuple(v.shape) for k, v in traverse_util.flatten_dict(dict(like), sep="/").items()}
    for key in want.keys() & (weights.variables.keys() - made.keys()):
        del want[key]  # named already
    place = "params/positions"
    if place in made and place in want and made[place].shape != want[place]:
        grid = image_size // weights.model["patch"]
        try:
            made[place] = resample(made[place], (grid, grid), rule=weights.family.positions)
        except ValueError as error:
            problems.append(f"other shape: {place}: {error}")
            del want[place], made[place]
    problems += [f"missing: {k} {want[k]}" for k in sorted(want.keys() - made.keys())]
    problems += [f"unexpected: {k} {made[k].shape}" for k in sorted(made.keys() - want.keys())]
    problems += [
        f"other shape: {k} {made[k].shape} in the file, {want[k]} in the model"
        for k in sorted(made.keys() & want.keys())
        if made[k].shape != want[k]
    ]
    problems += [f"not floating-point: {k} {v.dtype}" for k, v in sorted(made.items()) if v.dtype.kind != "f"]
    problems += [
        f"not finite: {k}" for k, v in sorted(made.items()) if v.dtype.kind == "f" and not np.isfinite(v).all()
    ]
    if problems:
        raise WeightsError(
            f"{str(weights.path)!r} ({weights.family.name}) does not fit the model:\n  " + "\n  ".join(problems)
        )
    return traverse_util.unflatten_dict({k: np.ascontiguousarray(v, np.float32) for k, v in made.items()}, sep="/")


class _Asked(dict[str, np.ndarray]):
    """Tensors that remember which of them were asked for."""

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        super().__init__(tensors)
        self.names: set[str] = set()

    def __getitem__(self, key: str) -> np.ndarray:
        self.names.add(key)
        return super().__getitem__(key)


def _convert(layout: Layout, asked: _Asked, model: dict[str, Any]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Our variables, NaN where a tensor is missing or of another shape, and these (at most 100)."""
    problems: list[str] = []
    variables: dict[str, np.ndarray] = {}
    while len(problems) < 100:
        try:
            variables = layout.convert(asked, model)
            break
        except KeyError as error:  # go on with that of another block in its place, to find the others
            key = str(error.args[0])
            problems.append(f"missing: {key}")
            alike = (v for k, v in asked.items() if re.sub(r"[0-9]+", "#", k) == re.sub(r"[0-9]+", "#", key))
            asked[key] = np.full_like(next(alike, np.zeros((1, 1, 1), np.float32)), np.nan)
        except OtherShape as error:
            if f"missing: {error.key}" not in problems:
                problems.append(f"other shape: {error.key} {asked[error.key].shape} in the file, {error.want} expected")
            asked[error.key] = np.full(error.want, np.nan, np.float32)
        except (ValueError, IndexError) as error:
            problems.append(str(error))
            break
    return variables, problems


def _find(path: Path) -> Path:
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix in (".npz", ".safetensors"))
        if len(found) != 1:
            listed = ", ".join(p.name for p in found) or "none"
            raise WeightsError(f"{str(path)!r} must hold one .npz or .safetensors file, it holds {listed}")
        return found[0]
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*") if p.suffix in (".npz", ".safetensors"))
        there = f"; in that folder are {', '.join(near)}" if near else ""
        raise WeightsError(f"weights {str(path)!r} do not exist{there}")
    return path


def _tensors(file: Path) -> dict[str, np.ndarray]:
    with open(file, "rb") as opened:
        start = opened.read(64)
    try:
        if start[8:9] != b"{":  # with which the header of a safetensors file begins, behind its length
            if start[:2] == b"PK" and file.suffix == ".npz":
                with np.load(file, allow_pickle=False) as saved:
                    return {k.removeprefix("params/"): _float32(saved[k]) for k in saved.files}
            if start[:2] == b"PK" or start[:1] == b"\x80":
                raise WeightsError(_PICKLE.format(path=str(file)))
        from safetensors.numpy import load_file

        return {k: _float32(v) for k, v in load_file(file).items()}
    except WeightsError:
        raise
    except Exception as error:  # readers raise anything on damaged files
        raise WeightsError(
            f"{str(file)!r} cannot be read as .npz or safetensors: {type(error).__name__}: {error}"
        ) from None


def _float32(tensor: np.ndarray) -> np.ndarray:
    """Floating-point tensors as float32, before anything is added up; others as they are."""
    if tensor.dtype.kind != "f" and not tensor.dtype.name.startswith(("bfloat", "float")):
        return tensor
    with np.errstate(over="ignore"):
        return tensor.astype(np.float32)


_PICKLE = (
    "{path!r} is a pickle, which can run any code when it is opened: tcq does not. Where you trust it, convert it once:\n"
    "  python -c \"import torch; from safetensors.torch import save_file; s = torch.load('{path}', map_location='cpu', "
    "weights_only=True); s = s.get('model', s.get('state_dict', s)); "
    "save_file({{k: v.contiguous() for k, v in s.items()}}, 'model.safetensors')\""
)


def _facts(folder: Path) -> dict[str, Any]:
    """What config.json and preprocessor_config.json beside the weights say, if they are there."""
    facts: dict[str, Any] = {}
    for file in (folder / "config.json", folder / "preprocessor_config.json"):
        if not file.is_file():
            continue
        try:
            found = json.loads(file.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise WeightsError(f"{str(file)!r} beside it cannot be read: {error}") from None
        own = found.get("pretrained_cfg") if isinstance(found, dict) else 0
        if own is not None and not isinstance(own, dict):
            raise WeightsError(f"{str(file)!r} beside it is not a JSON object as Hugging Face and timm write it")
        facts |= found | (own or {})
    return facts


def _told(family: Family, facts: dict[str, Any]) -> Family:
    """The family, with what the files beside the weights say of how images are to be fed.

    Raises WeightsError where they ask for something that tcq has not.
    """
    mean, std = (_three(facts, f"image_{k}") or _three(facts, k) for k in ("mean", "std"))
    family = family._replace(mean=mean or family.mean, std=std or family.std)
    names = {2: "bilinear", 3: "bicubic", "bilinear": "bilinear", "bicubic": "bicubic"}
    interpolation = facts.get("resample", facts.get("interpolation"))
    if interpolation is not None:
        if not isinstance(interpolation, int | str) or interpolation not in names:
            raise WeightsError(
                f"the JSON beside it asks for the interpolation {interpolation!r}; tcq has bilinear and bicubic"
            )
        family = family._replace(interpolation=names[interpolation])
    if facts.get("do_resize"):  # Hugging Face
        size = facts.get("size")
        edge = number(size, "shortest_edge", 1, 1e5) if isinstance(size, dict) else number(facts, "size", 1, 1e5)
        if facts.get("do_center_crop"):
            crop = facts.get("crop_size")
            kept = number(crop, "height", 1, 1e5) if isinstance(crop, dict) else number(facts, "crop_size", 1, 1e5)
            if edge is None or kept is None:
                raise WeightsError(f"the JSON beside it asks for a crop of {crop} out of {size}, which tcq has not")
            return family._replace(resize="crop", crop_share=min(1.0, kept / edge))
        keeps_shape = isinstance(size, dict) and edge is not None
        return family._replace(resize="crop" if keeps_shape else "squash", crop_share=1.0)
    share = number(facts, "crop_pct", 0.01, 1)  # timm
    if share is not None:
        mode = facts.get("crop_mode") or "center"
        if mode not in ("center", "squash") or (mode == "squash" and share < 1):
            raise WeightsError(
                f"the JSON beside it asks for crop_mode {mode!r} with crop_pct {share}, which tcq has not"
            )
        return family._replace(resize="crop" if mode == "center" else "squash", crop_share=share)
    return family


def _three(facts: dict[str, Any], key: str) -> tuple[float, float, float] | None:
    values = facts.get(key)
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != 3:
        raise WeightsError(f"config.json: {key} is {values!r}, three numbers were expected")
    low = 1e-6 if key.endswith("std") else -1e6
    a, b, c = (number({key: v}, key, low, 1e6) for v in values)
    if a is None or b is None or c is None:
        raise WeightsError(f"config.json: {key} is {values!r}, three numbers were expected")
    return a, b, c
