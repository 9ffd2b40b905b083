"""How published checkpoints name and shape the variables of our backbones.

There is one mapping for each format. A mapping returns our variables under flat names such as
"params/block_0/mlp_in/kernel". It looks up every tensor that a model of its kind has; the tensors that remain may only
be a head.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from tcq.models import resnet

HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Tensors = Mapping[str, np.ndarray]
Metadata = Mapping[str, Any]  # of the JSON files beside the weights


class WeightsError(ValueError):
    """These weights cannot be used.

    The message says what they hold, what was expected, and what to do.
    """


class ShapeError(Exception):
    """A tensor does not have the shape that the other tensors imply."""

    def __init__(self, key: str, expected: tuple[int, ...]) -> None:
        super().__init__(key, expected)
        self.key, self.expected = key, expected


class Family(NamedTuple):
    """How the authors of a format preprocess images and resample positions."""

    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: str  # crop | squash
    interpolation: str
    crop_share: float
    positions: str  # rule for other image sizes, see `positions.resample`; "" if there are no positions
    head: str  # regular expression for the names of tensors that do not belong to the backbone


class Layout(NamedTuple):
    """A format: how to recognize it, its model, and the mapping of its tensors to ours.

    The model is given as keys of `config.model`.
    """

    family: Family
    matches: Callable[[Tensors], bool]
    model: Callable[[Tensors, Metadata], dict[str, Any]]
    convert: Callable[[Tensors, dict[str, Any]], dict[str, np.ndarray]]


# Google ------------------------------------------------------------------------------------------------------------


def _google_model(t: Tensors, _: Metadata) -> dict[str, Any]:
    width, heads, _each = _shape(t, "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel", 3)
    return _vit(
        width=width,
        depth=_count(t, r"Transformer/encoderblock_([0-9]+)/"),
        heads=heads,
        patch=_shape(t, "embedding/kernel", 4)[0],
        mlp_ratio=_shape(t, "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel", 2)[1] / width,
        gelu="tanh",
        norm_eps=1e-6,
    )


def _google(t: Tensors, model: dict[str, Any]) -> dict[str, np.ndarray]:
    out = {"embed/kernel": t["embedding/kernel"], "embed/bias": t["embedding/bias"]}
    out |= _positions_and_cls(t, "Transformer/posembed_input/pos_embedding", "cls", model["width"])
    out |= {f"norm/{k}": t[f"Transformer/encoder_norm/{k}"] for k in ("scale", "bias")}
    for i in range(model["depth"]):
        target, source = f"block_{i}", f"Transformer/encoderblock_{i}"
        for k in ("scale", "bias"):
            out[f"{target}/norm_1/{k}"] = t[f"{source}/LayerNorm_0/{k}"]
            out[f"{target}/norm_2/{k}"] = t[f"{source}/LayerNorm_2/{k}"]
        for k in ("kernel", "bias"):
            for part in ("query", "key", "value", "out"):
                out[f"{target}/attention/{part}/{k}"] = t[f"{source}/MultiHeadDotProductAttention_1/{part}/{k}"]
            out[f"{target}/mlp_in/{k}"] = t[f"{source}/MlpBlock_3/Dense_0/{k}"]
            out[f"{target}/mlp_out/{k}"] = t[f"{source}/MlpBlock_3/Dense_1/{k}"]
    return _nest("params", out)


# PyTorch layouts ---------------------------------------------------------------------------------------------------


def _linear(t: Tensors, name: str, inputs: int, outputs: int) -> dict[str, np.ndarray]:
    kernel, bias = _tensor(t, f"{name}.weight", (outputs, inputs)), _tensor(t, f"{name}.bias", (outputs,))
    return {"kernel": kernel.T, "bias": bias}


def _norm(t: Tensors, name: str) -> dict[str, np.ndarray]:
    return {"scale": t[f"{name}.weight"], "bias": t[f"{name}.bias"]}


def _attention(parts: Mapping[str, Tensors], out: Tensors, heads: int) -> dict[str, np.ndarray]:
    """Query, key, value as (W, heads, W / heads); output projection as (heads, W / heads, W)."""
    width = out["bias"].shape[0]
    result: dict[str, np.ndarray] = {}
    for name, part in parts.items():
        result[f"{name}/kernel"] = part["kernel"].reshape(width, heads, -1)
        result[f"{name}/bias"] = part["bias"].reshape(heads, -1)
    return result | {"out/kernel": out["kernel"].reshape(heads, -1, width), "out/bias": out["bias"]}


def _positions_and_cls(t: Tensors, positions: str, cls: str, width: int) -> dict[str, np.ndarray]:
    """Positions of the patches, and the class token with its position added to it."""
    token, places = _tensor(t, cls, (1, 1, width)), t[positions]
    if places.ndim != 3 or places.shape[0] != 1 or places.shape[2] != width:
        raise ShapeError(positions, (1, places.shape[1] if places.ndim == 3 else 1, width))
    if _is_square(places.shape[1]):  # timm with no_embed_class
        return {"positions": places, "cls": token}
    return {"positions": places[:, 1:], "cls": token + places[:, :1]}


def _tensor(t: Tensors, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor with its shape checked.

    This is for tensors that are reshaped or added, which could hide another shape.
    """
    if t[key].shape != shape:
        raise ShapeError(key, shape)
    return t[key]


def _shape(t: Tensors, key: str, ndim: int) -> tuple[int, ...]:
    """The shape of a tensor from which the size of the model is read, with `ndim` dimensions."""
    shape = t[key].shape
    if len(shape) != ndim or not all(shape):
        raise WeightsError(f"{key} has shape {shape}, must have {ndim} dimensions")
    return shape


def _nest(prefix: str, tensors: Tensors) -> dict[str, np.ndarray]:
    return {f"{prefix}/{k}": v for k, v in tensors.items()}


def _hf_model(t: Tensors, metadata: Metadata) -> dict[str, Any]:
    p = _hf_prefix(t)
    width, _, patch, _ = _shape(t, f"{p}embeddings.patch_embeddings.projection.weight", 4)
    dinov2 = f"{p}encoder.layer.0.layer_scale1.lambda1" in t
    mlp = f"{p}encoder.layer.0.mlp.fc1.bias" if dinov2 else f"{p}encoder.layer.0.intermediate.dense.bias"
    registers = f"{p}embeddings.register_tokens"
    return _vit(
        width=width,
        depth=_count(t, re.escape(p) + r"encoder\.layer\.([0-9]+)\."),
        heads=_heads(width, metadata),
        patch=patch,
        mlp_ratio=_shape(t, mlp, 1)[0] / width,
        registers=_shape(t, registers, 3)[1] if registers in t else 0,
        layer_scale=dinov2,
        gelu=_gelu(metadata.get("hidden_act", "gelu")),
        norm_eps=number(metadata, "layer_norm_eps", 0, 1) or (1e-6 if dinov2 else 1e-12),
    )


def _hf_prefix(t: Tensors) -> str:
    """The prefix of all names, such as "vit." in a model with a head, or ""."""
    ending = "embeddings.patch_embeddings.projection.weight"
    name = next((k for k in t if k.endswith(ending)), None)
    if name is None:
        raise KeyError(ending)
    return name.removesuffix(ending)


def _hf(t: Tensors, model: dict[str, Any]) -> dict[str, np.ndarray]:
    p = _hf_prefix(t)
    out = _embed(t, f"{p}embeddings.patch_embeddings.projection")
    W, mlp = model["width"], round(model["mlp_ratio"] * model["width"])
    out |= _positions_and_cls(t, f"{p}embeddings.position_embeddings", f"{p}embeddings.cls_token", W)
    if model["registers"]:
        out["registers"] = t[f"{p}embeddings.register_tokens"]
    out |= _nest("norm", _norm(t, f"{p}layernorm"))
    new = f"{p}encoder.layer.0.norm1.weight" in t  # DINOv2's names
    norms = ("norm1", "norm2") if new else ("layernorm_before", "layernorm_after")
    dense = ("mlp.fc1", "mlp.fc2") if new else ("intermediate.dense", "output.dense")
    for i in range(model["depth"]):
        target, source = f"block_{i}", f"{p}encoder.layer.{i}"
        parts = {k: _linear(t, f"{source}.attention.attention.{k}", W, W) for k in ("query", "key", "value")}
        merged = _linear(t, f"{source}.attention.output.dense", W, W)
        out |= _nest(f"{target}/attention", _attention(parts, merged, model["heads"]))
        out |= _nest(f"{target}/norm_1", _norm(t, f"{source}.{norms[0]}"))
        out |= _nest(f"{target}/norm_2", _norm(t, f"{source}.{norms[1]}"))
        out |= _nest(f"{target}/mlp_in", _linear(t, f"{source}.{dense[0]}", W, mlp))
        out |= _nest(f"{target}/mlp_out", _linear(t, f"{source}.{dense[1]}", mlp, W))
        for name in ("1", "2") if model["layer_scale"] else ():
            out[f"{target}/scale_{name}"] = t[f"{source}.layer_scale{name}.lambda1"]
    return _nest("params", out)


def _timm_model(t: Tensors, metadata: Metadata) -> dict[str, Any]:
    width, _, patch, _ = _shape(t, "patch_embed.proj.weight", 4)
    arguments = metadata.get("model_args") or {}
    if not isinstance(arguments, dict):
        raise WeightsError(f"config.json: model_args is {arguments!r}, must be a JSON object")
    return _vit(
        width=width,
        depth=_count(t, r"blocks\.([0-9]+)\."),
        heads=_heads(width, {"num_attention_heads": arguments.get("num_heads"), **metadata}),
        patch=patch,
        mlp_ratio=_shape(t, "blocks.0.mlp.fc1.bias", 1)[0] / width,
        registers=_shape(t, "reg_token", 3)[1] if "reg_token" in t else 0,
        layer_scale="blocks.0.ls1.gamma" in t,
        gelu=_gelu(arguments.get("act_layer", "gelu")),
        norm_eps=1e-6,
    )


def _timm(t: Tensors, model: dict[str, Any]) -> dict[str, np.ndarray]:
    W, mlp = model["width"], round(model["mlp_ratio"] * model["width"])
    out = _embed(t, "patch_embed.proj") | _nest("norm", _norm(t, "norm"))
    out |= _positions_and_cls(t, "pos_embed", "cls_token", W)
    if model["registers"]:
        out["registers"] = t["reg_token"]
    for i in range(model["depth"]):
        target, source = f"block_{i}", f"blocks.{i}"
        fused = _linear(t, f"{source}.attn.qkv", W, 3 * W)
        kernels, biases = np.split(fused["kernel"], 3, axis=1), np.split(fused["bias"], 3)
        parts = {
            name: {"kernel": kernel, "bias": bias}
            for name, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True)
        }
        merged = _linear(t, f"{source}.attn.proj", W, W)
        out |= _nest(f"{target}/attention", _attention(parts, merged, model["heads"]))
        out |= _nest(f"{target}/mlp_in", _linear(t, f"{source}.mlp.fc1", W, mlp))
        out |= _nest(f"{target}/mlp_out", _linear(t, f"{source}.mlp.fc2", mlp, W))
        for name in ("1", "2"):
            out |= _nest(f"{target}/norm_{name}", _norm(t, f"{source}.norm{name}"))
            if model["layer_scale"]:
                out[f"{target}/scale_{name}"] = t[f"{source}.ls{name}.gamma"]
    return _nest("params", out)


def _is_original_dinov2(t: Tensors) -> bool:
    return "blocks.0.ls1.gamma" in t and "mask_token" in t and "blocks.0.attn.qkv.weight" in t


def _embed(t: Tensors, name: str) -> dict[str, np.ndarray]:
    return {"embed/kernel": t[f"{name}.weight"].transpose(2, 3, 1, 0), "embed/bias": t[f"{name}.bias"]}


def _count(t: Tensors, pattern: str) -> int:
    """The number of blocks; a gap in their numbering shows up as missing tensors."""
    return len({int(m[1]) for m in (re.match(pattern, k) for k in t) if m and len(m[1]) < 9})


def _is_square(n: int) -> bool:
    return round(n**0.5) ** 2 == n


def _vit(**keys: Any) -> dict[str, Any]:
    """The keys of `config.model` that the weights of a ViT decide."""
    return {
        "name": "",
        "pooling": "cls",
        "positions": "learned",
        "class_token": True,
        "registers": 0,
        "layer_scale": False,
        **keys,
    }


def number(metadata: Metadata, key: str, low: float, high: float) -> float | None:
    """A number of the JSON files, or None if the key is absent.

    Raises WeightsError for another type or range.
    """
    value = metadata.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise WeightsError(f"config.json: {key} is {value!r}, must be a number from {low:g} to {high:g}")
    return float(value)


def _heads(width: int, metadata: Metadata) -> int:
    num_heads = number(metadata, "num_attention_heads", 1, width)
    heads = num_heads or {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}.get(width)
    if heads is None or heads % 1 or width % heads:
        problem = "is unknown" if heads is None else f"cannot be {heads:g}"
        raise WeightsError(
            f"the number of attention heads for width {width} {problem}: "
            f'write {{"num_attention_heads": n}} to a config.json beside the weights'
        )
    return int(heads)


def _gelu(name: Any) -> str:
    known = {"gelu": "erf", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_tanh": "tanh"}
    if str(name) not in known:
        raise WeightsError(f"the weights require the activation {name!r}; tcq supports {', '.join(known)}")
    return known[str(name)]


# ResNets: torchvision and timm use the same names ------------------------------------------------------------------


def _resnet_model(t: Tensors, metadata: Metadata) -> dict[str, Any]:
    kind = metadata.get("architecture")  # timm's variants may compute something else with the same tensors
    if kind is not None and not re.fullmatch(r"(tv_)?resnet(18|34|50|101)(\..*)?", str(kind)):
        raise WeightsError(f"config.json: architecture {kind!r} is unknown: must be one of {', '.join(resnet.NAMED)}")
    stages = tuple(_count(t, rf"layer{i}\.([0-9]+)\.") for i in range(1, 5))
    size = resnet.Size(stages, "layer1.0.conv3.weight" in t)
    names = [name for name, named in resnet.NAMED.items() if named == size]
    if not names:
        raise WeightsError(f"a ResNet of {size} is unknown: must be one of {', '.join(resnet.NAMED)}")
    return {"name": names[0], "stem": "cifar" if _shape(t, "conv1.weight", 4)[2] == 3 else "imagenet"}


def _resnet(t: Tensors, model: dict[str, Any]) -> dict[str, np.ndarray]:
    size = resnet.NAMED[model["name"]]
    out = _conv(t, "stem", "conv1") | _batch_norm(t, "stem_norm", "bn1")
    for stage, count in enumerate(size.stages):
        for i in range(count):
            target, source = f"stage_{stage}_block_{i}", f"layer{stage + 1}.{i}"
            for n in range(1, 4 if size.bottleneck else 3):
                out |= _conv(t, f"{target}/conv_{n}", f"{source}.conv{n}")
                out |= _batch_norm(t, f"{target}/norm_{n}", f"{source}.bn{n}")
            if f"{source}.downsample.0.weight" in t:
                out |= _conv(t, f"{target}/shortcut", f"{source}.downsample.0")
                out |= _batch_norm(t, f"{target}/shortcut_norm", f"{source}.downsample.1")
    return out


def _conv(t: Tensors, target: str, source: str) -> dict[str, np.ndarray]:
    return {f"params/{target}/kernel": t[f"{source}.weight"].transpose(2, 3, 1, 0)}


def _batch_norm(t: Tensors, target: str, source: str) -> dict[str, np.ndarray]:
    return {
        f"params/{target}/scale": t[f"{source}.weight"],
        f"params/{target}/bias": t[f"{source}.bias"],
        f"batch_stats/{target}/mean": t[f"{source}.running_mean"],
        f"batch_stats/{target}/var": t[f"{source}.running_var"],
    }


_HF_HEADS = r"(.*\.)?(pooler\.dense|classifier|head)\..*|.*embeddings\.mask_token"
LAYOUTS = (
    Layout(
        Family("Google ViT", *HALF, "squash", "bilinear", 1.0, "linear", r"(head|pre_logits)/.*"),
        lambda t: "Transformer/encoder_norm/scale" in t,
        _google_model,
        _google,
    ),
    Layout(
        Family(
            "Hugging Face DINOv2 with registers",
            *IMAGENET,
            "crop",
            "bicubic",
            224 / 256,
            "bicubic_antialias",
            _HF_HEADS,
        ),
        lambda t: any(k.endswith("embeddings.register_tokens") for k in t),
        _hf_model,
        _hf,
    ),
    Layout(
        Family("Hugging Face DINOv2", *IMAGENET, "crop", "bicubic", 224 / 256, "bicubic", _HF_HEADS),
        lambda t: any(k.endswith("encoder.layer.0.layer_scale1.lambda1") for k in t),
        _hf_model,
        _hf,
    ),
    Layout(
        Family("Hugging Face ViT", *HALF, "squash", "bilinear", 1.0, "bicubic", _HF_HEADS),
        lambda t: any(k.endswith("encoder.layer.0.layernorm_before.weight") for k in t),
        _hf_model,
        _hf,
    ),
    Layout(
        Family(
            "original DINOv2 with registers",
            *IMAGENET,
            "crop",
            "bicubic",
            224 / 256,
            "bicubic_antialias",
            r"head\..*|mask_token",
        ),
        lambda t: _is_original_dinov2(t) and "reg_token" in t,
        _timm_model,
        _timm,
    ),
    Layout(
        Family("original DINOv2", *IMAGENET, "crop", "bicubic", 224 / 256, "bicubic", r"head\..*|mask_token"),
        lambda t: _is_original_dinov2(t),
        _timm_model,
        _timm,
    ),
    Layout(
        Family(
            "original MAE", *IMAGENET, "crop", "bicubic", 224 / 256, "bicubic", r"(head|decoder_\w+)(\..*)?|mask_token"
        ),
        lambda t: "decoder_pos_embed" in t and "blocks.0.attn.qkv.weight" in t,
        _timm_model,
        _timm,
    ),
    Layout(
        Family("timm ViT", *IMAGENET, "crop", "bicubic", 0.9, "bicubic_antialias", r"(head|fc_norm|pre_logits)\..*"),
        lambda t: "blocks.0.attn.qkv.weight" in t and "cls_token" in t,
        _timm_model,
        _timm,
    ),
    Layout(
        Family("ResNet", *IMAGENET, "crop", "bilinear", 224 / 256, "", r"fc\..*|.*num_batches_tracked"),
        lambda t: "layer4.0.conv1.weight" in t and "bn1.running_mean" in t,
        _resnet_model,
        _resnet,
    ),
)
