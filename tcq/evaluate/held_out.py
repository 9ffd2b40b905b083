"""Ranking a database for queries and scoring it; and whether clipping removes what it should. Used in and after training."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8
from ml_collections import ConfigDict

from tcq import augment, encode, losses, metrics, quantizer, ranking
from tcq import config as configs
from tcq.data import protocols
from tcq.data.sources import Source
from tcq.runtime import devices as parallel
from tcq.runtime import log as journal
from tcq.runtime import processes, signals

Scorer = Callable[[slice], Float[np.ndarray, "Q N"]]


class Conventions(NamedTuple):
    """How a ranking is scored; see `metrics`."""

    ties: str = "expected"
    denominator: str = "hits"
    empty: str = "zero"


DEFAULT = Conventions()


class Retrieval(NamedTuple):
    """How well a ranking answers the queries."""

    mean_average_precision: float
    average_precision: Float[np.ndarray, " Q"]
    relevant: Int[np.ndarray, " Q"]  # in the whole database
    precision: Float[np.ndarray, " C"]  # at each cut-off asked for, mean over the queries
    recall: Float[np.ndarray, " C"]  # mean over the queries that have anything relevant


def relevance(queries: Int[np.ndarray, " Q"] | Bool[np.ndarray, "Q L"], database: Any) -> Bool[np.ndarray, "Q N"]:
    """Same class number, or at least one shared label."""
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
    """AP@k, and precision and recall at `ks`, of the ranking that `score` gives for a slice of the queries.

    Two blocks of queries are in memory at a time, one being scored and one counted in threads: `max_scores` scores together,
    or `ranking.ROWS` queries each. No bit of the result depends on the size of the blocks, nor on the number of processes,
    which share them. `own` is where each query itself lies in the database, to be left out of its answers; -1 where it does
    not.
    """
    step = max(1, max_scores // 2 // max(len(database_labels), 1) // ranking.ROWS) * ranking.ROWS
    threads = os.cpu_count() or 1

    def count(values: np.ndarray, rows: slice) -> metrics.Found:
        relevant = relevance(query_labels[rows], database_labels)
        if own is not None:
            mine = own[rows, None] == np.arange(len(database_labels))
            values, relevant = np.where(mine, -np.inf, values), relevant & ~mine
        return metrics.search(
            values, relevant, k=k, cuts=ks, ties=conventions.ties, denominator=conventions.denominator
        )

    begin, end = (edge * ranking.ROWS for edge in processes.share(-(-len(query_labels) // ranking.ROWS)))
    end = min(end, len(query_labels))
    blocks = [slice(start, min(start + step, end)) for start in range(begin, end, step)]
    blocks = blocks or [slice(0, min(ranking.ROWS, len(query_labels)))]  # for its shapes
    parts: list[metrics.Found] = []
    with ThreadPoolExecutor(threads + 1) as pool:
        coming = pool.submit(score, blocks[0])  # the device scores a block while the one before it is counted
        for i, block in enumerate(blocks):
            journal.moved()
            values = np.asarray(coming.result())
            if signals.asked():
                break
            if i + 1 < len(blocks):
                coming = pool.submit(score, blocks[i + 1])
            edges = np.linspace(block.start, block.stop, min(threads, block.stop - block.start) + 1).astype(int)
            pieces = [slice(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
            parts += pool.map(count, [values[p.start - block.start : p.stop - block.start] for p in pieces], pieces)
    processes.agree_to_stop()
    mine = tuple(np.concatenate(column)[: max(end - begin, 0)] for column in zip(*parts, strict=True))
    found = metrics.Found(*parallel.gather(mine))
    return summary(found, ks, empty=conventions.empty)


def summary(found: metrics.Found, ks: list[int], *, empty: str) -> Retrieval:
    """What all queries found, as means."""
    some = found.relevant > 0
    recall = (found.hits[some] / found.relevant[some, None]).mean(axis=0) if some.any() else np.zeros(len(ks))
    mean = metrics.mean(found.average_precision, found.relevant, empty=empty)
    return Retrieval(mean, found.average_precision, found.relevant, (found.hits / np.asarray(ks)).mean(axis=0), recall)


def conventions_of(config: ConfigDict) -> Conventions:
    """The conventions that `config.eval` names."""
    return Conventions(config.eval.ties, config.eval.denominator, config.eval.empty)


def query_norm(config: ConfigDict) -> str:
    """`eval.normalize`, where "auto" is what the training loss compares: with pairing "quantized" and metric "ip"
    reconstructions, which depend on unit subvectors only; else the features as they are."""
    if config.eval.normalize != "auto":
        return str(config.eval.normalize)
    return "subvectors" if (config.loss.pairing, config.quantizer.metric) == ("quantized", "ip") else "none"


def scorers(encoder: encode.Encoder, queries: encode.Encoded, database: encode.Encoded) -> dict[str, Scorer]:
    """Scores by "asymmetric" (float query, stored code), "symmetric" (both codes) and "float" (both features)."""
    codebooks, c = encoder.codebooks, encoder.config.eval
    metric, normalize = c.score, query_norm(encoder.config)
    norms = ranking.code_norms(database.codes, codebooks) if metric == "cosine" else None
    decoded = np.asarray(quantizer.decode(queries.codes, codebooks))

    def coded(rows: Float[np.ndarray, "Q D"]) -> Scorer:
        return lambda block: np.asarray(
            ranking.scores(
                ranking.lookup_table(rows[block], codebooks, metric=metric, squared=c.squared, normalize=normalize),
                database.codes,
                norms=norms,
            )
        )

    return {
        "asymmetric": coded(queries.features),
        "symmetric": coded(decoded),
        "float": lambda block: ranking.dense_scores(queries.features[block], database.features, metric=metric),
    }


def held_out(encoder: encode.Encoder, source: Source, split: protocols.Split) -> dict[str, float]:
    """Loss and clip quality on the validation images; with labels also mAP of them against training images.

    Empty where there are fewer than two.
    """
    if len(split.validation) < 2:
        return {}
    config, images = encoder.config, source.images[split.validation]
    labels = None if source.labels is None else source.labels[split.validation]
    values = clip_quality(encoder, images, labels)
    if source.labels is None:
        return values
    chosen = np.sort(np.random.RandomState(0).permutation(split.train)[: config.eval.max_database])
    database = encode.encode(encoder, source.images[chosen])
    queries = encode.encode(encoder, images)
    score = scorers(encoder, queries, database)["asymmetric"]
    k = protocols.cut_off(config.data.protocol, config.eval.k, len(chosen))
    found = retrieve(score, labels, source.labels[chosen], k=k, ks=[1], conventions=conventions_of(config))
    return {"mAP": found.mean_average_precision} | values


def clip_quality(
    encoder: encode.Encoder, images: UInt8[np.ndarray, "N H W 3"], labels: Any, *, batches: int = 4
) -> dict[str, float]:
    """The training loss (without a queue) and its logs on un-trained images, with augmented views drawn by a fixed key.

    Where there are labels, also clip_precision, clip_recall and false_negative_rate (see `losses.nt_xent`), over up to
    `batches` batches of the training size; of fewer images with the same share of negatives clipped.
    """
    c = encoder.config
    size = min(c.data.batch_size, len(images))
    negatives = 2 * size - 2
    count = configs.clip_count(c.loss.clip, c.data.batch_size)
    clip = min(count * negatives // (2 * c.data.batch_size - 2), negatives)
    order = np.random.RandomState(c.train.seed).permutation(len(images))
    variables = parallel.replicate(encoder.variables)
    strengths = tuple(sorted(c.data.augment.items()))
    results = []
    for start in range(0, min(batches * size, len(images) // size * size), size):
        chosen = np.sort(order[start : start + size])
        rows = {"image": images[chosen], "index": chosen.astype(np.int32)}
        views = parallel.map_in_batches(_views(encoder.model, strengths), variables, rows, c.eval.batch_size)
        loss, logs = _loss(
            *views,
            pairing=c.loss.pairing,
            temperature=c.loss.temperature,
            clip=clip,
            debias=c.loss.debias,
            block_size=c.loss.block_size or None,
            labels=None if labels is None else labels[chosen].astype(np.int32),
        )
        results.append({"loss": float(loss), **{k: float(v) for k, v in logs.items()}})
    return {k: float(np.mean([r[k] for r in results])) for k in results[0]}


# Compiled as a whole: a loop outside of one would be compiled again for every batch.
_loss = jax.jit(losses.contrastive_loss, static_argnames=("pairing", "temperature", "clip", "debias", "block_size"))


@lru_cache(maxsize=4)
def _views(model: Any, strengths: tuple[tuple[str, float], ...]) -> Any:
    def body(variables: Any, rows: dict[str, Array]) -> tuple[Array, ...]:
        def pair(image: Array, index: Array) -> tuple[Array, Array]:
            keys = jax.random.split(jax.random.fold_in(jax.random.key(0), index))
            first, second = (augment.random_view(key, image, dict(strengths)) for key in keys)
            return first, second

        a, b = jax.vmap(pair)(rows["image"].astype(jnp.float32) / 255, rows["index"])
        out_a, out_b = model.apply(variables, a), model.apply(variables, b)
        return out_a.features, out_b.features, out_a.reconstructions, out_b.reconstructions

    return parallel.pmap_rows(body)
