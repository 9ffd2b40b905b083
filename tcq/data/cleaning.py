"""What is in the cache, and deleting what has not been used."""

import contextlib
import shutil
import sqlite3
import time
from pathlib import Path
from typing import NamedTuple

from tcq.data import shards

DAY = 86_400.0  # seconds
OTHERS = ("embedded", "compiled", "buckets")  # folders beside the decoded images


class Usage(NamedTuple):
    """A part of the shards."""

    what: str
    items: int
    bytes: int
    used: float  # the last time, in seconds since 1970; 0 if unknown


def usage(home: Path) -> list[Usage]:
    """The parts of the cache below a folder.

    They are decoded images by size, embeddings, compiled programs and bucket mirrors.
    """
    parts = []
    folder = home / "images"
    if (folder / shards.DATABASE).is_file():
        with contextlib.closing(sqlite3.connect(folder / shards.DATABASE, timeout=60)) as database:
            rows = database.execute(
                "SELECT rule, sum(rows), sum(bytes), max(used) FROM shards GROUP BY rule"
            ).fetchall()
        for _, count, size, used in rows:
            side = round((size / max(count, 1) / 3) ** 0.5)
            parts.append(Usage(f"images of {side} x {side} pixels", count, size, used))
    for path in [*(home / name for name in OTHERS), *_older(home)]:
        if path.is_dir():
            files = [p.stat() for p in path.rglob("*") if p.is_file()]
            what = path.name if path.name in OTHERS else f"{path.name}, of an older version of tcq"
            parts.append(
                Usage(what, len(files), sum(s.st_size for s in files), max((s.st_mtime for s in files), default=0.0))
            )
    return parts


def _older(home: Path) -> list[Path]:
    """Entries that earlier versions of tcq have written."""
    return sorted(p for p in home.glob("[0-9]-*") if (p / "names.json").is_file())


def delete_unused(home: Path, *, days: float) -> int:
    """Deletes what has not been used for some days, or everything for 0; returns the bytes.

    Processes that read an image meanwhile keep it. Raises OSError.
    """
    limit, before = time.time() - days * DAY, sum(part.bytes for part in usage(home))
    folder = home / "images"
    if (folder / shards.DATABASE).is_file():
        with shards.open_database(folder) as database, shards.transaction(database):
            unused = database.execute("SELECT id FROM shards WHERE used <= ?", (limit,)).fetchall()
            for (shard,) in unused:
                shards.delete_shard(database, folder, shard)
            if not database.execute("SELECT 1 FROM shards LIMIT 1").fetchone():
                for table in ("images", "files", "lists"):
                    database.execute(f"DELETE FROM {table}")
    for path in [*(p for name in OTHERS for p in sorted((home / name).glob("*"))), *_older(home)]:
        newest = max((p.stat().st_mtime for p in path.rglob("*") if p.is_file()), default=path.stat().st_mtime)
        if newest <= limit:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return before - sum(part.bytes for part in usage(home))
