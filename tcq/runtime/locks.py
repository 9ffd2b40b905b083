"""One writer at a time: a lock on a folder that ends with its process, however that ends."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from tcq.runtime import signals

NAME = ".lock"
EVERY = 0.1  # seconds between two attempts
ATTEMPTS = 100  # to open a file whose folder others delete
UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)

logger = logging.getLogger(__name__)


class LockedError(ValueError):
    """Another process writes to the folder; the message names it."""


@contextlib.contextmanager
def lock(folder: str | Path, *, wait: bool) -> Iterator[None]:
    """Holds the lock of a folder.

    The folders that this creates are deleted if nothing is written to them. If another process holds the lock, this one
    waits with `wait`, and raises LockedError without.

    The operating system releases the lock when the process ends, also by kill -9. Between hosts it holds where the file
    system shares locks, as NFS 4 does; where it has none, a warning says so, and nothing is locked.
    """
    folder = Path(folder)
    created = [p for p in (folder, *folder.parents) if not p.exists()]
    file = _open_locked(folder / NAME, wait=wait)
    with file:
        file.truncate(0)
        file.write(json.dumps({"host": platform.node(), "pid": os.getpid(), "time": time.ctime()}))
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # a folder is not empty, or was deleted
                if [p.name for p in folder.iterdir()] == [NAME]:
                    (folder / NAME).unlink()
                for path in created:
                    path.rmdir()


def _open_locked(path: Path, *, wait: bool) -> TextIO:
    """The lock file, locked.

    Another process may delete it, and its folder, before it is locked here: then it is opened again.
    """
    failed = 0
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+")
        except (FileNotFoundError, FileExistsError):
            failed += 1
            if failed == ATTEMPTS:
                raise
            continue
        failed = 0
        try:
            _take(file.fileno(), path, wait=wait)
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                    return file
        except BaseException:
            file.close()
            raise
        file.close()


def _take(number: int, path: Path, *, wait: bool) -> None:
    waited = False
    while True:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno in UNSUPPORTED:
                logger.warning(f"{path} cannot be locked ({error.strerror}): run one writer at a time")
                return
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
        if not wait:
            raise LockedError(f"{str(path.parent)!r} is in use by {_owner(path)}: wait for it, or stop it")
        if not waited:
            logger.info(f"waiting for {_owner(path)}, which writes to {str(path.parent)!r}")
            waited = True
        signals.poll()
        time.sleep(EVERY)


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text())
        return f"process {owner['pid']} on {owner['host']}, since {owner['time']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has not written its name yet
        return "another process"
