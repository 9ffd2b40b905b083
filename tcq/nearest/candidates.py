"""The k nearest items of queries among candidates of FAISS, with a proof.

The proof shows that no other item is among the k nearest.

FAISS sums the tables as they are: codewords are unit vectors of K numbers, and a query is its flat table. Its scores
differ from ours by rounding, in FastScan of the entries to 8 bits. All items but the candidates score at most the last
candidate's score plus this error. If that is below the k-th exact score, no other item can be among the k best;
else FAISS gives twice as many.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt

from tcq.nearest import columns

FAST_BITS = 4  # of a codeword in FastScan
FIRST, LEAST = 2, 32  # the first candidates: FIRST * k (of FastScan; else k) + LEAST
MOST = 8  # at most N / MOST candidates; a scan costs no more then
FLOAT_ERROR = 2.0**-23  # relative, of an addition and of an entry
MAX_CODEBOOKS, MAX_CODEWORDS = 128, 256  # FastScan sums bytes in 16 bits; unit vectors take K * K numbers


class Candidates(NamedTuple):
    """Items in the order of their ids, and in an index of FAISS."""

    columns: UInt[np.ndarray, "C N"]
    faiss_index: Any
    fast: bool  # FastScan: entries are rounded to 8 bits


def fits(num_codebooks: int, num_codewords: int, norms: Float[np.ndarray, " N"] | None) -> bool:
    """Whether FAISS ranks these codes: scores are sums, and the codes are of usual size."""
    return norms is None and num_codewords <= MAX_CODEWORDS and num_codebooks <= MAX_CODEBOOKS


def build(codes: UInt[np.ndarray, "N M"], num_codewords: int) -> Candidates:
    """Packs the codes for FAISS: FastScan if a codeword has at most 4 bits."""
    import faiss

    bits = max(columns.bits(num_codewords), FAST_BITS)
    fast = bits == FAST_BITS
    num_codebooks, width = codes.shape[1], 2**bits
    index = faiss.IndexPQ(num_codebooks * width, num_codebooks, bits, faiss.METRIC_INNER_PRODUCT)
    one_hot = np.broadcast_to(np.eye(width, dtype=np.float32), (num_codebooks, width, width))
    faiss.copy_array_to_vector(np.ascontiguousarray(one_hot).ravel(), index.pq.centroids)
    index.is_trained = True
    index.add_sa_codes(faiss.pack_bitstrings(codes.astype(np.int32), bits))
    index = faiss.IndexPQFastScan(index) if fast else index  # type: ignore[arg-type,assignment]
    return Candidates(columns.of_codes(codes, num_codewords), index, fast)


def search(
    items: Candidates, tables: Float[np.ndarray, "Q M K"], k: int, allowed: Bool[np.ndarray, " N"] | None
) -> list[tuple[np.ndarray, np.ndarray] | None]:
    """Scores and ids of the k best items that are allowed, best first, of each query.

    The answer of a query is None where there is no proof.
    """
    share = 1.0 if allowed is None else max(float(np.mean(allowed)), 1e-9)
    size, most = int((FIRST if items.fast else 1) * k / share) + LEAST, items.columns.shape[1] // MOST
    answers: list[tuple[np.ndarray, np.ndarray] | None] = [None] * len(tables)
    by_column, error = columns.of_tables(tables), _error(items, tables)
    left = np.flatnonzero(np.isfinite(error))
    while len(left) and size <= most:
        last, ids = _ask(items, tables[left], size)
        for query, bound, numbers in zip(left, last + error[left], ids, strict=True):
            answers[query] = _proven(items, by_column[query], k, allowed, bound, numbers)
        left = np.array([q for q in left if answers[q] is None], np.int64)
        size *= 2
    return answers


def _ask(items: Candidates, tables: Float[np.ndarray, "q M K"], size: int) -> tuple[np.ndarray, np.ndarray]:
    """The lowest score of the candidates of each query, as FAISS computes it, and their ids."""
    flat = np.zeros((len(tables), tables.shape[1], items.faiss_index.pq.ksub), np.float32)
    flat[:, :, : tables.shape[2]] = tables
    flat[:, :, tables.shape[2] :] = tables[:, :, :1]  # codewords that no code has
    scores, ids = items.faiss_index.search(flat.reshape(len(tables), -1), size)
    return scores[:, -1], ids


def _proven(
    items: Candidates,
    table: Float[np.ndarray, "C W"],
    k: int,
    allowed: Bool[np.ndarray, " N"] | None,
    bound: float,
    ids: np.ndarray,
) -> tuple[np.ndarray, np.ndarray] | None:
    """The k best of the candidates if all of them score above the bound of the others."""
    if ids[-1] < 0:  # FastScan leaves out items whose entries are all the lowest
        return None
    if allowed is not None:
        ids = ids[allowed[ids]]
    if len(ids) < k:
        return None
    best, numbers = columns.best(columns.scores(table, items.columns[:, ids], None), ids, k)
    return (best, numbers) if best[-1] > bound else None


def _error(items: Candidates, tables: Float[np.ndarray, "Q M K"]) -> Float[np.ndarray, " Q"]:
    """The largest difference between a score of FAISS and ours."""
    size = np.abs(tables).max(axis=2).sum(axis=1, dtype=np.float64)
    error = FLOAT_ERROR * (2 * tables.shape[1] + 2) * size
    if items.fast:
        spans = (tables.max(axis=2) - tables.min(axis=2)).astype(np.float64)
        step = np.maximum(spans.max(axis=1) / 255, spans.sum(axis=1) / 65535)
        error = error + tables.shape[1] * step * 0.51  # an entry is rounded to the nearest step
    return error
