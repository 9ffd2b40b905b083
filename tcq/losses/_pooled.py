"""The similarity that exactly `count` of all negative pairs of the global batch reach.

The pairs are never stored. The similarities are computed again, block by block, for each pass of the search. A pass
counts how many reach each of some trial values, and sums the counts over the devices. A sample places the first trial
values, so that the interval between two of them holds few pairs; interpolation inside this interval places the next
ones. After two or three passes few anchors are left, and only their similarities are searched, to the exact float.
Evenly spaced trial values among the others bound the number of passes in every case.
"""

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
# Trial values of a pass: STEPS times the expected error off the expected value, and at least LEAST_STEPS floats.
STEPS = np.array([-32, -6, -2, -0.5, 0.5, 2, 6, 32], np.float32)
LEAST_STEPS = np.array([4, 3, 2, 1, 1, 2, 3, 4], np.float32)
EVEN = 1  # further ones, evenly over the interval
FEW = 4  # times rows_to_count: as many of the last anchors are searched without computing their similarities again
SAMPLE = 256  # anchors of a device, paired with one another
SAMPLE_ERROR = 0.02  # of the sample's rank, as a share of it


class _State(NamedTuple):
    """The interval of keys: at least `count` pairs reach `under`, fewer reach `over`."""

    under: Int32[Array, ""]
    over: Int32[Array, ""]
    reach_under: UInt32[Array, ""]
    reach_over: UInt32[Array, ""]
    rows_under: Int32[Array, " R"]  # of these pairs, those of each anchor of this device
    rows_over: Int32[Array, " R"]
    keys: Int32[Array, " P"]  # trial values of the next pass


def pool(settings: Settings, batch: Batch, count: UInt32[Array, ""]) -> Pool:
    """Selects the `count` most similar negative pairs of the global batch.

    Ties go by anchor, then by column. All devices of the axis get one value; `batch` needs no gradient.
    """
    num_rows = len(batch.anchors)
    counted = _threshold.rows_to_count(_blocked.num_columns(settings, batch))
    few = min(num_rows, settings.block_size, FEW * counted)

    def is_open(s: _State) -> Array:
        return (s.over - 1 > s.under) & (s.reach_under > count) & (count > 0)

    def has_many_rows(s: _State) -> Array:
        rows = jnp.sum(s.rows_under > s.rows_over, dtype=jnp.int32)
        return (rows if settings.axis_name is None else jax.lax.pmax(rows, settings.axis_name)) > few

    def narrow_all(s: _State) -> _State:
        return _narrow(settings, s, count, _count_all_rows(settings, batch, s.keys))

    s = _start(settings, batch, count)
    if few < num_rows:
        s = jax.lax.while_loop(lambda s: is_open(s) & has_many_rows(s), narrow_all, s)
    rows = jnp.nonzero(s.rows_under > s.rows_over, size=few, fill_value=num_rows)[0]
    anchors, own, partner = (jnp.take(x, rows, axis=0, mode="clip") for x in (batch.anchors, batch.own, batch.partner))
    similarity, _ = _blocked.negatives(settings, batch, anchors, own, partner)

    def narrow_few(s: _State) -> _State:
        counts = _threshold.count_reaching(similarity, to_ordered_int(s.keys))
        others = jnp.broadcast_to(s.rows_over[:, None], (num_rows, len(s.keys)))
        return _narrow(settings, s, count, others.at[rows].set(counts, mode="drop"))

    end = jax.lax.while_loop(is_open, narrow_few, s)
    ties = _first(settings, end.rows_under - end.rows_over, (count - end.reach_over).astype(jnp.uint32))
    every = jnp.full(num_rows, jnp.iinfo(jnp.int32).max, jnp.int32)
    value = jnp.where(count > 0, _threshold.flushed(to_ordered_int(end.under)), jnp.inf)
    return Pool(value, jnp.where(end.reach_under == count, every, ties))


def _narrow(settings: Settings, s: _State, count: Array, rows: Int32[Array, "R P"]) -> _State:
    """The state after a pass.

    `rows` counts for each anchor of this device the negatives that reach each key.
    """
    reach = jnp.sum(rows, axis=0, dtype=jnp.uint32)
    reach = reach if settings.axis_name is None else jax.lax.psum(reach, settings.axis_name)
    enough = reach >= count
    low = jnp.argmax(jnp.where(enough, s.keys, s.under))
    high = jnp.argmin(jnp.where(enough, s.over, s.keys))
    raised, lowered = jnp.any(enough), ~jnp.all(enough)
    s = s._replace(
        under=jnp.where(raised, s.keys[low], s.under),
        reach_under=jnp.where(raised, reach[low], s.reach_under),
        rows_under=jnp.where(raised, rows[:, low], s.rows_under),
        over=jnp.where(lowered, s.keys[high], s.over),
        reach_over=jnp.where(lowered, reach[high], s.reach_over),
        rows_over=jnp.where(lowered, rows[:, high], s.rows_over),
    )
    return s._replace(keys=_place(s, count))


def _start(settings: Settings, batch: Batch, count: Array) -> _State:
    num_rows, num_columns = len(batch.anchors), _blocked.num_columns(settings, batch)
    negatives = (num_columns - 2 + batch.filled).astype(jnp.int32)
    total = negatives.astype(jnp.uint32) * jnp.uint32(num_columns)
    under, over = (to_ordered_int(jnp.float32(x)) for x in (LOW, HIGH))
    rows = jnp.broadcast_to(negatives, (num_rows,))
    share = count.astype(jnp.float32) / jnp.maximum(total.astype(jnp.float32), 1)
    guesses = to_ordered_int(_sample(settings, batch, share))
    none = jnp.zeros(num_rows, jnp.int32)
    keys = jnp.concatenate([guesses, _even(under, over)])
    return _State(under, over, total, jnp.uint32(0), rows, none, jnp.clip(keys, under + 1, over - 1))


def _sample(settings: Settings, batch: Batch, share: Array) -> Float[Array, " S"]:
    """Values that about `share` of negative pairs reach, estimated from some of each device."""
    num_rows = len(batch.anchors)
    random = np.random.RandomState(0)
    rows, columns = (random.permutation(num_rows)[:SAMPLE] for _ in range(2))
    own, partner, others = batch.own[rows, None], batch.partner[rows, None], batch.own[None, columns]
    similarity = _blocked.product(batch.anchors[rows], batch.anchors[columns].T)
    negative = (others != own) & (others != partner)
    values = jnp.where(negative, similarity, -jnp.inf).ravel()
    total = jnp.sum(negative, dtype=jnp.int32)
    rank = jnp.clip(
        (share * jnp.exp(SAMPLE_ERROR * STEPS) * total.astype(jnp.float32)).astype(jnp.int32),
        jnp.minimum(total, 1),
        total,
    ).astype(jnp.int32)
    low, reach, high = (jnp.broadcast_to(x, STEPS.shape) for x in (jnp.float32(LOW), total, jnp.max(values)))
    trials = jnp.broadcast_to(values, (len(STEPS), len(values)))
    guesses = _threshold.threshold(trials, rank, low=low, reach=reach, high=jnp.maximum(high, LOW)).value
    guesses = jnp.clip(guesses, LOW, HIGH)
    return guesses if settings.axis_name is None else jax.lax.pmean(guesses, settings.axis_name)


def _place(s: _State, count: Array) -> Int32[Array, " P"]:
    """Trial values inside the interval: near the one that interpolation expects, and evenly."""
    inside = jnp.maximum((s.reach_under - s.reach_over).astype(jnp.float32), 1)
    position = (s.reach_under - count).astype(jnp.float32) / inside
    error = jnp.sqrt(position * (1 - position) / inside)
    under, over = to_ordered_int(s.under), to_ordered_int(s.over)
    key = to_ordered_int(under + (over - under) * position)
    width = (s.over - s.under).astype(jnp.float32)
    steps = jnp.maximum(jnp.abs(STEPS) * jnp.minimum(error * width, width / 4), LEAST_STEPS)
    placed = key + (jnp.sign(STEPS) * jnp.minimum(steps, width)).astype(jnp.int32)
    return jnp.clip(jnp.concatenate([placed, _even(s.under, s.over)]), s.under + 1, s.over - 1)


def _even(under: Array, over: Array) -> Int32[Array, " EVEN"]:
    return under + jnp.maximum((over - under) // (EVEN + 1), 1) * jnp.arange(1, EVEN + 1, dtype=jnp.int32)


def _count_all_rows(settings: Settings, batch: Batch, keys: Int32[Array, " P"]) -> Int32[Array, "R P"]:
    """How many negatives of each anchor of this device reach each key."""
    values = to_ordered_int(keys)

    def one_block(rows: tuple[Array, ...]) -> Array:
        anchors, own, partner, present = rows
        similarity, _ = _blocked.negatives(settings, batch, anchors, own, partner)
        return jnp.where(present[:, None], _threshold.count_reaching(similarity, values), 0)

    present = jnp.ones(len(batch.anchors), bool)
    rows = batch.anchors, batch.own, batch.partner, present
    size = min(settings.block_size, _threshold.rows_to_count(_blocked.num_columns(settings, batch) + len(batch.queue)))
    counts = jax.lax.map(one_block, tuple(_blocked.split(x, size) for x in rows))
    return counts.reshape(-1, len(keys))[: len(present)]


def _first(settings: Settings, ties: Int32[Array, " R"], room: UInt32[Array, ""]) -> Int32[Array, " R"]:
    """How many ties of each anchor of this device are in the first `room` of the global batch."""
    both = ties.reshape(2, -1)
    if settings.axis_name is not None:
        both = jax.lax.all_gather(both, settings.axis_name, axis=1, tiled=True)
    counts = both.ravel().astype(jnp.uint32)
    before = jnp.cumsum(counts, dtype=jnp.uint32) - counts
    taken = jnp.minimum(jnp.where(room > before, room - before, 0), counts).reshape(both.shape).astype(jnp.int32)
    if settings.axis_name is not None:
        first = jax.lax.axis_index(settings.axis_name) * (len(ties) // 2)
        taken = jax.lax.dynamic_slice_in_dim(taken, first, len(ties) // 2, axis=1)
    return taken.ravel()
