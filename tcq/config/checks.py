"""What a config must fulfil before any device is used.

It checks types, the allowed values of each key, and combinations.
"""

from collections.abc import Iterable, Iterator
from math import inf, isfinite, log2
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from tcq import losses, metrics, quantizer, ranking
from tcq.config import derived
from tcq.config.overrides import COUNT_OR_SHARE, ConfigError, flatten, suggestion
from tcq.data import folders, images, protocols
from tcq.models import embedder, resnet, vit

OPTIMIZERS = ("adamw", "lars", "sgd")
DTYPES = ("float32", "bfloat16")
RAMPS = ("linear", "cosine")
INITS = ("opq", "kmeans", "data", "random")


class Choice(NamedTuple):
    """One of some texts."""

    values: tuple[str, ...]

    def problem(self, value: Any) -> str | None:
        if value in self.values:
            return None
        return f"{value!r} is unknown: use one of {', '.join(map(repr, self.values))}"


class Range(NamedTuple):
    """A number from low to high; the ends belong to it unless they are open."""

    low: float
    high: float = inf
    open_low: bool = False
    open_high: bool = False

    def problem(self, value: Any) -> str | None:
        if not isfinite(value):
            return f"{value} must be a finite number"
        above = self.low < value if self.open_low else self.low <= value
        below = value < self.high if self.open_high else value <= self.high
        if above and below:
            return None
        if self.high == inf:
            return f"{value} must be {'above' if self.open_low else 'at least'} {self.low}"
        if self.open_low or self.open_high:
            left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
            return f"{value} must be in {left}{self.low}, {self.high}{right}"
        return f"{value} must be from {self.low} to {self.high}"


def _one_of(values: Iterable[str]) -> Choice:
    return Choice(tuple(values))


COUNT, POSITIVE_COUNT = Range(0), Range(1)
POSITIVE = Range(0, inf, open_low=True, open_high=True)  # a finite number
SHARE, SHARE_BELOW_1 = Range(0, 1), Range(0, 1, open_high=True)
SEED = 2**32 - 1
# Keys that are not here are bools, free texts, or have a rule of their own below (loss.clip, model.mean ...).
ALLOWED: dict[str, Choice | Range] = {
    "data.protocol": _one_of(protocols.PROTOCOLS),
    "data.split_seed": Range(-1, SEED),
    "data.query": SHARE_BELOW_1,
    "data.validation": SHARE_BELOW_1,
    "data.max_pixels": POSITIVE_COUNT,
    "data.cache_gib": Range(0),
    "data.image_size": Range(1, 4096),
    "data.resize": _one_of(images.RESIZES),
    "data.interpolation": _one_of(images.INTERPOLATIONS),
    "data.crop_share": Range(0, 1, open_low=True),
    "data.batch_size": Range(2),
    "data.views": Range(0, 4096),
    "data.resident": COUNT,
    "data.threads": Range(1, 256),
    "data.augment.crop": SHARE_BELOW_1,
    "data.augment.stretch": Range(0, 2),
    "data.augment.rotate": Range(0, 180),
    "data.augment.shift": SHARE,
    "data.augment.flip": SHARE,
    "data.augment.brightness": SHARE,
    "data.augment.contrast": SHARE,
    "data.augment.saturation": SHARE,
    "data.augment.hue": Range(0, 0.5),
    "data.augment.jitter": SHARE,
    "data.augment.grayscale": SHARE,
    "data.augment.blur": SHARE,
    "data.augment.noise": Range(0),
    "data.augment.drop": SHARE_BELOW_1,
    "model.name": _one_of(("", embedder.NAME, *vit.NAMED, *resnet.NAMED)),
    "model.width": POSITIVE_COUNT,
    "model.depth": POSITIVE_COUNT,
    "model.heads": POSITIVE_COUNT,
    "model.patch": POSITIVE_COUNT,
    "model.pooling": _one_of(vit.POOLINGS),
    "model.positions": _one_of(vit.POSITIONS),
    "model.mlp_ratio": POSITIVE,
    "model.registers": COUNT,
    "model.gelu": _one_of(vit.GELUS),
    "model.norm_eps": SHARE,
    "model.stem": _one_of((*resnet.STEMS, vit.STEM)),
    "model.dropout": SHARE_BELOW_1,
    "model.drop_path": SHARE_BELOW_1,
    "model.dtype": _one_of(DTYPES),
    "model.attention": _one_of(vit.ATTENTIONS),
    "quantizer.num_codebooks": POSITIVE_COUNT,
    "quantizer.num_codewords": Range(2, quantizer.MAX_CODEWORDS),
    "quantizer.codeword_dim": POSITIVE_COUNT,
    "quantizer.bits": COUNT,
    "quantizer.scale": POSITIVE,
    "quantizer.metric": _one_of(quantizer.METRICS),
    "quantizer.init": _one_of(INITS),
    "quantizer.init_images": POSITIVE_COUNT,
    "quantizer.whitening": Range(0, 1),
    "loss.pairing": _one_of(losses.PAIRINGS),
    "loss.temperature": Range(*losses.TEMPERATURES),
    "loss.clip_from": SHARE,
    "loss.clip_full": SHARE,
    "loss.clip_ramp": _one_of(RAMPS),
    "loss.clip_scope": _one_of(losses.SCOPES),
    "loss.debias": SHARE_BELOW_1,
    "loss.queue": COUNT,
    "loss.queue_from": SHARE,
    "loss.block_size": COUNT,
    "loss.gather": _one_of(losses.GATHERS),
    "loss.entropy_weight": Range(0),
    "loss.diversity_weight": Range(0),
    "optim.name": _one_of(OPTIMIZERS),
    "optim.learning_rate": POSITIVE,
    "optim.backbone_rate": Range(0),
    "optim.head_rate": Range(0),
    "optim.codebooks_rate": Range(0),
    "optim.layer_decay": Range(0, 1, open_low=True),
    "optim.frozen_blocks": Range(-1),
    "optim.weight_decay": Range(0),
    "optim.momentum": SHARE,
    "optim.clip_norm": Range(0),
    "train.total_steps": Range(0, 2**31 - 2),
    "train.total_epochs": Range(0),
    "train.microbatches": POSITIVE_COUNT,
    "train.seed": Range(0, SEED),
    "train.log_every_steps": POSITIVE_COUNT,
    "train.compare_every_steps": POSITIVE_COUNT,
    "train.max_skipped": POSITIVE_COUNT,
    "eval.every_steps": COUNT,
    "eval.k": Range(-1),
    "eval.score": _one_of(ranking.METRICS),
    "eval.normalize": _one_of(("auto", *ranking.NORMALIZE)),
    "eval.ties": _one_of(metrics.TIES),
    "eval.denominator": _one_of(metrics.DENOMINATORS),
    "eval.empty": _one_of(metrics.EMPTY),
    "eval.max_scores": POSITIVE_COUNT,
    "eval.baseline_mib": COUNT,
    "eval.batch_size": POSITIVE_COUNT,
    "eval.max_database": POSITIVE_COUNT,
    "checkpoint.every_steps": POSITIVE_COUNT,
    "checkpoint.keep": POSITIVE_COUNT,
}


def check(config: ConfigDict, base: ConfigDict) -> None:
    """Raises ConfigError for a config that does not fit.

    The error lists every unknown or missing key, wrong type, and value that does not fit.
    """
    _raise(_type_problems(config, base) or list(_value_problems(config)))


def check_types(config: ConfigDict, base: ConfigDict) -> None:
    """Raises ConfigError that lists every unknown or missing key and wrong type."""
    _raise(_type_problems(config, base))


def check_run(config: ConfigDict, *, num_devices: int, num_train: int, num_validation: int) -> None:
    """Raises ConfigError where the config does not fit the devices or the number of images."""
    d, q = config.data, config.quantizer
    problems = []
    if d.batch_size % num_devices:
        below, above = d.batch_size // num_devices * num_devices, -(-d.batch_size // num_devices) * num_devices
        problems.append(
            f"data.batch_size {d.batch_size} is not divisible by the {num_devices} devices: "
            f"use {f'{below} or ' if below else ''}{above}"
        )
    elif d.batch_size // num_devices % config.train.microbatches:
        problems.append(
            f"train.microbatches {config.train.microbatches} does not divide the {d.batch_size // num_devices} images "
            f"of each device (data.batch_size {d.batch_size} on {num_devices})"
        )
    if d.batch_size > num_train:
        problems.append(
            f"data.batch_size {d.batch_size} is above the {num_train:,} training images ({num_validation:,} more are "
            f"held out for validation): an image would be its own negative; use at most "
            f"{num_train // num_devices * num_devices}"
        )
    available = min(q.init_images, num_train)
    if q.init in ("kmeans", "opq") and available < q.num_codewords:
        problems.append(
            f"quantizer.init {q.init} cannot make {q.num_codewords} codewords of {available} images: "
            f"use quantizer.init=data or fewer codewords"
        )
    _raise(problems)


def _value_problems(c: ConfigDict) -> Iterator[str]:
    values = flatten(c)
    for key, allowed in ALLOWED.items():
        problem = allowed.problem(values[key])
        if problem:
            yield f"{key} {problem}"
    yield from _data_problems(c)
    yield from _backbone_problems(c)
    yield from _quantizer_problems(c)
    yield from _loss_problems(c)
    yield from _run_problems(c)


def _data_problems(c: ConfigDict) -> Iterator[str]:
    if not c.data.source:
        yield "data.source is not set: use digits, tfds:<name>, folder:<path> or embeddings:<path>"
    if c.data.labels not in folders.LABELS and Path(c.data.labels).suffix not in folders.FILES:
        yield f"data.labels {c.data.labels!r} is unknown: use {', '.join(folders.LABELS)}, or a .csv or .jsonl file"
    if c.data.views == 1:
        yield "data.views 1 leaves no two views to compare: use 0 or at least 2"


def _backbone_problems(c: ConfigDict) -> Iterator[str]:
    m = c.model
    for key, low in (("mean", -inf), ("std", 0.0)):
        values = m[key]
        if len(values) != 3 or not all(isinstance(x, int | float) and low < x < inf for x in values):
            yield f"model.{key} {values} must be three finite numbers{', above 0' if key == 'std' else ''}"
    if m.name == embedder.NAME:
        yield from _embedding_problems(c)
    else:
        yield from _resnet_problems(c) if m.name in resnet.NAMED else _vit_problems(c)


def _embedding_problems(c: ConfigDict) -> Iterator[str]:
    if c.optim.frozen_blocks >= 0:
        yield f"optim.frozen_blocks {c.optim.frozen_blocks} must be -1: embeddings have no blocks that could be trained"
    if c.model.embedder and c.data.views < 2:
        yield f"data.views {c.data.views} must be at least 2: model.embedder embeds this many views of each image once"


def _vit_problems(c: ConfigDict) -> Iterator[str]:
    d, m = c.data, c.model
    (width, depth, heads), patch = vit.NAMED.get(m.name, (vit.Size(m.width, m.depth, m.heads), m.patch))
    if patch > 0 and d.image_size % patch:
        of = f"the patch of {m.name}" if m.name else "model.patch"
        fit = max(round(d.image_size / patch), 1) * patch
        yield f"data.image_size {d.image_size} is not divisible by {of} {patch}: use for example {fit}"
    if heads > 0 and width % heads:
        yield f"model.width {width} is not divisible by model.heads {heads}"
    if m.positions == "sincos2d" and width % 4:
        yield f"model.width {width} is not divisible by 4, as model.positions sincos2d needs"
    if c.optim.frozen_blocks > depth:
        yield f"optim.frozen_blocks {c.optim.frozen_blocks} is above the {depth} blocks of the backbone; -1 freezes all"
    if m.width > 0 and m.mlp_ratio > 0 and round(m.mlp_ratio * width) < 1:
        yield f"model.mlp_ratio {m.mlp_ratio} leaves the MLP no hidden unit"
    if m.stem == vit.STEM and patch.bit_count() != 1:
        yield f"model.stem conv halves an image again and again: model.patch {patch} must be a power of two"
    if m.attention == "cudnn" and m.dtype != "bfloat16":
        yield "model.attention cudnn needs model.dtype bfloat16"


def _resnet_problems(c: ConfigDict) -> Iterator[str]:
    m, frozen = c.model, c.optim.frozen_blocks
    blocks = sum(resnet.NAMED[m.name].stages)
    if frozen > blocks:
        yield f"optim.frozen_blocks {frozen} is above the {blocks} blocks of {m.name}; -1 freezes all"
    if m.stem == vit.STEM:
        yield f"model.stem conv is for a ViT: use {' or '.join(resnet.STEMS)} with {m.name}"
    if m.dropout or m.drop_path:
        yield f"model.dropout {m.dropout} and model.drop_path {m.drop_path} must be 0: {m.name} has neither"
    if c.train.microbatches > 1 and frozen >= 0:
        yield (
            f"train.microbatches {c.train.microbatches}: the batch statistics of {m.name} would be those of a "
            f"microbatch; use a ViT, or freeze the backbone (optim.frozen_blocks=-1)"
        )
    if m.scan:
        yield f"model.scan must be false: the blocks of {m.name} differ, and only those of a ViT can be one loop"


def _quantizer_problems(c: ConfigDict) -> Iterator[str]:
    q = c.quantizer
    k = q.num_codewords
    if 2 <= k <= quantizer.MAX_CODEWORDS and k & (k - 1):
        yield f"quantizer.num_codewords {k} must be a power of two: use for example {2 ** round(log2(k))}"
    elif k >= 2 and q.bits not in (0, derived.bits(c)):
        each = quantizer.code_bits(k)
        yield (
            f"quantizer.bits {q.bits} is not what the codebooks give: {q.num_codebooks} codebooks x {each} bits "
            f"({k} codewords) = {derived.bits(c)}; set quantizer.num_codebooks={q.bits / each:g} or quantizer.bits=0"
        )


def _loss_problems(c: ConfigDict) -> Iterator[str]:
    loss, batch_size = c.loss, c.data.batch_size
    negatives = 2 * batch_size - 2 + loss.queue
    try:
        amount = derived.clip_amount(loss.clip)
    except ValueError as error:
        yield str(error)
        return
    if isinstance(amount, float) and not 0 <= amount < 1:
        yield f"loss.clip {loss.clip} is a share and must be in [0, 1); write a count without a decimal point"
    elif 0 < amount < 1 and negatives > 0 and _clips_nothing(c):
        total, remedy = f"{negatives} negatives of an anchor", "loss.clip_scope=batch, "
        if loss.clip_scope == "batch":
            total, remedy = f"{2 * batch_size * negatives} negative pairs of a batch", ""
        yield (
            f"loss.clip {loss.clip} is less than one of the {total}, so nothing would be clipped: use "
            f"{remedy}a larger data.batch_size, or loss.clip=0"
        )
    elif isinstance(amount, int) and loss.queue and amount >= 2 * batch_size - 2 > 0:
        yield (
            f"loss.clip {loss.clip} is all of the {2 * batch_size - 2} negatives that an anchor has until loss.queue "
            f"is filled, so nothing would be learned: use a share such as 0.1"
        )
    elif amount < 0 or derived.clip_rule(c, 1).count(queued=loss.queue) >= max(negatives, 1):
        sizes = f"2 x {batch_size} - 2{f' + {loss.queue}' if loss.queue else ''} = {negatives}"
        yield (
            f"loss.clip {loss.clip} must be from 0 to {negatives - 1}: a batch of {batch_size} has {sizes} negatives "
            f"per anchor"
        )
    if loss.queue and loss.pairing == "float":
        yield (
            f"loss.queue {loss.queue} holds reconstructions, which loss.pairing float does not compare: "
            f"use cross or quantized"
        )
    if loss.clip_from > loss.clip_full:
        yield f"loss.clip_from {loss.clip_from} must not be above loss.clip_full {loss.clip_full}"


def _clips_nothing(c: ConfigDict) -> bool:
    count = derived.clip_rule(c, 1).count(queued=c.loss.queue)
    return bool(count == 0 if c.loss.clip_scope == "anchor" else count * 2 * c.data.batch_size * derived.ROUNDING < 1)


def _run_problems(c: ConfigDict) -> Iterator[str]:
    t, warmup = c.train, c.optim.warmup_steps
    if (t.total_steps > 0) == (t.total_epochs > 0):
        yield (
            f"train.total_steps ({t.total_steps}) and train.total_epochs ({t.total_epochs}): one must be set and the "
            f"other 0"
        )
    if isinstance(warmup, float) and not 0 <= warmup < 1:
        yield f"optim.warmup_steps {warmup} is a share of the run and must be in [0, 1); write a count without a point"
    elif warmup < 0:
        yield f"optim.warmup_steps {warmup} must be at least 0"


def _type_problems(config: ConfigDict, base: ConfigDict) -> list[str]:
    known, values = flatten(base), flatten(config)
    problems = [f"{key} is unknown{suggestion(key, known)}" for key in values.keys() - known.keys()]
    problems += [f"{key} is missing" for key in known.keys() - values.keys()]
    for key in values.keys() & known.keys():
        value = values[key]
        if key in COUNT_OR_SHARE:
            kinds = key == "loss.clip" and isinstance(value, str)  # its text is checked below
            if not kinds and (isinstance(value, bool) or not isinstance(value, int | float)):
                problems.append(f"{key} {value!r} must be a count such as 64 or a share such as 0.1")
            continue
        expected = type(known[key])
        fits = isinstance(value, expected) and isinstance(value, bool) == (expected is bool)
        if not fits and not (expected is float and type(value) is int):
            problems.append(f"{key} {value!r} must be {expected.__name__}, not {type(value).__name__}")
    return sorted(problems)


def _raise(problems: list[str]) -> None:
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError("\n".join([f"the config has {len(problems)} problems:", *(f"  - {p}" for p in problems)]))
