"""Decoded images on disk: one entry for each content and rule of decoding.

All folders and runs share them.

An image is known by its contents, and a file by its state until that changes. Decoded images are written in batches; a
killed run loses the last one. How they are stored is in shards.py.
"""

import hashlib
import json
import logging
import os
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tcq.data import images, shards
from tcq.data.images import ImageError, UnreadableError
from tcq.data.rows import Rows
from tcq.data.shards import Rule, rule_of
from tcq.runtime import log, signals

BATCH_BYTES = 2**25  # of decoded images that are written together
BATCH_SECONDS = 5.0  # after which they are written anyway
AHEAD = 256  # images that are decoded ahead
DIGEST_BYTES = 20
ATTEMPTS = 3  # to map shards that other processes may delete
RECENT = 2.0  # seconds; a file that changed so recently may change again within the resolution of its time

__all__ = ["Entry", "Item", "Rule", "decode", "digest", "recall", "remember", "rule_of"]

logger = logging.getLogger(__name__)


class Item(NamedTuple):
    """An image to decode: a name, and a file or a function that reads its contents."""

    name: str
    source: Path | Callable[[], bytes]


class Entry(NamedTuple):
    """The images among some items, in their order."""

    images: Rows  # uint8 (N, S, S, 3), mapped from disk
    names: list[str]
    digests: list[bytes]  # of the contents
    skipped: list[dict[str, str]]  # {"path", "reason"} of what cannot be decoded
    unreadable: list[str]  # those of the skipped that may be images, but could not be read
    repaired: list[dict[str, str]]  # the same of what was decoded although it is damaged


class _Result(NamedTuple):
    digest: bytes | None  # None: the file could not be read
    pixels: np.ndarray | None
    note: str


def decode(items: Sequence[Item], rule: Rule) -> Entry:
    """Decodes the items that the cache lacks, and returns all.

    Files that could not be read are skipped, and tried again the next time; what their contents decide is remembered.
    Raises OSError if the cache cannot be written.
    """
    with shards.open_database(rule.folder) as database:
        for attempt in range(ATTEMPTS):
            digests, unreadable = _fill(database, items, rule)
            try:
                return _entry(database, items, digests, unreadable, rule)
            except (FileNotFoundError, KeyError):  # another process has deleted unused shards just now
                if attempt == ATTEMPTS - 1:
                    raise
    raise AssertionError


def remember(key: str, names: Sequence[str], digests: Sequence[bytes], arrays: bytes, rule: Rule) -> None:
    """Stores the contents of a list of images under a key, for `recall`."""
    with shards.open_database(rule.folder) as database, shards.transaction(database):
        row = key, json.dumps(list(names)), b"".join(digests), arrays
        database.execute("INSERT OR REPLACE INTO lists VALUES (?, ?, ?, ?)", row)


def recall(key: str, rule: Rule) -> tuple[Entry, bytes] | None:
    """A stored list and its arrays; None if there is none, or the cache lacks an image of it."""
    with shards.open_database(rule.folder) as database:
        row = database.execute("SELECT names, digests, arrays FROM lists WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        names, joined = json.loads(row[0]), row[1]
        digests: list[bytes | None] = [joined[i : i + DIGEST_BYTES] for i in range(0, len(joined), DIGEST_BYTES)]
        if set(digests) - shards.known(database, rule):
            return None
        return _entry(database, [Item(n, Path()) for n in names], digests, {}, rule), row[2]


def digest(source: Path | bytes) -> bytes:
    """The identity of contents: a hash of their size and bytes. Raises UnreadableError."""
    try:
        with images.opened(source) as file:
            size = str(file.seek(0, os.SEEK_END)).encode()
            file.seek(0)
            contents = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES))
            return hashlib.blake2b(size + contents.digest(), digest_size=DIGEST_BYTES).digest()
    except OSError as error:
        raise UnreadableError(f"cannot be read: {error.strerror or error}") from None


def _fill(database: sqlite3.Connection, items: Sequence[Item], rule: Rule) -> tuple[list[bytes | None], dict[int, str]]:
    """The digest of each item, and the reasons why items cannot be read.

    All others are in the cache then.
    """
    known, remembered = shards.known(database, rule), _remembered(database, items)
    stats = [_stat(item.source) for item in items]
    digests: list[bytes | None] = [None] * len(items)
    todo = []
    for i, item in enumerate(items):
        seen = remembered.get(os.fsencode(item.source)) if isinstance(item.source, Path) else None
        if seen and seen[0] == stats[i] and seen[1] in known:
            digests[i] = seen[1]
        else:
            todo.append(i)
    progress = log.Progress(logger, "decoding images", len(todo))
    unreadable: dict[int, str] = {}
    batch: dict[int, _Result] = {}
    size, start = 0, time.monotonic()
    for done, (i, result) in enumerate(_decode_all(((i, items[i].source) for i in todo), rule, known), 1):
        signals.poll()
        progress.update(done)
        if result.digest is None:
            unreadable[i] = result.note
            continue
        digests[i], batch[i] = result.digest, result
        size += 0 if result.pixels is None else result.pixels.nbytes
        if size >= BATCH_BYTES or time.monotonic() - start > BATCH_SECONDS:
            _write(database, batch, items, stats, rule)
            batch, size, start = {}, 0, time.monotonic()
    _write(database, batch, items, stats, rule)
    if todo and rule.gib:
        shards.evict(database, rule, {d for d in digests if d})
    return digests, unreadable


def _remembered(database: sqlite3.Connection, items: Sequence[Item]) -> dict[bytes, tuple[str, bytes]]:
    """The state of the items' files when they were read, and their digest, if these are known."""
    paths = [os.fsencode(item.source) for item in items if isinstance(item.source, Path)]
    if not paths:
        return {}
    rows = database.execute("SELECT path, stat, digest FROM files WHERE path BETWEEN ? AND ?", (min(paths), max(paths)))
    return {path: (stat, digest) for path, stat, digest in rows}


def _stat(source: Path | Callable[[], bytes]) -> str | None:
    """The state of a file: equal if it has not changed.

    None for a file that cannot be read, or that changed just now.
    """
    if not isinstance(source, Path):
        return None
    try:
        s = os.stat(source)
    except OSError:
        return None
    if time.time() - max(s.st_mtime, s.st_ctime) < RECENT:
        return None
    return f"{s.st_size} {s.st_mtime_ns} {s.st_ctime_ns} {s.st_ino}"


def _decode_all(
    items: Iterable[tuple[int, Path | Callable[[], bytes]]], rule: Rule, known: set[bytes]
) -> Iterator[tuple[int, _Result]]:
    """The results of items, in their order; known contents are not decoded."""

    def one(item: Path | Callable[[], bytes]) -> _Result:
        source = item if isinstance(item, Path) else item()
        try:
            identity = digest(source)
            if identity in known:
                return _Result(identity, None, "")
            decoded = images.read(source, size=rule.size, resize=rule.resize, max_pixels=rule.max_pixels)
            return _Result(identity, decoded.pixels, decoded.repaired)
        except UnreadableError as error:
            return _Result(None, None, str(error))
        except ImageError as error:
            return _Result(identity, None, str(error).encode("utf-8", "replace").decode())

    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        ahead: deque[Any] = deque()
        for number, source in items:
            ahead.append((number, pool.submit(one, source)))
            if len(ahead) >= AHEAD:
                number, future = ahead.popleft()
                yield number, future.result()
        while ahead:
            number, future = ahead.popleft()
            yield number, future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # a stop waits only for the images that are being decoded


def _write(
    database: sqlite3.Connection,
    batch: dict[int, _Result],
    items: Sequence[Item],
    stats: Sequence[str | None],
    rule: Rule,
) -> None:
    """Appends the decoded images of a batch to shards, and stores what was learned."""
    if not batch:
        return
    with shards.transaction(database):
        known = {d for (d,) in database.execute("SELECT digest FROM images WHERE rule = ?", (rule.key,))}
        new = {r.digest: r for r in batch.values() if r.digest not in known}
        decoded = [shards.NewImage(d, r.pixels, r.note) for d, r in new.items() if d and r.pixels is not None]
        while decoded:
            decoded = decoded[shards.append(database, decoded, rule) :]
        reasons = [(rule.key, r.digest, None, None, r.note) for r in new.values() if r.pixels is None]
        database.executemany("INSERT INTO images VALUES (?, ?, ?, ?, ?)", reasons)
        files = [
            (os.fsencode(items[i].source), stats[i], r.digest)  # type: ignore[arg-type]
            for i, r in batch.items()
            if stats[i] is not None
        ]
        database.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", files)


def _entry(
    database: sqlite3.Connection,
    items: Sequence[Item],
    digests: Sequence[bytes | None],
    unreadable: dict[int, str],
    rule: Rule,
) -> Entry:
    rows = database.execute("SELECT digest, shard, row, note FROM images WHERE rule = ?", (rule.key,))
    places = {digest: (shard, row, note) for digest, shard, row, note in rows}
    names, hashes, skipped, repaired, used, numbers = [], [], [], [], [], []
    for i, (item, digest) in enumerate(zip(items, digests, strict=True)):
        if digest is None:
            skipped.append({"path": item.name, "reason": unreadable[i]})
            continue
        shard, row, note = places[digest]
        if shard is None:
            skipped.append({"path": item.name, "reason": note})
            continue
        if note:
            repaired.append({"path": item.name, "reason": note})
        names.append(item.name)
        hashes.append(digest)
        used.append(shard)
        numbers.append(row)
    return Entry(
        shards.open_rows(database, rule, np.array(used, np.int64), np.array(numbers, np.int64)),
        names,
        hashes,
        skipped,
        [items[i].name for i in unreadable],
        repaired,
    )
