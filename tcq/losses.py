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

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Num

from tcq.quantizer import unit

PAIRINGS = ("cross", "quantized", "float")
Logs = dict[str, Array]
T = TypeVar("T")


def nt_xent(
    a: Float[ArrayLike, "b D"],
    b: Float[ArrayLike, "b D"],
    *,
    temperature: float,
    clip: int | Int[Array, ""] = 0,
    axis_name: str | None = None,
    labels: Num[ArrayLike, " b *L"] | None = None,
) -> tuple[Float[Array, ""], Logs]:
    """Top-k clipped NT-Xent over the global batch.

    Args:
      a, b: the two views, (b, D) on each device; normalised inside, in float32.
      temperature: divisor of the cosine similarities, above 0.
      clip: how many of the 2B - 2 negatives of each anchor are removed, most similar first; among equals the one that
        comes first in the stacked order [a, b] goes first, so that exactly `clip` go. 0 is plain NT-Xent. An array may
        change from step to step without compiling again; it is not checked.
      axis_name: the mapped axis over which the batch is spread.
      labels: (b,) class numbers or (b, L) multi-hot; only for the logs below.

    Returns:
      The mean over the 2B anchors, float32, and logs: positive_similarity, negative_similarity, accuracy (share of
      anchors whose positive beats all negatives); where anything may be clipped clip_similarity (mean similarity of the
      last negative clipped, or of the hardest while none is); with labels false_negative_rate (share of negatives of the
      anchor's own class), and where anything may be clipped clip_precision (share of clipped pairs that are false
      negatives) and clip_recall (share of false negatives that are clipped).

    Raises:
      ValueError: the shapes differ, the temperature is not positive, or clip is not in 0 .. 2B - 2.
    """
    a, b = unit(jnp.asarray(a, jnp.float32)), unit(jnp.asarray(b, jnp.float32))
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"the views must have one shape (B, D), got {a.shape} and {b.shape}")
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be above 0")
    columns = jnp.concatenate([_gather(a, axis_name), _gather(b, axis_name)])  # (2B, D)
    num_anchors = columns.shape[0]
    if isinstance(clip, int) and not 0 <= clip <= num_anchors - 2:
        raise ValueError(
            f"clip {clip} is not within the {num_anchors - 2} negatives of a global batch of {num_anchors // 2}"
        )

    similarity = jnp.matmul(jnp.concatenate([a, b]), columns.T, precision="highest")  # (2b, 2B)
    self_pair, positive_pair = _pair_masks(a.shape[0], num_anchors, axis_name)
    negative = ~(self_pair | positive_pair)
    positive_similarity = jnp.sum(jnp.where(positive_pair, similarity, 0.0), axis=1)  # (2b,)

    constant = jax.lax.stop_gradient(similarity)
    clips = not isinstance(clip, int) or clip > 0
    clipped = largest(jnp.where(negative, constant, -jnp.inf), clip) if clips else jnp.zeros_like(negative)
    # Relative to the positive, whose own logit is then exactly 0: so is the loss where nothing else is left.
    logits = jnp.where(self_pair | clipped, -jnp.inf, (similarity - positive_similarity[:, None]) / temperature)
    loss = jnp.mean(jax.nn.logsumexp(logits, axis=1))

    hardest = jnp.max(jnp.where(negative, constant, -jnp.inf), axis=1)
    logs = {
        "positive_similarity": jnp.mean(positive_similarity),
        "negative_similarity": jnp.sum(jnp.where(negative, constant, 0.0)) / jnp.sum(negative),
        "accuracy": jnp.mean(jax.lax.stop_gradient(positive_similarity) > hardest),
    }
    if clips:
        logs["clip_similarity"] = jnp.mean(jnp.minimum(jnp.min(jnp.where(clipped, constant, jnp.inf), axis=1), hardest))
    if labels is not None:
        same = _same_class(jnp.asarray(labels), axis_name) & negative
        shares = {"false_negative_rate": (same, negative)}
        if clips:
            shares |= {"clip_precision": (same & clipped, clipped), "clip_recall": (same & clipped, same)}
        for name, (part, whole) in shares.items():
            logs[name] = _sum(part, axis_name) / jnp.maximum(_sum(whole, axis_name), 1)
    return _mean((loss, jax.lax.stop_gradient(logs)), axis_name)


def contrastive_loss(
    features_a: Float[ArrayLike, "b D"],
    features_b: Float[ArrayLike, "b D"],
    recon_a: Float[ArrayLike, "b D"],
    recon_b: Float[ArrayLike, "b D"],
    *,
    pairing: str,
    temperature: float,
    clip: int | Int[Array, ""] = 0,
    axis_name: str | None = None,
    labels: Num[ArrayLike, " b *L"] | None = None,
) -> tuple[Float[Array, ""], Logs]:
    """Clipped NT-Xent between features and soft reconstructions of the two views.

    Args:
      features_a, features_b: float features of the views, (b, D).
      recon_a, recon_b: their soft reconstructions, (b, D).
      pairing: "cross": the mean of (features_a, recon_b) and (features_b, recon_a), after SPQ, which takes their sum;
        "quantized": (recon_a, recon_b), after MeCoQ; "float": (features_a, features_b), no quantizer.
      temperature, clip, axis_name, labels: as `nt_xent`; with "cross" each of the two problems is clipped on its own.

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
    results = [
        nt_xent(a, b, temperature=temperature, clip=clip, axis_name=axis_name, labels=labels)
        for a, b in problems[pairing]
    ]
    return jax.tree.map(lambda *values: sum(values) / len(values), *results)


def assignment_entropy(weights: Float[ArrayLike, "N M K"]) -> Float[Array, ""]:
    """Mean entropy of the soft codes, in nats, 0 to log K. Minimised, it makes assignments decided (MeCoQ)."""
    weights = jnp.asarray(weights, jnp.float32)
    # The floor keeps the gradient finite where a weight has underflowed to 0.
    return jnp.mean(-jnp.sum(weights * jnp.log(jnp.maximum(weights, 1e-30)), axis=-1))


def codeword_diversity(codebooks: Float[ArrayLike, "M K d"]) -> Float[Array, ""]:
    """Mean cosine similarity of all K * K codeword pairs of each codebook. Minimised, it spreads them (MeCoQ)."""
    unit_words = unit(jnp.asarray(codebooks, jnp.float32))
    return jnp.mean(jnp.einsum("mkd,mld->mkl", unit_words, unit_words, precision="highest"))


def largest(values: Float[Array, "R C"], count: int | Array) -> Bool[Array, "R C"]:
    """A mask of the `count` largest values of every row, the first of equals first: exactly `count` per row.

    The row's threshold is found by bisection on the bits of the floats, 32 passes that compare and count, whatever the
    count: no sort. NaN is not allowed; `count` is 0 .. C.
    """
    values = jnp.where(values == 0, 0.0, values)  # -0.0 and 0.0 are equal, their bits are not
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    keys = jnp.where(bits & sign, ~bits, bits | sign)  # unsigned order = float order

    def try_bit(i: Array, threshold: Array) -> Array:
        candidate = threshold | (sign >> i.astype(jnp.uint32))
        enough = jnp.sum(keys >= candidate, axis=1, keepdims=True) >= count
        return jnp.where(enough, candidate, threshold)

    threshold = jax.lax.fori_loop(0, 32, try_bit, jnp.zeros((keys.shape[0], 1), jnp.uint32))
    above, equal = keys > threshold, keys == threshold
    room = count - jnp.sum(above, axis=1, keepdims=True)
    return above | (equal & (jnp.cumsum(equal, axis=1) <= room))


def _gather(x: Array, axis_name: str | None) -> Array:
    return x if axis_name is None else jax.lax.all_gather(x, axis_name, axis=0, tiled=True)


def _sum(mask: Array, axis_name: str | None) -> Array:
    total = jnp.sum(mask, dtype=jnp.float32)
    return total if axis_name is None else jax.lax.psum(total, axis_name)


def _mean(tree: T, axis_name: str | None) -> T:
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def _pair_masks(b: int, num_anchors: int, axis_name: str | None) -> tuple[Array, Array]:
    """Which columns are the row itself and which its positive: two boolean (2b, 2B)."""
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * b
    half = num_anchors // 2
    row = first + jnp.concatenate([jnp.arange(b), half + jnp.arange(b)])
    column = jnp.arange(num_anchors)
    return row[:, None] == column, ((row + half) % num_anchors)[:, None] == column


def _same_class(labels: Array, axis_name: str | None) -> Bool[Array, "rows columns"]:
    """Equal class numbers, or at least one shared label of multi-hot rows."""
    everyone = _gather(labels, axis_name)
    same = labels[:, None] == everyone if labels.ndim == 1 else (labels @ everyone.T) > 0
    return jnp.tile(same, (2, 2))
