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
from ml_collections import ConfigDict

from tcq import augment, encode
from tcq.data import embeddings
from tcq.data.source import Source
from tcq.models import embedder
from tcq.runtime import locks, log, processes, signals, storage

BLOCK = 64  # images embedded at a time
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
    has_views: np.ndarray  # for each image whether it gets views
    run: Run
    draw: Callable[..., Any]
    views: int


def write(folder: Path, state: State, run: Run, source: Source, viewed: np.ndarray, data: ConfigDict) -> None:
    """Writes items, the views of the images at `viewed` (zeros for others), and metadata.

    Each process of a run writes files of its own. They go on where they stopped, if the folder has this state.
    `data` is `config.data`.
    """
    images = source.images
    names = (embeddings.ITEMS, embeddings.VIEWS)[: 2 if data.views else 1]
    processes.on_first(lambda: _begin(folder, names, state))
    processes.require_visible(folder / STATE)
    draw = _compiled_views(tuple(sorted(data.augment.items())))
    work = _Work(folder, names, images, np.isin(np.arange(len(images)), viewed), run, draw, data.views)
    size = min(SHARD, max(BLOCK, -(-len(images) // FILES)))
    own = list(enumerate(range(0, len(images), size)))[jax.process_index() :: jax.process_count()]
    spans = [(number, first, min(first + size, len(images))) for number, first in own]
    done = {number: _done(folder, names, number) for number, *_ in spans}
    task = f"embedding images and {data.views} views each" + (", share of process 0" if processes.several() else "")
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
