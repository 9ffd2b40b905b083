"""The files of a folder of embeddings while they are being written.

Each process writes files of its own. A stopped run leaves a folder that the same call finishes.
"""

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int32
from ml_collections import ConfigDict

from tcq import augment, encode
from tcq.data import embeddings
from tcq.data import known as earlier
from tcq.data.source import Source
from tcq.models import embedder
from tcq.runtime import locks, log, processes, signals, storage

BLOCK = 64  # images embedded at a time
COPIED = 1024  # embeddings copied at a time
SHARD = 2**16  # rows of a file, at most
FILES = 32  # of a collection below 2^21 images; as many processes can share the work
SEED = 0  # of the views: runs with other seeds share them
PARTIAL = "-partial"  # of the name of a folder that is being written
STATE = "state.json"  # of a folder that is being written: what it holds
EVERY = 10.0  # seconds between two records of how many images of a file are embedded

Run = Callable[[np.ndarray], np.ndarray]  # uint8 images (N, S, S, 3) to float32 embeddings (N, F)

logger = logging.getLogger(__name__)


class State(NamedTuple):
    """What a folder holds."""

    of: str  # digest of images and settings
    output: Sequence[float]  # `embedder.signature`; empty for a backbone of ours


def read_state(path: Path) -> State | None:
    """The state in a file; None if there is no file, or another one."""
    try:
        return State(**json.loads(storage.read(path) or b"null"))
    except (ValueError, TypeError):
        return None


def write_state(path: Path, state: State) -> None:
    """Writes a state to a file."""
    storage.write_text(path, json.dumps(state._asdict()))


def partial(folder: Path) -> Path:
    """The folder that becomes `folder`."""
    return folder.with_name(folder.name + PARTIAL)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks the folder that becomes `folder`, for one run at a time.

    What a stopped run has written to it stays.
    """
    with locks.lock(partial(folder), wait=True):
        yield
        (folder / locks.NAME).unlink(missing_ok=True)


def publish(folder: Path) -> None:
    """Gives the folder that becomes `folder` its name."""
    partial(folder).rename(folder)


class _Work(NamedTuple):
    """What the files of a folder are made of."""

    folder: Path
    names: Sequence[str]  # of the kinds of files
    images: Any
    seeds: np.ndarray  # int32, for each image: of its views
    has_views: np.ndarray  # for each image whether it gets views
    known: earlier.Known | None
    run: Run
    draw: Callable[..., Any]
    views: int


def write(
    folder: Path,
    state: State,
    run: Run,
    source: Source,
    has_views: Bool[np.ndarray, " N"],
    data: ConfigDict,
    known: earlier.Known | None = None,
) -> None:
    """Writes items, the views of the images that have any (zeros for others), and metadata.

    Each process of a run writes files of its own. They go on where they stopped, if the folder has this state. The
    source has digests: they seed the views. `data` is `config.data`. Embeddings that are `known` are copied.
    """
    assert source.digests is not None
    images = source.images
    names = (embeddings.ITEMS, embeddings.VIEWS)[: 2 if data.views else 1]
    processes.on_first(lambda: _begin(folder, names, state))
    processes.require_visible(folder / STATE)
    draw = _compiled_views(tuple(sorted(data.augment.items())))
    work = _Work(folder, names, images, view_seeds(source.digests), has_views, known, run, draw, data.views)
    size = min(SHARD, max(BLOCK, -(-len(images) // FILES)))
    own = list(enumerate(range(0, len(images), size)))[jax.process_index() :: jax.process_count()]
    spans = [(number, first, min(first + size, len(images))) for number, first in own]
    done = {number: _done(folder, names, number) for number, *_ in spans}
    task = f"embedding images and {data.views} views each" + (", share of process 0" if processes.several() else "")
    total = sum(stop - first for _, first, stop in spans)
    embedded = sum(done.values())
    progress = log.Progress(logger, task, total, done=embedded)
    for number, first, stop in spans:
        for end in _write_file(work, number, (first, stop), first + done[number]):
            embedded += end - first - done[number]
            done[number] = end - first
            progress.update(embedded)
    processes.exchange(None)  # all are done

    def finish() -> None:
        embeddings.write_metadata(folder, source.names, source.labels, source.classes)
        for path in folder.glob("*.json"):
            path.unlink()

    processes.on_first(finish)


def view_seeds(digests: Sequence[bytes]) -> Int32[np.ndarray, " N"]:
    """The seeds of the views of images, from their contents.

    So an image has the same views in any collection.
    """
    return np.array([int.from_bytes(digest[:4], "big") >> 1 for digest in digests], np.int32)


def _write_file(work: _Work, number: int, span: tuple[int, int], begin: int) -> Iterator[int]:
    """Embeds the images from `begin` on, for the files of one number.

    `span` is the first image of the files and the end. Yields again and again the image before which all are done.
    """
    first, stop = span
    rows = np.arange(begin, stop)
    missing, shards = rows, []
    if work.known is not None and (work.known.numbers[rows] >= 0).any():
        missing = rows[work.known.numbers[rows] < 0]
        shards = _shards(work, number, span, work.known.folders[0].items.shape[1], new=begin == first)
        _copy(work, np.setdiff1d(rows, missing), shards, first)
    recorded = time.monotonic()
    for start in range(0, len(missing), BLOCK):
        signals.poll()
        block = missing[start : start + BLOCK]
        pixels = np.asarray(work.images[block])
        plain = work.run(pixels)
        shards = shards or _shards(work, number, span, plain.shape[1], new=begin == first)
        shards[0][block - first] = plain
        here = work.has_views[block]
        for view in range(work.views) if here.any() else ():
            drawn = np.asarray(work.draw(pixels, work.seeds[block], np.int32(view)))[here]
            shards[1][block[here] - first, view] = work.run(drawn)
        end = int(missing[start + BLOCK]) if start + BLOCK < len(missing) else stop
        if time.monotonic() - recorded >= EVERY or end == stop:
            _record(work.folder, number, shards, end - first)
            recorded = time.monotonic()
        yield end
    if len(rows) and not len(missing):
        _record(work.folder, number, shards, stop - first)
        yield stop


def _copy(work: _Work, images: np.ndarray, shards: Sequence[np.ndarray], first: int) -> None:
    """Copies the embeddings of images that are known into files, whose first image is `first`."""
    assert work.known is not None
    for start in range(0, len(images), COPIED):
        signals.poll()
        block = images[start : start + COPIED]
        shards[0][block - first] = earlier.items(work.known, block)
        viewed = block[work.has_views[block]]
        if work.views and len(viewed):
            shards[1][viewed - first] = earlier.views(work.known, viewed)


def _begin(folder: Path, names: Sequence[str], state: State) -> None:
    """Deletes all files if they are of other images, or embedded in another way."""
    before = read_state(folder / STATE)
    if before and before.of == state.of and embedder.is_same(state.output, before.output):
        counts = [_done(folder, names, int(path.stem)) for path in folder.glob("[0-9]*.json")]
        if any(counts):
            logger.info(f"{folder}: going on after {sum(counts):,} images")
        return
    for path in folder.glob("*.json"):
        path.unlink()
    for name in names:
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir()
    write_state(folder / STATE, state)


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


def _shards(work: _Work, number: int, span: tuple[int, int], width: int, *, new: bool) -> list[np.ndarray]:
    """The mapped files of one number, one of each kind."""
    count = span[1] - span[0]
    shapes = (count, width), (count, work.views, width)
    return [_shard(work.folder, name, number, shape, new=new) for name, shape in zip(work.names, shapes, strict=False)]


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
    """uint8 views by number, drawn as for a frozen backbone of ours."""

    @jax.jit
    def views(images: Any, seeds: Any, number: Any) -> Any:
        def view(image: Any, seed: Any) -> Any:
            return augment.random_view(encode.view_key(SEED, seed, number), image / 255, dict(strengths))

        return jnp.round(jax.vmap(view)(images.astype(jnp.float32), seeds) * 255).astype(jnp.uint8)

    return views
