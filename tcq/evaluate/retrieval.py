"""Ranking a database for queries, and AP, precision and recall of the rankings. Used during and after training."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from tcq import config as configs
from tcq import encode, metrics, quantizer, ranking
from tcq.config import Conventions
from tcq.runtime import devices, processes, signals

Scorer = Callable[[slice], Float[np.ndarray, "Q N"]]  # the scores of all items for a slice of the queries
DEFAULT = Conventions()


class Retrieval(NamedTuple):
    """The scores of the rankings of Q queries."""

    mean_average_precision: float
    average_precision: Float[np.ndarray, " Q"]
    relevant: Int[np.ndarray, " Q"]  # in the whole database
    precision: Float[np.ndarray, " C"]  # at each of C cut-offs, mean over the queries
    recall: Float[np.ndarray, " C"]  # mean over the queries with a relevant item


def relevance(queries: Int[np.ndarray, " Q"] | Bool[np.ndarray, "Q L"], database: Any) -> Bool[np.ndarray, "Q N"]:
    """Equal class numbers, or at least one shared label of multi-hot rows."""
    if queries.ndim == 1:
        return queries[:, None] == database
    return (queries.astype(np.float32) @ database.T.astype(np.float32)) > 0


def retrieve(
    score: Scorer,
    query_labels: Any,
    database_labels: Any,
    *,
    k: int,
    ks: list[int],
    conventions: Conventions = DEFAULT,
    own: Int[np.ndarray, " Q"] | None = None,
    max_scores: int = 2**24,
) -> Retrieval:
    """AP@k, and precision and recall at `ks`, of the rankings by `score`.

    Args:
      score: the scores of all items for a slice of the queries.
      query_labels, database_labels: class numbers, or multi-hot rows.
      k, ks: cut-offs.
      conventions: see `metrics`.
      own: for each query its own position in the database, which is excluded from its answers; -1 if it is not there.
      max_scores: scores in memory at once. Two blocks of queries are in memory, of at least `ranking.ROWS` queries: one
        is scored on the device while the one before it is evaluated in threads.

    The results have the same bits for any block size, and for any number of processes, which share the blocks.
    Raises Stopped if a process of the run was asked to stop.
    """
    size = max(1, max_scores // 2 // max(len(database_labels), 1) // ranking.ROWS) * ranking.ROWS
    begin, end = (edge * ranking.ROWS for edge in processes.share(-(-len(query_labels) // ranking.ROWS)))
    end = min(end, len(query_labels))
    blocks = [slice(start, min(start + size, end)) for start in range(begin, end, size)]
    blocks = blocks or [slice(0, min(ranking.ROWS, len(query_labels)))]  # at least one, for the shapes of the results

    def evaluate(scores: np.ndarray, rows: slice) -> metrics.Scores:
        relevant = relevance(query_labels[rows], database_labels)
        if own is not None:
            excluded = own[rows, None] == np.arange(len(database_labels))
            scores, relevant = np.where(excluded, -np.inf, scores), relevant & ~excluded
        return metrics.search(
            scores, relevant, k=k, cuts=ks, ties=conventions.ties, denominator=conventions.denominator
        )

    parts = _evaluate_blocks(score, evaluate, blocks)
    processes.agree_to_stop()
    rows = tuple(np.concatenate(column)[: max(end - begin, 0)] for column in zip(*parts, strict=True))
    return summary(metrics.Scores(*devices.gather(rows)), ks, empty=conventions.empty)


def _evaluate_blocks(
    score: Scorer, evaluate: Callable[[np.ndarray, slice], metrics.Scores], blocks: list[slice]
) -> list[metrics.Scores]:
    """Evaluates blocks in threads, each while the next one is scored; stops early when the process is asked to."""
    threads = os.cpu_count() or 1
    parts: list[metrics.Scores] = []
    with ThreadPoolExecutor(threads + 1) as pool:
        ahead = pool.submit(score, blocks[0])
        for i, block in enumerate(blocks):
            signals.advance()
            scores = np.asarray(ahead.result())
            if signals.requested():
                break
            if i + 1 < len(blocks):
                ahead = pool.submit(score, blocks[i + 1])
            edges = np.linspace(block.start, block.stop, min(threads, block.stop - block.start) + 1).astype(int)
            pieces = [slice(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
            parts += pool.map(evaluate, [scores[p.start - block.start : p.stop - block.start] for p in pieces], pieces)
    return parts


def summary(scores: metrics.Scores, ks: list[int], *, empty: str) -> Retrieval:
    """Means over all queries."""
    answerable = scores.relevant > 0
    recall = (
        (scores.hits[answerable] / scores.relevant[answerable, None]).mean(axis=0)
        if answerable.any()
        else np.zeros(len(ks))
    )
    mean = metrics.mean(scores.average_precision, scores.relevant, empty=empty)
    precision = (scores.hits / np.asarray(ks)).mean(axis=0)
    return Retrieval(mean, scores.average_precision, scores.relevant, precision, recall)


def scorers(encoder: encode.Encoder, queries: encode.Encoded, database: encode.Encoded) -> dict[str, Scorer]:
    """Scores by "asymmetric" (float query, stored code), "symmetric" (both codes) and "float" (both features)."""
    codebooks, c = encoder.codebooks, encoder.config.eval
    normalize = configs.query_norm(encoder.config)
    norms = ranking.code_norms(database.codes, codebooks) if c.score == "cosine" else None
    decoded = np.asarray(quantizer.decode(queries.codes, codebooks))

    def by_codes(rows: Float[np.ndarray, "Q D"]) -> Scorer:
        return lambda block: np.asarray(
            ranking.scores(
                ranking.lookup_table(rows[block], codebooks, metric=c.score, squared=c.squared, normalize=normalize),
                database.codes,
                norms=norms,
            )
        )

    return {
        "asymmetric": by_codes(queries.features),
        "symmetric": by_codes(decoded),
        "float": lambda block: ranking.dense_scores(queries.features[block], database.features, metric=c.score),
    }
