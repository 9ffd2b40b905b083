"""Decoded images on disk: one entry for each content and rule of decoding, shared by all folders and runs.

A folder has `cache.sqlite`, which knows where each image is, and shards of uint8 rows. Rows are appended in batches:
first the pixels, then, in one transaction, the database. A killed run loses the last batch, and no reader ever sees it.
"""

import contextlib
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
from ml_collections import ConfigDict

from tcq.data import images
from tcq.data.images import ImageError, Resize, UnreadableError
from tcq.data.rows import Rows
from tcq.runtime import log, signals, storage

VERSION = 3  # of the decoder and the format; entries of other versions are not read
DATABASE = "cache.sqlite"
SHARD_BYTES = 2**28
BATCH_BYTES = 2**25  # of decoded images that are written together
BATCH_SECONDS = 5.0  # after which they are written anyway
AHEAD = 256  # images that are decoded ahead
DIGEST_BYTES = 20
ATTEMPTS = 3  # to map shards that other processes may delete
RECENT = 2.0  # seconds; a file that changed so recently may change again within the resolution of its time
TABLES = """
CREATE TABLE IF NOT EXISTS shards (id INTEGER PRIMARY KEY AUTOINCREMENT, rule TEXT, rows INTEGER, bytes INTEGER,
    used REAL);
CREATE TABLE IF NOT EXISTS images (rule TEXT, digest BLOB, shard INTEGER, row INTEGER, note TEXT,
    PRIMARY KEY (rule, digest)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS of_shard ON images (shard);
CREATE TABLE IF NOT EXISTS files (path BLOB PRIMARY KEY, stat TEXT, digest BLOB) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS lists (key TEXT PRIMARY KEY, names TEXT, digests BLOB, arrays BLOB);
"""

logger = logging.getLogger(__name__)


class Rule(NamedTuple):
    """How images are decoded, and where the results are kept."""

    size: int
    resize: Resize = images.WHOLE
    max_pixels: int = images.MAX_PIXELS
    home: str = ""  # "" is storage.cache_home()
    gib: float = 0.0  # the size above which the longest unused shards are deleted; 0: no limit

    @property
    def folder(self) -> Path:
        return (Path(self.home).expanduser() if self.home else storage.cache_home()) / "images"

    @property
    def key(self) -> str:
        parts = [VERSION, self.size, self.resize, self.max_pixels]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def rule_of(data: ConfigDict) -> Rule:
    """The rule that `config.data` describes."""
    return Rule(data.image_size, images.resize_of(data), data.max_pixels, data.cache_dir, data.cache_gib)


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
    with open_database(rule.folder) as database:
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
    with open_database(rule.folder) as database, transaction(database):
        row = key, json.dumps(list(names)), b"".join(digests), arrays
        database.execute("INSERT OR REPLACE INTO lists VALUES (?, ?, ?, ?)", row)


def recall(key: str, rule: Rule) -> tuple[Entry, bytes] | None:
    """A stored list and its arrays; None if there is none, or one of its images is not in the cache any more."""
    with open_database(rule.folder) as database:
        found = database.execute("SELECT names, digests, arrays FROM lists WHERE key = ?", (key,)).fetchone()
        if found is None:
            return None
        names, joined = json.loads(found[0]), found[1]
        digests: list[bytes | None] = [joined[i : i + DIGEST_BYTES] for i in range(0, len(joined), DIGEST_BYTES)]
        if set(digests) - _known(database, rule):
            return None
        return _entry(database, [Item(n, Path()) for n in names], digests, {}, rule), found[2]


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


@contextlib.contextmanager
def open_database(folder: Path) -> Iterator[sqlite3.Connection]:
    """The database of a cache. Raises OSError where the cache cannot be read or written."""
    try:
        with contextlib.closing(_connect(folder)) as database:
            yield database
    except (sqlite3.OperationalError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        reason = getattr(error, "strerror", None) or error
        raise OSError(0, f"{reason}: make room, or set data.cache_dir to another folder", str(folder)) from None


@contextlib.contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """A change of the database as a whole or not at all, by one writer at a time."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.OperationalError):  # SQLite has done so itself, on a full disk
            database.execute("ROLLBACK")
        raise


def _connect(folder: Path) -> sqlite3.Connection:
    """The database of a cache; a corrupted one is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    for attempt in range(2):
        database = sqlite3.connect(folder / DATABASE, timeout=600, isolation_level=None, check_same_thread=False)
        try:
            database.executescript(TABLES)
            return database
        except sqlite3.OperationalError:
            database.close()
            raise
        except sqlite3.DatabaseError:
            database.close()
            if attempt:
                raise
            logger.warning(f"{folder / DATABASE} is corrupted: images are decoded again")
            (folder / DATABASE).unlink()
    raise AssertionError


def _known(database: sqlite3.Connection, rule: Rule) -> set[bytes]:
    """The contents that the cache has an entry for; entries of shards that are gone or too short are deleted first."""
    for shard, rows in database.execute("SELECT id, rows FROM shards WHERE rule = ?", (rule.key,)).fetchall():
        path = _path(rule.folder, shard)
        if not path.is_file() or path.stat().st_size < rows * _row_bytes(rule):
            logger.warning(f"{path} is corrupted: its images are decoded again")
            with transaction(database):
                delete_shard(database, rule.folder, shard)
    return {d for (d,) in database.execute("SELECT digest FROM images WHERE rule = ?", (rule.key,))}


def _row_bytes(rule: Rule) -> int:
    return rule.size * rule.size * 3


def _path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:06d}.u8"


def delete_shard(database: sqlite3.Connection, folder: Path, shard: int) -> None:
    """Deletes a shard and what the database knows of its images."""
    database.execute("DELETE FROM images WHERE shard = ?", (shard,))
    database.execute("DELETE FROM shards WHERE id = ?", (shard,))
    _path(folder, shard).unlink(missing_ok=True)  # a process that has mapped it keeps its rows


def _fill(database: sqlite3.Connection, items: Sequence[Item], rule: Rule) -> tuple[list[bytes | None], dict[int, str]]:
    """The digest of each item, and the reasons why items cannot be read; all others are in the cache then."""
    known, remembered = _known(database, rule), _remembered(database, items)
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
        _evict(database, rule, {d for d in digests if d})
    return digests, unreadable


def _remembered(database: sqlite3.Connection, items: Sequence[Item]) -> dict[bytes, tuple[str, bytes]]:
    """What is known of the files of the items: their state when they were read, and their digest."""
    paths = [os.fsencode(item.source) for item in items if isinstance(item.source, Path)]
    if not paths:
        return {}
    found = database.execute(
        "SELECT path, stat, digest FROM files WHERE path BETWEEN ? AND ?", (min(paths), max(paths))
    )
    return {path: (stat, digest) for path, stat, digest in found}


def _stat(source: Path | Callable[[], bytes]) -> str | None:
    """The state of a file: equal if it has not changed. None of one that cannot be read, or changed just now."""
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

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ahead: deque[Any] = deque()
        for number, source in items:
            ahead.append((number, pool.submit(one, source)))
            if len(ahead) >= AHEAD:
                number, future = ahead.popleft()
                yield number, future.result()
        while ahead:
            number, future = ahead.popleft()
            yield number, future.result()


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
    with transaction(database):
        known = {d for (d,) in database.execute("SELECT digest FROM images WHERE rule = ?", (rule.key,))}
        new = {r.digest: r for r in batch.values() if r.digest not in known}
        decoded = [r for r in new.values() if r.pixels is not None]
        while decoded:
            decoded = decoded[_append(database, decoded, rule) :]
        reasons = [(rule.key, r.digest, None, None, r.note) for r in new.values() if r.pixels is None]
        database.executemany("INSERT INTO images VALUES (?, ?, ?, ?, ?)", reasons)
        files = [
            (os.fsencode(items[i].source), stats[i], r.digest)  # type: ignore[arg-type]
            for i, r in batch.items()
            if stats[i] is not None
        ]
        database.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", files)


def _append(database: sqlite3.Connection, results: Sequence[_Result], rule: Rule) -> int:
    """Appends images to the newest shard, or to a new one if that is full; returns how many."""
    width = _row_bytes(rule)
    most = max(SHARD_BYTES // width, 1)
    found = database.execute(
        "SELECT id, rows FROM shards WHERE rule = ? AND rows < ? ORDER BY id DESC LIMIT 1", (rule.key, most)
    ).fetchone()
    if found is None:
        row = rule.key, 0, 0, time.time()
        shard, rows = (
            database.execute("INSERT INTO shards (rule, rows, bytes, used) VALUES (?, ?, ?, ?)", row).lastrowid,
            0,
        )
    else:
        shard, rows = found
    assert shard is not None
    part = results[: most - rows]
    with open(_path(rule.folder, shard), "ab") as file:
        file.truncate(max(rows * width, 0))  # what a killed run has left
        for result in part:
            assert result.pixels is not None
            file.write(result.pixels.tobytes())
        file.flush()
        os.fsync(file.fileno())
    entries = [(rule.key, r.digest, shard, rows + i, r.note) for i, r in enumerate(part)]
    database.executemany("INSERT INTO images VALUES (?, ?, ?, ?, ?)", entries)
    total = rows + len(part)
    database.execute("UPDATE shards SET rows = ?, bytes = ? WHERE id = ?", (total, total * width, shard))
    return len(part)


def _entry(
    database: sqlite3.Connection,
    items: Sequence[Item],
    digests: Sequence[bytes | None],
    unreadable: dict[int, str],
    rule: Rule,
) -> Entry:
    rows = database.execute("SELECT digest, shard, row, note FROM images WHERE rule = ?", (rule.key,))
    places = {digest: (shard, row, note) for digest, shard, row, note in rows}
    names, found, skipped, repaired, shards, numbers = [], [], [], [], [], []
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
        found.append(digest)
        shards.append(shard)
        numbers.append(row)
    return Entry(
        _rows(database, rule, np.array(shards, np.int64), np.array(numbers, np.int64)),
        names,
        found,
        skipped,
        [items[i].name for i in unreadable],
        repaired,
    )


def _rows(database: sqlite3.Connection, rule: Rule, shards: np.ndarray, rows: np.ndarray) -> Rows:
    used, places = np.unique(shards, return_inverse=True)
    arrays: list[np.ndarray] = []
    for shard in used.tolist():
        shape = (int(rows[shards == shard].max()) + 1, rule.size, rule.size, 3)
        arrays.append(np.memmap(_path(rule.folder, shard), np.uint8, "r", shape=shape))
    with contextlib.suppress(sqlite3.OperationalError):  # a cache that can only be read is used as it is
        marks = [(time.time(), shard) for shard in used.tolist()]
        database.executemany("UPDATE shards SET used = ? WHERE id = ?", marks)
    empty = np.zeros((0, rule.size, rule.size, 3), np.uint8)
    return Rows(arrays or [empty], (places.astype(np.int32).reshape(-1), rows))


def _evict(database: sqlite3.Connection, rule: Rule, used: set[bytes]) -> None:
    """Deletes the longest unused shards until the cache is within its limit, but none with these contents."""
    own = {
        shard
        for digest, shard in database.execute("SELECT digest, shard FROM images WHERE rule = ?", (rule.key,))
        if digest in used
    }
    with transaction(database):
        shards = database.execute("SELECT id, bytes FROM shards ORDER BY used").fetchall()
        total = sum(size for _, size in shards)
        for shard, size in shards:
            if total <= rule.gib * 2**30:
                break
            if shard not in own:
                delete_shard(database, rule.folder, shard)
                total -= size
                logger.info(f"deleted {size / 2**20:,.1f} MiB of decoded images, the longest unused (data.cache_gib)")
