"""The k nearest items of a query among items sorted by the first columns of their codes.

All items of a bucket share these columns, and so the sum of their entries. With the largest entry of each other column
it bounds the scores of the bucket. Buckets are scored in the order of falling bounds, until the bound is below the k-th
score found. Rounded addition and division are monotone, so the bound holds for rounded scores too. Codes of 16 bits
have no other columns: a bucket is one score.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt

from tcq.nearest import columns, scan

BITS = 16  # of the columns that name a bucket
FIRST, FIRST_ITEMS = 16, 4  # of the first round: the least number of buckets, and about FIRST_ITEMS * k items
GROWTH = 8  # buckets of the next round, times those of this one
GROUPS = 16  # groups of buckets for each bucket that is wanted
BLOCK = 2**20  # items that are scored at a time


class Buckets(NamedTuple):
    """N items in the order of their buckets, and of ids in each; B buckets that are not empty."""

    keys: Int[np.ndarray, " B"]  # the first columns as one number
    starts: Int[np.ndarray, " B_and_1"]  # of each bucket among the items
    ids: UInt[np.ndarray, " N"]
    rest: UInt[np.ndarray, "R N"]  # the other columns
    norms: Float[np.ndarray, " N"] | None
    low: Float[np.ndarray, " B"] | None  # smallest and largest norm of each bucket
    high: Float[np.ndarray, " B"] | None


def num_first(num_columns: int, width: int) -> int:
    """The number of columns that name a bucket; 0 if one alone is too wide."""
    return min(num_columns, BITS // columns.bits(width))


def build(
    codes: UInt[np.ndarray, "N M"], num_codewords: int, *, norms: Float[np.ndarray, " N"] | None = None
) -> Buckets:
    """Sorts the items. Raises ValueError if K is above 65,536, or for 2^32 items or more."""
    if not len(codes) < 2**32 or num_codewords > 2**BITS:
        raise ValueError(f"{len(codes):,} items of {num_codewords:,} codewords: at most 2^32 - 1 and 2^{BITS}")
    cols = columns.of_codes(codes, num_codewords)
    width = num_codewords**2 if columns.pairs(codes.shape[1], num_codewords) else num_codewords
    first = num_first(len(cols), width)
    keys = np.zeros(len(codes), np.uint32)
    for column in cols[:first]:
        keys = keys * np.uint32(width) + column
    order = np.argsort(keys.astype(np.uint16), kind="stable").astype(np.uint32)
    keys = keys[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else np.zeros(0, np.int64)
    low = high = None
    if norms is not None:
        norms = norms[order]
        low, high = (f.reduceat(norms, starts) if len(starts) else norms for f in (np.minimum, np.maximum))
    ends = np.append(starts, len(codes)).astype(np.int64)
    return Buckets(keys[starts].astype(np.int64), ends, order, cols[first:][:, order], norms, low, high)


def search(
    items: Buckets, table: Float[np.ndarray, "C W"], k: int, allowed: Bool[np.ndarray, " N"] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and ids of the k best items that are allowed, best first."""
    sums = _first_sums(items, table[: len(table) - len(items.rest)])
    bound = _bounds(items, sums, table[len(table) - len(items.rest) :])
    if allowed is not None and np.count_nonzero(allowed) * scan.SPARSE <= len(allowed):
        places = np.flatnonzero(allowed[items.ids])
        values = _scores(items, table, places, sums[np.searchsorted(items.starts, places, side="right") - 1])
        return columns.best(values, items.ids[places].astype(np.int64), k)
    best, ids = np.empty(0, np.float32), np.empty(0, np.int64)
    size = max(FIRST, FIRST_ITEMS * k * len(bound) // max(len(items.ids), 1))
    above = np.float32(np.inf)
    while above > -np.inf:
        least = best[-1] if len(best) == k else -np.float32(np.inf)
        now = np.flatnonzero((bound >= least) & (bound < above))
        if len(now) > size:
            least = max(least, _reached_by(bound, size))
            now = now[bound[now] >= least]
        for part in _blocks(items, now):
            best, ids = _merge(items, table, k, allowed, part, sums, best, ids)
        above, size = min(above, least), size * GROWTH  # fewer groups may give a higher value than before
        if len(best) == k and best[-1] >= above:
            break
    return best, ids


def _reached_by(bound: Float[np.ndarray, " B"], size: int) -> np.float32:
    """A value that at least `size` bounds reach, and not many more.

    It comes from the largest bound of each of some groups.
    """
    groups = min(GROUPS * size, len(bound))
    top = bound[: len(bound) // groups * groups].reshape(-1, groups).max(axis=0)
    return np.partition(top, groups - size)[groups - size]


def _first_sums(items: Buckets, table: Float[np.ndarray, "F W"]) -> Float[np.ndarray, " B"]:
    """The sum of the first entries of each bucket."""
    total = np.zeros(1, np.float32)
    for row in table:
        total = (total[:, None] + row).ravel()
    return total if len(total) == len(items.keys) else total[items.keys]


def _bounds(items: Buckets, sums: Float[np.ndarray, " B"], rest: Float[np.ndarray, "R W"]) -> Float[np.ndarray, " B"]:
    """A score that no item of a bucket exceeds."""
    for row in rest:
        sums = sums + row.max()
    if items.low is None or items.high is None:
        return sums
    return columns.divided(sums, np.where(sums > 0, items.low, items.high))


def _blocks(items: Buckets, buckets: Int[np.ndarray, " b"]) -> list[np.ndarray]:
    """The buckets in parts of about `BLOCK` items."""
    before = np.cumsum(items.starts[buckets + 1] - items.starts[buckets])
    cuts = np.flatnonzero(np.diff(before // BLOCK)) + 1
    return [part for part in np.split(buckets, cuts) if len(part)]


def _merge(
    items: Buckets,
    table: Float[np.ndarray, "C W"],
    k: int,
    allowed: Bool[np.ndarray, " N"] | None,
    buckets: Int[np.ndarray, " b"],
    sums: Float[np.ndarray, " B"],
    best: Float[np.ndarray, " n"],
    ids: Int[np.ndarray, " n"],
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of those found and of the items of some buckets."""
    counts = items.starts[buckets + 1] - items.starts[buckets]
    ends = np.cumsum(counts)
    places = np.arange(ends[-1]) + np.repeat(items.starts[buckets] - (ends - counts), counts)
    values = _scores(items, table, places, np.repeat(sums[buckets], counts))
    if len(best) == k:
        kept = np.flatnonzero(values >= best[-1])
        values, places = values[kept], places[kept]
    new = items.ids[places].astype(np.int64)
    if allowed is not None:
        kept = np.flatnonzero(allowed[new])
        values, new = values[kept], new[kept]
    return columns.best(np.concatenate([best, values]), np.concatenate([ids, new]), k)


def _scores(
    items: Buckets, table: Float[np.ndarray, "C W"], places: Int[np.ndarray, " n"], sums: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """The scores of items, from the sums of their first entries."""
    for row, column in zip(table[len(table) - len(items.rest) :], items.rest, strict=True):
        sums = sums + row.take(column[places])
    return columns.divided(sums, None if items.norms is None else items.norms[places])
