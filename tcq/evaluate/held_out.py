"""Validation on images that are not trained on.

It measures the loss, retrieval, and whether clipping removes false negatives.
"""

from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from tcq import augment, encode, losses, ranking
from tcq import config as configs
from tcq.data import protocols
from tcq.data.rows import take
from tcq.data.source import Source
from tcq.evaluate import retrieval
from tcq.models import retriever
from tcq.runtime import devices

MAX_BATCHES = 4  # of the training size, for the loss and the quality of clipping
QUERIES, DATABASE = 200, 10_000  # embeddings for `neighbours`, at most
NEAREST, FOUND = 10, 100  # of an embedding, and the first ones by codes


def validate(encoder: encode.Encoder, source: Source, split: protocols.Split) -> dict[str, float]:
    """Loss and clip quality on the validation images, and with labels their mAP.

    The mAP is against training images. A model on embeddings also has `neighbours`. Empty if there are fewer than two
    validation images.
    """
    if len(split.validation) < 2:
        return {}
    config = encoder.config
    images = take(source.images, split.validation)
    labels = None if source.labels is None else source.labels[split.validation]
    rows = images if source.views is None else take(source.views, split.validation)
    values = clip_quality(encoder, rows, labels)
    if retriever.takes_embeddings(encoder.model):
        values["neighbours"] = neighbours(encoder, source, split)
    if source.labels is None:
        return values
    chosen = np.sort(np.random.RandomState(0).permutation(split.train)[: config.eval.max_database])
    database = encode.encode(encoder, take(source.images, chosen))
    queries = encode.encode(encoder, images)
    score = retrieval.scorers(encoder, queries, database)["asymmetric"]
    k = protocols.cut_off(config.data.protocol, config.eval.k, len(chosen))
    conventions = configs.conventions(config)
    result = retrieval.retrieve(
        score, labels, source.labels[chosen], k=k, ks=[1], conventions=conventions, max_scores=config.eval.max_scores
    )
    return {"mAP": result.mean_average_precision} | values


def neighbours(encoder: encode.Encoder, source: Source, split: protocols.Split) -> float:
    """The share of the nearest training embeddings that codes find for validation ones.

    Of the NEAREST ones, by the cosine of the embeddings minus their mean, it counts those among the FOUND first ones by
    codes. It needs no labels.
    """
    random = np.random.RandomState(0)
    chosen = (random.permutation(s)[:n] for s, n in ((split.validation, QUERIES), (split.train, DATABASE)))
    queries, database = (np.asarray(take(source.images, np.sort(places)), np.float32) for places in chosen)
    mean = database.mean(axis=0, keepdims=True)
    cosines = ranking.dense_scores(queries - mean, database - mean, metric="cosine")
    metric, normalize = encoder.model.metric, configs.query_norm(encoder.config)
    features = encode.encode(encoder, queries).features
    tables = ranking.lookup_table(features, encoder.codebooks, metric=metric, normalize=normalize)
    scores = np.asarray(ranking.scores(tables, encode.codes(encoder, database)))
    nearest, found = (np.argsort(-s, axis=1, kind="stable")[:, :n] for s, n in ((cosines, NEAREST), (scores, FOUND)))
    return float(np.mean([np.isin(a, b).mean() for a, b in zip(nearest, found, strict=True)]))


def clip_quality(encoder: encode.Encoder, images: Any, labels: Any) -> dict[str, float]:
    """The training loss and its logs on held-out images, with views drawn from a fixed key.

    `images` are uint8 (N, H, W, 3), or embeddings: (N, F), of which views are made, or two or more views each,
    (N, V, F).

    The loss is without a queue, and with the complete `loss.clip` whatever the step, so that steps can be compared.
    With labels the logs have clip_precision, clip_recall and false_negative_rate (see `losses.nt_xent`). All are means
    over up to `MAX_BATCHES` batches of the training size; if there are fewer images, the same share of negatives is
    clipped.
    """
    c = encoder.config
    size = min(c.data.batch_size, len(images))
    clip = configs.clip_rule(c, 0).of_negatives(2 * size - 2, queue=c.loss.queue)
    order = np.random.RandomState(c.train.seed).permutation(len(images))
    variables = devices.place(encoder.variables)
    run = _compiled_views(encoder.model, tuple(sorted(c.data.augment.items())))
    results = []
    for start in range(0, min(MAX_BATCHES * size, len(images) // size * size), size):
        chosen = np.sort(order[start : start + size])
        batch = images[chosen]
        rows = {"image": batch[:, :2] if batch.ndim == 3 else batch, "index": chosen.astype(np.int32)}
        loss, logs = _loss(
            *devices.map_in_batches(run, variables, rows, c.eval.batch_size),
            pairing=c.loss.pairing,
            temperature=c.loss.temperature,
            clip=clip,
            clip_scope=c.loss.clip_scope,
            debias=c.loss.debias,
            block_size=c.loss.block_size or None,
            labels=None if labels is None else labels[chosen].astype(np.int32),
        )
        results.append({"loss": float(loss), **{k: float(v) for k, v in logs.items()}})
    return {k: float(np.mean([r[k] for r in results])) for k in results[0]}


# Compiled as a whole: outside of jit its scan would be compiled again for every batch.
_loss = jax.jit(
    losses.contrastive_loss, static_argnames=("pairing", "temperature", "clip", "clip_scope", "debias", "block_size")
)


@lru_cache(maxsize=4)
def _compiled_views(model: Any, strengths: tuple[tuple[str, float], ...]) -> Any:
    """Features and reconstructions of two views of each image.

    The order is (features a, features b, recon a, recon b).
    """

    def body(variables: Any, rows: dict[str, Array]) -> tuple[Array, ...]:
        def pair(image: Array, index: Array) -> tuple[Array, Array]:
            keys = jax.random.split(jax.random.fold_in(jax.random.key(0), index))
            first, second = (augment.random_view(key, image, dict(strengths)) for key in keys)
            return first, second

        images = retriever.scaled(rows["image"])
        if images.ndim == 3:
            a, b = images[:, 0], images[:, 1]
        elif images.ndim == 2:
            keys = jax.vmap(lambda index: jax.random.fold_in(jax.random.key(0), index))(rows["index"])
            known = variables["params"]["backbone"]
            a, b = augment.noisy_views(images, known["mean"], known["std"], keys, dict(strengths))
        else:
            a, b = jax.vmap(pair)(images, rows["index"])
        out_a, out_b = model.apply(variables, a), model.apply(variables, b)
        return out_a.features, out_b.features, out_a.reconstructions, out_b.reconstructions

    return devices.pmap_rows(body)
