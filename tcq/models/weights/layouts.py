"""How published checkpoints name and shape what our backbones call otherwise: one mapping for each format.

A mapping gives flat names of our variables, such as "params/block_0/mlp_in/kernel". It asks for every tensor that a model of
that kind has; what is left over afterwards may only be a classifier.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from tcq.models import resnet

HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Tensors = Mapping[str, np.ndarray]
Facts = Mapping[str, Any]  # of the JSON files beside the weights


class WeightsError(ValueError):
    """These weights cannot be used; the message says what was found, what was expected, and what to do."""


class OtherShape(Exception):
    """A tensor is not of the shape that the others imply."""

    def __init__(self, key: str, want: tuple[int, ...]) -> None:
        super().__init__(key, want)
        self.key, self.want = key, want


class Family(NamedTuple):
    """How the makers of a format build a model and feed it images."""

    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: str  # crop | squash
    interpolation: str
    crop_share: float
    positions: str  # rule for other sizes, see `positions.resample`; "" where there are none
    left_out: str  # names of tensors that belong to a head and not to the backbone


class Layout(NamedTuple):
    """A format: how to know it, what model it holds (as keys of `config.model`), and how its tensors become ours."""

    family: Family
    looks_like: Callable[[Tensors], bool]
    model: Callable[[Tensors, Facts], dict[str, Any]]
    convert: Callable[[Tensors, dict[str, Any]], dict[str, np.ndarray]]


# Google ------------------------------------------------------------------------------------------------------------


def _google_model(t: Tensors, _: Facts) -> dict[str, Any]:
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
        ours, theirs = f"block_{i}", f"Transformer/encoderblock_{i}"
        for k in ("scale", "bias"):
            out[f"{ours}/norm_1/{k}"] = t[f"{theirs}/LayerNorm_0/{k}"]
            out[f"{ours}/norm_2/{k}"] = t[f"{theirs}/LayerNorm_2/{k}"]
        for k in ("kernel", "bias"):
            for part in ("query", "key", "value", "out"):
                out[f"{ours}/attention/{part}/{k}"] = t[f"{theirs}/MultiHeadDotProductAttention_1/{part}/{k}"]
            out[f"{ours}/mlp_in/{k}"] = t[f"{theirs}/MlpBlock_3/Dense_0/{k}"]
            out[f"{ours}/mlp_out/{k}"] = t[f"{theirs}/MlpBlock_3/Dense_1/{k}"]
    return _nest("params", out)


# PyTorch layouts ---------------------------------------------------------------------------------------------------


def _linear(t: Tensors, name: str, inputs: int, outputs: int) -> dict[str, np.ndarray]:
    kernel, bias = _tensor(t, f"{name}.weight", (outputs, inputs)), _tensor(t, f"{name}.bias", (outputs,))
    return {"kernel": kernel.T, "bias": bias}


def _norm(t: Tensors, name: str) -> dict[str, np.ndarray]:
    return {"scale": t[f"{name}.weight"], "bias": t[f"{name}.bias"]}


def _attention(parts: Mapping[str, Tensors], out: Tensors, heads: int) -> dict[str, np.ndarray]:
    """Query, key and value as (W, heads, W / heads), the output projection as (heads, W / heads, W)."""
    width = out["bias"].shape[0]
    result: dict[str, np.ndarray] = {}
    for name, part in parts.items():
        result[f"{name}/kernel"] = part["kernel"].reshape(width, heads, -1)
        result[f"{name}/bias"] = part["bias"].reshape(heads, -1)
    return result | {"out/kernel": out["kernel"].reshape(heads, -1, width), "out/bias": out["bias"]}


def _positions_and_cls(t: Tensors, positions: str, cls: str, width: int) -> dict[str, np.ndarray]:
    """Ours adds the class token's position to the token once and for all."""
    token, places = _tensor(t, cls, (1, 1, width)), t[positions]
    if places.ndim != 3 or places.shape[0] != 1 or places.shape[2] != width:
        raise OtherShape(positions, (1, places.shape[1] if places.ndim == 3 else 1, width))
    if _is_square(places.shape[1]):  # timm with no_embed_class
        return {"positions": places, "cls": token}
    return {"positions": places[:, 1:], "cls": token + places[:, :1]}


def _tensor(t: Tensors, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """One that is reshaped or added on the way, which could hide another shape."""
    if t[key].shape != shape:
        raise OtherShape(key, shape)
    return t[key]


def _shape(t: Tensors, key: str, ndim: int) -> tuple[int, ...]:
    """The shape of a tensor that the size of the model is read from."""
    found = t[key].shape
    if len(found) != ndim or not all(found):
        raise WeightsError(f"{key} has shape {found}, {ndim} dimensions were expected")
    return found


def _nest(prefix: str, tensors: Tensors) -> dict[str, np.ndarray]:
    return {f"{prefix}/{k}": v for k, v in tensors.items()}


def _hf_model(t: Tensors, facts: Facts) -> dict[str, Any]:
    p = _hf_prefix(t)
    width, _, patch, _ = _shape(t, f"{p}embeddings.patch_embeddings.projection.weight", 4)
    dinov2 = f"{p}encoder.layer.0.layer_scale1.lambda1" in t
    mlp = f"{p}encoder.layer.0.mlp.fc1.bias" if dinov2 else f"{p}encoder.layer.0.intermediate.dense.bias"
    registers = f"{p}embeddings.register_tokens"
    return _vit(
        width=width,
        depth=_count(t, re.escape(p) + r"encoder\.layer\.([0-9]+)\."),
        heads=_heads(width, facts),
        patch=patch,
        mlp_ratio=_shape(t, mlp, 1)[0] / width,
        registers=_shape(t, registers, 3)[1] if registers in t else 0,
        layer_scale=dinov2,
        gelu=_gelu(facts.get("hidden_act", "gelu")),
        norm_eps=number(facts, "layer_norm_eps", 0, 1) or (1e-6 if dinov2 else 1e-12),
    )


def _hf_prefix(t: Tensors) -> str:
    """ "", or the name of the backbone inside a model with a head, such as "vit."."""
    ending = "embeddings.patch_embeddings.projection.weight"
    found = next((k for k in t if k.endswith(ending)), None)
    if found is None:
        raise KeyError(ending)
    return found.removesuffix(ending)


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
        ours, theirs = f"block_{i}", f"{p}encoder.layer.{i}"
        parts = {k: _linear(t, f"{theirs}.attention.attention.{k}", W, W) for k in ("query", "key", "value")}
        merged = _linear(t, f"{theirs}.attention.output.dense", W, W)
        out |= _nest(f"{ours}/attention", _attention(parts, merged, model["heads"]))
        out |= _nest(f"{ours}/norm_1", _norm(t, f"{theirs}.{norms[0]}"))
        out |= _nest(f"{ours}/norm_2", _norm(t, f"{theirs}.{norms[1]}"))
        out |= _nest(f"{ours}/mlp_in", _linear(t, f"{theirs}.{dense[0]}", W, mlp))
        out |= _nest(f"{ours}/mlp_out", _linear(t, f"{theirs}.{dense[1]}", mlp, W))
        for name in ("1", "2") if model["layer_scale"] else ():
            out[f"{ours}/scale_{name}"] = t[f"{theirs}.layer_scale{name}.lambda1"]
    return _nest("params", out)


def _timm_model(t: Tensors, facts: Facts) -> dict[str, Any]:
    width, _, patch, _ = _shape(t, "patch_embed.proj.weight", 4)
    told = facts.get("model_args") or {}
    if not isinstance(told, dict):
        raise WeightsError(f"config.json: model_args is {told!r}, a JSON object was expected")
    return _vit(
        width=width,
        depth=_count(t, r"blocks\.([0-9]+)\."),
        heads=_heads(width, {"num_attention_heads": told.get("num_heads"), **facts}),
        patch=patch,
        mlp_ratio=_shape(t, "blocks.0.mlp.fc1.bias", 1)[0] / width,
        registers=_shape(t, "reg_token", 3)[1] if "reg_token" in t else 0,
        layer_scale="blocks.0.ls1.gamma" in t,
        gelu=_gelu(told.get("act_layer", "gelu")),
        norm_eps=1e-6,
    )


def _timm(t: Tensors, model: dict[str, Any]) -> dict[str, np.ndarray]:
    W, mlp = model["width"], round(model["mlp_ratio"] * model["width"])
    out = _embed(t, "patch_embed.proj") | _nest("norm", _norm(t, "norm"))
    out |= _positions_and_cls(t, "pos_embed", "cls_token", W)
    if model["registers"]:
        out["registers"] = t["reg_token"]
    for i in range(model["depth"]):
        ours, theirs = f"block_{i}", f"blocks.{i}"
        fused = _linear(t, f"{theirs}.attn.qkv", W, 3 * W)
        kernels, biases = np.split(fused["kernel"], 3, axis=1), np.split(fused["bias"], 3)
        parts = {
            name: {"kernel": kernel, "bias": bias}
            for name, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True)
        }
        merged = _linear(t, f"{theirs}.attn.proj", W, W)
        out |= _nest(f"{ours}/attention", _attention(parts, merged, model["heads"]))
        out |= _nest(f"{ours}/mlp_in", _linear(t, f"{theirs}.mlp.fc1", W, mlp))
        out |= _nest(f"{ours}/mlp_out", _linear(t, f"{theirs}.mlp.fc2", mlp, W))
        for name in ("1", "2"):
            out |= _nest(f"{ours}/norm_{name}", _norm(t, f"{theirs}.norm{name}"))
            if model["layer_scale"]:
                out[f"{ours}/scale_{name}"] = t[f"{theirs}.ls{name}.gamma"]
    return _nest("params", out)


def _embed(t: Tensors, name: str) -> dict[str, np.ndarray]:
    return {"embed/kernel": t[f"{name}.weight"].transpose(2, 3, 1, 0), "embed/bias": t[f"{name}.bias"]}


def _count(t: Tensors, pattern: str) -> int:
    """How many blocks there are; a gap in their numbers shows as tensors that are missing."""
    return len({int(m[1]) for m in (re.match(pattern, k) for k in t) if m and len(m[1]) < 9})


def _is_square(n: int) -> bool:
    return round(n**0.5) ** 2 == n


def _vit(**found: Any) -> dict[str, Any]:
    """The keys of `config.model` that weights of a ViT decide."""
    return {
        "name": "",
        "pooling": "cls",
        "positions": "learned",
        "class_token": True,
        "registers": 0,
        "layer_scale": False,
        **found,
    }


def number(facts: Facts, key: str, low: float, high: float) -> float | None:
    """A number of the JSON files, None where it is not told. Raises WeightsError if it is none, or outside the limits."""
    value = facts.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise WeightsError(f"config.json: {key} is {value!r}, a number from {low:g} to {high:g} was expected")
    return float(value)


def _heads(width: int, facts: Facts) -> int:
    told = number(facts, "num_attention_heads", 1, width)
    heads = told or {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}.get(width)
    if heads is None or heads % 1 or width % heads:
        raise WeightsError(
            f"how many attention heads share the width of {width} is {'not told' if heads is None else f'told as {heads:g}'}: "
            f'write {{"num_attention_heads": n}} into a config.json beside the weights'
        )
    return int(heads)


def _gelu(name: Any) -> str:
    known = {"gelu": "erf", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_tanh": "tanh"}
    if str(name) not in known:
        raise WeightsError(f"the weights want the activation {name!r}; tcq has {', '.join(known)}")
    return known[str(name)]


# ResNets: torchvision and timm name them alike --------------------------------------------------------------------


def _resnet_model(t: Tensors, facts: Facts) -> dict[str, Any]:
    kind = facts.get("architecture")  # timm's variants may compute something else with the same tensors
    if kind is not None and not re.fullmatch(r"(tv_)?resnet(18|34|50|101)(\..*)?", str(kind)):
        raise WeightsError(f"config.json: the architecture {kind!r} is none of {', '.join(resnet.NAMED)}")
    stages = tuple(_count(t, rf"layer{i}\.([0-9]+)\.") for i in range(1, 5))
    found = resnet.Size(stages, "layer1.0.conv3.weight" in t)
    names = [name for name, size in resnet.NAMED.items() if size == found]
    if not names:
        raise WeightsError(f"a ResNet of {found} is none of {', '.join(resnet.NAMED)}")
    return {"name": names[0], "stem": "cifar" if _shape(t, "conv1.weight", 4)[2] == 3 else "imagenet"}


def _resnet(t: Tensors, model: dict[str, Any]) -> dict[str, np.ndarray]:
    size = resnet.NAMED[model["name"]]
    out = _conv(t, "stem", "conv1") | _batch_norm(t, "stem_norm", "bn1")
    for stage, count in enumerate(size.stages):
        for i in range(count):
            ours, theirs = f"stage_{stage}_block_{i}", f"layer{stage + 1}.{i}"
            for n in range(1, 4 if size.bottleneck else 3):
                out |= _conv(t, f"{ours}/conv_{n}", f"{theirs}.conv{n}")
                out |= _batch_norm(t, f"{ours}/norm_{n}", f"{theirs}.bn{n}")
            if f"{theirs}.downsample.0.weight" in t:
                out |= _conv(t, f"{ours}/shortcut", f"{theirs}.downsample.0")
                out |= _batch_norm(t, f"{ours}/shortcut_norm", f"{theirs}.downsample.1")
    return out


def _conv(t: Tensors, ours: str, theirs: str) -> dict[str, np.ndarray]:
    return {f"params/{ours}/kernel": t[f"{theirs}.weight"].transpose(2, 3, 1, 0)}


def _batch_norm(t: Tensors, ours: str, theirs: str) -> dict[str, np.ndarray]:
    return {
        f"params/{ours}/scale": t[f"{theirs}.weight"],
        f"params/{ours}/bias": t[f"{theirs}.bias"],
        f"batch_stats/{ours}/mean": t[f"{theirs}.running_mean"],
        f"batch_stats/{ours}/var": t[f"{theirs}.running_var"],
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
