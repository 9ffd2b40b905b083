"""Codes as columns, and the sums of table entries that they select.

The sums have the bits of `ranking.scores`.
"""

import numpy as np
from jaxtyping import Float, Shaped, UInt

TINY = np.float32(1e-12)  # norms are at least this, as in `ranking.scores`


def bits(num_codewords: int) -> int:
    """Bits that hold a number below K, which need not be a power of two."""
    return max((num_codewords - 1).bit_length(), 1)


def pairs(num_codebooks: int, num_codewords: int) -> bool:
    """Whether two codewords make one number: it has a byte, and half the entries are summed."""
    return num_codewords <= 16 and num_codebooks % 2 == 0


def of_codes(codes: UInt[np.ndarray, "N M"], num_codewords: int) -> UInt[np.ndarray, "C N"]:
    """The columns of codes: M / 2 of pairs of codewords, or M of codewords."""
    if not pairs(codes.shape[1], num_codewords):
        return np.ascontiguousarray(codes.T)
    return np.ascontiguousarray((codes[:, 0::2] * num_codewords + codes[:, 1::2]).T.astype(np.uint8))


def of_tables(tables: Float[np.ndarray, "Q M K"]) -> Float[np.ndarray, "Q C W"]:
    """The tables of the columns."""
    tables = np.asarray(tables, np.float32)
    queries, num_codebooks, num_codewords = tables.shape
    if not pairs(num_codebooks, num_codewords):
        return tables
    summed = tables[:, 0::2, :, None] + tables[:, 1::2, None, :]
    return summed.reshape(queries, num_codebooks // 2, num_codewords**2)


def scores(
    table: Float[np.ndarray, "C W"], columns: UInt[np.ndarray, "C n"], norms: Float[np.ndarray, " n"] | None
) -> Float[np.ndarray, " n"]:
    """The score of each item: its entries, added in order, and divided by its norm if given."""
    total = np.zeros(columns.shape[1], np.float32)
    for row, column in zip(table, columns, strict=True):
        total += row.take(column)
    return divided(total, norms)


def divided(total: Float[np.ndarray, " n"], norms: Float[np.ndarray, " n"] | None) -> Float[np.ndarray, " n"]:
    """Scores from sums."""
    return total if norms is None else total * inverse(norms)


def inverse(norms: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """What sums are multiplied by."""
    return np.float32(1) / np.maximum(norms, TINY)


def best(
    values: Float[np.ndarray, " n"], ids: Shaped[np.ndarray, " n"], k: int
) -> tuple[Float[np.ndarray, " _"], Shaped[np.ndarray, " _"]]:
    """The k largest scores, best first, and their ids; the lowest ids first among ties."""
    if len(values) > k:
        reached = np.flatnonzero(values >= np.partition(values, len(values) - k)[len(values) - k])
        values, ids = values[reached], ids[reached]
    order = np.lexsort((ids, -values))[:k]
    return values[order], ids[order]
