"""Being asked to stop: SIGTERM of a scheduler, SIGINT of a person."""

import asyncio
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

GRACE = 25.0  # seconds; schedulers kill after 30
INSIST = 1.0  # seconds after the first signal from which on another one ends the process at once


class Stopped(BaseException):
    """The process was asked to stop, and did what it had to before; `status` is what it exits with.

    No Exception, as KeyboardInterrupt is none: what forgives errors, such as that of a damaged image, is not to forgive this.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


_asked: list[str] = []  # names of the signals, here or in another process
_received: list[float] = []  # when they came here; schedulers and terminals may send one of them twice
_deferred = 0


def install() -> None:
    """From now on the two signals end what is going on with `Stopped`, in `deferred` code when it asks.

    Python runs a handler between two of its own instructions, so never during a long compilation: after GRACE seconds a
    thread ends the process, whose last checkpoint then is an earlier one.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _handle)

    def watch() -> None:
        number = 0
        while number not in (signal.SIGTERM, signal.SIGINT):
            number = reader.recv(1)[0]
        time.sleep(GRACE)
        name = signal.Signals(number).name
        print(f"{name}: not at a point to stop at within {GRACE:.0f} s; the last checkpoint stands", file=sys.stderr)
        sys.stderr.flush()
        os._exit(128 + number)

    writer_kept.append(writer)
    threading.Thread(target=watch, name="signals", daemon=True).start()


writer_kept: list[socket.socket] = []


def asked() -> str | None:
    """The signal that asks to stop, or None."""
    return _asked[0] if _asked else None


def ask(name: str) -> None:
    """Another process was asked to stop, by the signal of this name."""
    if not _asked:
        _asked.append(name)


def status(name: str) -> int:
    """What a process exits with that a signal stopped."""
    return 128 + signal.Signals[name]


def check() -> None:
    """Raises Stopped where the process was asked to stop."""
    name = asked()
    if name:
        raise Stopped(f"stopped by {name}", status(name))


@contextmanager
def deferred() -> Iterator[None]:
    """Code that looks at `asked` by itself, often enough."""
    global _deferred
    _deferred += 1
    try:
        yield
    finally:
        _deferred -= 1


def _handle(number: int, frame: FrameType | None) -> None:
    if _swallows(frame):  # again in a moment
        threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
        return
    _received.append(time.monotonic())
    if _received[-1] - _received[0] > INSIST:
        raise KeyboardInterrupt
    ask(signal.Signals(number).name)
    if len(_received) == 1 and not _deferred:
        check()


def _swallows(frame: FrameType | None) -> bool:
    """Whether what is raised here would be printed and forgotten: in finalizers, in JAX's callback of the garbage collector, and
    in callbacks of asyncio, by which Orbax reads and writes."""
    while frame:
        if frame.f_code.co_name in ("__del__", "_xla_gc_callback") or frame.f_code is asyncio.Handle._run.__code__:
            return True
        frame = frame.f_back
    return False
