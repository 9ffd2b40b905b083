"""The k nearest items of a query from the scores of all items, block by block."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt

from tcq.nearest import columns

BLOCK = 2**16  # items
SPARSE = 16  # if at most N / SPARSE items are allowed, every way scores all of these


class Scan(NamedTuple):
    """Items in the order of their ids."""

    columns: UInt[np.ndarray, "C N"]
    norms: Float[np.ndarray, " N"] | None


def build(codes: UInt[np.ndarray, "N M"], num_codewords: int, *, norms: Float[np.ndarray, " N"] | None = None) -> Scan:
    """Stores the codes by column."""
    return Scan(columns.of_codes(codes, num_codewords), norms)


def search(
    items: Scan, table: Float[np.ndarray, "C W"], k: int, allowed: Bool[np.ndarray, " N"] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and ids of the k best items that are allowed, best first."""
    ids = None if allowed is None else np.flatnonzero(allowed)
    count = items.columns.shape[1] if ids is None else len(ids)
    best, numbers = np.empty(0, np.float32), np.empty(0, np.int64)
    for first in range(0, count, BLOCK):
        last = min(first + BLOCK, count)
        here = slice(first, last) if ids is None else ids[first:last]
        norms = None if items.norms is None else items.norms[here]
        values = columns.scores(table, items.columns[:, here], norms)
        # Later items with the k-th score are not among the best: ties go to lower ids.
        better = np.flatnonzero(values > best[-1]) if len(best) == k else np.arange(len(values))
        new = better + first if ids is None else ids[first:last][better]
        best, numbers = columns.best(np.concatenate([best, values[better]]), np.concatenate([numbers, new]), k)
    return best, numbers
