"""Shards of decoded images, and the database that knows where each image is.

Rows are appended to a shard first, and the database is changed in one transaction after it, so that no reader sees a
row which is not complete. What a killed run has appended is written over.
"""

import contextlib
import hashlib
import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from tcq.data import images
from tcq.data.images import Resize
from tcq.data.rows import Rows
from tcq.runtime import storage

VERSION = 3  # of the decoder and the format; entries of other versions are not read
DATABASE = "cache.sqlite"
SHARD_BYTES = 2**28
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


class NewImage(NamedTuple):
    """An image to store."""

    digest: bytes  # of the contents that it was decoded from
    pixels: np.ndarray  # uint8 (S, S, 3)
    note: str  # what was repaired, else ""


class Rule(NamedTuple):
    """How images are decoded, and where the results are kept."""

    size: int
    resize: Resize = images.WHOLE
    max_pixels: int = images.MAX_PIXELS
    home: str = ""  # "" is storage.cache_home()
    gib: float = 0.0  # the size above which the longest unused shards are deleted; 0: no limit

    @property
    def folder(self) -> Path:
        """Where the shards and the database are."""
        return (Path(self.home).expanduser() if self.home else storage.cache_home()) / "images"

    @property
    def key(self) -> str:
        """What names the rule in the database."""
        parts = [VERSION, self.size, self.resize, self.max_pixels]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def rule_of(data: ConfigDict) -> Rule:
    """The rule that `config.data` describes."""
    return Rule(data.image_size, images.resize_of(data), data.max_pixels, data.cache_dir, data.cache_gib)


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


def known(database: sqlite3.Connection, rule: Rule) -> set[bytes]:
    """The contents that the cache has an entry for.

    Entries of shards that are gone or too short are deleted first.
    """
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


def append(database: sqlite3.Connection, new: Sequence[NewImage], rule: Rule) -> int:
    """Appends images to the newest shard, or to a new one if that is full.

    Returns their number. It works within a transaction.
    """
    width = _row_bytes(rule)
    most = max(SHARD_BYTES // width, 1)
    place = database.execute(
        "SELECT id, rows FROM shards WHERE rule = ? AND rows < ? ORDER BY id DESC LIMIT 1", (rule.key, most)
    ).fetchone()
    if place is None:
        row = rule.key, 0, 0, time.time()
        database.execute("INSERT INTO shards (rule, rows, bytes, used) VALUES (?, ?, ?, ?)", row)
        place = database.execute("SELECT last_insert_rowid(), 0").fetchone()
    shard, rows = place
    part = new[: most - rows]
    with open(_path(rule.folder, shard), "ab") as file:
        file.truncate(max(rows * width, 0))  # what a killed run has left
        for image in part:
            file.write(image.pixels.tobytes())
        file.flush()
        os.fsync(file.fileno())
    entries = [(rule.key, image.digest, shard, rows + i, image.note) for i, image in enumerate(part)]
    database.executemany("INSERT INTO images VALUES (?, ?, ?, ?, ?)", entries)
    total = rows + len(part)
    database.execute("UPDATE shards SET rows = ?, bytes = ? WHERE id = ?", (total, total * width, shard))
    return len(part)


def open_rows(database: sqlite3.Connection, rule: Rule, shards: np.ndarray, rows: np.ndarray) -> Rows:
    """The images at these rows of these shards, mapped from disk.

    Raises FileNotFoundError if a shard is gone.
    """
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


def evict(database: sqlite3.Connection, rule: Rule, used: set[bytes]) -> None:
    """Deletes the longest unused shards until the cache is within its limit.

    None of those with these contents is deleted.
    """
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
