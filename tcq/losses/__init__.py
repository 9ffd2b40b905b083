"""The top-k clipped NT-Xent loss, the pairings of views it is used with, and two regularizers.

NT-Xent (SimCLR, Chen et al. 2020): stack two views to 2B unit rows; anchor i's positive p(i) is its partner in the
other half, the other 2B - 2 rows are its negatives; with s the cosine similarity and t the temperature

    L_i = -s_ip / t + log( exp(s_ip / t) + sum over kept negatives j of exp(s_ij / t) ).

Clipping (TransClippedCLR, arXiv 2401.15362) drops the `clip` most similar negatives of every anchor: they are likely
the same thing as the anchor. The paper's equations are not public to us; that the count is per anchor, over both views
and the global batch, and that a clipped pair is absent (no value, no gradient), is our reading.

The functions work alike on one device and inside a mapped axis (`axis_name`): rows stay local, columns are gathered,
the loss and logs that come back are those of the global batch. Differentiate, then average gradients over the axis.
"""

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Num

from tcq.losses import _blocked as anchors
from tcq.quantizer import unit

PAIRINGS = ("cross", "quantized", "float")
Logs = dict[str, Array]
T = TypeVar("T")


class Queue(NamedTuple):
    """Vectors of earlier batches, which every anchor has as further negatives; the same on all devices."""

    vectors: Float[Array, "Q D"]
    filled: Int[Array, ""] | int  # so many of them, the first, are there


def nt_xent(
    a: Float[ArrayLike, "b D"],
    b: Float[ArrayLike, "b D"],
    *,
    temperature: float,
    clip: int | Int[Array, ""] = 0,
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
      a, b: the two views, (b, D) on each device; normalised inside, in float32.
      temperature: divisor of the cosine similarities, above 0.
      clip: how many of the 2B - 2 negatives of each anchor (and of the queue) are removed, most similar first; among
        equals the one that comes first in the stacked order [a, b, queue] goes first, so that exactly `clip` go. 0 is
        plain NT-Xent. An array may change from step to step without compiling again; it is not checked, and no more
        than all negatives go.
      debias: rho, the assumed share of negatives that are of the anchor's class, of the debiased contrastive loss
        (Chuang et al. 2020), over the negatives that are left; 0 is none.
      queue: further negatives; normalised inside, with gradient.
      block_size: anchors handled at a time; memory is some times block_size x (2B + Q) float32. None: so many that a
        block has 4 M similarities.
      gather: how the columns come to the rows. "all": every device holds all 2B; "ring": devices hand theirs round,
        twice for every block, and hold 2b.
      axis_name: the mapped axis over which the batch is spread.
      average: whether loss and logs are averaged over that axis. False leaves it to the caller, who averages the gradients
        anyhow: they are the same.
      labels: (b,) class numbers or (b, L) multi-hot; only for the logs below.

    Returns:
      The mean over the 2B anchors, float32, and logs: positive_similarity, negative_similarity (of the batch), accuracy
      (share of anchors whose positive beats all negatives); where anything may be clipped clip_similarity (mean over the
      anchors of the similarity above which negatives are clipped, or of the hardest while none is); with labels
      false_negative_rate (share of negatives of the anchor's own class), and where anything may be clipped
      clip_precision (share of clipped pairs that are false negatives) and clip_recall (share of false negatives that are
      clipped).

    Raises:
      ValueError: the shapes differ, the temperature is not positive, clip is not in 0 .. 2B - 2 + Q, debias is not in
        [0, 1), the block size is below 1, gather is unknown, a ring has no axis, or there are labels and a queue.
    """
    return _problems(
        [(a, b)],
        temperature=temperature,
        clip=clip,
        debias=debias,
        queue=queue,
        block_size=block_size,
        gather=gather,
        axis_name=axis_name,
        average=average,
        labels=labels,
    )


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
      pairing: "cross": the mean of (features_a, recon_b) and (features_b, recon_a), after SPQ, which takes their sum;
        "quantized": (recon_a, recon_b), after MeCoQ; "float": (features_a, features_b), no quantizer.
      options: of `nt_xent`; with "cross" each of the two problems is clipped on its own.

    Returns:
      loss and logs as `nt_xent`, averaged over the problems.

    Raises:
      ValueError: the pairing is unknown, or as `nt_xent`.
    """
    problems = {
        "cross": [(features_a, recon_b), (features_b, recon_a)],
        "quantized": [(recon_a, recon_b)],
        "float": [(features_a, features_b)],
    }
    if pairing not in problems:
        raise ValueError(f"pairing {pairing!r} is unknown: use one of {', '.join(PAIRINGS)}")
    return _problems(problems[pairing], **{"clip": 0, **options})


def _problems(
    pairs: list[tuple[ArrayLike, ArrayLike]],
    *,
    temperature: float,
    clip: int | Array,
    debias: float = 0.0,
    queue: Queue | None = None,
    block_size: int | None = None,
    gather: str = "all",
    axis_name: str | None = None,
    average: bool = True,
    labels: ArrayLike | None = None,
) -> tuple[Array, Logs]:
    """Mean loss and logs of some pairs of views; their columns are gathered together."""
    shapes = {jnp.shape(view) for pair in pairs for view in pair}
    if len(shapes) > 1 or len(next(iter(shapes))) != 2:
        raise ValueError(f"the views must have one shape (B, D), got {', '.join(map(str, sorted(shapes)))}")
    views = unit(jnp.stack([jnp.stack([jnp.asarray(v, jnp.float32) for v in pair]) for pair in pairs]))  # (P, 2, b, D)
    b, width = views.shape[2:]
    num_devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    num_columns = 2 * b * num_devices
    queue = queue or Queue(jnp.zeros((0, width)), 0)
    num_negatives = num_columns - 2 + len(queue.vectors)
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be above 0")
    if isinstance(clip, int) and not 0 <= clip <= num_negatives:
        raise ValueError(
            f"clip {clip} is not within the {num_negatives} negatives of a global batch of {num_columns // 2}"
        )
    if not 0 <= debias < 1:
        raise ValueError(f"debias {debias} is a share of the negatives and must be in [0, 1)")
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size {block_size} must be at least 1")
    if gather not in anchors.GATHERS:
        raise ValueError(f"gather {gather!r} is unknown: use one of {', '.join(anchors.GATHERS)}")
    if gather == "ring" and axis_name is None:
        raise ValueError("a ring needs the axis_name of the devices that form it")
    if labels is not None and len(queue.vectors):
        raise ValueError("labels tell what is clipped of the batch; a queue has none: leave one of them out")

    columns = _gather(views, axis_name, axis=2) if gather == "all" else views
    rule = anchors.Rule(
        temperature=temperature,
        clips=not isinstance(clip, int) or clip > 0,
        debias=debias,
        block_size=block_size or anchors.block_size_for(2 * b, num_columns + len(queue.vectors)),
        gather=gather,
        axis_name=axis_name,
    )
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * b
    half = num_columns // 2
    own = (first + jnp.concatenate([jnp.arange(b), half + jnp.arange(b)])).astype(jnp.int32)
    both_labels = None
    if labels is not None:
        labels = jnp.asarray(labels)
        both_labels = jnp.concatenate([labels] * 2), jnp.concatenate([_gather(labels, axis_name)] * 2)

    results = []
    for pair, theirs in zip(views, columns, strict=True):
        positive = jnp.tile(jnp.sum(pair[0] * pair[1], axis=-1), 2)
        batch = anchors.Batch(
            anchors=pair.reshape(2 * b, width),
            positive=positive,
            columns=theirs.reshape(-1, width),
            queue=unit(jnp.asarray(queue.vectors, jnp.float32)),
            own=own,
            partner=(own + half) % num_columns,
            filled=jnp.asarray(queue.filled, jnp.int32),
            clip=jnp.asarray(clip, jnp.int32),
            labels=both_labels,
        )
        loss, seen = anchors.total_loss(rule, batch)
        results.append((loss / (2 * b), _logs(batch, seen, rule, num_columns)))
    loss, logs = jax.tree.map(lambda *values: jnp.stack(values).mean(0), *results)
    loss, logs = _mean((loss, jax.lax.stop_gradient(logs)), axis_name if average else None)
    return loss, _shares(logs)


def _logs(batch: anchors.Batch, seen: anchors.Seen, rule: anchors.Rule, num_columns: int) -> Logs:
    """Means over the anchors of this device."""
    total = jnp.sum(batch.columns, axis=0)
    if rule.gather == "ring":
        total = jax.lax.psum(total, rule.axis_name)
    own = jnp.sum(batch.anchors**2, axis=1)
    negatives = (batch.anchors @ total - own - batch.positive) / max(num_columns - 2, 1)
    logs = {
        "positive_similarity": jnp.mean(batch.positive),
        "negative_similarity": jnp.mean(negatives),
        "accuracy": jnp.mean(batch.positive > seen.hardest),
    }
    if rule.clips:
        logs["clip_similarity"] = jnp.mean(seen.threshold)
    if batch.labels is not None:
        counts = {"same": seen.same, "negatives": jnp.array(num_columns - 2.0)}
        if rule.clips:
            counts |= {"same_clipped": seen.same_clipped, "clipped": batch.clip}
        logs |= {f"count_{name}": jnp.mean(values.astype(jnp.float32)) for name, values in counts.items()}
    return logs


def _shares(logs: Logs) -> Logs:
    """Counts of the global batch as shares of one another."""
    counts = {name.removeprefix("count_"): logs.pop(name) for name in list(logs) if name.startswith("count_")}
    if counts:
        logs["false_negative_rate"] = counts["same"] / counts["negatives"]
    if "clipped" in counts:
        logs["clip_precision"] = counts["same_clipped"] / jnp.maximum(counts["clipped"], 1)
        logs["clip_recall"] = counts["same_clipped"] / jnp.maximum(counts["same"], 1e-9)
    return logs


def assignment_entropy(weights: Float[ArrayLike, "N M K"]) -> Float[Array, ""]:
    """Mean entropy of the soft codes, in nats, 0 to log K. Minimised, it makes assignments decided (MeCoQ)."""
    weights = jnp.asarray(weights, jnp.float32)
    # The floor keeps the gradient finite where a weight has underflowed to 0.
    return jnp.mean(-jnp.sum(weights * jnp.log(jnp.maximum(weights, 1e-30)), axis=-1))


def codeword_diversity(codebooks: Float[ArrayLike, "M K d"]) -> Float[Array, ""]:
    """Mean cosine similarity of all K * K codeword pairs of each codebook. Minimised, it spreads them (MeCoQ)."""
    unit_words = unit(jnp.asarray(codebooks, jnp.float32))
    return jnp.mean(jnp.einsum("mkd,mld->mkl", unit_words, unit_words, precision="highest"))


def _gather(x: Array, axis_name: str | None, *, axis: int = 0) -> Array:
    return x if axis_name is None else jax.lax.all_gather(x, axis_name, axis=axis, tiled=True)


def _mean(tree: T, axis_name: str | None) -> T:
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)
