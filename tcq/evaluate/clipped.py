"""A picture of clipping: anchors with their most similar negatives, clipped and kept."""

from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from tcq import config as configs
from tcq import encode, plots, quantizer
from tcq.data import protocols
from tcq.data.rows import take
from tcq.data.source import Source
from tcq.runtime import processes

CLIPPED = "clipped.png"
ANCHORS, NEGATIVES = 8, 10


def write(folder: Path, encoder: encode.Encoder, source: Source, split: protocols.Split) -> None:
    """Draws clipped.png from a batch of training images, by their hard codes.

    Each image is taken once and without augmentation. Does nothing if nothing is clipped or there are no images to
    draw. All processes of a run call it, the first draws.
    """
    config = encoder.config
    images = source.images if source.pictures is None else source.pictures
    rule = configs.clip_rule(config, 1)
    if images.ndim != 4 or not rule.count() or len(split.train) < 2:
        return
    chosen = np.sort(np.random.RandomState(0).permutation(split.train)[: config.data.batch_size])
    similarity = similarities(encoder, encode.encode(encoder, take(source.images, chosen)))
    clipped = clipped_pairs(
        similarity, rule.of_negatives(len(chosen) - 1, queue=config.loss.queue), scope=config.loss.clip_scope
    )
    nearest = np.sort(similarity, axis=1)[:, -min(NEGATIVES, len(chosen) - 1) :]
    density = nearest.mean(axis=1)
    negatives = [around_the_border(*row) for row in zip(similarity, clipped, strict=True)]
    shown = np.argsort(density, kind="stable")[np.unique(np.linspace(0, len(chosen) - 1, ANCHORS).astype(int))]
    draw = partial(
        plots.gallery,
        folder / CLIPPED,
        [images[chosen[i]] for i in shown],
        [[images[chosen[j]] for j in negatives[i]] for i in shown],
        captions=[[f"{similarity[i, j]:.2f}" for j in negatives[i]] for i in shown],
        right=np.array([~clipped[i, negatives[i]] for i in shown]),
        marks=(plots.KEPT, plots.CLIPPED),
        name="anchor",
        title="the most similar negative, then the last ones clipped (scissors) and the first ones kept (solid), of "
        f"rare (top) to common anchors: {clipped.mean() * len(chosen) / (len(chosen) - 1):.1%} of pairs are clipped",
    )
    processes.on_first(draw)


def around_the_border(similarity: Float[np.ndarray, " B"], clipped: Bool[np.ndarray, " B"]) -> Int[np.ndarray, " n"]:
    """Negatives of an anchor: the most similar one, then those on both sides of the border.

    Half of them are clipped and half are kept, where there are enough of each.
    """
    order = np.argsort(-similarity, kind="stable")[:-1]  # the last one is the anchor itself
    absent, present = order[clipped[order]], order[~clipped[order]]
    num_present = min(len(present), max(NEGATIVES // 2, NEGATIVES - len(absent)))
    num_absent = NEGATIVES - num_present
    if len(absent) > num_absent:
        absent = np.concatenate([absent[:1], absent[len(absent) - num_absent + 1 :]])
    return np.concatenate([absent, present[:num_present]])


def similarities(encoder: encode.Encoder, encoded: encode.Encoded) -> Float[np.ndarray, "B B"]:
    """Cosine similarities as `loss.pairing` takes them; -inf for an image and itself.

    Hard codes take the place of soft ones.
    """
    features = np.asarray(quantizer.unit(jnp.asarray(encoded.features)))
    codes = np.asarray(quantizer.unit(quantizer.decode(encoded.codes, encoder.codebooks)))
    pairing = encoder.config.loss.pairing
    anchors, columns = codes if pairing == "quantized" else features, features if pairing == "float" else codes
    similarity = anchors @ columns.T
    np.fill_diagonal(similarity, -np.inf)
    return similarity


def clipped_pairs(similarity: Float[np.ndarray, "B B"], count: float, *, scope: str) -> Bool[np.ndarray, "B B"]:
    """The mask of the `count` most similar negatives of each anchor.

    With scope "batch" it is the mask of as many on average.
    """
    if scope == "anchor":
        order = np.argsort(-similarity, axis=1, kind="stable")[:, : int(count)]
        mask = np.zeros(similarity.shape, bool)
        np.put_along_axis(mask, order, True, axis=1)
        return mask
    flat = np.zeros((similarity.size,), bool)
    flat[np.argsort(-similarity.ravel(), kind="stable")[: int(count * len(similarity))]] = True
    return flat.reshape(similarity.shape)
