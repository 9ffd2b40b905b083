"""Which are the `count` largest values of every row: exactly so many, the first column first among equals, without a sort.

A sort of the rows costs many times the matrix product that made them, on every backend. Here the threshold of a row is
searched for in passes that compare and count: false position (the Illinois rule) on the logit of the share above it,
with bisection of the bits of the floats from time to time, so that it always ends.
"""

from math import gcd
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Int32

SLICES = 8  # of a row, counted side by side: XLA's CPU backend makes vector code of that, not of a plain row sum
CACHED = 2**18  # values searched at a time on a CPU: 1 MiB stays in its cache


class Cut(NamedTuple):
    """Where each row is cut: selected is what is above `value`, and of what equals it the columns up to `last`."""

    value: Float[Array, " R"]
    last: Int32[Array, " R"]


def cut(
    values: Float[Array, "R C"],
    count: ArrayLike,
    *,
    low: Float[Array, " R"],
    reach: Int32[Array, " R"],
    high: Float[Array, " R"],
) -> Cut:
    """The cut that selects the `count` largest values of every row.

    Args:
      values: float32. NaN is never selected, and counts as below everything.
      count: from 0 to the least `reach`; may be traced.
      low, reach: a finite number below which `count` values of each row do not go, and how many are not below it, (R,).
      high: the largest value of each row, (R,).

    Returns:
      Of what is selected the smallest value or, where no value equals another there, a number between it and the next;
      infinity where the count is 0.
    """
    num_rows, num_columns = values.shape
    count = jnp.asarray(count, jnp.int32)
    rows = gcd(num_rows, 1 << max(CACHED // num_columns, 1).bit_length() - 1)
    if jax.default_backend() != "cpu" or rows == num_rows:
        return _cut(values, count, low, reach, high)
    parts = [x.reshape(num_rows // rows, rows, *x.shape[1:]) for x in (values, low, reach, high)]
    found = jax.lax.map(lambda part: _cut(part[0], count, *part[1:]), parts)
    return Cut(*(x.reshape(num_rows) for x in found))


def selected(values: Float[Array, "R C"], where: Cut) -> Bool[Array, "R C"]:
    """The mask of what a cut selects."""
    value, last = where.value[:, None], where.last[:, None]
    return (values > value) | ((values == value) & (jax.lax.broadcasted_iota(jnp.int32, values.shape, 1) <= last))


def _cut(values: Array, count: Array, low: Array, reach: Array, high: Array) -> Cut:
    num_columns = values.shape[1]
    aim = _logit(count + 0.25, num_columns)

    class State(NamedTuple):
        """`count` values or more reach `under`, fewer reach `over`: keys, integers in the order of the floats."""

        i: Array
        under: Array
        over: Array
        reach_under: Array
        reach_over: Array
        side: Array  # which end moved last
        weight: Array  # of the other end

    def is_open(s: State) -> Array:
        return (s.over - 1 > s.under) & (s.reach_under > count) & (count > 0)

    def narrow(s: State) -> State:
        # The Illinois rule: an end that stays twice in a row pulls half as much each time.
        a = (_logit(s.reach_under, num_columns) - aim) * jnp.where(s.side < 0, s.weight, 1)
        b = (aim - _logit(s.reach_over, num_columns)) * jnp.where(s.side > 0, s.weight, 1)
        first = _key(s.under)
        position = _key(first + (_key(s.over) - first) * (a / (a + b)))
        halfway = (s.under & s.over) + ((s.under ^ s.over) >> 1)
        guess = jnp.where((s.i > 8) & (s.i % 4 == 0), halfway, jnp.clip(position, s.under + 1, s.over - 1))
        reached = _count(values >= _key(guess)[:, None])
        enough, live = reached >= count, is_open(s)
        moved = jnp.where(enough, 1, -1)
        return State(
            s.i + 1,
            jnp.where(live & enough, guess, s.under),
            jnp.where(live & ~enough, guess, s.over),
            jnp.where(live & enough, reached, s.reach_under),
            jnp.where(live & ~enough, reached, s.reach_over),
            moved,
            jnp.where(moved == s.side, s.weight * 0.5, 0.5),
        )

    zero = jnp.zeros(low.shape, jnp.int32)
    start = State(jnp.int32(0), _key(low), _key(high) + 1, reach, zero, zero, jnp.ones(low.shape))
    end = jax.lax.while_loop(lambda s: jnp.any(is_open(s)), narrow, start)
    value = _key(end.under)
    value = jnp.where(count > 0, jnp.where(value == 0, 0.0, value), jnp.inf)  # XLA takes numbers below 1e-38 for 0
    ties = (end.reach_under > count) & (count > 0)
    last = jax.lax.cond(jnp.any(ties), _last_of_equals, _last_column, values, value, count - end.reach_over)
    return Cut(value, jnp.where(count > 0, last, -1))


def _last_column(values: Array, value: Array, room: Array) -> Array:
    return jnp.full(value.shape, values.shape[1] - 1, jnp.int32)


def _last_of_equals(values: Array, value: Array, room: Array) -> Array:
    """The first column up to which `room` values equal the threshold; the last one where fewer do."""
    column = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        first, last = bounds
        middle = (first + last) // 2
        enough = _count((values == value[:, None]) & (column <= middle[:, None])) >= room
        return jnp.where(enough, first, middle + 1), jnp.where(enough, middle, last)

    ends = jnp.zeros(value.shape, jnp.int32), _last_column(values, value, room)
    return jax.lax.fori_loop(0, values.shape[1].bit_length(), halve, ends)[1]


def _count(mask: Bool[Array, "R C"]) -> Int32[Array, " R"]:
    """How many are true in each row."""
    width = mask.shape[1] // SLICES
    rest = jnp.sum(mask[:, width * SLICES :], axis=1, dtype=jnp.int32)
    if not width:
        return rest
    lanes = sum(mask[:, i * width : (i + 1) * width].astype(jnp.int32) for i in range(SLICES))
    return rest + jnp.sum(jnp.asarray(lanes), axis=1, dtype=jnp.int32)


def _logit(count: Int[Array, "*n"] | Float[Array, "*n"], out_of: int) -> Float[Array, "*n"]:
    return jnp.log((count + 0.5) / (out_of - count + 0.5))


def _key(x: Array) -> Array:
    """float32 as int32 of the same order, and back."""
    into = jnp.int32 if x.dtype == jnp.float32 else jnp.float32
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    ordered = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return jax.lax.bitcast_convert_type(ordered, into)
