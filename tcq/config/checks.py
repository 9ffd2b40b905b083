"""The values derived from a config, and what must hold before any device works: every refusal carries its numbers."""

import difflib
from collections.abc import Iterable, Iterator
from math import log2
from typing import Any

from ml_collections import ConfigDict

from tcq import losses, metrics, quantizer, ranking
from tcq.data import images, protocols
from tcq.losses import _blocked as anchors
from tcq.models import resnet, vit

OPTIMIZERS = ("adamw", "lars", "sgd")
DTYPES = ("float32", "bfloat16")
RAMPS = ("linear", "cosine")
INITS = ("kmeans", "data", "random")


class ConfigError(ValueError):
    """The config cannot work; the message says what is wrong, the values, and what to do."""


def bits(config: ConfigDict) -> int:
    """Bits per image: M * log2(K)."""
    return config.quantizer.num_codebooks * int(log2(config.quantizer.num_codewords))


def clip_count(clip: int | float, batch_size: int, *, queue: int = 0) -> int:
    """`loss.clip` as a count: an integer is one already, a fraction is taken of the 2B - 2 negatives of the global batch
    and those of a queue, and floored."""
    return int(clip * (2 * batch_size - 2 + queue)) if isinstance(clip, float) else clip


def total_steps(config: ConfigDict, num_train: int) -> int:
    """Steps of the run: `train.total_steps`, or `train.total_epochs` times the images over the batch, rounded up."""
    if config.train.total_steps:
        return config.train.total_steps
    return max(1, -int(-config.train.total_epochs * num_train // config.data.batch_size))


def check(config: ConfigDict, base: ConfigDict) -> None:
    """Raises ConfigError, listing every unknown key, wrong type, and value that does not fit the others."""
    problems = _type_problems(config, base) or list(_value_problems(config))
    _raise(problems)


def check_types(config: ConfigDict, base: ConfigDict) -> None:
    """Raises ConfigError, listing every unknown key and wrong type."""
    _raise(_type_problems(config, base))


def check_run(
    config: ConfigDict, *, num_devices: int, num_train: int, num_validation: int, platform: str = "cpu"
) -> None:
    """Raises ConfigError where the config does not fit the devices or the images that were found."""
    d, steps = config.data, total_steps(config, num_train)
    problems = []
    if d.batch_size % num_devices:
        near = [
            n for n in (d.batch_size // num_devices * num_devices, -(-d.batch_size // num_devices) * num_devices) if n
        ]
        problems.append(
            f"data.batch_size {d.batch_size} is not divisible by the {num_devices} devices: "
            f"use {' or '.join(str(n) for n in near)}"
        )
    elif d.batch_size // num_devices % config.train.microbatches:
        problems.append(
            f"train.microbatches {config.train.microbatches} does not divide the {d.batch_size // num_devices} images of "
            f"each device (data.batch_size {d.batch_size} on {num_devices})"
        )
    if d.batch_size > num_train:
        problems.append(
            f"data.batch_size {d.batch_size} is above the {num_train:,} training images ({num_validation:,} more are held "
            f"out for validation): an image would be its own negative; use at most {num_train // num_devices * num_devices}"
        )
    if (
        config.quantizer.init == "kmeans"
        and min(config.quantizer.init_images, num_train) < config.quantizer.num_codewords
    ):
        problems.append(
            f"quantizer.init kmeans cannot make {config.quantizer.num_codewords} codewords of "
            f"{min(config.quantizer.init_images, num_train)} images: use quantizer.init=data or fewer codewords"
        )
    if config.optim.warmup_steps >= steps:
        problems.append(f"optim.warmup_steps {config.optim.warmup_steps} must be below the {steps} steps of the run")
    _raise(problems)


def _value_problems(c: ConfigDict) -> Iterator[str]:
    d, m, q, loss, o, t = c.data, c.model, c.quantizer, c.loss, c.optim, c.train
    if not d.source:
        yield "data.source is not set: use digits, tfds:<name> or folder:<path>"
    choices = {
        "data.protocol": (d.protocol, tuple(protocols.PROTOCOLS)),
        "data.resize": (d.resize, images.RESIZES),
        "data.interpolation": (d.interpolation, tuple(images.INTERPOLATIONS)),
        "model.name": (m.name, ("", *vit.NAMED, *resnet.NAMED)),
        "model.stem": (m.stem, resnet.STEMS),
        "model.attention": (m.attention, vit.ATTENTIONS),
        "model.pooling": (m.pooling, vit.POOLINGS),
        "model.positions": (m.positions, vit.POSITIONS),
        "model.dtype": (m.dtype, DTYPES),
        "model.gelu": (m.gelu, vit.GELUS),
        "quantizer.metric": (q.metric, quantizer.METRICS),
        "quantizer.init": (q.init, INITS),
        "loss.pairing": (loss.pairing, losses.PAIRINGS),
        "loss.clip_ramp": (loss.clip_ramp, RAMPS),
        "loss.gather": (loss.gather, anchors.GATHERS),
        "optim.name": (o.name, OPTIMIZERS),
        "eval.score": (c.eval.score, ranking.METRICS),
        "eval.normalize": (c.eval.normalize, ("auto", *ranking.NORMALIZE)),
        "eval.ties": (c.eval.ties, metrics.TIES),
        "eval.denominator": (c.eval.denominator, metrics.DENOMINATORS),
        "eval.empty": (c.eval.empty, metrics.EMPTY),
    }
    for key, (value, known) in choices.items():
        if value not in known:
            yield f"{key} {value!r} is unknown: use one of {', '.join(repr(k) for k in known)}"
    flat = flatten(c)
    for key, low, high in _RANGES:
        if not low <= flat[key] <= high:
            limits = f"at least {low}" if high == float("inf") else f"from {low} to {high}"
            yield f"{key} {flat[key]} must be {limits}"
    for key in ("quantizer.scale", "loss.temperature", "optim.learning_rate", "optim.layer_decay", "model.mlp_ratio"):
        if not 0 < flat[key] < float("inf"):
            yield f"{key} {flat[key]} must be above 0"
    for key in (
        "data.query",
        "data.validation",
        "data.augment.crop",
        "model.dropout",
        "model.drop_path",
        "loss.debias",
    ):
        if not 0 <= flat[key] < 1:
            yield f"{key} {flat[key]} must be in [0, 1)"
    (width, depth, heads), patch = vit.NAMED.get(m.name, (vit.Size(m.width, m.depth, m.heads), m.patch))
    if m.name not in resnet.NAMED:
        if patch > 0 and d.image_size % patch:
            yield (
                f"data.image_size {d.image_size} is not divisible by {'the patch of ' + m.name if m.name else 'model.patch'} {patch}: "
                f"use for example {max(round(d.image_size / patch), 1) * patch}"
            )
        if heads > 0 and width % heads:
            yield f"model.width {width} is not divisible by model.heads {heads}"
        if m.positions == "sincos2d" and width % 4:
            yield f"model.width {width} is not divisible by 4, as model.positions sincos2d needs"
        if o.frozen_blocks > depth:
            yield f"optim.frozen_blocks {o.frozen_blocks} is above the {depth} blocks of the backbone; -1 is all of it"
        if m.width > 0 and m.mlp_ratio > 0 and round(m.mlp_ratio * width) < 1:
            yield f"model.mlp_ratio {m.mlp_ratio} leaves the MLP no hidden unit"
        if m.attention == "cudnn" and m.dtype != "bfloat16":
            yield "model.attention cudnn needs model.dtype bfloat16"
    else:
        blocks = sum(resnet.NAMED[m.name].stages)
        if o.frozen_blocks > blocks:
            yield f"optim.frozen_blocks {o.frozen_blocks} is above the {blocks} blocks of {m.name}; -1 is all of it"
        if m.dropout or m.drop_path:
            yield f"model.dropout {m.dropout} and model.drop_path {m.drop_path} are for ViTs: {m.name} has none, set them to 0"
        if t.microbatches > 1 and o.frozen_blocks >= 0:
            yield (
                f"train.microbatches {t.microbatches}: the batch statistics of {m.name} would be those of a piece of the batch; "
                f"use a ViT, or freeze the backbone (optim.frozen_blocks=-1)"
            )
        if m.scan:
            yield f"model.scan is for ViTs, whose blocks are alike; those of {m.name} are not"
    for key, low in (("mean", -_INFINITY), ("std", 0.0)):
        values = m[key]
        if len(values) != 3 or not all(isinstance(x, int | float) and low < x < _INFINITY for x in values):
            yield f"model.{key} {values} must be three finite numbers{', above 0' if key == 'std' else ''}"
    k = q.num_codewords
    if k < 2 or k > quantizer.MAX_CODEWORDS or k & (k - 1):
        near = 2 ** min(max(round(log2(max(k, 2))), 1), 16)
        yield f"quantizer.num_codewords {k} is not a power of two from 2 to {quantizer.MAX_CODEWORDS}: use for example {near}"
    elif q.bits not in (0, bits(c)):
        yield (
            f"quantizer.bits {q.bits} is not what the codebooks give: {q.num_codebooks} codebooks x {int(log2(k))} bits "
            f"({k} codewords) = {bits(c)}; set quantizer.num_codebooks={q.bits / log2(k):g} or quantizer.bits=0"
        )
    if not 0 < d.crop_share <= 1:
        yield f"data.crop_share {d.crop_share} must be above 0 and at most 1"
    if d.views == 1:
        yield "data.views 1 leaves no two views to compare: use 0 or at least 2"
    yield from _clip_problems(loss.clip, d.batch_size, loss.queue)
    if loss.queue and loss.pairing == "float":
        yield f"loss.queue {loss.queue} holds reconstructions, which loss.pairing float does not compare: use cross or quantized"
    if loss.clip_from > loss.clip_full:
        yield f"loss.clip_from {loss.clip_from} must not be above loss.clip_full {loss.clip_full}"
    if (t.total_steps > 0) == (t.total_epochs > 0):
        yield f"set one of train.total_steps ({t.total_steps}) and train.total_epochs ({t.total_epochs}), and leave the other 0"
    if 0 < t.total_steps <= o.warmup_steps:
        yield f"optim.warmup_steps {o.warmup_steps} must be below train.total_steps {t.total_steps}"


def _clip_problems(clip: Any, batch_size: int, queue: int) -> Iterator[str]:
    negatives = 2 * batch_size - 2 + queue
    if isinstance(clip, bool) or not isinstance(clip, int | float):
        yield f"loss.clip {clip!r} must be a count such as 64 or a fraction such as 0.1"
    elif isinstance(clip, float) and not 0 <= clip < 1:
        yield f"loss.clip {clip} is a fraction of the negatives and must be in [0, 1); a count is written without a point"
    elif clip < 0 or clip_count(clip, batch_size, queue=queue) >= max(negatives, 1):
        yield (
            f"loss.clip {clip} must be from 0 to {negatives - 1}: "
            f"a batch of {batch_size} has 2 x {batch_size} - 2{f' + {queue}' if queue else ''} = {negatives} negatives per anchor"
        )


_INFINITY = float("inf")
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("data.image_size", 1, 4096),
    ("data.split_seed", -1, 2**32 - 1),
    ("data.batch_size", 2, _INFINITY),
    ("data.threads", 1, 256),
    ("data.resident", 0, _INFINITY),
    ("data.views", 0, 4096),
    ("data.augment.stretch", 0, 2),
    ("data.augment.rotate", 0, 180),
    ("data.augment.shift", 0, 1),
    ("data.augment.flip", 0, 1),
    ("data.augment.brightness", 0, 1),
    ("data.augment.contrast", 0, 1),
    ("data.augment.saturation", 0, 1),
    ("data.augment.hue", 0, 0.5),
    ("data.augment.jitter", 0, 1),
    ("data.augment.grayscale", 0, 1),
    ("data.augment.blur", 0, 1),
    ("model.width", 1, _INFINITY),
    ("model.depth", 1, _INFINITY),
    ("model.heads", 1, _INFINITY),
    ("model.patch", 1, _INFINITY),
    ("model.registers", 0, _INFINITY),
    ("model.norm_eps", 0, 1),
    ("quantizer.num_codebooks", 1, _INFINITY),
    ("quantizer.codeword_dim", 1, _INFINITY),
    ("quantizer.init_images", 1, _INFINITY),
    ("loss.clip_from", 0, 1),
    ("loss.clip_full", 0, 1),
    ("loss.queue", 0, _INFINITY),
    ("loss.queue_from", 0, 1),
    ("loss.block_size", 0, _INFINITY),
    ("loss.entropy_weight", 0, _INFINITY),
    ("loss.diversity_weight", 0, _INFINITY),
    ("optim.warmup_steps", 0, _INFINITY),
    ("optim.backbone_rate", 0, _INFINITY),
    ("optim.head_rate", 0, _INFINITY),
    ("optim.codebooks_rate", 0, _INFINITY),
    ("optim.layer_decay", 0, 1),
    ("optim.frozen_blocks", -1, _INFINITY),
    ("optim.weight_decay", 0, _INFINITY),
    ("optim.momentum", 0, 1),
    ("optim.clip_norm", 0, _INFINITY),
    ("train.total_steps", 0, 2**31 - 2),
    ("train.total_epochs", 0, _INFINITY),
    ("train.microbatches", 1, _INFINITY),
    ("train.seed", 0, 2**32 - 1),
    ("train.log_every_steps", 1, _INFINITY),
    ("train.compare_every_steps", 1, _INFINITY),
    ("train.max_skipped", 1, _INFINITY),
    ("eval.every_steps", 0, _INFINITY),
    ("eval.k", -1, _INFINITY),
    ("eval.max_scores", 1, _INFINITY),
    ("eval.batch_size", 1, _INFINITY),
    ("eval.max_database", 1, _INFINITY),
    ("checkpoint.every_steps", 1, _INFINITY),
    ("checkpoint.keep", 1, _INFINITY),
)


def _type_problems(config: ConfigDict, base: ConfigDict) -> list[str]:
    known, found = flatten(base), flatten(config)
    problems = [f"{key}: there is no such key{nearest(key, known)}" for key in found.keys() - known.keys()]
    problems += [f"{key} is missing" for key in known.keys() - found.keys()]
    for key in sorted(found.keys() & known.keys() - {"loss.clip"}):
        want, value = type(known[key]), found[key]
        fits = isinstance(value, want) and isinstance(value, bool) == (want is bool)
        if not fits and not (want is float and type(value) is int):
            problems.append(f"{key} {value!r} must be {want.__name__}, not {type(value).__name__}")
    return sorted(problems)


def _raise(problems: list[str]) -> None:
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError("\n".join(["the config has these problems:", *(f"  - {p}" for p in problems)]))


def nearest(key: str, known: Iterable[str]) -> str:
    by_tail = {k.split(".")[-1]: k for k in known}
    near = difflib.get_close_matches(key, list(known), 1, 0.6) or [
        by_tail[t] for t in difflib.get_close_matches(key.split(".")[-1], list(by_tail), 1, 0.6)
    ]
    return f": did you mean {near[0]}?" if near else "; configs/base.py lists them all"


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
