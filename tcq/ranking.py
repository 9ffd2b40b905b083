"""Ranks stored codes: lookup tables, asymmetric and symmetric scores, blocked top-k.

Higher scores are always closer.

A query is compared with each codeword once, which gives a table of M * K numbers; the score of a stored item is the sum
of the M entries that its code selects. Asymmetric: the query is a float feature. Symmetric: it is decoded from a code.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, UInt

from tcq.quantizer import unit

METRICS = ("l2", "ip", "cosine")
NORMALIZE = ("none", "whole", "subvectors")
ROWS = 32  # queries per matrix product; blocks of queries that start at a multiple of it give the same bits


def lookup_table(
    queries: Float[ArrayLike, "Q D"],
    codebooks: Float[ArrayLike, "M K d"],
    *,
    metric: str,
    squared: bool = True,
    normalize: str = "none",
) -> Float[Array, "Q M K"]:
    """One table per query, float32, whose entries a code sums up to a score.

    Args:
      queries: features, (Q, D) with D = M * d.
      codebooks: (M, K, d); unit codewords for "ip" if the quantizer has metric "ip".
      metric: "l2": -||q_m - c_mk||^2; "ip": <q_m, c_mk>; "cosine": <q_m, c_mk> of q / ||q||, whose sums are cosine
        similarities when divided by the norms of the decoded items (`scores(..., norms=...)`).
      squared: with False "l2" is -||q_m - c_mk||, which SPQ's released code sums up; another ranking.
      normalize: what is scaled to unit length first: "none" (MeCoQ's released code), "whole" vectors or "subvectors"
        (MeCoQ's training loss).

    Raises:
      ValueError: the metric or normalization is unknown, or D is not M * d.
    """
    queries, codebooks = jnp.asarray(queries, jnp.float32), jnp.asarray(codebooks, jnp.float32)
    num_codebooks, _, d = codebooks.shape
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize {normalize!r} is unknown: use one of {', '.join(NORMALIZE)}")
    if queries.ndim != 2 or queries.shape[1] != num_codebooks * d:
        raise ValueError(
            f"queries {queries.shape} do not fit codebooks {codebooks.shape}: must be (Q, {num_codebooks * d})"
        )
    _check_metric(metric)
    return _tables(queries, codebooks, metric=metric, squared=squared, normalize=normalize)


def code_norms(codes: UInt[ArrayLike, "N M"], codebooks: Float[ArrayLike, "M K d"]) -> Float[Array, " N"]:
    """The Euclidean norm of each decoded item, float32; for "cosine"."""
    squares = jnp.sum(jnp.asarray(codebooks, jnp.float32) ** 2, axis=-1)  # (M, K)
    return jnp.sqrt(_sum_columns(*_columns(squares[None], jnp.asarray(codes)), None)[0])


def scores(
    tables: Float[ArrayLike, "Q M K"], codes: UInt[ArrayLike, "N M"], *, norms: Float[ArrayLike, " N"] | None = None
) -> Float[Array, "Q N"]:
    """Scores of all items for all queries, float32.

    They are divided by `norms` if given (see `lookup_table`).
    """
    columns = _columns(jnp.asarray(tables), jnp.asarray(codes))
    return _sum_columns(*columns, None if norms is None else jnp.asarray(norms))


def dense_scores(
    queries: Float[ArrayLike, "Q D"], items: Float[ArrayLike, "N D"], *, metric: str
) -> Float[np.ndarray, "Q N"]:
    """The similarities of `lookup_table` between float vectors.

    Raises ValueError for an unknown metric.
    """
    _check_metric(metric)
    return np.asarray(_dense(jnp.asarray(queries, jnp.float32), jnp.asarray(items, jnp.float32), metric=metric))


def top_k(
    tables: Float[ArrayLike, "Q M K"],
    codes: UInt[ArrayLike, "N M"],
    k: int,
    *,
    norms: Float[ArrayLike, " N"] | None = None,
    block_size: int = 65_536,
) -> tuple[Float[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
    """Scores and indices of the k best items of each query, best first.

    Among ties the lowest index is first. Items are scored in blocks, so memory is that of Q * (block_size + k) scores;
    the result does not depend on block_size. At most N items are returned. Raises ValueError if k or block_size is
    below 1.
    """
    if k < 1 or block_size < 1:
        raise ValueError(f"k {k} and block_size {block_size} must be at least 1")
    tables, codes = jnp.asarray(tables), np.asarray(codes)
    norms = None if norms is None else np.asarray(norms)
    num_queries, k = tables.shape[0], min(k, len(codes))
    best_scores = np.empty((num_queries, 0), np.float32)
    best_ids = np.empty((num_queries, 0), np.int64)
    for start in range(0, len(codes), block_size):
        stop = min(start + block_size, len(codes))
        block = np.asarray(scores(tables, codes[start:stop], norms=None if norms is None else norms[start:stop]))
        merged = np.concatenate([best_scores, block], axis=1)
        ids = np.concatenate([best_ids, np.broadcast_to(np.arange(start, stop), block.shape)], axis=1)
        keep = _best_columns(merged, k)  # earlier columns have lower indices, so ties go to the lowest index
        best_scores, best_ids = np.take_along_axis(merged, keep, 1), np.take_along_axis(ids, keep, 1)
    return best_scores, best_ids


def _best_columns(values: np.ndarray, k: int) -> np.ndarray:
    """Columns of the k largest values of each row, in a stable order.

    Only values that reach the k-th are sorted.
    """
    if values.shape[1] <= k:
        return np.argsort(-values, axis=1, kind="stable")
    kth = np.partition(values, values.shape[1] - k, axis=1)[:, values.shape[1] - k]
    rows = []
    for row, threshold in zip(values, kth, strict=True):
        reached = np.flatnonzero(row >= threshold)
        rows.append(reached[np.argsort(-row[reached], kind="stable")[:k]])
    return np.stack(rows)


@jax.jit
def _columns(tables: Float[Array, "Q M K"], codes: UInt[Array, "N M"]) -> tuple[Array, Array]:
    """Tables (Q, C, W) and codes (C, N) of columns.

    Columns are pairs of codebooks if these give a byte, for half as many gathers.

    A program of its own: in that of the sum, XLA would make the pairs again for each query.
    """
    queries, num_codebooks, num_codewords = tables.shape
    if num_codewords > 16 or num_codebooks % 2:
        return tables, codes.T
    pairs = tables[:, 0::2, :, None] + tables[:, 1::2, None, :]
    tables = pairs.reshape(queries, num_codebooks // 2, num_codewords**2)
    return tables, (codes[:, 0::2] * num_codewords + codes[:, 1::2]).astype(jnp.uint8).T


@jax.jit
def _sum_columns(tables: Float[Array, "Q C W"], codes: UInt[Array, "C N"], norms: Array | None) -> Float[Array, "Q N"]:
    total = jnp.zeros((tables.shape[0], codes.shape[1]), jnp.float32)
    for c in range(tables.shape[1]):  # one gather at a time keeps memory at Q * N
        total = total + jnp.take(tables[:, c], codes[c], axis=1, mode="clip")
    # Not a quotient: XLA would choose between one and this product, which rounds differently.
    return total if norms is None else total * (1 / jnp.maximum(norms, 1e-12))[None]


@partial(jax.jit, static_argnames=("metric", "squared", "normalize"))
def _tables(queries: Array, codebooks: Array, *, metric: str, squared: bool, normalize: str) -> Array:
    def chunk(queries: Array) -> Array:
        if metric == "cosine" or normalize == "whole":
            queries = unit(queries)
        q = queries.reshape(ROWS, codebooks.shape[0], codebooks.shape[2])
        if normalize == "subvectors":
            q = unit(q)
        inner = jnp.einsum("qmd,mkd->qmk", q, codebooks, precision="highest")
        if metric != "l2":
            return inner
        distance = jnp.sum(codebooks**2, axis=-1)[None] + jnp.sum(q**2, axis=-1, keepdims=True) - 2 * inner
        return -distance if squared else -jnp.sqrt(jnp.maximum(distance, 0))

    return _in_chunks(chunk, queries)


@partial(jax.jit, static_argnames="metric")
def _dense(queries: Array, items: Array, *, metric: str) -> Array:
    if metric == "cosine":
        items = unit(items)

    def chunk(queries: Array) -> Array:
        inner = jnp.matmul(unit(queries) if metric == "cosine" else queries, items.T, precision="highest")
        if metric != "l2":
            return inner
        return 2 * inner - jnp.sum(items**2, axis=1)[None] - jnp.sum(queries**2, axis=1, keepdims=True)

    return _in_chunks(chunk, queries)


def _in_chunks(function: Callable[[Array], Array], rows: Float[Array, "Q D"]) -> Array:
    """Applies a function to exactly `ROWS` rows at a time.

    Matrix products of other shapes round differently.
    """
    padded = jnp.pad(rows, [(0, -len(rows) % ROWS), (0, 0)])
    results = jax.lax.map(function, padded.reshape(-1, ROWS, rows.shape[1]))
    return results.reshape(-1, *results.shape[2:])[: len(rows)]


def _check_metric(metric: str) -> None:
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r} is unknown: use one of {', '.join(METRICS)}")
