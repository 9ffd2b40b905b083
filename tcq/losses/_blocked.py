"""What each anchor makes of the batch: its loss and the gradient of that, a block of anchors at a time.

The similarities of all pairs never exist at once. A block has those of its anchors to every column, which is all that
it needs to know its most similar negatives, to leave them out, to sum over what is left and to take the gradient: the
products of a step are those of the dense loss, three, and nothing is computed twice. Memory is that of one block.
"""

from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Num

from tcq.losses import _threshold as selection

T = TypeVar("T")
GATHERS = ("all", "ring")
BLOCK = 2**22  # similarities held at once where no block size is asked for: 16 MiB, and a few temporaries of that size
LEAST = 128  # anchors of such a block, or the gradient of the columns is carried through memory too often


class Rule(NamedTuple):
    """How anchors are treated; hashable, for it decides what is compiled."""

    temperature: float
    clips: bool  # whether anything may be clipped
    debias: float  # rho of the debiased estimator; 0 is none
    block_size: int
    gather: str  # "all": `columns` are everybody's; "ring": they are this device's, and go round
    axis_name: str | None


class Batch(NamedTuple):
    """R local anchors, the C columns of the global batch that they see, and Q further negatives. All of unit length."""

    anchors: Float[Array, "R D"]
    positive: Float[Array, " R"]  # similarity to the positive
    columns: Float[Array, "C_or_local D"]  # in the order [view a, view b], of the global batch or of this device
    queue: Float[Array, "Q D"]
    own: Int32[Array, " R"]  # column of the anchor itself, of the global batch
    partner: Int32[Array, " R"]  # column of its positive
    filled: Int32[Array, ""]  # so many of the queue are there
    clip: Int32[Array, ""]
    labels: tuple[Num[Array, " R *L"], Num[Array, " C *L"]] | None  # of the anchors and of the columns


class Seen(NamedTuple):
    """What R anchors saw."""

    hardest: Float[Array, " R"]  # similarity of the most similar negative
    threshold: Float[Array, " R"]  # no kept negative is more similar, and no clipped one less
    same: Int32[Array, " R"]  # negatives of the anchor's own class
    same_clipped: Int32[Array, " R"]


def block_size_for(num_anchors: int, num_columns: int) -> int:
    """Anchors of a block where no size is asked for."""
    return min(num_anchors, max(LEAST, BLOCK // num_columns))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def total_loss(rule: Rule, batch: Batch) -> tuple[Float[Array, ""], Seen]:
    """The sum of the losses of the anchors.

    Differentiable, once and in reverse, by anchors, positive, columns and queue. With a ring the gradient of the columns
    is already summed over the devices, whose losses must have one cotangent: average the loss over the axis.
    """
    loss, seen, _ = _all_blocks(rule, batch, differentiate=False)
    return loss, seen


def _forward(rule: Rule, batch: Batch) -> tuple[tuple[Array, Seen], tuple[Array, ...]]:
    loss, seen, gradients = _all_blocks(rule, batch, differentiate=True)
    return (loss, seen), gradients


def _backward(rule: Rule, gradients: tuple[Array, ...], cotangents: tuple[Array, Seen]) -> tuple[Batch]:
    anchors, positive, columns, queue = (cotangents[0] * g for g in gradients)
    return (Batch(anchors, positive, columns, queue, None, None, None, None, None),)  # type: ignore[arg-type]


total_loss.defvjp(_forward, _backward)


def objective(
    log_sum: Float[Array, " R"], positive: Float[Array, " R"], *, num_kept: Int32[Array, ""], rule: Rule
) -> Float[Array, " R"]:
    """The loss of anchors of these positive similarities and log-sum-exps over their kept negatives (/ temperature).

    NT-Xent, or with rule.debias = rho > 0 the debiased estimate of Chuang et al. 2020, whose sum over N negatives is
    max(N exp(-1/t), (sum - rho N exp(positive/t)) / (1 - rho)).
    """
    positive = positive / rule.temperature
    if not rule.debias:
        return jax.nn.softplus(log_sum - positive)
    top = jax.lax.stop_gradient(jnp.maximum(log_sum, positive))  # cancels: what is exponentiated is at most 0
    total = jnp.exp(log_sum - top) - rule.debias * num_kept * jnp.exp(positive - top)
    debiased = jnp.maximum(num_kept * jnp.exp(-1 / rule.temperature - top), total / (1 - rule.debias))
    log_debiased = jnp.where(debiased > 0, jnp.log(jnp.where(debiased > 0, debiased, 1.0)), -jnp.inf)
    return jax.nn.softplus(log_debiased + top - positive)


def _all_blocks(rule: Rule, batch: Batch, *, differentiate: bool) -> tuple[Array, Seen, tuple[Array, ...]]:
    num_anchors, width = batch.anchors.shape
    size = min(rule.block_size, num_anchors)
    num_blocks = -(-num_anchors // size)
    extra = num_blocks * size - num_anchors

    def blocks(x: Array) -> Array:
        return jnp.pad(x, [(0, extra)] + [(0, 0)] * (x.ndim - 1)).reshape(num_blocks, size, *x.shape[1:])

    local = batch.anchors, batch.positive, batch.own, batch.partner, jnp.ones(num_anchors)
    labels = None if batch.labels is None else blocks(batch.labels[0])

    def one_block(carry: tuple[Array, ...], block: tuple[tuple[Array, ...], Array | None]) -> tuple[tuple, tuple]:
        loss, seen, gradients = _block(rule, batch, *block, differentiate=differentiate)
        if not differentiate:
            return (carry[0] + loss,), (seen, ())
        mine, theirs = gradients[:2], gradients[2:]
        return tuple(a + b for a, b in zip(carry, (loss, *theirs), strict=True)), (seen, mine)

    start: tuple[Array, ...] = (jnp.zeros(()),)
    if differentiate:  # transposed, because the product that makes it is twice as fast so on a CPU
        start += jnp.zeros((width, len(batch.columns))), jnp.zeros((width, len(batch.queue)))
    carry, (seen, mine) = jax.lax.scan(one_block, start, (tuple(map(blocks, local)), labels))
    seen, mine = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num_anchors], (seen, mine))
    return carry[0], seen, (*mine, *(x.T for x in carry[1:]))


def _block(
    rule: Rule, batch: Batch, rows: tuple[Array, ...], labels: Array | None, *, differentiate: bool
) -> tuple[Array, Seen, tuple[Array, ...]]:
    """Loss of some anchors, what they saw, and the gradients by them, their positives, the columns and the queue."""
    anchors, positive, own, partner, weight = rows
    similarity = _similarities(rule, anchors, batch.columns)
    num_columns = similarity.shape[1]
    column = jax.lax.broadcasted_iota(jnp.int32, similarity.shape, 1)
    similarity = jnp.where((column == own[:, None]) | (column == partner[:, None]), -jnp.inf, similarity)
    if len(batch.queue):
        remembered = jnp.where(jnp.arange(len(batch.queue)) < batch.filled, _product(anchors, batch.queue.T), -jnp.inf)
        similarity = jnp.concatenate([similarity, remembered], axis=1)
    num_negatives = num_columns - 2 + batch.filled
    hardest = jnp.max(similarity, axis=1)

    kept, threshold, num_kept = similarity, hardest, num_negatives
    if rule.clips:
        clip = jnp.minimum(batch.clip, num_negatives)
        low = jnp.full(hardest.shape, -2.0)  # below any cosine
        reach = jnp.broadcast_to(num_negatives, hardest.shape)
        cut = selection.cut(similarity, clip, low=low, reach=reach, high=hardest)
        clipped = selection.selected(similarity, cut)
        kept, num_kept = jnp.where(clipped, -jnp.inf, similarity), num_negatives - clip
        threshold = jnp.minimum(cut.value, hardest)
    top = jnp.max(kept, axis=1) if rule.clips else hardest
    top = jnp.where(top == -jnp.inf, 0.0, top)  # where nothing is left
    powers = jnp.exp((kept - top[:, None]) / rule.temperature)
    total = jnp.sum(powers, axis=1)
    log_sum = top / rule.temperature + jnp.log(total)

    same = same_clipped = jnp.zeros(hardest.shape, jnp.int32)
    if labels is not None and batch.labels is not None:
        alike = same_class(labels, batch.labels[1]) & (similarity[:, :num_columns] > -jnp.inf)
        same = jnp.sum(alike, axis=1, dtype=jnp.int32)
        if rule.clips:
            same_clipped = jnp.sum(alike & clipped[:, :num_columns], axis=1, dtype=jnp.int32)
    seen = Seen(hardest, threshold, same, same_clipped)

    def loss_of(log_sum: Array, positive: Array) -> Array:
        # A sum with weights would make NaN of what padding may hold.
        return jnp.sum(jnp.where(weight > 0, objective(log_sum, positive, num_kept=num_kept, rule=rule), 0.0))

    if not differentiate:
        return loss_of(log_sum, positive), seen, ()
    loss, (by_log_sum, by_positive) = jax.value_and_grad(loss_of, (0, 1))(log_sum, positive)
    scale = jnp.where(total > 0, by_log_sum / jnp.where(total > 0, total, 1.0), 0.0)[:, None] / rule.temperature
    by_anchors, by_columns = _pull(rule, powers[:, :num_columns], anchors * scale, batch.columns)
    by_queue = jnp.zeros((anchors.shape[1], 0))
    if len(batch.queue):
        by_anchors += _product(powers[:, num_columns:], batch.queue)
        by_queue = _product((anchors * scale).T, powers[:, num_columns:])
    return loss, seen, (by_anchors * scale, by_positive, by_columns, by_queue)


def _similarities(rule: Rule, anchors: Array, columns: Array) -> Float[Array, "r C"]:
    if rule.gather == "all":
        return _product(anchors, columns.T)

    def hop(visitor: Array, _: None) -> tuple[Array, Array]:
        return _pass_on(rule, visitor), _product(anchors, visitor.T)

    _, parts = jax.lax.scan(hop, columns, length=jax.lax.axis_size(rule.axis_name))
    return _to_columns(rule, parts)


def _pull(rule: Rule, powers: Array, scaled: Array, columns: Array) -> tuple[Float[Array, "r D"], Float[Array, "D C"]]:
    """powers @ columns, and (powers.T @ scaled).T."""
    if rule.gather == "all":
        return _product(powers, columns), _product(scaled.T, powers)

    def hop(state: tuple[Array, Array, Array], part: Array) -> tuple[tuple[Array, Array, Array], None]:
        visitor, luggage, mine = state
        mine += _product(part, visitor)
        luggage += _product(scaled.T, part)
        return (*_pass_on(rule, (visitor, luggage)), mine), None

    start = columns, jnp.zeros(columns.shape[::-1]), jnp.zeros(scaled.shape)
    (_, luggage, mine), _ = jax.lax.scan(hop, start, _from_columns(rule, powers))
    return mine, luggage


def _pass_on(rule: Rule, tree: T) -> T:
    """To the previous device, from the next one: after all hops everything is at home."""
    n = jax.lax.axis_size(rule.axis_name)
    return jax.lax.ppermute(tree, rule.axis_name, [(i, (i - 1) % n) for i in range(n)])


def _to_columns(rule: Rule, parts: Float[Array, "n r local"]) -> Float[Array, "r C"]:
    """The parts of the hops, this device's first, in the order of the global columns."""
    n, r, width = parts.shape
    parts = jnp.roll(parts, jax.lax.axis_index(rule.axis_name), axis=0).reshape(n, r, 2, width // 2)
    return parts.transpose(1, 2, 0, 3).reshape(r, n * width)


def _from_columns(rule: Rule, values: Float[Array, "r C"]) -> Float[Array, "n r local"]:
    """Its inverse."""
    n = jax.lax.axis_size(rule.axis_name)
    r, width = len(values), values.shape[1] // n
    parts = values.reshape(r, 2, n, width // 2).transpose(2, 0, 1, 3).reshape(n, r, width)
    return jnp.roll(parts, -jax.lax.axis_index(rule.axis_name), axis=0)


def same_class(labels: Num[Array, " r *L"], everyone: Num[Array, " C *L"]) -> Array:
    """Equal class numbers, or at least one shared label of multi-hot rows: boolean (r, C)."""
    return labels[:, None] == everyone if labels.ndim == 1 else (labels @ everyone.T) > 0


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")
