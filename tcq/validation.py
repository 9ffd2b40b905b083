"""Ranking a database for queries and scoring it; and whether clipping removes what it should. Used in and after training."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from tcq import augment, encode, losses, metrics, parallel, quantizer, ranking
from tcq import config as configs

Scorer = Callable[[slice], Float[np.ndarray, "Q N"]]


class Retrieval(NamedTuple):
    """How well a ranking answers the queries."""

    average_precision: Float[np.ndarray, " Q"]
    precision: Float[np.ndarray, " C"]  # at each cut-off asked for
    recall: Float[np.ndarray, " C"]

    @property
    def mean_average_precision(self) -> float:
        return float(self.average_precision.mean())


def relevance(queries: Int[np.ndarray, " Q"] | Bool[np.ndarray, "Q L"], database: Any) -> Bool[np.ndarray, "Q N"]:
    """Same class number, or at least one shared label."""
    if queries.ndim == 1:
        return queries[:, None] == database
    return (queries.astype(np.float32) @ database.T.astype(np.float32)) > 0


def retrieve(
    score: Scorer, query_labels: Any, database_labels: Any, *, k: int, ks: list[int], block_size: int = 256
) -> Retrieval:
    """AP@k, precision and recall at `ks` of the ranking that `score` gives for a slice of the queries, block by block."""
    parts = []
    for start in range(0, len(query_labels), block_size):
        block = slice(start, min(start + block_size, len(query_labels)))
        values, relevant = np.asarray(score(block)), relevance(query_labels[block], database_labels)
        average_precision = metrics.average_precision(values, relevant, k=k)
        parts.append((average_precision, metrics.hits(values, relevant, ks=ks), relevant.sum(axis=1)))
    average_precision, hits, relevant = (np.concatenate(p) for p in zip(*parts, strict=True))
    some = relevant > 0
    recall = (hits[some] / relevant[some, None]).mean(axis=0) if some.any() else np.zeros(len(ks))
    return Retrieval(average_precision, (hits / np.asarray(ks)).mean(axis=0), recall)


def scorers(
    encoder: encode.Encoder, queries: encode.Encoded, database: encode.Encoded, *, metric: str
) -> dict[str, Scorer]:
    """Scores by "asymmetric" (float query, stored code), "symmetric" (both codes) and "float" (both features)."""
    codebooks = encoder.codebooks
    norms = ranking.code_norms(database.codes, codebooks) if metric == "cosine" else None
    decoded = np.asarray(quantizer.decode(queries.codes, codebooks))

    def coded(rows: Float[np.ndarray, "Q D"]) -> Scorer:
        return lambda block: np.asarray(
            ranking.scores(ranking.lookup_table(rows[block], codebooks, metric=metric), database.codes, norms=norms)
        )

    return {
        "asymmetric": coded(queries.features),
        "symmetric": coded(decoded),
        "float": lambda block: ranking.dense_scores(queries.features[block], database.features, metric=metric),
    }


def clip_quality(
    encoder: encode.Encoder, images: UInt8[np.ndarray, "N H W 3"], labels: Any, *, batches: int = 4
) -> dict[str, float]:
    """The training loss and its logs on un-trained images, with augmented views drawn by a fixed key.

    Where there are labels, also clip_precision, clip_recall and false_negative_rate (see `losses.nt_xent`), over up to
    `batches` batches of the training size; of fewer images with the same share of negatives clipped.
    """
    c = encoder.config
    size = min(c.data.batch_size, len(images))
    negatives = 2 * size - 2
    clip = configs.clip_count(c.loss.clip, c.data.batch_size) * negatives // (2 * c.data.batch_size - 2)
    order = np.random.RandomState(c.train.seed).permutation(len(images))
    params = parallel.replicate(encoder.params)
    strengths = tuple(sorted(c.data.augment.items()))
    results = []
    for start in range(0, min(batches * size, len(images) // size * size), size):
        chosen = np.sort(order[start : start + size])
        rows = {"image": images[chosen], "index": chosen.astype(np.int32)}
        views = parallel.map_in_batches(_views(encoder.model, strengths), params, rows, c.eval.batch_size)
        loss, logs = losses.contrastive_loss(
            *views,
            pairing=c.loss.pairing,
            temperature=c.loss.temperature,
            clip=clip,
            labels=None if labels is None else labels[chosen].astype(np.int32),
        )
        results.append({"loss": float(loss), **{k: float(v) for k, v in logs.items()}})
    return {k: float(np.mean([r[k] for r in results])) for k in results[0]}


@lru_cache(maxsize=4)
def _views(model: Any, strengths: tuple[tuple[str, float], ...]) -> Any:
    def body(params: Any, rows: dict[str, Array]) -> tuple[Array, ...]:
        def pair(image: Array, index: Array) -> tuple[Array, Array]:
            keys = jax.random.split(jax.random.fold_in(jax.random.key(0), index))
            first, second = (augment.random_view(key, image, dict(strengths)) for key in keys)
            return first, second

        a, b = jax.vmap(pair)(rows["image"].astype(jnp.float32) / 255, rows["index"])
        out_a, out_b = model.apply({"params": params}, a), model.apply({"params": params}, b)
        return out_a.features, out_b.features, out_a.reconstructions, out_b.reconstructions

    return parallel.pmap_rows(body)
