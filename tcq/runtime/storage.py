"""Files on this machine and in buckets (gs://bucket/folder), and the cache folder.

On this machine files are replaced whole or not at all. Buckets are read and written through fsspec.

Orbax writes checkpoints to a bucket itself. All other files of a workdir are small: they are written to a local mirror,
and changed ones are uploaded before each checkpoint, at the end, and once a minute.
"""

import hashlib
import json
import logging
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from tcq.runtime import log, signals

UPLOAD_EVERY = 60.0  # seconds
DOWNLOAD_BATCH = 256  # files requested together
TEMPORARY = ".tmp-"  # in the names of files and folders that are being written
ABANDONED_FILE, ABANDONED_FOLDER = 600.0, 86_400.0  # seconds without a change, after which its writer was killed

logger = logging.getLogger(__name__)


class BucketError(ValueError):
    """A bucket cannot be read or written; the message says which one and why."""


def cache_home() -> Path:
    """The folder of all that can be computed again: $XDG_CACHE_HOME/tcq, or ~/.cache/tcq.

    Where there is no home, or it cannot be written, as in containers, it is a temporary folder of this user.
    """
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "tcq").expanduser()
        home.mkdir(parents=True, exist_ok=True)
        if os.access(home, os.W_OK):
            return home
        reason = f"{home} cannot be written"
    except (RuntimeError, OSError) as error:  # RuntimeError: the user has no home
        reason = str(error)
    folder = Path(tempfile.gettempdir(), f"tcq-{os.getuid()}")
    _warn_once(f"{reason}: caching in {folder}; set XDG_CACHE_HOME, or data.cache_dir, to keep what is decoded")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user: set XDG_CACHE_HOME")
    return folder


@lru_cache
def _warn_once(message: str) -> None:
    logger.warning(message)


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path`.

    It replaces `path`, flushed to disk, if the block ends without an error.
    """
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}-{secrets.token_hex(4)}")  # hosts share folders
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Replaces a local file, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text)


def delete_abandoned(folder: Path) -> None:
    """Deletes temporary files and folders that killed processes have left in a folder.

    One that was written to in the last ten minutes (a folder: in the last day) may belong to a process that lives.
    """
    for path in folder.glob(f"{TEMPORARY}*"):
        with suppress(FileNotFoundError):  # another process has deleted or renamed it
            newest = max(p.stat().st_mtime for p in (path, *path.rglob("*")))
            if time.time() - newest > (ABANDONED_FOLDER if path.is_dir() else ABANDONED_FILE):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def is_url(place: str | Path) -> bool:
    """Whether a place is in a bucket, such as gs://bucket/folder."""
    return isinstance(place, str) and "://" in place


def join(folder: str | Path, name: str) -> str | Path:
    """The path or URL of a file in a folder or bucket."""
    return f"{str(folder).rstrip('/')}/{name}" if is_url(folder) else Path(folder, name)


def read(path: str | Path) -> bytes | None:
    """The contents of a local file or URL; None if there is no such file. Raises BucketError."""
    if not is_url(path):
        return Path(path).read_bytes() if Path(path).is_file() else None
    with _filesystem(path) as (fs, inside):
        try:
            return bytes(fs.cat_file(inside))
        except FileNotFoundError:
            return None


def write(url: str, data: bytes) -> None:
    """Writes one file of a bucket. Raises BucketError."""
    with _filesystem(url) as (fs, inside):
        fs.pipe_file(inside, data)


def remove(url: str) -> None:
    """Deletes one file of a bucket. Raises BucketError."""
    with _filesystem(url) as (fs, inside):
        fs.rm_file(inside)


def download(url: str) -> Path:
    """A local folder, below `cache_home()`, with all files below a URL.

    Only files that have changed are fetched. Raises BucketError if there is no file or no access.
    """
    folder = cache_home() / "buckets" / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:32]
    with _filesystem(url) as (fs, inside):
        marks = {name: _mark(info) for name, info in _files_below(fs, inside).items()}
        if not marks:
            raise BucketError(f"no file found below {url!r}")
        listing = folder.with_suffix(".json")
        known = json.loads(listing.read_text()) if listing.is_file() else {}
        for name in known.keys() - marks.keys():
            (folder / name).unlink(missing_ok=True)
        new = [n for n, mark in marks.items() if known.get(n) != mark or not (folder / n).is_file()]
        _fetch(fs, inside, new, folder, url)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(listing, json.dumps(marks))
    return folder


def upload(folder: Path, url: str, *, last: str) -> None:
    """Writes all files of a local folder to a URL, the one named `last` after all others.

    Raises BucketError.
    """
    with _filesystem(url) as (fs, inside):
        for path in sorted(folder.iterdir(), key=lambda p: p.name == last):
            fs.put_file(str(path), f"{inside}/{path.name}")


class Mirror(NamedTuple):
    """The local folder with the small files of a workdir, and a function.

    The function uploads changed files to the bucket of the workdir.
    """

    folder: Path
    upload: Callable[[], None]


@contextmanager
def mirror(workdir: str | Path, *, writes: bool = True) -> Iterator[Mirror]:
    """The files of a workdir except its checkpoints.

    If the workdir is in a bucket, this is a temporary copy, else the workdir itself. With writes=False, for all
    processes of a run but the first, nothing is uploaded.
    """
    if not is_url(workdir):
        yield Mirror(Path(workdir), lambda: None)
        return
    url = str(workdir).rstrip("/")
    with tempfile.TemporaryDirectory(prefix="tcq-") as temporary:
        folder, lock = Path(temporary), threading.Lock()
        with _filesystem(url) as (fs, inside):
            _fetch(fs, inside, list(_files_below(fs, inside, deep=False)), folder, url)
        uploaded = _changes(folder, {})

        def upload_changed() -> None:
            with lock, _filesystem(url) as (fs, inside):
                for name, mark in _changes(folder, uploaded).items():
                    fs.put_file(str(folder / name), f"{inside}/{name}")
                    uploaded[name] = mark

        if not writes:
            yield Mirror(folder, lambda: None)
            return
        ended = threading.Event()
        threading.Thread(target=_repeat, args=(upload_changed, ended), name="bucket", daemon=True).start()
        try:
            yield Mirror(folder, upload_changed)
        finally:
            ended.set()
            upload_changed()


def _repeat(upload: Callable[[], None], ended: threading.Event) -> None:
    while not ended.wait(UPLOAD_EVERY):
        try:
            upload()
        except BucketError as error:
            logger.warning(f"upload failed, trying again in {UPLOAD_EVERY:.0f} s: {error}")


@contextmanager
def _filesystem(url: str | Path) -> Iterator[tuple[Any, str]]:
    """The fsspec file system of a URL, and the path inside it.

    Turns the many kinds of errors of the file system into BucketError.
    """
    import fsspec

    try:
        fs, inside = fsspec.core.url_to_fs(str(url).rstrip("/"))
    except (ImportError, ValueError) as error:
        raise BucketError(f"{url}: {error}; for gs:// run pip install gcsfs") from None
    fs.invalidate_cache()
    try:
        yield fs, inside
    except Exception as error:
        if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in ("gcsfs", "aiohttp", "google"):
            reason = str(error).splitlines()[0][:300] if str(error) else "no reason given"
            raise BucketError(f"{url}: {type(error).__name__}: {reason}") from None
        raise


def _files_below(fs: Any, inside: str, *, deep: bool = True) -> dict[str, dict[str, Any]]:
    """Listing entries of the files in a folder (if deep, below it) by relative name, sorted."""
    try:
        listed = fs.find(inside, detail=True) if deep else {i["name"]: i for i in fs.ls(inside, detail=True)}
    except FileNotFoundError:
        return {}
    start = len(inside.rstrip("/")) + 1
    names = {path[start:]: info for path, info in listed.items() if info["type"] == "file" and path[start:]}
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise BucketError(f"{inside} holds {name!r}, a path outside of it: rename that file")
    return {n: names[n] for n in sorted(names) if not n.endswith("/")}


def _mark(info: dict[str, Any]) -> list[str]:
    """A value that changes whenever the contents of a file do."""
    return [str(info.get(key)) for key in ("size", "etag", "ETag", "md5Hash", "generation", "mtime") if key in info]


def _fetch(fs: Any, inside: str, names: list[str], folder: Path, url: str) -> None:
    progress = log.Progress(logger, f"downloading {url}", len(names), unit="files")
    for first in range(0, len(names), DOWNLOAD_BATCH):
        chunk = names[first : first + DOWNLOAD_BATCH]
        for parent in {(folder / name).parent for name in chunk}:
            parent.mkdir(parents=True, exist_ok=True)
        ending = f"{os.getpid()}-{secrets.token_hex(4)}"  # hosts share folders
        temporary = [str((folder / n).with_name(f"{TEMPORARY}{Path(n).name}-{ending}")) for n in chunk]
        fs.get([f"{inside}/{name}" for name in chunk], temporary)
        for file, name in zip(temporary, chunk, strict=True):
            os.replace(file, folder / name)
        signals.poll()
        progress.update(first + len(chunk))


def _changes(folder: Path, uploaded: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Size and time of modification of each file that differs from what was uploaded."""
    changes = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(TEMPORARY)):
        name, stat = path.relative_to(folder).as_posix(), path.stat()
        mark = stat.st_size, stat.st_mtime_ns
        if uploaded.get(name) != mark:
            changes[name] = mark
    return changes
