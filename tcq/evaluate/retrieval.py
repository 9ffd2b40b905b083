"""Rankings of a database for queries, and their AP, precision and recall.

Training and evaluation use them.
"""

import functools
import itertools
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
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
      max_scores: scores in memory at once. Blocks of queries, of at least `ranking.ROWS`, are in memory: one is scored
        on each accelerator, or on the CPU, while the one before them is evaluated in threads.

    The results have the same bits for any block size, and for any number of processes, which share the blocks.
    Raises Stopped if a process of the run got a signal to stop.
    """
    at_once = 1 + len(devices.scorers())
    size = max(1, max_scores // at_once // max(len(database_labels), 1) // ranking.ROWS) * ranking.ROWS
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
    """Evaluates blocks in threads, each while the next ones are scored.

    Stops early if the process got a signal to stop.
    """
    threads, scored = os.cpu_count() or 1, len(devices.scorers())
    parts: list[metrics.Scores] = []
    with ThreadPoolExecutor(threads + scored) as pool:
        ahead = deque(pool.submit(score, block) for block in blocks[:scored])
        for i, block in enumerate(blocks):
            signals.advance()
            scores = np.asarray(ahead.popleft().result())
            if signals.requested():
                break
            if i + scored < len(blocks):
                ahead.append(pool.submit(score, blocks[i + scored]))
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
    """The scores "asymmetric", "symmetric" and "float".

    The first takes float queries and stored codes, the second both codes, the third both features.
    """
    codebooks, c = encoder.codebooks, encoder.config.eval
    normalize = configs.query_norm(encoder.config)
    norms = ranking.code_norms(database.codes, codebooks) if c.score == "cosine" else None
    decoded = np.asarray(quantizer.decode(queries.codes, codebooks))

    def by_codes(rows: Float[np.ndarray, "Q D"]) -> Scorer:
        def score(block: slice, codes: Any, norms: Any) -> np.ndarray:
            table = ranking.lookup_table(rows[block], codebooks, metric=c.score, squared=c.squared, normalize=normalize)
            return np.asarray(ranking.scores(table, codes, norms=norms))

        return _in_turn(score, database.codes, norms)

    def by_features(block: slice, features: Any) -> np.ndarray:
        return ranking.dense_scores(queries.features[block], features, metric=c.score)

    return {
        "asymmetric": by_codes(queries.features),
        "symmetric": by_codes(decoded),
        "float": _in_turn(by_features, database.features),
    }


def _in_turn(score: Callable[..., np.ndarray], *database: Any) -> Scorer:
    """A scorer that takes the devices in turn, each with a copy of the database."""
    copy_on, turns = functools.cache(partial(jax.device_put, database)), itertools.cycle(devices.scorers())
    return lambda block: score(block, *copy_on(next(turns)))
