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
from typing import Any, NamedTuple

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
SHARD = 2**16  # rows of a file, at most
FILES = 32  # of a collection below 2^21 images; as many processes can share the work
SEED = 0  # of the views: runs with other seeds share them
DONE = "done.json"
PARTIAL = "-partial"  # of the name of a folder that is being written
STATE = "state.json"  # of a folder that is being written: what it holds
EVERY = 10.0  # seconds between two records of how many images of a file are embedded

Run = Callable[[np.ndarray], np.ndarray]  # uint8 images (N, S, S, 3) to float32 embeddings (N, F)

logger = logging.getLogger(__name__)


def open_source(config: ConfigDict, order: Callable[[Source], Source] = lambda source: source) -> Source:
    """The source of a config; with `model.embedder`, its embeddings.

    The embeddings are computed once and cached. The processes of a run share the work and read all of them, so these
    must share `data.cache_dir`. `order` puts the images into the order that a run knows.
    Raises SourceError and EmbedderError.
    """
    source = order(sources.open_source(config.data))
    if not config.model.embedder:
        return source
    folder = _cache(config, source)
    _fill(folder, config, source)
    processes.require_visible(folder / DONE)
    cached = embeddings.open_folder(folder)
    return source._replace(images=cached.images, views=cached.views, pictures=source.images)


def write(config: ConfigDict, out: str | Path) -> int:
    """Writes the embeddings of the source of a config, and of views, to a new folder.

    There are `data.views` views of each image. The embeddings are those of `model.embedder`, or of the backbone that
    `model.weights` names, before any projection. The processes of a run share the work, and the folder.
    If the call is stopped, the same call goes on in `<out>-partial`. Returns the number of images. Raises SourceError,
    also if `out` exists, EmbedderError and WeightsError.
    """
    if storage.is_url(out):
        raise SourceError(f"{out} is in a bucket: give a local folder, and copy it afterwards")
    out = Path(out)
    processes.on_first(lambda: _refuse(out, "exists"))
    run = _run_of(config)
    source = sources.open_source(config.data)
    identity = hashlib.blake2b(configs.to_json(config).encode() + _contents(source)).hexdigest()
    with processes.entered_by_first(lambda: _locked(out)):
        processes.on_first(lambda: _refuse(out, "was written meanwhile by another process"))
        _write(_partial(out), config, run, source, np.arange(len(source.images)), identity)
        processes.on_first(lambda: _publish(out))
    return len(source.images)


def _refuse(out: Path, reason: str) -> None:
    if out.exists():
        raise SourceError(f"{out} {reason}: give another folder")


def _partial(folder: Path) -> Path:
    return folder.with_name(folder.name + PARTIAL)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Locks the folder that becomes `folder`, for one run at a time.

    What a stopped run has written to it stays.
    """
    with locks.lock(_partial(folder), wait=True):
        yield
        (folder / locks.NAME).unlink(missing_ok=True)


def _publish(folder: Path) -> None:
    _partial(folder).rename(folder)


def _run_of(config: ConfigDict) -> Run:
    """What embeds images. Raises EmbedderError if the config has no function and no weights."""
    m = config.model
    if m.embedder:
        return partial(_run_embedder, m.embedder, int(m.embedder_output[0]))
    if not m.weights:
        raise embedder.EmbedderError(
            "nothing to embed with: give --config.model.embedder=file.py:function, or --config.model.weights=<path>"
        )
    model = retriever.from_config(config)
    variables = devices.replicate(encode.backbone_from_weights(config, model))
    run = _compiled_backbone(model)
    return lambda images: np.asarray(devices.map_here(run, variables, images, config.eval.batch_size))


def _run_embedder(spec: str, width: int, images: np.ndarray) -> np.ndarray:
    rows = embedder.run(spec, images)
    if rows.shape[1] != width:
        raise embedder.EmbedderError(
            f"model.embedder {spec} returned {rows.shape[1]} numbers for each of {len(images)} images, and {width} "
            f"before: the width must not depend on the images"
        )
    return rows


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
    """Writes a folder of the cache, unless it is there."""

    def is_done() -> bool:
        return (folder / DONE).is_file()

    if processes.on_first(is_done):
        return
    m = config.model
    embedder.require_same(m.embedder, config.data.image_size, tuple(m.embedder_output))
    split = splits.of_source(source, config.data)
    viewed = np.union1d(split.train, split.validation)
    with processes.entered_by_first(lambda: _locked(folder)):
        if processes.on_first(is_done):  # by another run, meanwhile
            return
        partial = _partial(folder)
        _write(partial, config, _run_of(config), source, viewed, folder.name)

        def publish() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            storage.write_text(partial / DONE, json.dumps({"images": len(source.images)}))
            _publish(folder)

        processes.on_first(publish)


class _Work(NamedTuple):
    """What the files of a folder are made of."""

    folder: Path
    names: Sequence[str]  # of the kinds of files
    images: Any
    has_views: np.ndarray  # for each image whether it gets views
    run: Run
    draw: Callable[..., Any]
    views: int


def _write(folder: Path, config: ConfigDict, run: Run, source: Source, viewed: np.ndarray, identity: str) -> None:
    """Writes items, the views of the images at `viewed` (zeros for others), and metadata.

    Each process of a run writes files of its own. They go on where they stopped.
    """
    images, views = source.images, config.data.views
    names = (embeddings.ITEMS, embeddings.VIEWS)[: 2 if views else 1]
    processes.on_first(lambda: _begin(folder, names, identity))
    processes.require_visible(folder / STATE)
    draw = _compiled_views(tuple(sorted(config.data.augment.items())))
    work = _Work(folder, names, images, np.isin(np.arange(len(images)), viewed), run, draw, views)
    size = min(SHARD, max(BLOCK, -(-len(images) // FILES)))
    own = list(enumerate(range(0, len(images), size)))[jax.process_index() :: jax.process_count()]
    spans = [(number, first, min(first + size, len(images))) for number, first in own]
    done = {number: _done(folder, names, number) for number, *_ in spans}
    task = f"embedding images and {views} views each" + (", share of process 0" if processes.several() else "")
    total = sum(stop - first for _, first, stop in spans)
    embedded = sum(done.values())
    progress = log.Progress(logger, task, total, done=embedded)
    for number, first, stop in spans:
        for count in _write_file(work, number, range(first + done[number], stop, BLOCK), (first, stop)):
            embedded += count
            progress.update(embedded)
    processes.exchange(None)  # all are done

    def finish() -> None:
        embeddings.write_metadata(folder, source.names, source.labels, source.classes)
        for path in folder.glob("*.json"):
            path.unlink()

    processes.on_first(finish)


def _write_file(work: _Work, number: int, starts: range, span: tuple[int, int]) -> Iterator[int]:
    """Embeds the blocks of images that begin at `starts`, for the files of one number.

    `span` is the first image of the files and the end. Yields the number of images of each block.
    """
    first, stop = span
    shards: list[np.ndarray] = []
    recorded = time.monotonic()
    for start in starts:
        signals.poll()
        rows = np.arange(start, min(start + BLOCK, stop))
        block = np.asarray(work.images[rows])
        plain = work.run(block)
        if not shards:
            shapes = (stop - first, plain.shape[1]), (stop - first, work.views, plain.shape[1])
            named = zip(work.names, shapes, strict=False)
            shards = [_shard(work.folder, name, number, shape, new=start == first) for name, shape in named]
        shards[0][rows - first] = plain
        here = work.has_views[rows]
        for view in range(work.views) if here.any() else ():
            pixels = np.asarray(work.draw(block, rows.astype(np.int32), np.int32(view)))[here]
            shards[1][rows[here] - first, view] = work.run(pixels)
        if time.monotonic() - recorded >= EVERY or rows[-1] + 1 == stop:
            _record(work.folder, number, shards, int(rows[-1]) + 1 - first)
            recorded = time.monotonic()
        yield len(rows)


def _begin(folder: Path, names: Sequence[str], identity: str) -> None:
    """Deletes all files if they are of other images, or embedded in another way."""
    state = json.dumps({"identity": identity})
    if storage.read(folder / STATE) == state.encode():
        counts = [_done(folder, names, int(path.stem)) for path in folder.glob("[0-9]*.json")]
        if any(counts):
            logger.info(f"{folder}: going on after {sum(counts):,} images")
        return
    for path in folder.glob("*.json"):
        path.unlink()
    for name in names:
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir()
    storage.write_text(folder / STATE, state)


def _done(folder: Path, names: Sequence[str], number: int) -> int:
    """How many images of the files of one number are embedded."""
    record = storage.read(folder / f"{number}.json")
    if record is None or not all(_file(folder, name, number).is_file() for name in names):
        return 0
    return int(json.loads(record)["images"])


def _record(folder: Path, number: int, shards: Sequence[Any], count: int) -> None:
    """Records the number of images that are on the disk."""
    for shard in shards:
        shard.flush()
    storage.write_text(folder / f"{number}.json", json.dumps({"images": count}))


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
