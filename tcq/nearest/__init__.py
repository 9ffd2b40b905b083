"""Exact search: the k nearest items of queries, faster than `ranking.top_k`.

The scores, ids and ties are those of `ranking.top_k`.

`build` chooses how, by the number of items and bits; the answers are the same.

* buckets: of many items of up to 32 bits, and of all such where FAISS does not rank as we do (norms, or K above 256).
* candidates: FAISS, with FastScan if K is at most 16, and a proof.
* shards: of very many items of more than 16 bits on all accelerators of this machine, if it has any.
* scan: the scores of all items; also where few of them are allowed, or k is a large part of them.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Bool, Float, Int, UInt

from tcq.nearest import buckets, candidates, columns, scan, shards
from tcq.nearest.buckets import Buckets
from tcq.nearest.candidates import Candidates
from tcq.nearest.scan import Scan
from tcq.nearest.shards import Shards
from tcq.runtime import devices

__all__ = ["Engine", "build", "name", "top_k"]

Engine = Scan | Buckets | Candidates | Shards
FEW = 2**15  # items that are scanned
MANY_BY_CODE, MANY_BY_HALF = 2**17, 2**19  # items from which on buckets are faster than FAISS's IndexPQ
MANY_ON_DEVICES = 2**20  # items from which on accelerators share them; not timed
FASTER = 8  # FastScan is faster than IndexPQ up to this many times these numbers


def build(
    codes: UInt[np.ndarray, "N M"], num_codewords: int, *, norms: Float[np.ndarray, " N"] | None = None
) -> Engine:
    """Items ready to be searched, held in memory. Scores are divided by `norms` if given."""
    count, num_codebooks = codes.shape
    bits = num_codebooks * columns.bits(num_codewords)
    if count <= FEW:
        return scan.build(codes, num_codewords, norms=norms)
    by_faiss = candidates.fits(num_codebooks, num_codewords, norms)
    if bits > buckets.BITS and count >= MANY_ON_DEVICES and devices.accelerated():
        return shards.build(codes, num_codewords, norms=norms)
    many = MANY_BY_CODE if bits <= buckets.BITS else MANY_BY_HALF
    if bits <= 2 * buckets.BITS and (not by_faiss or count >= many * (FASTER if num_codewords <= 16 else 1)):
        return buckets.build(codes, num_codewords, norms=norms)
    if by_faiss:
        return candidates.build(codes, num_codewords)
    return scan.build(codes, num_codewords, norms=norms)


def name(engine: Engine) -> str:
    """How an engine finds the items, in words."""
    if isinstance(engine, Buckets):
        return f"buckets by {'half of the code' if len(engine.rest) else 'code'}, {len(engine.keys):,} not empty"
    if isinstance(engine, Candidates):
        return f"candidates of FAISS {'FastScan' if engine.fast else 'IndexPQ'}, and a proof"
    if isinstance(engine, Shards):
        return f"scan of all items on {len(engine.allowed)} devices"
    return "scan of all items"


def top_k(
    engine: Engine, tables: Float[np.ndarray, "Q M K"], k: int, *, allowed: Bool[np.ndarray, " N"] | None = None
) -> tuple[Float[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
    """Scores and ids of each query's k best items, best first; the lowest id first among ties.

    Only items that are `allowed` are ranked; if there are fewer than k, all of them are returned. The queries share
    the processors of this machine. Raises ValueError if k is below 1, or tables hold NaN.
    """
    if k < 1:
        raise ValueError(f"k {k} must be at least 1")
    tables = np.asarray(tables, np.float32)
    if np.isnan(tables).any():
        raise ValueError("the tables of the queries hold NaN: their features must be finite")
    count = _count(engine) if allowed is None else int(np.count_nonzero(allowed))
    k = min(k, count)
    if k == 0 or not len(tables):
        return np.zeros((len(tables), k), np.float32), np.zeros((len(tables), k), np.int64)
    answers: list[tuple[np.ndarray, np.ndarray] | None] = [None] * len(tables)
    if count * scan.SPARSE > _count(engine) and isinstance(engine, Candidates):
        answers = candidates.search(engine, tables, k, allowed)
    elif count * scan.SPARSE > _count(engine) and isinstance(engine, Shards):
        answers = list(shards.search(engine, columns.of_tables(tables), k, allowed))
    one_by_one = engine if isinstance(engine, Buckets | Scan) else Scan(engine.columns, _norms(engine))
    search = buckets.search if isinstance(one_by_one, Buckets) else scan.search
    left = [query for query, answer in enumerate(answers) if answer is None]
    by_column = columns.of_tables(tables[left])

    def answer(row: int) -> tuple[np.ndarray, np.ndarray]:
        return search(one_by_one, by_column[row], k, allowed)  # type: ignore[arg-type]

    if len(left) == 1:
        answers[left[0]] = answer(0)
    elif left:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for query, best in zip(left, pool.map(answer, range(len(left))), strict=True):
                answers[query] = best
    scores, ids = zip(*(best for best in answers if best is not None), strict=True)
    return np.stack(scores), np.stack(ids)


def _count(engine: Engine) -> int:
    return len(engine.ids) if isinstance(engine, Buckets) else engine.columns.shape[1]


def _norms(engine: Candidates | Shards) -> np.ndarray | None:
    return engine.norms if isinstance(engine, Shards) else None
