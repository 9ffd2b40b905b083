"""The files of a published checkpoint: the tensors, and the JSON files beside them.

It reads from the JSON files what they say about preprocessing.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from tcq.models.weights.layouts import Family, Metadata, WeightsError, number

SUFFIXES = (".npz", ".safetensors")
SHARDED = ".safetensors.index.json"  # lists the files of a checkpoint that is stored in parts
INTERPOLATIONS = {2: "bilinear", 3: "bicubic", "bilinear": "bilinear", "bicubic": "bicubic"}  # Pillow's numbers
PICKLE = (
    "{path!r} is a pickle, which can run any code when it is opened, so tcq does not open it. If you trust it, convert "
    "it once:\n"
    "  python -c \"import torch; from safetensors.torch import save_file; s = torch.load('{path}', map_location='cpu', "
    "weights_only=True); s = s.get('model', s.get('state_dict', s)); "
    "save_file({{k: v.contiguous() for k, v in s.items()}}, 'model.safetensors')\""
)


def find(path: Path) -> Path:
    """The weights file at a path.

    The path may be a folder with exactly one such file, or with the parts that an index lists. Raises WeightsError.
    """
    if path.is_dir():
        sharded = sorted(p for p in path.iterdir() if p.name.endswith(SHARDED))
        if len(sharded) == 1:
            return sharded[0]
        candidates = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
        if len(candidates) != 1:
            listed = ", ".join(p.name for p in candidates) or "none"
            raise WeightsError(f"{str(path)!r} must hold one .npz or .safetensors file, it holds {listed}")
        return candidates[0]
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*") if p.suffix in SUFFIXES)
        hint = f"; its folder has {', '.join(near)}" if near else ""
        raise WeightsError(f"weights {str(path)!r} not found{hint}")
    return path


def tensors(file: Path) -> dict[str, np.ndarray]:
    """All tensors of a file by name, floating-point ones as float32.

    Raises WeightsError, also for a pickle.
    """
    if file.name.endswith(SHARDED):
        return _parts(file)
    with open(file, "rb") as stream:
        start = stream.read(64)
    try:
        if start[8:9] != b"{":  # a safetensors file begins with the length of its header (8 bytes) and "{"
            if start[:2] == b"PK" and file.suffix == ".npz":
                with np.load(file, allow_pickle=False) as saved:
                    return {k.removeprefix("params/"): _float32(saved[k]) for k in saved.files}
            if start[:2] == b"PK" or start[:1] == b"\x80":
                raise WeightsError(PICKLE.format(path=str(file)))
        from safetensors.numpy import load_file

        return {k: _float32(v) for k, v in load_file(file).items()}
    except WeightsError:
        raise
    except Exception as error:  # readers raise errors of any kind for corrupted files
        raise WeightsError(
            f"{str(file)!r} cannot be read as .npz or safetensors: {type(error).__name__}: {error}"
        ) from None


def _parts(index: Path) -> dict[str, np.ndarray]:
    """The tensors of the files that an index lists, each from the file where it should be."""
    try:
        places = {str(k): str(v) for k, v in json.loads(index.read_text())["weight_map"].items()}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise WeightsError(f"{str(index)!r} cannot be read: {type(error).__name__}: {error}") from None
    names = sorted(set(places.values()))
    outside = [n for n in names if Path(n).name != n]
    absent = [n for n in names if n not in outside and not (index.parent / n).is_file()]
    if outside or absent:
        raise WeightsError(
            f"{str(index)!r} lists {', '.join(outside or absent)}, not found beside it: copy all its files"
        )
    weights = {name: tensors(index.parent / name) for name in names}
    missing = [k for k, name in places.items() if k not in weights[name]]
    if missing:
        raise WeightsError(
            f"{str(index)!r}: {missing[0]} is not in {places[missing[0]]}: the files do not belong together"
        )
    return {k: weights[name][k] for k, name in places.items()}


def _float32(tensor: np.ndarray) -> np.ndarray:
    """A floating-point tensor as float32, before sums are taken; another one unchanged."""
    if tensor.dtype.kind != "f" and not tensor.dtype.name.startswith(("bfloat", "float")):
        return tensor
    with np.errstate(over="ignore"):
        return tensor.astype(np.float32)


def metadata(folder: Path) -> dict[str, Any]:
    """The contents of config.json and preprocessor_config.json beside the weights, merged.

    Raises WeightsError.
    """
    merged: dict[str, Any] = {}
    for file in (folder / "config.json", folder / "preprocessor_config.json"):
        if not file.is_file():
            continue
        try:
            values = json.loads(file.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise WeightsError(f"{str(file)!r} beside the weights cannot be read: {error}") from None
        nested = values.get("pretrained_cfg") if isinstance(values, dict) else 0  # timm
        if nested is not None and not isinstance(nested, dict):
            raise WeightsError(f"{str(file)!r} must be a JSON object as Hugging Face and timm write it")
        merged |= values | (nested or {})
    return merged


def preprocessing(family: Family, metadata: Metadata) -> Family:
    """The family with the preprocessing that the JSON files beside the weights require.

    Raises WeightsError where they require something that tcq does not support.
    """
    mean, std = (_three_numbers(metadata, f"image_{k}") or _three_numbers(metadata, k) for k in ("mean", "std"))
    family = family._replace(mean=mean or family.mean, std=std or family.std)
    interpolation = metadata.get("resample", metadata.get("interpolation"))
    if interpolation is not None:
        if not isinstance(interpolation, int | str) or interpolation not in INTERPOLATIONS:
            raise WeightsError(
                f"the JSON beside the weights requires the interpolation {interpolation!r}: must be bilinear or bicubic"
            )
        family = family._replace(interpolation=INTERPOLATIONS[interpolation])
    if metadata.get("do_resize"):
        return _hugging_face_resize(family, metadata)
    share = number(metadata, "crop_pct", 0.01, 1)  # timm
    if share is None:
        return family
    mode = metadata.get("crop_mode") or "center"
    if mode not in ("center", "squash") or (mode == "squash" and share < 1):
        raise WeightsError(
            f"the JSON beside the weights requires crop_mode {mode!r} with crop_pct {share}, which tcq does not support"
        )
    return family._replace(resize="crop" if mode == "center" else "squash", crop_share=share)


def _hugging_face_resize(family: Family, metadata: Metadata) -> Family:
    size = metadata.get("size")
    edge = number(size, "shortest_edge", 1, 1e5) if isinstance(size, dict) else number(metadata, "size", 1, 1e5)
    if metadata.get("do_center_crop"):
        crop = metadata.get("crop_size")
        crop_side = number(crop, "height", 1, 1e5) if isinstance(crop, dict) else number(metadata, "crop_size", 1, 1e5)
        if edge is None or crop_side is None:
            raise WeightsError(
                f"the JSON beside the weights requires a crop of {crop} from {size}, which tcq does not support"
            )
        return family._replace(resize="crop", crop_share=min(1.0, crop_side / edge))
    keeps_shape = isinstance(size, dict) and edge is not None
    return family._replace(resize="crop" if keeps_shape else "squash", crop_share=1.0)


def _three_numbers(metadata: Metadata, key: str) -> tuple[float, float, float] | None:
    values = metadata.get(key)
    if values is None:
        return None
    low = 1e-6 if key.endswith("std") else -1e6
    numbers = [number({key: v}, key, low, 1e6) for v in values] if isinstance(values, list) else []
    if len(numbers) != 3 or None in numbers:
        raise WeightsError(f"the JSON beside the weights: {key} {values!r} must be three numbers")
    a, b, c = (float(x) for x in numbers if x is not None)
    return a, b, c
