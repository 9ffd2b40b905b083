"""The similarity that exactly `count` of all negative pairs of the global batch reach.

The pairs are never stored. The similarities are computed again, block by block, for each pass of the search. A pass
counts how many reach each of some trial values, and sums the counts over the devices. A sample places the first trial
values, so that the interval between two of them holds few pairs; interpolation inside this interval places the next
ones. After two passes few anchors are left, and only their similarities are searched, to the exact float. Evenly spaced
trial values among the others bound the number of passes in every case.

A pair of images counts for each of its two anchors, with one similarity. So a pass computes it for one of them, its
owner: anchor i owns the B - 1 columns that follow its own, of 2B in a circle. Its positive is the next one.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt32

from tcq.losses import _blocked, _threshold
from tcq.losses._blocked import Batch, Pool, Settings
from tcq.losses._threshold import to_ordered_int

MAX_PAIRS = 2**32 - 1  # pairs are counted in uint32
LOW, HIGH = -1.5, 1.5  # below and above all cosines
# Trial values of the first pass: this many times SAMPLE_ERROR off the value estimated from the sample.
FIRST_STEPS = np.array([-32, -6, -2, -0.5, 0.5, 2, 6, 32], np.float32)
# Of the later ones: this many standard deviations off the interpolated value, at least LEAST_STEPS floats.
STEPS = np.array([-3, -1.6, -0.8, -0.25, 0.25, 0.8, 1.6, 3], np.float32)
LEAST_STEPS = np.array([4, 3, 2, 1, 1, 2, 3, 4], np.float32)
EVEN = 1  # further ones, evenly over the interval
FEW = 256  # or fewer of the last anchors are searched without computing their similarities again
SAMPLE = 256  # anchors of a device, paired with one another; of a small batch every eighth
ROUNDING = 1e-6  # similarities so near count as equal where many are: they are rounded otherwise in other blocks
MANY_TIES = 1e-4  # of the clipped pairs
LARGEST_ZERO = 0x7FFFFF  # the key before that of the least normal float
NEAR = 1.15  # ranks this much smaller and larger than that of the sample say how far the trial values are apart
SAMPLE_ERROR = 0.02  # of the sample's rank, as a share of it


class _State(NamedTuple):
    """The interval of keys: at least `count` pairs reach `under`, fewer reach `over`."""

    under: Int32[Array, ""]
    over: Int32[Array, ""]
    reach_under: UInt32[Array, ""]
    reach_over: UInt32[Array, ""]
    rows_under: Int32[Array, " R"]  # of these pairs, those that an anchor of this device owns
    rows_over: Int32[Array, " R"]
    keys: Int32[Array, " P"]  # trial values of the next pass


def pool(settings: Settings, batch: Batch, count: UInt32[Array, ""]) -> Pool:
    """Selects the `count` most similar negative pairs of the global batch.

    Ties go by anchor, then by column. All devices of the axis get one value; `batch` needs no gradient.
    """
    num_rows = len(batch.anchors)
    few = min(num_rows, max(settings.block_size, 2), FEW)  # 2: all of a single image, whose anchors own nothing

    def is_open(s: _State) -> Array:
        return (s.over - 1 > s.under) & (s.reach_under > count) & (count > 0)

    def has_many_rows(s: _State) -> Array:
        return _over_devices(jax.lax.pmax, settings, jnp.sum(s.rows_under > s.rows_over, dtype=jnp.int32)) > few

    def narrow_all(s: _State) -> _State:
        return _place(_narrow(settings, s, count, _count_owned(settings, batch, s.keys)), count)

    s = _start(settings, batch, count)
    if few < num_rows:
        s = jax.lax.while_loop(lambda s: is_open(s) & has_many_rows(s), narrow_all, s)
    rows = jnp.nonzero(s.rows_under > s.rows_over, size=few, fill_value=num_rows)[0]
    present = (rows < num_rows)[:, None]
    anchors, own = (jnp.take(x, rows, axis=0, mode="clip") for x in (batch.anchors, batch.own))
    owned, queued = (jnp.where(present, x, -jnp.inf) for x in _of_owners(settings, batch, anchors, own))
    values = jnp.concatenate([owned, queued], axis=1)

    def narrow_few(s: _State) -> _State:
        counts = _count(owned, queued, to_ordered_int(s.keys))
        others = jnp.broadcast_to(s.rows_over[:, None], (num_rows, len(s.keys)))
        s = _narrow(settings, s, count, others.at[rows].set(counts, mode="drop"))
        return _place(_shrink(settings, s, values), count)

    end = jax.lax.while_loop(is_open, narrow_few, s)
    middle = to_ordered_int(end.under)
    near = _over_devices(jax.lax.psum, settings, jnp.sum(_count_near(owned, queued, middle)))
    low, high, ties, above = jax.lax.cond(
        has_many_rows(s) | (near.astype(jnp.float32) > jnp.maximum(2.0, MANY_TIES * count.astype(jnp.float32))),
        lambda: _ties_of_all(settings, batch, middle - ROUNDING, middle + ROUNDING),
        lambda: (*_between(settings, s, end, values), _ties_of_few(settings, end, own, owned, queued), end.reach_over),
    )
    low, high = (jnp.where(count > 0, _threshold.flushed(x), jnp.inf) for x in (low, high))
    return Pool(low, high, _first(ties, jnp.where(count > above, count - above, 0).astype(jnp.uint32))[batch.own])


def _over_devices(reduce: Callable[..., Array], settings: Settings, x: Array) -> Array:
    return x if settings.axis_name is None else reduce(x, settings.axis_name)


def _narrow(settings: Settings, s: _State, count: Array, rows: Int32[Array, "R P"]) -> _State:
    """The state after a pass.

    `rows` counts for each anchor of this device the pairs it owns that reach each key.
    """
    reach = _over_devices(jax.lax.psum, settings, jnp.sum(rows, axis=0, dtype=jnp.uint32))
    enough = reach >= count
    low = jnp.argmax(jnp.where(enough, s.keys, s.under))
    high = jnp.argmin(jnp.where(enough, s.over, s.keys))
    raised, lowered = jnp.any(enough), ~jnp.all(enough)
    return s._replace(
        under=jnp.where(raised, s.keys[low], s.under),
        reach_under=jnp.where(raised, reach[low], s.reach_under),
        rows_under=jnp.where(raised, rows[:, low], s.rows_under),
        over=jnp.where(lowered, s.keys[high], s.over),
        reach_over=jnp.where(lowered, reach[high], s.reach_over),
        rows_over=jnp.where(lowered, rows[:, high], s.rows_over),
    )


def _inside(s: _State, values: Array) -> Array:
    return (values >= to_ordered_int(s.under)) & (values < to_ordered_int(s.over))


def _shrink(settings: Settings, s: _State, values: Float[Array, "r V"]) -> _State:
    """The state whose interval ends at the least and the largest value inside.

    So ties end the search.
    """
    inside = _inside(s, values)
    least = jnp.min(jnp.where(inside, values, HIGH))
    largest = jnp.max(jnp.where(inside, values, LOW))
    under = jnp.clip(_key(_over_devices(jax.lax.pmin, settings, least)), s.under, s.over - 1)
    over = jnp.clip(_key(_over_devices(jax.lax.pmax, settings, largest)) + 1, under + 1, s.over)
    return s._replace(under=under, over=over)


def _between(settings: Settings, start: _State, end: _State, values: Float[Array, "r V"]) -> tuple[Array, Array]:
    """Values halfway from the pairs inside the interval to the next ones below and above.

    So it does not matter that similarities are rounded otherwise when they are computed again. `values` has all pairs
    inside the interval `start`.
    """
    inside = _inside(end, values)
    under, over, start_under, start_over = (to_ordered_int(x) for x in (end.under, end.over, start.under, start.over))
    least, above = (jnp.min(jnp.where(x, values, start_over)) for x in (inside, values >= over))
    largest, below = (jnp.max(jnp.where(x, values, start_under)) for x in (inside, values < under))
    least, above = (_over_devices(jax.lax.pmin, settings, x) for x in (least, above))
    largest, below = (_over_devices(jax.lax.pmax, settings, x) for x in (largest, below))
    low, high = (least + below) / 2, (largest + above) / 2
    return jnp.where(low > below, low, least), jnp.where(high < above, high, largest)


def _key(value: Array) -> Array:
    """The largest key of the floats that XLA takes for equal.

    Those below 1e-38 are 0 when it compares.
    """
    return jnp.where(value == 0, LARGEST_ZERO, to_ordered_int(value))


def _start(settings: Settings, batch: Batch, count: Array) -> _State:
    num_rows, num_columns = len(batch.anchors), _blocked.num_columns(settings, batch)
    negatives = (num_columns - 2 + batch.filled).astype(jnp.int32)
    total = negatives.astype(jnp.uint32) * jnp.uint32(num_columns)
    under, over = (to_ordered_int(jnp.float32(x)) for x in (LOW, HIGH))
    rows = jnp.broadcast_to(negatives, (num_rows,))
    share = count.astype(jnp.float32) / jnp.maximum(total.astype(jnp.float32), 1)
    none = jnp.zeros(num_rows, jnp.int32)
    keys = jnp.concatenate([to_ordered_int(_sample(settings, batch, share)), _even(under, over)])
    return _State(under, over, total, jnp.uint32(0), rows, none, jnp.clip(keys, under + 1, over - 1))


def _sample(settings: Settings, batch: Batch, share: Array) -> Float[Array, " S"]:
    """Values that about `share` of negative pairs reach, estimated from some of each device."""
    num_rows = len(batch.anchors)
    size = min(SAMPLE, -(-num_rows // 8))
    random = np.random.RandomState(0)
    rows, columns = (random.permutation(num_rows)[:size] for _ in range(2))
    own, partner, others = batch.own[rows, None], batch.partner[rows, None], batch.own[None, columns]
    similarity = _blocked.product(batch.anchors[rows], batch.anchors[columns].T)
    negative = (others != own) & (others != partner)
    values = jnp.where(negative, similarity, -jnp.inf).ravel()
    total = jnp.sum(negative, dtype=jnp.int32)
    logs = np.array([-np.log(NEAR), 0, np.log(NEAR)], np.float32)
    rank = (share * jnp.exp(logs) * total.astype(jnp.float32)).astype(jnp.int32)
    rank = jnp.clip(rank, jnp.minimum(total, 1), total).astype(jnp.int32)
    low, reach, high = (jnp.broadcast_to(x, rank.shape) for x in (jnp.float32(LOW), total, jnp.max(values)))
    trials = jnp.broadcast_to(values, (len(rank), len(values)))
    near = _threshold.threshold(trials, rank, low=low, reach=reach, high=jnp.maximum(high, LOW)).value
    fewer, middle, more = (_over_devices(jax.lax.pmean, settings, jnp.clip(x, LOW, HIGH)) for x in near)
    slope = jnp.where(FIRST_STEPS < 0, middle - more, fewer - middle) / logs[2]
    return jnp.clip(middle + slope * SAMPLE_ERROR * FIRST_STEPS, LOW, HIGH)


def _place(s: _State, count: Array) -> _State:
    """The state with trial values inside the interval.

    They are near the one that interpolation expects, and spread evenly.
    """
    inside = jnp.maximum((s.reach_under - s.reach_over).astype(jnp.float32), 1)
    position = (s.reach_under - count).astype(jnp.float32) / inside
    error = jnp.sqrt(2 * position * (1 - position) / inside)  # a pair counts twice
    under, over = to_ordered_int(s.under), to_ordered_int(s.over)
    key = to_ordered_int(under + (over - under) * position)
    width = (s.over - s.under).astype(jnp.float32)
    steps = jnp.maximum(jnp.abs(STEPS) * jnp.minimum(error * width, width / 4), LEAST_STEPS)
    placed = key + (jnp.sign(STEPS) * jnp.minimum(steps, width)).astype(jnp.int32)
    keys = jnp.concatenate([placed, _even(s.under, s.over)])
    return s._replace(keys=jnp.clip(keys, s.under + 1, s.over - 1))


def _even(under: Array, over: Array) -> Int32[Array, " EVEN"]:
    return under + jnp.maximum((over - under) // (EVEN + 1), 1) * jnp.arange(1, EVEN + 1, dtype=jnp.int32)


def _count_owned(settings: Settings, batch: Batch, keys: Int32[Array, " P"]) -> Int32[Array, "R P"]:
    """How many of the pairs that each anchor of this device owns reach each key."""
    b, width = len(batch.anchors) // 2, batch.anchors.shape[1]
    owned = _blocked.num_columns(settings, batch) // 2
    size = min(settings.block_size, _threshold.rows_to_count(owned + owned // 4), max(owned // 4, 128), b)
    values = to_ordered_int(keys)
    around = jnp.concatenate([batch.columns, batch.columns[: len(batch.columns) // 2 + size]])

    def one_block(block: tuple[Array, Array]) -> Array:
        anchors, own = block
        return _count(*_of_owners(settings, batch, anchors, own, around), values)

    def one_view(view: tuple[Array, Array]) -> Array:
        anchors, own = view
        blocks = _blocked.split(anchors, size)
        first = own[0] + size * jnp.arange(len(blocks), dtype=jnp.int32)[:, None]
        counts = jax.lax.map(one_block, (blocks, first + jnp.arange(size, dtype=jnp.int32)[None]))
        return counts.reshape(-1, len(keys))[:b]

    views = batch.anchors.reshape(2, b, width), batch.own.reshape(2, b)
    return jax.lax.map(one_view, views).reshape(2 * b, len(keys))


def _of_owners(
    settings: Settings, batch: Batch, anchors: Array, own: Array, around: Array | None = None
) -> tuple[Float[Array, "r C"], Float[Array, "r Q"]]:
    """Similarities of anchors to the columns they own, and to the queue.

    Other columns have -inf. With `around`, the columns followed by those at their beginning, the anchors are
    consecutive: then only the columns are computed that one of them owns.
    """
    queued = _blocked.to_queue(batch, anchors)
    num_owned = _blocked.num_columns(settings, batch) // 2 - 1
    if around is None or settings.gather == "ring":
        similarity = _blocked.similarities(settings, anchors, batch.columns)
        after = jax.lax.broadcasted_iota(jnp.int32, similarity.shape, 1) - own[:, None] - 1
        after = jnp.where(after < 0, after + similarity.shape[1], after)
    else:
        columns = jax.lax.dynamic_slice_in_dim(around, own[0] + 1, num_owned + len(anchors) - 1)
        similarity = _blocked.product(anchors, columns.T)
        after = jnp.arange(len(columns))[None] - jnp.arange(len(anchors))[:, None]
    return jnp.where((after >= 0) & (after < num_owned), similarity, -jnp.inf), queued


def _count(owned: Float[Array, "r C"], queued: Float[Array, "r Q"], trials: Float[Array, " P"]) -> Int32[Array, "r P"]:
    """The pairs of each row that reach each value: those of two anchors count twice."""
    counts = 2 * _threshold.count_reaching(owned, trials)
    return counts + _threshold.count_reaching(queued, trials) if queued.size else counts


def _ties_of_few(settings: Settings, s: _State, own: Array, owned: Array, queued: Array) -> Int32[Array, " C"]:
    """How many pairs inside the interval each anchor of the global batch has.

    All of them are among the given similarities.
    """
    tied = _inside(s, owned)
    by_row = jnp.sum(tied, axis=1, dtype=jnp.int32) + jnp.sum(_inside(s, queued), axis=1, dtype=jnp.int32)
    return _over_devices(jax.lax.psum, settings, jnp.sum(tied, axis=0, dtype=jnp.int32).at[own].add(by_row))


def _count_near(owned: Float[Array, "r C"], queued: Float[Array, "r Q"], value: Array) -> Int32[Array, " r"]:
    """How many pairs of each row equal a value up to rounding."""
    reach = _count(owned, queued, jnp.stack([value - ROUNDING, value + ROUNDING]))
    return reach[:, 0] - reach[:, 1]


def _ties_of_all(
    settings: Settings, batch: Batch, low: Array, high: Array
) -> tuple[Array, Array, Int32[Array, " C"], UInt32[Array, ""]]:
    """`low`, `high`, the number of pairs between them of each anchor, and of all above."""
    ends = jnp.stack([low, to_ordered_int(to_ordered_int(high) + 1)])
    size = min(settings.block_size, _threshold.rows_to_count(_blocked.num_columns(settings, batch)))

    def one_block(rows: tuple[Array, ...]) -> Array:
        similarity, _ = _blocked.negatives(settings, batch, *rows)
        return _threshold.count_reaching(similarity, ends)

    blocks = tuple(_blocked.split(x, size) for x in (batch.anchors, batch.own, batch.partner))
    counts = jax.lax.map(one_block, blocks).reshape(-1, 2)[: len(batch.own)]
    none = jnp.zeros(_blocked.num_columns(settings, batch), jnp.int32)
    ties = _over_devices(jax.lax.psum, settings, none.at[batch.own].set(counts[:, 0] - counts[:, 1]))
    return low, high, ties, _over_devices(jax.lax.psum, settings, jnp.sum(counts[:, 1], dtype=jnp.uint32))


def _first(ties: Int32[Array, " C"], room: UInt32[Array, ""]) -> Int32[Array, " C"]:
    """How many ties of each anchor are in the first `room` of the global batch, or ALL."""
    counts = ties.astype(jnp.uint32)
    before = jnp.cumsum(counts, dtype=jnp.uint32) - counts
    taken = jnp.minimum(jnp.where(room > before, room - before, 0), counts)
    return jnp.where(taken == counts, _blocked.ALL, taken.astype(jnp.int32))
