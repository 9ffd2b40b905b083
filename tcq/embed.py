"""Embeds a collection and its views once, into a folder that training reads.

A user's function or a backbone embeds them.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tcq import augment, encode
from tcq import config as configs
from tcq.data import embeddings, sources, splits
from tcq.data.source import Source, SourceError
from tcq.models import embedder, retriever
from tcq.runtime import devices, locks, log, processes, signals, storage

BLOCK = 64  # images embedded at a time
SHARD = 2**16  # rows of a file
SEED = 0  # of the views: runs with other seeds share them
DONE = "done.json"
PARTIAL = "-partial"  # of the name of a folder that is being written
STATE = "state.json"  # of a folder that is being written: what it holds, and how many images are embedded
EVERY = 10.0  # seconds between two records of the state

Run = Callable[[np.ndarray], np.ndarray]  # uint8 images (N, S, S, 3) to float32 embeddings (N, F)

logger = logging.getLogger(__name__)


def open_source(config: ConfigDict, order: Callable[[Source], Source] = lambda source: source) -> Source:
    """The source of a config; with `model.embedder`, its embeddings.

    The embeddings are computed once and cached. Process 0 computes them. All processes of a run read them, so these
    must share `data.cache_dir`. `order` puts the images into the order that a run knows.
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
    """Writes the embeddings of the source of a config, and of views, to a new folder.

    There are `data.views` views of each image. The embeddings are those of `model.embedder`, or of the backbone that
    `model.weights` names, before any projection.
    If the call is stopped, the same call goes on in `<out>-partial`. Returns the number of images. Raises SourceError,
    also if `out` exists, EmbedderError and WeightsError.
    """
    if Path(out).exists():
        raise SourceError(f"{out} exists: give another folder")
    run = _run_of(config)
    source = sources.open_source(config.data)
    identity = hashlib.blake2b(configs.to_json(config).encode() + _contents(source)).hexdigest()
    with _partial(Path(out)) as folder:
        if Path(out).exists():
            raise SourceError(f"{out} was written meanwhile by another process: give another folder")
        _write(folder, config, run, source, np.arange(len(source.images)), identity)
        folder.rename(out)
    return len(source.images)


@contextlib.contextmanager
def _partial(folder: Path) -> Iterator[Path]:
    """The folder that becomes `folder`, for one process at a time.

    What a stopped process has written to it stays.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    with locks.lock(partial, wait=True):
        yield partial
        (folder / locks.NAME).unlink(missing_ok=True)


def _run_of(config: ConfigDict) -> Run:
    """What embeds images. Raises EmbedderError if the config has no function and no weights."""
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
    digest = hashlib.blake2b(json.dumps(parts).encode() + _contents(source)).hexdigest()
    home = Path(data.cache_dir).expanduser() if data.cache_dir else storage.cache_home()
    return home / "embedded" / digest[:32]


def _contents(source: Source) -> bytes:
    """The digests of all images; one of all pixels if there are none."""
    if source.digests is not None:
        return b"".join(source.digests)
    digest = hashlib.blake2b()
    for first in range(0, len(source.images), BLOCK):
        signals.poll()
        digest.update(np.ascontiguousarray(source.images[first : first + BLOCK]).data)
    return digest.digest()


def _fill(folder: Path, config: ConfigDict, source: Source) -> None:
    if (folder / DONE).is_file():
        return
    split = splits.of_source(source, config.data)
    viewed = np.union1d(split.train, split.validation)
    with _partial(folder) as partial:
        if (folder / DONE).is_file():  # by another process, meanwhile
            return
        shutil.rmtree(folder, ignore_errors=True)
        _write(partial, config, _run_of(config), source, viewed, folder.name)
        storage.write_text(partial / DONE, json.dumps({"images": len(source.images)}))
        partial.rename(folder)


def _write(folder: Path, config: ConfigDict, run: Run, source: Source, viewed: np.ndarray, identity: str) -> None:
    """Writes items, the views of the images at `viewed` (zeros for others), and metadata.

    It goes on where it stopped.
    """
    images, views = source.images, config.data.views
    names = (embeddings.ITEMS, embeddings.VIEWS)[: 2 if views else 1]
    begin = _begin(folder, names, identity)
    progress = log.Progress(logger, f"embedding images and {views} views each", len(images), done=begin)
    has_views = np.isin(np.arange(len(images)), viewed)
    draw = _compiled_views(tuple(sorted(config.data.augment.items())))
    recorded = time.monotonic()
    for number, first in enumerate(range(0, len(images), SHARD)):
        shards: list[np.ndarray] = []
        stop = min(first + SHARD, len(images))
        for start in range(max(first, begin), stop, BLOCK):
            signals.poll()
            rows = np.arange(start, min(start + BLOCK, stop))
            block = np.asarray(images[rows])
            plain = run(block)
            if not shards:
                shapes = (stop - first, plain.shape[1]), (stop - first, views, plain.shape[1])
                new = start == first
                shards = [_shard(folder, n, number, of, new=new) for n, of in zip(names, shapes, strict=False)]
            shards[0][rows - first] = plain
            here = has_views[rows]
            for view in range(views) if here.any() else ():
                pixels = np.asarray(draw(block, rows.astype(np.int32), np.int32(view)))[here]
                shards[1][rows[here] - first, view] = run(pixels)
            progress.update(int(rows[-1]) + 1)
            if time.monotonic() - recorded >= EVERY or rows[-1] + 1 == stop:
                _record(folder, shards, identity, int(rows[-1]) + 1)
                recorded = time.monotonic()
    embeddings.write_metadata(folder, source.names, source.labels, source.classes)
    (folder / STATE).unlink()


def _begin(folder: Path, names: Sequence[str], identity: str) -> int:
    """The number of images that are embedded already.

    Deletes all files if they are of other images, or embedded in another way.
    """
    try:
        state = json.loads((folder / STATE).read_text())
    except (OSError, ValueError):
        state = {"identity": "", "images": 0}
    files = [_file(folder, name, number) for name in names for number in range(-(-state["images"] // SHARD))]
    if state["identity"] == identity and all(file.is_file() for file in files):
        logger.info(f"{folder}: going on after {state['images']:,} images")
        return int(state["images"])
    (folder / STATE).unlink(missing_ok=True)
    for name in names:
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir()
    return 0


def _record(folder: Path, shards: Sequence[Any], identity: str, count: int) -> None:
    """Records the number of images that are on the disk."""
    for shard in shards:
        shard.flush()
    storage.write_text(folder / STATE, json.dumps({"identity": identity, "images": count}))


def _file(folder: Path, name: str, number: int) -> Path:
    return folder / name / f"{name}_{number}.npy"


def _shard(folder: Path, name: str, number: int, shape: tuple[int, ...], *, new: bool) -> np.ndarray:
    """A mapped file, whose place on the disk is reserved.

    So a full disk is an OSError here, and not a bus error later.
    """
    path = _file(folder, name, number)
    if not new:
        return np.lib.format.open_memmap(path, mode="r+")
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
