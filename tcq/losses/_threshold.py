"""The threshold of each row that exactly `count` values reach, found without sorting.

Sorting a row costs many times the matrix product that computed it, on every backend. The search compares and counts
instead: false position (the Illinois rule) on the logit of the share of larger values, with an occasional bisection of
the bits of the floats, so that it always ends.
"""

from collections.abc import Callable
from math import gcd
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Int32

SLICES = 8  # of a row, counted side by side: XLA vectorizes that on CPUs, but not a plain sum over the row
CACHED = 2**18  # values searched at a time on a CPU: 1 MiB fits its cache
PARTS = 4  # of this size, counted by one program for all threads


class Threshold(NamedTuple):
    """Selects in each row the values above `value`, and equal ones up to the column `last`."""

    value: Float[Array, " R"]
    last: Int32[Array, " R"]


def threshold(
    values: Float[Array, "R C"],
    count: ArrayLike,
    *,
    low: Float[Array, " R"],
    reach: Int32[Array, " R"],
    high: Float[Array, " R"],
) -> Threshold:
    """The threshold for the `count` largest values of every row, the first columns among ties.

    Args:
      values: float32. NaN is never selected, and counts as lower than any number.
      count: from 0 to `reach`, for all rows or for each; may be traced.
      low, reach: for each row a finite number that at least `count` values reach, and how many reach it.
      high: the largest value of each row.

    Returns:
      As `value` the smallest selected value, or a number between it and the next lower one; infinity for count 0.
    """
    num_rows, num_columns = values.shape
    count = jnp.asarray(count, jnp.int32)
    count = jnp.broadcast_to(count, (num_rows,))
    rows = _cached_rows(num_rows, num_columns)
    if jax.default_backend() != "cpu" or rows == num_rows:
        return _search(values, count, low, reach, high)
    parts = [x.reshape(num_rows // rows, rows, *x.shape[1:]) for x in (values, count, low, reach, high)]
    results = jax.lax.map(lambda part: _search(*part), parts)
    return Threshold(*(x.reshape(num_rows) for x in results))


def first_ties(
    values: Float[Array, "R C"], *, low: Float[Array, ""], high: Float[Array, ""], room: Int32[Array, " R"]
) -> Bool[Array, "R C"]:
    """The mask of the values above `high`, and of some from `low` to `high`.

    In each row these are the first `room`. NaN is not selected.
    """
    last = jnp.where(room > 0, values.shape[1] - 1, -1).astype(jnp.int32)
    some = (room > 0) & (room < values.shape[1])

    def find() -> Array:
        return jnp.where(some, _last_of(room, lambda: (values >= low) & (values <= high)), last)

    last = jax.lax.cond(jnp.any(some), find, lambda: last)
    column = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)
    return (values > high) | ((values >= low) & (column <= last[:, None]))


def count_reaching(values: Float[Array, "R C"], trials: Float[Array, " P"]) -> Int32[Array, "R P"]:
    """How many values of each row reach each trial value."""
    if jax.default_backend() != "cpu":
        return jnp.sum(values[:, :, None] >= trials, axis=1, dtype=jnp.int32)
    num_rows, num_columns = values.shape
    rows = _cached_rows(num_rows, num_columns)
    parts = gcd(num_rows // rows, PARTS)

    def some_parts(some: Array) -> Array:
        return jnp.stack([one_part(some[i]) for i in range(parts)])

    def one_part(part: Array) -> Array:
        return jnp.stack([count_true(part >= trials[i]) for i in range(len(trials))], axis=1)

    counts = jax.lax.map(some_parts, values.reshape(-1, parts, rows, num_columns))
    return counts.reshape(num_rows, len(trials))


def rows_to_count(num_columns: int) -> int:
    """The number of rows for which `count_reaching` is fast.

    On a CPU these are a few parts that fit its cache.
    """
    return PARTS * _cached_rows(1 << 20, num_columns) if jax.default_backend() == "cpu" else 1 << 20


def select(values: Float[Array, "R C"], by: Threshold) -> Bool[Array, "R C"]:
    """The mask of the values that a threshold selects."""
    value, last = by.value[:, None], by.last[:, None]
    return (values > value) | ((values == value) & (jax.lax.broadcasted_iota(jnp.int32, values.shape, 1) <= last))


class _State(NamedTuple):
    """The bracket of each row: at least `count` values reach `under`, fewer reach `over`."""

    i: Array
    under: Array
    over: Array
    reach_under: Array
    reach_over: Array
    side: Array  # the end that moved last: 1 under, -1 over
    weight: Array  # of the other end


def _search(values: Array, count: Array, low: Array, reach: Array, high: Array) -> Threshold:
    num_columns = values.shape[1]
    target = _logit(jnp.asarray(count).astype(jnp.float32) + 0.25, num_columns)

    def is_open(s: _State) -> Array:
        return (s.over - 1 > s.under) & (s.reach_under > count) & (count > 0)

    def narrow(s: _State) -> _State:
        guess = _guess(s, target, num_columns)
        reached = count_true(values >= to_ordered_int(guess)[:, None])
        enough, live = reached >= count, is_open(s)
        side = jnp.where(enough, jnp.int32(1), jnp.int32(-1))
        return _State(
            s.i + 1,
            jnp.where(live & enough, guess, s.under),
            jnp.where(live & ~enough, guess, s.over),
            jnp.where(live & enough, reached, s.reach_under),
            jnp.where(live & ~enough, reached, s.reach_over),
            side,
            jnp.where(side == s.side, s.weight * 0.5, 0.5),
        )

    zero = jnp.zeros(low.shape, jnp.int32)
    weight = jnp.ones(low.shape, jnp.float32)
    start = _State(jnp.int32(0), to_ordered_int(low), to_ordered_int(high) + 1, reach, zero, zero, weight)
    end = jax.lax.while_loop(lambda s: jnp.any(is_open(s)), narrow, start)
    value = jnp.where(count > 0, flushed(to_ordered_int(end.under)), jnp.inf)
    ties = (end.reach_under > count) & (count > 0)
    room = count - end.reach_over
    every = jnp.full(value.shape, num_columns - 1, jnp.int32)
    last = jax.lax.cond(jnp.any(ties), lambda: _last_of(room, lambda: values == value[:, None]), lambda: every)
    return Threshold(value, jnp.where(count > 0, last, -1))


def _guess(s: _State, target: Array, num_columns: int) -> Int32[Array, " R"]:
    """The next key to try, by false position or bisection.

    In false position an end that stays twice loses half its weight.
    """
    a = (_logit(s.reach_under, num_columns) - target) * jnp.where(s.side < 0, s.weight, 1)
    b = (target - _logit(s.reach_over, num_columns)) * jnp.where(s.side > 0, s.weight, 1)
    under = to_ordered_int(s.under)
    position = to_ordered_int(under + (to_ordered_int(s.over) - under) * (a / (a + b)))
    middle = (s.under & s.over) + ((s.under ^ s.over) >> 1)
    return jnp.where((s.i > 8) & (s.i % 4 == 0), middle, jnp.clip(position, s.under + 1, s.over - 1))


def _last_of(room: Int32[Array, " R"], ties: Callable[[], Bool[Array, "R C"]]) -> Int32[Array, " R"]:
    """The first column up to which a row has `room` ties; the last if it has fewer."""
    shape = jax.eval_shape(ties).shape
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 1)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        first, last = bounds
        middle = (first + last) // 2
        enough = count_true(ties() & (column <= middle[:, None])) >= room
        return jnp.where(enough, first, middle + 1), jnp.where(enough, middle, last)

    ends = jnp.zeros(room.shape, jnp.int32), jnp.full(room.shape, shape[1] - 1, jnp.int32)
    return jax.lax.fori_loop(0, shape[1].bit_length(), halve, ends)[1]


def _cached_rows(num_rows: int, num_columns: int) -> int:
    """A divisor of the number of rows: the rows that fit the cache of a CPU."""
    return gcd(num_rows, 1 << max(CACHED // num_columns, 1).bit_length() - 1)


def count_true(mask: Bool[Array, "R C"]) -> Int32[Array, " R"]:
    """The number of true values in each row."""
    width = mask.shape[1] // SLICES
    rest = jnp.sum(mask[:, width * SLICES :], axis=1, dtype=jnp.int32)
    if not width:
        return rest
    lanes = sum(mask[:, i * width : (i + 1) * width].astype(jnp.int32) for i in range(SLICES))
    return rest + jnp.sum(jnp.asarray(lanes), axis=1, dtype=jnp.int32)


def _logit(count: Int[Array, "*n"] | Float[Array, "*n"], total: int) -> Float[Array, "*n"]:
    """log(count / (total - count)), finite for 0 and the total."""
    below, above = (jnp.asarray(x).astype(jnp.float32) + 0.5 for x in (count, total - count))
    return jnp.log(below / above)


def flushed(x: Array) -> Array:
    """x, with 0 for numbers below 1e-38, which XLA takes for 0 when it compares."""
    return jnp.where(x == 0, 0.0, x)


def to_ordered_int(x: Array) -> Array:
    """float32 as int32 of the same order, and int32 back to float32."""
    dtype = jnp.int32 if x.dtype == jnp.float32 else jnp.float32
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    ordered = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return jax.lax.bitcast_convert_type(ordered, dtype)
