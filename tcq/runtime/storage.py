"""Workdirs, indexes and images in buckets (gs://bucket/folder): what fsspec is asked for, always whole files.

Orbax writes checkpoints to a bucket by itself. All else of a workdir is small: it is written to a folder of this machine, and
what changed is sent before a checkpoint is, at the end, and once a minute.
"""

import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from tcq.runtime.log import moved, say

EVERY = 60.0  # seconds
AT_ONCE = 256  # files asked for together


class BucketError(ValueError):
    """A bucket cannot be read or written; the message says which and why."""


def is_url(place: str | Path) -> bool:
    return isinstance(place, str) and "://" in place


def join(place: str | Path, name: str) -> str | Path:
    """The name of something in a folder, in a bucket or not."""
    return f"{str(place).rstrip('/')}/{name}" if is_url(place) else Path(place, name)


def read(path: str | Path) -> bytes | None:
    """A file in a bucket or not; None where there is none."""
    if not is_url(path):
        return Path(path).read_bytes() if Path(path).is_file() else None
    with _files(path) as (fs, inside):
        try:
            return bytes(fs.cat_file(inside))
        except FileNotFoundError:
            return None


def write(url: str, data: bytes) -> None:
    with _files(url) as (fs, inside):
        fs.pipe_file(inside, data)


def remove(url: str) -> None:
    with _files(url) as (fs, inside):
        fs.rm_file(inside)


def brought(url: str) -> Path:
    """A folder of this machine, below $XDG_CACHE_HOME/tcq or ~/.cache/tcq, that holds all files below a URL.

    Only what changed since the last time is fetched. Raises BucketError where there is no file, or no access.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "tcq", "buckets").expanduser()
    folder = home / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:32]
    with _files(url) as (fs, inside):
        there = {n: _mark(info) for n, info in _below(fs, inside).items()}
        if not there:
            raise BucketError(f"there is no file below {url!r}")
        listed = folder.with_suffix(".json")
        had = json.loads(listed.read_text()) if listed.is_file() else {}
        for name in had.keys() - there.keys():
            (folder / name).unlink(missing_ok=True)
        new = [n for n, mark in there.items() if had.get(n) != mark or not (folder / n).is_file()]
        _fetch(fs, inside, new, folder, url)
        folder.mkdir(parents=True, exist_ok=True)
        half = listed.with_suffix(f".half-{os.getpid()}")
        half.write_text(json.dumps(there))
        half.replace(listed)
    return folder


def send(folder: Path, url: str, *, last: str) -> None:
    """Writes all files of a folder to a URL, one of them after all others."""
    with _files(url) as (fs, inside):
        for path in sorted(folder.iterdir(), key=lambda p: p.name == last):
            fs.put_file(str(path), f"{inside}/{path.name}")


class At(NamedTuple):
    """A workdir: where its small files are, and how they get to where they belong."""

    folder: Path
    send: Any  # () -> None


@contextmanager
def at(workdir: str | Path, *, writes: bool = True) -> Iterator[At]:
    """The folder to read and write the files of a workdir in, all but its checkpoints. Only in a bucket it is another one.

    With writes=False, in a process of several that is not the first, nothing is sent.
    """
    if not is_url(workdir):
        yield At(Path(workdir), lambda: None)
        return
    url = str(workdir).rstrip("/")
    with tempfile.TemporaryDirectory(prefix="tcq-") as here:
        folder, lock = Path(here), threading.Lock()
        with _files(url) as (fs, inside):
            _fetch(fs, inside, list(_below(fs, inside, deep=False)), folder, url)
        sent = _changes(folder, {})

        def send_changed() -> None:
            with lock, _files(url) as (fs, inside):
                for name, mark in _changes(folder, sent).items():
                    fs.put_file(str(folder / name), f"{inside}/{name}")
                    sent[name] = mark

        ended = threading.Event()

        def now_and_then() -> None:
            while not ended.wait(EVERY):
                try:
                    send_changed()
                except BucketError as error:  # the next one may get through; the last one is not in here
                    say(f"not sent, to be tried again: {error}")

        if not writes:
            yield At(folder, lambda: None)
            return
        threading.Thread(target=now_and_then, name="bucket", daemon=True).start()
        try:
            yield At(folder, send_changed)
        finally:
            ended.set()
            send_changed()


@contextmanager
def _files(url: str | Path) -> Iterator[tuple[Any, str]]:
    """The file system of a URL and the path inside it. Its errors, of many kinds, become BucketError."""
    import fsspec

    try:
        fs, inside = fsspec.core.url_to_fs(str(url).rstrip("/"))
    except (ImportError, ValueError) as error:
        raise BucketError(f"{url}: {error}; pip install 'tcq[buckets]' brings what gs:// needs") from None
    fs.invalidate_cache()
    try:
        yield fs, inside
    except Exception as error:
        if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in ("gcsfs", "aiohttp", "google"):
            raise BucketError(f"{url}: {_why(error)}") from None
        raise


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else 'no reason given'}"


def _below(fs: Any, inside: str, *, deep: bool = True) -> dict[str, dict[str, Any]]:
    """Names of files, relative to a folder, and what is known of each."""
    try:
        found = fs.find(inside, detail=True) if deep else {i["name"]: i for i in fs.ls(inside, detail=True)}
    except FileNotFoundError:
        return {}
    start = len(inside.rstrip("/")) + 1
    names = {path[start:]: info for path, info in found.items() if info["type"] == "file" and path[start:]}
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise BucketError(f"{inside} holds {name!r}, which names a place outside of it")
    return {n: names[n] for n in sorted(names) if not n.endswith("/")}


def _mark(info: dict[str, Any]) -> list[str]:
    """Another one for other contents."""
    return [str(info.get(key)) for key in ("size", "etag", "ETag", "md5Hash", "generation", "mtime") if key in info]


def _fetch(fs: Any, inside: str, names: list[str], folder: Path, url: str) -> None:
    start = said = time.monotonic()
    for first in range(0, len(names), AT_ONCE):
        some = names[first : first + AT_ONCE]
        for parent in {(folder / name).parent for name in some}:
            parent.mkdir(parents=True, exist_ok=True)
        halves = [str((folder / name).with_name(f".{Path(name).name}.half-{os.getpid()}")) for name in some]
        fs.get([f"{inside}/{name}" for name in some], halves)
        for half, name in zip(halves, some, strict=True):
            os.replace(half, folder / name)
        moved()
        done = first + len(some)
        if time.monotonic() - said > 5 or (done == len(names) and said > start):
            said = time.monotonic()
            say(f"{url}: {done:,} of {len(names):,} files fetched, {done / (said - start):,.0f}/s")


def _changes(folder: Path, sent: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Sizes and times of the files that are not what was sent."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".half"):
        name, stat = path.relative_to(folder).as_posix(), path.stat()
        if sent.get(name) != (mark := (stat.st_size, stat.st_mtime_ns)):
            found[name] = mark
    return found
