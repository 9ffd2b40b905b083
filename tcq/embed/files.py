"""The files of a folder of embeddings while they are being written.

Each process writes files of its own. A stopped run leaves a folder that the same call finishes.
"""

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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
COPIED = 2**26  # bytes copied at a time
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
    """Gives the folder that becomes `folder` its name.

    Deletes the record of what is done.
    """
    partial(folder).rename(folder)
    for path in (folder / STATE, *folder.glob("[0-9]*.done")):
        path.unlink(missing_ok=True)


class _Work(NamedTuple):
    """What the files of a folder are made of."""

    folder: Path
    names: Sequence[str]  # of the kinds of files
    files: Sequence[str]  # the names of the images
    images: Any
    seeds: np.ndarray  # int32, for each image: of its views
    has_views: np.ndarray  # for each image whether it gets views
    known: earlier.Known | None
    run: Run
    draw: Callable[..., Any]
    views: int


class _File(NamedTuple):
    """The files of one number: some images in order."""

    number: int
    first: int  # image
    is_done: np.ndarray  # for each image
    shards: list[Any]  # one of each kind, mapped; empty until the width is known


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
    work = _Work(
        folder, names, source.names, images, view_seeds(source.digests), has_views, known, run, draw, data.views
    )
    size = min(SHARD, max(BLOCK, -(-len(images) // FILES)))
    own = list(enumerate(range(0, len(images), size)))[jax.process_index() :: jax.process_count()]
    of = {n: _File(n, first, _done(folder, names, n, min(size, len(images) - first)), []) for n, first in own}
    _copy_known(work, of.values())
    task = f"embedding images and {data.views} views each" + (", share of process 0" if processes.several() else "")
    embedded = sum(int(file.is_done.sum()) for file in of.values())
    progress = log.Progress(logger, task, sum(len(file.is_done) for file in of.values()), done=embedded)
    for count in _embed_missing(work, of, size):
        embedded += count
        progress.update(embedded)
    processes.exchange(None)  # all are done

    processes.on_first(lambda: embeddings.write_metadata(folder, source.names, source.labels, source.classes))


def view_seeds(digests: Sequence[bytes]) -> Int32[np.ndarray, " N"]:
    """The seeds of the views of images, from their contents.

    So an image has the same views in any collection.
    """
    return np.array([int.from_bytes(digest[:4], "big") >> 1 for digest in digests], np.int32)


def _embed_missing(work: _Work, of: dict[int, _File], size: int) -> Iterator[int]:
    """Embeds the images that are not done, and writes them to the files of their numbers.

    All blocks but the last with and the last without views have one size: functions may be compiled for it. Yields the
    number of images of each block.
    """
    missing = np.concatenate([f.first + np.flatnonzero(~f.is_done) for f in of.values()] or [np.zeros(0, np.int64)])
    parts = missing[work.has_views[missing]], missing[~work.has_views[missing]]
    recorded, changed = time.monotonic(), set()
    try:
        for block in (rows[start : start + BLOCK] for rows in parts for start in range(0, len(rows), BLOCK)):
            signals.poll()
            plain, views = _embed(work, block)
            for number in np.unique(block // size):
                here = block // size == number
                _store(work, of[number], block[here], plain[here], [view[here] for view in views])
                changed.add(number)
            if time.monotonic() - recorded >= EVERY:
                _record(work.folder, [of[number] for number in changed])
                recorded, changed = time.monotonic(), set()
            yield len(block)
    finally:  # also where it is stopped
        _record(work.folder, [of[number] for number in changed])


def _embed(work: _Work, block: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The embeddings of some images, and of each of their views if they get any."""
    pixels = np.asarray(work.images[block])
    drawn = range(work.views) if work.has_views[block[0]] else ()
    plain = _run(work, block, pixels, "")
    return plain, [
        _run(work, block, np.asarray(work.draw(pixels, work.seeds[block], np.int32(view))), f"view {view} of ")
        for view in drawn
    ]


def _run(work: _Work, block: np.ndarray, pixels: np.ndarray, what: str) -> np.ndarray:
    """Embeds images; an error names the image."""
    try:
        return work.run(pixels)
    except embedder.NotFiniteError as error:
        raise embedder.EmbedderError(f"{error}: {what}{work.files[block[error.row]]}") from None


def _copy_known(work: _Work, of: Iterable[_File]) -> None:
    """Copies the embeddings that are known."""
    if work.known is None or not work.known.folders:
        return
    bytes_of_row = 4 * (1 + work.views) * work.known.folders[0].items.shape[1]
    most = max(COPIED // bytes_of_row, 1)
    for file in of:
        images = file.first + np.flatnonzero(~file.is_done)
        images = images[work.known.numbers[images] >= 0]
        for has_views in (True, False):
            rows = images[work.has_views[images] == has_views]
            for start in range(0, len(rows), most):
                signals.poll()
                block = rows[start : start + most]
                views = list(earlier.views(work.known, block).swapaxes(0, 1)) if has_views else []
                _store(work, file, block, earlier.items(work.known, block), views)
        if len(images):
            _record(work.folder, [file])


def _store(work: _Work, file: _File, images: np.ndarray, plain: np.ndarray, views: Sequence[np.ndarray]) -> None:
    """Writes embeddings of images of a file, (n, F) and one (n, F) for each view."""
    if not file.shards:
        shapes = (len(file.is_done), plain.shape[1]), (len(file.is_done), work.views, plain.shape[1])
        named, new = zip(work.names, shapes, strict=False), not file.is_done.any()
        file.shards.extend(_shard(work.folder, name, file.number, shape, new=new) for name, shape in named)
    rows = images - file.first
    file.shards[0][rows] = plain
    for view, values in enumerate(views):
        file.shards[1][rows, view] = values
    file.is_done[rows] = True


def _begin(folder: Path, names: Sequence[str], state: State) -> None:
    """Deletes all files if they are of other images, or embedded in another way."""
    before = read_state(folder / STATE)
    if before and before.of == state.of and embedder.is_same(state.output, before.output):
        done = sum(int(_read(path).sum()) for path in folder.glob("[0-9]*.done"))
        if done:
            logger.info(f"{folder}: going on after {done:,} images")
        return
    for path in (*folder.glob("*.json"), *folder.glob("[0-9]*.done")):
        path.unlink()
    for name in names:
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir()
    write_state(folder / STATE, state)


def _done(folder: Path, names: Sequence[str], number: int, count: int) -> Bool[np.ndarray, " n"]:
    """Which images of the files of one number are embedded."""
    record = _read(folder / f"{number}.done")
    complete = len(record) == count and all(_file(folder, name, number).is_file() for name in names)
    return record if complete else np.zeros(count, bool)


def _read(path: Path) -> Bool[np.ndarray, " n"]:
    return np.frombuffer(storage.read(path) or b"", bool).copy()


def _record(folder: Path, of: Iterable[_File]) -> None:
    """Records which images are on the disk."""
    for file in of:
        for shard in file.shards:
            shard.flush()
        with storage.atomic(folder / f"{file.number}.done") as temporary:
            temporary.write_bytes(file.is_done.tobytes())


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
    """uint8 views by number, drawn as for a frozen backbone of ours."""

    @jax.jit
    def views(images: Any, seeds: Any, number: Any) -> Any:
        def view(image: Any, seed: Any) -> Any:
            return augment.random_view(encode.view_key(SEED, seed, number), image / 255, dict(strengths))

        return jnp.round(jax.vmap(view)(images.astype(jnp.float32), seeds) * 255).astype(jnp.uint8)

    return views
