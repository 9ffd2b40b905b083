"""Forward and backward pass of the clipped NT-Xent loss, one block of anchors at a time.

The similarities of all pairs never exist at once. A block holds the similarities of its anchors to all columns: enough
to find their most similar negatives, to mask them, to sum over the others and to compute the gradient. A step takes the
three matrix products of the dense loss, and computes nothing twice. Memory is that of one block.
"""

from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Num

from tcq.losses import _threshold

T = TypeVar("T")
GATHERS = ("all", "ring")
SCOPES = ("anchor", "batch")
BLOCK = 2**22  # similarities of a block of the default size: 16 MiB, and a few temporaries of that size
ALL = jnp.iinfo(jnp.int32).max  # `Pool.room` of an anchor all of whose equal pairs are clipped
MIN_BLOCK = 128  # anchors of such a block; smaller ones move the gradient of the columns through memory too often


class Settings(NamedTuple):
    """The static options of the loss; hashable, because compilation depends on them."""

    temperature: float
    clips: bool  # whether anything may be clipped
    debias: float  # rho of the debiased estimator; 0 is none
    block_size: int
    gather: str  # "all": `columns` are those of all devices; "ring": those of this device, passed round
    axis_name: str | None
    scope: str = "anchor"  # the most similar negatives are clipped of each "anchor", or of the whole "batch"


class Pool(NamedTuple):
    """The negative pairs of the whole batch that are clipped.

    They are the pairs above `high`, and some of those from `low` to `high`, which are equal up to rounding.
    """

    low: Float[Array, ""]
    high: Float[Array, ""]
    room: Int32[Array, " R"]  # how many of these are clipped of each anchor, the first ones, or ALL


class Batch(NamedTuple):
    """R anchors of this device, the C columns of the global batch, and Q further negatives.

    All are unit vectors.
    """

    anchors: Float[Array, "R D"]
    positive: Float[Array, " R"]  # similarity to the positive
    columns: Float[Array, "C_or_local D"]  # in the order [view a, view b], of the global batch or of this device
    queue: Float[Array, "Q D"]
    own: Int32[Array, " R"]  # column of the anchor itself in the global batch
    partner: Int32[Array, " R"]  # column of its positive
    filled: Int32[Array, ""]  # entries of the queue that are valid, from the first on
    clip: Int32[Array, ""]  # negatives clipped of each anchor; scope "anchor"
    pool: Pool | None  # scope "batch"
    labels: tuple[Num[Array, " R *L"], Num[Array, " C *L"]] | None  # of the anchors and of the columns


class Stats(NamedTuple):
    """Statistics of R anchors for the logs."""

    hardest: Float[Array, " R"]  # similarity of the most similar negative
    threshold: Float[Array, " R"]  # clipped negatives are at least as similar, kept ones at most
    clipped: Int32[Array, " R"]  # number of clipped negatives
    same: Int32[Array, " R"]  # negatives of the anchor's class
    same_clipped: Int32[Array, " R"]


def default_block_size(num_anchors: int, num_columns: int) -> int:
    """The number of anchors in a block of about `BLOCK` similarities."""
    return min(num_anchors, max(MIN_BLOCK, BLOCK // num_columns))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def total_loss(settings: Settings, batch: Batch) -> tuple[Float[Array, ""], Stats]:
    """The sum of the losses of the anchors.

    Differentiable once, in reverse, with respect to anchors, positive, columns and queue. With a ring the gradient of
    the columns is already summed over the devices, whose losses must have one cotangent: average the loss over the
    axis.
    """
    loss, stats, _ = _all_blocks(settings, batch, differentiate=False)
    return loss, stats


def _forward(settings: Settings, batch: Batch) -> tuple[tuple[Array, Stats], tuple[Array, ...]]:
    loss, stats, gradients = _all_blocks(settings, batch, differentiate=True)
    return (loss, stats), gradients


def _backward(settings: Settings, gradients: tuple[Array, ...], cotangents: tuple[Array, Stats]) -> tuple[Batch]:
    anchors, positive, columns, queue = (cotangents[0] * g for g in gradients)
    return (Batch(anchors, positive, columns, queue, None, None, None, None, None, None),)  # type: ignore[arg-type]


total_loss.defvjp(_forward, _backward)


def objective(
    log_sum: Float[Array, " R"], positive: Float[Array, " R"], *, num_kept: Int32[Array, "*R"], settings: Settings
) -> Float[Array, " R"]:
    """The loss of each anchor, from its kept negatives and its positive.

    `log_sum` is the log-sum-exp over the kept negatives (/ temperature), `positive` the positive similarity.

    NT-Xent, or with settings.debias = rho > 0 the debiased loss of Chuang et al. 2020, where the sum over N negatives
    is replaced by max(N exp(-1/t), (sum - rho N exp(positive/t)) / (1 - rho)).
    """
    positive = positive / settings.temperature
    if not settings.debias:
        return jax.nn.softplus(log_sum - positive)
    top = jax.lax.stop_gradient(jnp.maximum(log_sum, positive))  # cancels, and keeps exponents at most 0
    count = num_kept.astype(jnp.float32)
    total = jnp.exp(log_sum - top) - settings.debias * count * jnp.exp(positive - top)
    debiased = jnp.maximum(count * jnp.exp(-1 / settings.temperature - top), total / (1 - settings.debias))
    log_debiased = jnp.where(debiased > 0, jnp.log(jnp.where(debiased > 0, debiased, 1.0)), -jnp.inf)
    return jax.nn.softplus(log_debiased + top - positive)


def _all_blocks(settings: Settings, batch: Batch, *, differentiate: bool) -> tuple[Array, Stats, tuple[Array, ...]]:
    """The total loss, statistics and gradients, from a scan over the blocks.

    The gradients are those of anchors, positive, columns and queue.
    """
    num_anchors, width = batch.anchors.shape
    size = min(settings.block_size, num_anchors)
    room = jnp.zeros(num_anchors, jnp.int32) if batch.pool is None else batch.pool.room
    rows = batch.anchors, batch.positive, batch.own, batch.partner, room, jnp.ones(num_anchors, jnp.float32)
    labels = None if batch.labels is None else split(batch.labels[0], size)

    def one_block(carry: tuple[Array, ...], block: tuple[tuple[Array, ...], Array | None]) -> tuple[tuple, tuple]:
        loss, stats, gradients = _block(settings, batch, *block, differentiate=differentiate)
        if not differentiate:
            return (carry[0] + loss,), (stats, ())
        by_rows, by_columns = gradients[:2], gradients[2:]
        return tuple(a + b for a, b in zip(carry, (loss, *by_columns), strict=True)), (stats, by_rows)

    start: tuple[Array, ...] = (jnp.zeros((), jnp.float32),)
    if differentiate:  # transposed, because the product that computes them is twice as fast on CPUs
        start += tuple(jnp.zeros((width, len(x)), jnp.float32) for x in (batch.columns, batch.queue))
    carry, (stats, by_rows) = jax.lax.scan(one_block, start, (tuple(split(x, size) for x in rows), labels))
    stats, by_rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num_anchors], (stats, by_rows))
    return carry[0], stats, (*by_rows, *(x.T for x in carry[1:]))


def split(x: Array, size: int) -> Array:
    """Rows in blocks of one size, the last one padded with zeros."""
    num_blocks = -(-len(x) // size)
    padding = num_blocks * size - len(x)
    return jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)).reshape(num_blocks, size, *x.shape[1:])


def _block(
    settings: Settings, batch: Batch, rows: tuple[Array, ...], labels: Array | None, *, differentiate: bool
) -> tuple[Array, Stats, tuple[Array, ...]]:
    """Loss, statistics and gradients of some anchors.

    The gradients are by the anchors, their positives, the columns and the queue.
    """
    anchors, positive, own, partner, room, weight = rows
    similarity, num_columns = negatives(settings, batch, anchors, own, partner)
    num_negatives = num_columns - 2 + batch.filled
    hardest = jnp.max(similarity, axis=1)
    clipped, cut, num_clipped = _clip(settings, batch, similarity, hardest, room, num_negatives)
    num_kept = num_negatives - num_clipped

    remaining = similarity if clipped is None else jnp.where(clipped, -jnp.inf, similarity)
    top = hardest if clipped is None else jnp.max(remaining, axis=1)
    top = jnp.where(top == -jnp.inf, 0.0, top)  # nothing is kept
    powers = jnp.exp((remaining - top[:, None]) / settings.temperature)
    total = jnp.sum(powers, axis=1)
    log_sum = top / settings.temperature + jnp.log(total)
    stats = Stats(hardest, cut, num_clipped, *_count_same(batch, labels, similarity, clipped, num_columns))

    def loss_of(log_sum: Array, positive: Array) -> Array:
        # `where` instead of a product with the weight: padding may hold NaN.
        return jnp.sum(jnp.where(weight > 0, objective(log_sum, positive, num_kept=num_kept, settings=settings), 0.0))

    if not differentiate:
        return loss_of(log_sum, positive), stats, ()
    loss, (by_log_sum, by_positive) = jax.value_and_grad(loss_of, (0, 1))(log_sum, positive)
    scale = jnp.where(total > 0, by_log_sum / jnp.where(total > 0, total, 1.0), 0.0)[:, None] / settings.temperature
    by_anchors, by_columns = _pull_back(settings, powers[:, :num_columns], anchors * scale, batch.columns)
    by_queue = jnp.zeros((anchors.shape[1], 0), jnp.float32)
    if len(batch.queue):
        by_anchors += product(powers[:, num_columns:], batch.queue)
        by_queue = product((anchors * scale).T, powers[:, num_columns:])
    return loss, stats, (by_anchors * scale, by_positive, by_columns, by_queue)


def num_columns(settings: Settings, batch: Batch) -> int:
    """The columns of the global batch."""
    return len(batch.columns) * (jax.lax.axis_size(settings.axis_name) if settings.gather == "ring" else 1)


def negatives(
    settings: Settings, batch: Batch, anchors: Array, own: Array, partner: Array
) -> tuple[Float[Array, "r C_and_Q"], int]:
    """Similarities of anchors to columns, -inf for non-negatives; and the batch column count."""
    similarity = similarities(settings, anchors, batch.columns)
    num_columns = similarity.shape[1]
    column = jax.lax.broadcasted_iota(jnp.int32, similarity.shape, 1)
    similarity = jnp.where((column == own[:, None]) | (column == partner[:, None]), -jnp.inf, similarity)
    if len(batch.queue):
        similarity = jnp.concatenate([similarity, to_queue(batch, anchors)], axis=1)
    return similarity, num_columns


def to_queue(batch: Batch, anchors: Array) -> Float[Array, "r Q"]:
    """Similarities of anchors to the queue, -inf where it is not filled."""
    filled = (jnp.arange(len(batch.queue), dtype=jnp.int32) < batch.filled)[None]
    return jnp.where(filled, product(anchors, batch.queue.T), -jnp.inf)


def _clip(
    settings: Settings, batch: Batch, similarity: Array, hardest: Array, room: Array, num_negatives: Array
) -> tuple[Array | None, Array, Int32[Array, " r"]]:
    """The mask of the clipped negatives or None, the threshold and the number of them.

    Threshold and number are those of each anchor.
    """
    if not settings.clips:
        return None, hardest, jnp.zeros(len(similarity), jnp.int32)
    if batch.pool is not None:
        mask = _threshold.first_ties(similarity, low=batch.pool.low, high=batch.pool.high, room=room)
        return mask, jnp.minimum(batch.pool.low, hardest), _threshold.count_true(mask)
    clip = jnp.minimum(batch.clip, num_negatives)
    low = jnp.full(hardest.shape, -2.0, jnp.float32)  # below any cosine
    reach = jnp.broadcast_to(num_negatives, hardest.shape)
    cut = _threshold.threshold(similarity, clip, low=low, reach=reach, high=hardest)
    return _threshold.select(similarity, cut), jnp.minimum(cut.value, hardest), jnp.broadcast_to(clip, hardest.shape)


def _count_same(
    batch: Batch, labels: Array | None, similarity: Array, clipped: Array | None, num_columns: int
) -> tuple[Int32[Array, " r"], Int32[Array, " r"]]:
    """The negatives of each anchor's class, and the clipped among them; zeros without labels."""
    zero = jnp.zeros(len(similarity), jnp.int32)
    if labels is None or batch.labels is None:
        return zero, zero
    same = same_class(labels, batch.labels[1]) & (similarity[:, :num_columns] > -jnp.inf)
    count = jnp.sum(same, axis=1, dtype=jnp.int32)
    if clipped is None:
        return count, zero
    return count, jnp.sum(same & clipped[:, :num_columns], axis=1, dtype=jnp.int32)


def similarities(settings: Settings, anchors: Array, columns: Array) -> Float[Array, "r C"]:
    """Similarities of anchors to the columns of all devices."""
    if settings.gather == "all":
        return product(anchors, columns.T)

    def hop(remote: Array, _: None) -> tuple[Array, Array]:
        return _pass_on(settings, remote), product(anchors, remote.T)

    _, parts = jax.lax.scan(hop, columns, length=jax.lax.axis_size(settings.axis_name))
    return _to_columns(settings, parts)


def _pull_back(
    settings: Settings, powers: Array, scaled: Array, columns: Array
) -> tuple[Float[Array, "r D"], Float[Array, "D C"]]:
    """powers @ columns, and (powers.T @ scaled).T."""
    if settings.gather == "all":
        return product(powers, columns), product(scaled.T, powers)

    def hop(state: tuple[Array, Array, Array], part: Array) -> tuple[tuple[Array, Array, Array], None]:
        remote, remote_grad, local_grad = state
        local_grad += product(part, remote)
        remote_grad += product(scaled.T, part)
        return (*_pass_on(settings, (remote, remote_grad)), local_grad), None

    start = columns, jnp.zeros(columns.shape[::-1], jnp.float32), jnp.zeros(scaled.shape, jnp.float32)
    (_, columns_grad, local_grad), _ = jax.lax.scan(hop, start, _from_columns(settings, powers))
    return local_grad, columns_grad


def _pass_on(settings: Settings, tree: T) -> T:
    """Sends to the previous device and receives from the next.

    After n hops every shard is back on its device.
    """
    n = jax.lax.axis_size(settings.axis_name)
    return jax.lax.ppermute(tree, settings.axis_name, [(i, (i - 1) % n) for i in range(n)])


def _to_columns(settings: Settings, parts: Float[Array, "n r local"]) -> Float[Array, "r C"]:
    """The parts of n hops, that of this device first, in the order of the global columns."""
    n, r, width = parts.shape
    parts = jnp.roll(parts, jax.lax.axis_index(settings.axis_name), axis=0).reshape(n, r, 2, width // 2)
    return parts.transpose(1, 2, 0, 3).reshape(r, n * width)


def _from_columns(settings: Settings, values: Float[Array, "r C"]) -> Float[Array, "n r local"]:
    """The inverse of `_to_columns`."""
    n = jax.lax.axis_size(settings.axis_name)
    r, width = len(values), values.shape[1] // n
    parts = values.reshape(r, 2, n, width // 2).transpose(2, 0, 1, 3).reshape(n, r, width)
    return jnp.roll(parts, -jax.lax.axis_index(settings.axis_name), axis=0)


def same_class(labels: Num[Array, " r *L"], others: Num[Array, " C *L"]) -> Array:
    """Equal class numbers, or a shared label of multi-hot rows: boolean (r, C)."""
    return labels[:, None] == others[None] if labels.ndim == 1 else (labels @ others.T) > 0


def product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")
