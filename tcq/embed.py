"""Embeds a collection and its views once, with a user's function or a backbone, into a folder that training reads."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tcq import augment, encode
from tcq.data import embeddings, sources, splits
from tcq.data.source import Source, SourceError
from tcq.models import embedder, retriever
from tcq.runtime import devices, log, processes, signals, storage

BLOCK = 64  # images embedded at a time
SHARD = 2**16  # rows of a file
SEED = 0  # of the views: runs with other seeds share them
DONE = "done.json"

Run = Callable[[np.ndarray], np.ndarray]  # uint8 images (N, S, S, 3) to float32 embeddings (N, F)

logger = logging.getLogger(__name__)


def open_source(config: ConfigDict, order: Callable[[Source], Source] = lambda source: source) -> Source:
    """The source of a config; with `model.embedder` its embeddings, which are computed once and cached.

    Process 0 computes them. All processes of a run read them, so these must share `data.cache_dir`. `order` puts the
    images into the order that a run knows.
    Raises SourceError and EmbedderError.
    """
    source = order(sources.open_source(config.data))
    if not config.model.embedder:
        return source
    folder = _cache(config, source)
    processes.on_first(lambda: _fill(folder, config, source))
    processes.require_visible(folder / DONE)
    cached = embeddings.open_folder(folder)
    return source._replace(images=cached.images, views=cached.views, pictures=source.images)


def write(config: ConfigDict, out: str | Path) -> int:
    """Writes the embeddings of the source of a config, and `data.views` views of each image, to a new folder.

    They are those of `model.embedder`, or of the backbone that `model.weights` names, before any projection.
    Returns the number of images. Raises SourceError, also if `out` exists, EmbedderError and WeightsError.
    """
    if Path(out).exists():
        raise SourceError(f"{out} exists: give another folder")
    run = _run_of(config)
    source = sources.open_source(config.data)
    with storage.temporary_folder(out) as folder:
        _write(folder, config, run, source, np.arange(len(source.images)))
        folder.rename(out)
    return len(source.images)


def _run_of(config: ConfigDict) -> Run:
    """What embeds images. Raises EmbedderError if the config has neither a function nor weights."""
    m = config.model
    if m.embedder:
        return partial(embedder.run, m.embedder)
    if not m.weights:
        raise embedder.EmbedderError(
            "nothing to embed with: give --config.model.embedder=file.py:function, or --config.model.weights=<path>"
        )
    model = retriever.from_config(config)
    variables = devices.replicate(encode.backbone_from_weights(config, model))
    run = _compiled_backbone(model)
    return lambda images: np.asarray(devices.map_in_batches(run, variables, images, config.eval.batch_size))


@lru_cache(maxsize=2)
def _compiled_backbone(model: retriever.Retriever) -> Any:
    def body(variables: Any, images: Any) -> Any:
        pixels = retriever.normalized(retriever.scaled(images), model.mean, model.std)
        return model.backbone.apply(variables, pixels).astype(jnp.float32)  # type: ignore[union-attr]

    return devices.pmap_rows(body)


def _cache(config: ConfigDict, source: Source) -> Path:
    """The folder of the embeddings of a source, named by all that they depend on."""
    data = config.data
    parts = [
        [float(x) for x in config.model.embedder_output],  # not the file: it may be moved
        SEED,
        data.views,
        sorted((name, strength) for name, strength in data.augment.items() if name not in ("noise", "drop")),
        [data.image_size, data.resize, data.interpolation, data.crop_share],
        [data.protocol, data.split_seed, data.query, data.validation],
        [data.max_pixels, data.labels],
    ]
    digest = hashlib.blake2b(json.dumps(parts).encode())
    if source.digests is not None:
        digest.update(b"".join(source.digests))
    for first in range(0, len(source.images) if source.digests is None else 0, BLOCK):
        signals.poll()
        digest.update(np.ascontiguousarray(source.images[first : first + BLOCK]).data)
    home = Path(data.cache_dir).expanduser() if data.cache_dir else storage.cache_home()
    return home / "embedded" / digest.hexdigest()[:32]


def _fill(folder: Path, config: ConfigDict, source: Source) -> None:
    if (folder / DONE).is_file():
        return
    split = splits.of_source(source, config.data)
    viewed = np.union1d(split.train, split.validation)
    shutil.rmtree(folder, ignore_errors=True)
    if folder.parent.is_dir():
        storage.delete_abandoned(folder.parent)
    with storage.temporary_folder(folder) as temporary:
        _write(temporary, config, _run_of(config), source, viewed)
        storage.write_text(temporary / DONE, json.dumps({"images": len(source.images)}))
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / DONE).is_file():  # else another process has written the same meanwhile
                raise


def _write(folder: Path, config: ConfigDict, run: Run, source: Source, viewed: np.ndarray) -> None:
    """Writes items, the views of the images at `viewed` (zeros for others), and metadata."""
    images, views = source.images, config.data.views
    progress = log.Progress(logger, f"embedding images and {views} views each", len(images))
    has_views = np.isin(np.arange(len(images)), viewed)
    draw = _compiled_views(tuple(sorted(config.data.augment.items())))
    for name in (embeddings.ITEMS, embeddings.VIEWS)[: 2 if views else 1]:
        (folder / name).mkdir(parents=True)
    for number, first in enumerate(range(0, len(images), SHARD)):
        items: Any = None
        rows_of_views: Any = None
        stop = min(first + SHARD, len(images))
        for start in range(first, stop, BLOCK):
            signals.poll()
            rows = np.arange(start, min(start + BLOCK, stop))
            block = np.asarray(images[rows])
            plain = run(block)
            if items is None:
                items = _shard(folder, embeddings.ITEMS, number, (stop - first, plain.shape[1]))
                if views:
                    rows_of_views = _shard(folder, embeddings.VIEWS, number, (stop - first, views, plain.shape[1]))
            items[rows - first] = plain
            here = has_views[rows]
            for view in range(views) if here.any() else ():
                pixels = np.asarray(draw(block, rows.astype(np.int32), np.int32(view)))[here]
                rows_of_views[rows[here] - first, view] = run(pixels)
            progress.update(int(rows[-1]) + 1)
    embeddings.write_metadata(folder, source.names, source.labels, source.classes)


def _shard(folder: Path, name: str, number: int, shape: tuple[int, ...]) -> np.ndarray:
    """A mapped file, whose place on the disk is reserved: a full disk is an OSError here, and not a bus error later."""
    path = folder / name / f"{name}_{number}.npy"
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return rows


@lru_cache(maxsize=2)
def _compiled_views(strengths: tuple[tuple[str, float], ...]) -> Any:
    """uint8 views by number, the same that a frozen backbone of ours would see."""

    @jax.jit
    def views(images: Any, indices: Any, number: Any) -> Any:
        def view(image: Any, index: Any) -> Any:
            return augment.random_view(encode.view_key(SEED, index, number), image / 255, dict(strengths))

        return jnp.round(jax.vmap(view)(images.astype(jnp.float32), indices) * 255).astype(jnp.uint8)

    return views
