"""The top-k clipped NT-Xent loss, the pairings of views for it, and two regularizers.

NT-Xent (SimCLR, Chen et al. 2020): stack two views to 2B unit rows. The positive p(i) of anchor i is its partner in the
other view, the other 2B - 2 rows are its negatives. With s the cosine similarity and t the temperature

    L_i = -s_ip / t + log( exp(s_ip / t) + sum over kept negatives j of exp(s_ij / t) ).

Clipping (TransClippedCLR, arXiv 2401.15362) drops the `clip` most similar negatives of each anchor: they are likely to
show the same thing (false negatives). The paper's equations are not public to us. That the count is per anchor, over
both views and the global batch, and that a clipped pair has no value and no gradient, is our reading. With
`clip_scope="batch"`, which is ours, the most similar pairs of the whole batch are dropped instead: an anchor that has
many false negatives loses many, one that has none loses none.

All functions work on one device and inside a mapped axis (`axis_name`): rows stay local, columns are gathered, and loss
and logs are those of the global batch. Differentiate, then average the gradients over the axis. `jax.shard_map` needs
`check_vma=False`.
"""

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Num

from tcq.losses import _blocked, _pooled
from tcq.losses._blocked import GATHERS, SCOPES
from tcq.quantizer import unit

__all__ = [
    "GATHERS",
    "PAIRINGS",
    "SCOPES",
    "TEMPERATURES",
    "Queue",
    "assignment_entropy",
    "codeword_diversity",
    "contrastive_loss",
    "nt_xent",
]
PAIRINGS = ("cross", "quantized", "float")
TEMPERATURES = 1e-4, 1e4  # our choice, far beyond what trains
Logs = dict[str, Array]
T = TypeVar("T")


class Queue(NamedTuple):
    """Vectors of earlier batches: further negatives of every anchor, the same on all devices."""

    vectors: Float[Array, "Q D"]
    filled: Int[Array, ""] | int  # entries that are valid, from the first on; clamped to 0 to Q


class _Options(NamedTuple):
    """The arguments of `nt_xent` apart from the views."""

    temperature: float
    clip: float | Array = 0
    clip_scope: str = "anchor"
    debias: float = 0.0
    queue: Queue | None = None
    block_size: int | None = None
    gather: str = "all"
    axis_name: str | None = None
    average: bool = True
    labels: ArrayLike | None = None


def nt_xent(
    a: Float[ArrayLike, "b D"],
    b: Float[ArrayLike, "b D"],
    *,
    temperature: float,
    clip: float | Int[Array, ""] | Float[Array, ""] = 0,
    clip_scope: str = "anchor",
    debias: float = 0.0,
    queue: Queue | None = None,
    block_size: int | None = None,
    gather: str = "all",
    axis_name: str | None = None,
    average: bool = True,
    labels: Num[ArrayLike, " b *L"] | None = None,
) -> tuple[Float[Array, ""], Logs]:
    """Top-k clipped NT-Xent over the global batch.

    Args:
      a, b: the two views, (b, D) on each device; normalized inside, in float32.
      temperature: divisor of the cosine similarities, within TEMPERATURES.
      clip: number of negatives dropped for each anchor, of the 2B - 2 in the batch and those in the queue, most similar
        first: exactly that many; ties go by their order in [a, b, queue]. 0 is plain NT-Xent. An array may change from
        step to step without recompilation; its value is clamped, and for "anchor" rounded down, not checked.
      clip_scope: "anchor": each anchor loses `clip` negatives. "batch": of all negative pairs of the global batch the
        clip x 2B most similar ones are dropped, so `clip` is the mean of each anchor, and may be a float (rounded down
        to whole pairs); ties go by the order of the anchors in [a, b], then by that of their columns. A pair counts
        for each of its two anchors.
      debias: rho, the assumed share of false negatives, of the debiased contrastive loss (Chuang et al. 2020) over the
        kept negatives; 0 is off.
      queue: further negatives; normalized inside, with gradient.
      block_size: anchors processed at a time; memory is a few times block_size x (2B + Q) float32. None: blocks of 4 M
        similarities.
      gather: how the rows get the columns. "all": every device holds all 2B; "ring": each device holds 2b and passes
        them round, twice for every block.
      axis_name: the mapped axis that the batch is spread over.
      average: whether loss and logs are averaged over that axis. With False the caller averages them together with the
        gradients, which are the same either way.
      labels: (b,) class numbers or (b, L) multi-hot; only used for logs.

    Returns:
      The mean loss of the 2B anchors, float32, and logs: positive_similarity, negative_similarity (over the batch),
      accuracy (share of anchors whose positive is more similar than all negatives). If anything may be clipped,
      clip_similarity (mean over the anchors of the similarity above which negatives are clipped, or of the most similar
      negative if none is). With labels, false_negative_rate (share of negatives that are of the anchor's class), and if
      anything may be clipped, clip_precision (share of clipped negatives that are false negatives) and clip_recall
      (share of false negatives that are clipped).

    Raises:
      ValueError: an argument is out of the range that is given here, the shapes differ, there are no negatives, a ring
        has no axis, or there are labels and a queue.

    Example:
      >>> import jax
      >>> a, b = jax.random.normal(jax.random.key(0), (2, 32, 16))
      >>> loss, logs = nt_xent(a, b, temperature=0.2, clip=6)
      >>> sorted(logs)
      ['accuracy', 'clip_similarity', 'negative_similarity', 'positive_similarity']
    """
    options = _Options(temperature, clip, clip_scope, debias, queue, block_size, gather, axis_name, average, labels)
    return _mean_over_pairs([(a, b)], options)


def contrastive_loss(
    features_a: Float[ArrayLike, "b D"],
    features_b: Float[ArrayLike, "b D"],
    recon_a: Float[ArrayLike, "b D"],
    recon_b: Float[ArrayLike, "b D"],
    *,
    pairing: str,
    **options: Any,
) -> tuple[Float[Array, ""], Logs]:
    """Clipped NT-Xent between features and soft reconstructions of the two views.

    Args:
      features_a, features_b: float features of the views, (b, D).
      recon_a, recon_b: their soft reconstructions, (b, D).
      pairing: "cross": the mean over (features_a, recon_b) and (features_b, recon_a), after SPQ, which takes the sum;
        "quantized": (recon_a, recon_b), after MeCoQ; "float": (features_a, features_b), no quantizer.
      options: those of `nt_xent`. With "cross" each of the two pairs is clipped separately.

    Returns:
      Loss and logs of `nt_xent`, averaged over the pairs.

    Raises:
      ValueError: the pairing is unknown, or as `nt_xent`.
    """
    pairs = {
        "cross": [(features_a, recon_b), (features_b, recon_a)],
        "quantized": [(recon_a, recon_b)],
        "float": [(features_a, features_b)],
    }
    if pairing not in pairs:
        raise ValueError(f"pairing {pairing!r} is unknown: use one of {', '.join(PAIRINGS)}")
    return _mean_over_pairs(pairs[pairing], _Options(**options))


def _mean_over_pairs(pairs: list[tuple[ArrayLike, ArrayLike]], o: _Options) -> tuple[Array, Logs]:
    """Mean loss and logs over pairs of views, whose columns are gathered together."""
    o = o._replace(clip=o.clip.item() if isinstance(o.clip, np.generic) else o.clip)
    _check_shapes(o, {jnp.shape(view) for pair in pairs for view in pair})
    views = unit(jnp.stack([jnp.stack([jnp.asarray(v, jnp.float32) for v in pair]) for pair in pairs]))  # (P, 2, b, D)
    b, width = views.shape[2:]
    num_columns = 2 * b * (1 if o.axis_name is None else jax.lax.axis_size(o.axis_name))
    queue = o.queue or Queue(jnp.zeros((0, width), jnp.float32), 0)
    _check(o, batch_size=num_columns // 2, queue_size=len(queue.vectors))

    columns = _gather(views, o.axis_name, axis=2) if o.gather == "all" else views
    settings = _blocked.Settings(
        temperature=o.temperature,
        clips=not isinstance(o.clip, int | float) or o.clip > 0,
        debias=o.debias,
        block_size=o.block_size or _blocked.default_block_size(2 * b, num_columns + len(queue.vectors)),
        gather=o.gather,
        axis_name=o.axis_name,
        scope=o.clip_scope,
    )
    own = _own_columns(b, num_columns, o.axis_name)
    labels = _both_views(o.labels, o.axis_name)
    results = []
    for pair, pair_columns in zip(views, columns, strict=True):
        positive = jnp.tile(jnp.sum(pair[0] * pair[1], axis=-1), 2)
        batch = _blocked.Batch(
            anchors=pair.reshape(2 * b, width),
            positive=positive,
            columns=pair_columns.reshape(-1, width),
            queue=unit(jnp.asarray(queue.vectors, jnp.float32)),
            own=own,
            partner=(own + num_columns // 2) % num_columns,
            filled=jnp.clip(jnp.asarray(queue.filled, jnp.int32), 0, len(queue.vectors)),
            clip=jnp.asarray(0 if o.clip_scope == "batch" else o.clip, jnp.int32),
            pool=None,
            labels=labels,
        )
        if settings.clips and o.clip_scope == "batch":
            batch = batch._replace(pool=_pool(settings, batch, o.clip))
        loss, stats = _blocked.total_loss(settings, batch)
        results.append((loss / (2 * b), _logs(batch, stats, settings, num_columns)))
    loss, logs = jax.tree.map(lambda *values: jnp.stack(values).mean(0), *results)
    loss, logs = _mean((loss, jax.lax.stop_gradient(logs)), o.axis_name if o.average else None)
    return loss, _shares(logs)


def _pool(settings: _blocked.Settings, batch: _blocked.Batch, clip: ArrayLike) -> _blocked.Pool:
    """The pairs of the batch that are clipped, `clip` of each anchor on average."""
    num_anchors = _blocked.num_columns(settings, batch)
    most = (num_anchors - 2 + batch.filled).astype(jnp.uint32) * jnp.uint32(num_anchors)
    if isinstance(clip, int | float):
        pairs = jnp.uint32(int(clip * num_anchors + 1e-6))
    else:
        mean = jnp.asarray(clip)
        mean = mean.astype(jnp.float32 if jnp.issubdtype(mean.dtype, jnp.floating) else jnp.int32)
        mean = jnp.clip(mean, 0, (num_anchors - 2 + batch.filled).astype(mean.dtype))
        whole = mean.astype(jnp.uint32)  # computed apart: a product in float32 would lose pairs
        rest = (mean - whole.astype(mean.dtype)).astype(jnp.float32) * num_anchors
        error = jnp.minimum(mean.astype(jnp.float32) * num_anchors * 6e-8, 0.5)  # of a mean in float32
        pairs = whole * jnp.uint32(num_anchors) + jnp.floor(rest + error).astype(jnp.uint32)
    return _pooled.pool(settings, jax.lax.stop_gradient(batch), jnp.minimum(pairs, most))


def _check_shapes(o: _Options, views: set[tuple[int, ...]]) -> None:
    """Raises ValueError for views, labels, queue or clip of another shape."""
    shape = next(iter(views))
    if len(views) > 1 or len(shape) != 2 or not shape[1]:
        raise ValueError(f"the views must have one shape (B, D), got {', '.join(map(str, sorted(views)))}")
    if o.labels is not None and (np.ndim(o.labels) not in (1, 2) or np.shape(o.labels)[0] != shape[0]):
        raise ValueError(f"labels {np.shape(o.labels)} must be ({shape[0]},) or ({shape[0]}, L) for views {shape}")
    if o.queue is not None and (not isinstance(o.queue, Queue) or np.shape(o.queue.vectors)[1:] != shape[1:]):
        got = np.shape(o.queue.vectors) if isinstance(o.queue, Queue) else type(o.queue).__name__
        raise ValueError(f"queue {got} must be a losses.Queue of vectors (Q, {shape[1]}) for views {shape}")
    if isinstance(o.clip, str | None) or np.shape(o.clip):
        raise ValueError(f"clip {o.clip!r} must be one number")
    if not isinstance(o.block_size, int | np.integer | None):
        raise ValueError(f"block_size {o.block_size} must be an integer or None")


def _check(o: _Options, *, batch_size: int, queue_size: int) -> None:
    """Raises ValueError for options out of their range; the batch size is global."""
    num_negatives = 2 * batch_size - 2 + queue_size
    if num_negatives <= 0:
        raise ValueError(f"a batch of {batch_size} images has no negatives: use a larger batch, or a queue")
    if not TEMPERATURES[0] <= o.temperature <= TEMPERATURES[1]:
        raise ValueError(f"temperature {o.temperature} must be from {TEMPERATURES[0]} to {TEMPERATURES[1]:.0f}")
    if isinstance(o.clip, int | float) and not 0 <= o.clip <= num_negatives:
        raise ValueError(f"clip {o.clip} must be from 0 to the {num_negatives} negatives of a batch of {batch_size}")
    if o.clip_scope not in SCOPES:
        raise ValueError(f"clip_scope {o.clip_scope!r} is unknown: use one of {', '.join(SCOPES)}")
    if isinstance(o.clip, float) and o.clip_scope != "batch":
        raise ValueError(f"clip {o.clip} must be an integer; only with clip_scope 'batch' it is a mean")
    if o.clip_scope == "batch" and 2 * batch_size * num_negatives > _pooled.MAX_PAIRS:
        raise ValueError(
            f"a batch of {batch_size} with {num_negatives} negatives of each anchor has more than {_pooled.MAX_PAIRS} "
            "pairs: use clip_scope 'anchor' or a smaller batch or queue"
        )
    if not 0 <= o.debias < 1:
        raise ValueError(f"debias {o.debias} is a share of the negatives and must be in [0, 1)")
    if o.block_size is not None and o.block_size < 1:
        raise ValueError(f"block_size {o.block_size} must be at least 1")
    if o.gather not in GATHERS:
        raise ValueError(f"gather {o.gather!r} is unknown: use one of {', '.join(GATHERS)}")
    if o.gather == "ring" and o.axis_name is None:
        raise ValueError("gather 'ring' needs the axis_name of its devices")
    if o.labels is not None and queue_size:
        raise ValueError(
            "labels cannot be combined with a queue, whose entries have no labels: leave out labels or queue"
        )


def _own_columns(b: int, num_columns: int, axis_name: str | None) -> Int[Array, " R"]:
    """The global column of each of the 2b anchors of this device, int32."""
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * b
    both_views = jnp.concatenate([jnp.arange(b), num_columns // 2 + jnp.arange(b)])
    return (first + both_views).astype(jnp.int32)


def _both_views(labels: ArrayLike | None, axis_name: str | None) -> tuple[Array, Array] | None:
    """The labels of the anchors of this device and of all columns, both for two views."""
    if labels is None:
        return None
    labels = jnp.asarray(labels)
    if labels.ndim == 2:
        labels = (labels != 0).astype(jnp.float32)  # a product of small integers would overflow
    return jnp.concatenate([labels] * 2), jnp.concatenate([_gather(labels, axis_name)] * 2)


def _logs(batch: _blocked.Batch, stats: _blocked.Stats, settings: _blocked.Settings, num_columns: int) -> Logs:
    """Means over the anchors of this device."""
    total = jnp.sum(batch.columns, axis=0)
    if settings.gather == "ring":
        total = jax.lax.psum(total, settings.axis_name)
    own = jnp.sum(batch.anchors**2, axis=1)
    negatives = (batch.anchors @ total - own - batch.positive) / max(num_columns - 2, 1)
    logs = {
        "positive_similarity": jnp.mean(batch.positive),
        "negative_similarity": jnp.mean(negatives),
        "accuracy": jnp.mean(batch.positive > stats.hardest, dtype=jnp.float32),
    }
    if settings.clips:
        logs["clip_similarity"] = jnp.mean(stats.threshold)
    if batch.labels is not None:
        counts = {"same": stats.same, "negatives": jnp.array(num_columns - 2, jnp.float32)}
        if settings.clips:
            counts |= {"same_clipped": stats.same_clipped, "clipped": stats.clipped}
        logs |= {f"count_{name}": jnp.mean(values.astype(jnp.float32)) for name, values in counts.items()}
    return logs


def _shares(logs: Logs) -> Logs:
    """The logs with counts over the global batch replaced by their ratios."""
    counts = {name.removeprefix("count_"): logs.pop(name) for name in list(logs) if name.startswith("count_")}
    if counts:
        logs["false_negative_rate"] = counts["same"] / counts["negatives"]
    if "clipped" in counts:
        logs["clip_precision"] = counts["same_clipped"] / jnp.maximum(counts["clipped"], 1e-9)
        logs["clip_recall"] = counts["same_clipped"] / jnp.maximum(counts["same"], 1e-9)
    return logs


def assignment_entropy(weights: Float[ArrayLike, "N M K"]) -> Float[Array, ""]:
    """Mean entropy of the soft codes, in nats, 0 to log K.

    If it is minimized, assignments become harder (MeCoQ).
    """
    weights = jnp.asarray(weights, jnp.float32)
    # The floor keeps the gradient finite where a weight has underflowed to 0.
    return jnp.mean(-jnp.sum(weights * jnp.log(jnp.maximum(weights, 1e-30)), axis=-1))


def codeword_diversity(codebooks: Float[ArrayLike, "M K d"]) -> Float[Array, ""]:
    """Mean cosine similarity over all K * K pairs of codewords of a codebook.

    If it is minimized, the codewords spread (MeCoQ).
    """
    unit_words = unit(jnp.asarray(codebooks, jnp.float32))
    return jnp.mean(jnp.einsum("mkd,mld->mkl", unit_words, unit_words, precision="highest"))


def _gather(x: Array, axis_name: str | None, *, axis: int = 0) -> Array:
    return x if axis_name is None else jax.lax.all_gather(x, axis_name, axis=axis, tiled=True)


def _mean(tree: T, axis_name: str | None) -> T:
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)
