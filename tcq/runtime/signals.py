"""Stopping on SIGTERM (schedulers), SIGINT (people) and SIGHUP (a closed terminal).

A handler sets a flag, and long loops poll it.

Only the command line installs the handler. In Python code that uses tcq as a library signals keep their default effect.
"""

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

NOTICE = 1.0  # seconds after which a message says that the process is stopping
GRACE = 25.0  # seconds to reach a safe point; schedulers send SIGKILL after 30
INSIST = 1.0  # a second signal ends the process at once if it comes later than this many seconds after the first

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

logger = logging.getLogger(__name__)


class Stopped(BaseException):
    """The process got a signal to stop, and has reached a safe point.

    `status` is the exit status of the process. Stopped derives from BaseException, as KeyboardInterrupt does, so that
    `except Exception` does not swallow it.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _State:
    """The state of signal handling; one per process, because handlers are per process."""

    requested: str | None = None  # name of the signal, received here or by another process of the run
    received: float | None = None  # time of the first signal here; schedulers and terminals may send one twice
    polls = 0
    waits = False  # for a person
    wakeup: socket.socket | None = None  # kept open for Python to write to


def install() -> None:
    """Handles SIGTERM, SIGINT and SIGHUP from now on; call it once, from the main thread.

    Python runs handlers between two of its own instructions, so never during a long compilation or another call into C.
    Therefore a thread, woken through a socket, ends the process where no safe point is reached within `GRACE` seconds.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    _State.wakeup = writer
    for number in HANDLED:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
            signal.signal(number, handle)
    threading.Thread(target=_end_after_grace, args=(reader,), name="signals", daemon=True).start()


def handle(number: int, frame: FrameType | None) -> None:
    """The handler: it notes the signal.

    Another signal more than `INSIST` seconds later ends the process at once.
    """
    now = time.monotonic()
    if _State.received is None:
        _State.received = now
    elif now - _State.received > INSIST:
        os._exit(128 + number)
    request(signal.Signals(number).name)
    if _State.waits:
        check()


@contextmanager
def waiting() -> Iterator[None]:
    """While the main thread waits for a person, a signal raises Stopped at once."""
    check()
    _State.waits = True
    try:
        yield
    finally:
        _State.waits = False


def requested() -> str | None:
    """Name of the signal to stop that this process or another of its run got; else None."""
    return _State.requested


def request(name: str) -> None:
    """Asks this process to stop.

    `name` is the name of the signal that another process of the run received.
    """
    _State.requested = _State.requested or name


def check() -> None:
    """Raises Stopped if a stop was requested."""
    name = requested()
    if name:
        raise Stopped(f"stopped by {name}", status(name))


def poll() -> None:
    """Counts a round of a long loop, and raises Stopped as `check`; call it in every round."""
    advance()
    check()


def advance() -> None:
    """Counts a round of a long loop that checks for signals itself; see `polls`."""
    _State.polls += 1


def polls() -> int:
    """How often this process has called `poll` or `advance`.

    While this number grows, the process is not stuck.
    """
    return _State.polls


def status(name: str) -> int:
    """The exit status of a process that the signal of this name stopped: 128 plus its number."""
    return 128 + signal.Signals[name]


def reset() -> None:
    """Clears the request to stop, for programs that continue after `Stopped`, such as tests."""
    _State.requested = _State.received = None


def _end_after_grace(reader: socket.socket) -> None:
    number = 0
    while number not in HANDLED or signal.getsignal(number) == signal.SIG_IGN:
        number = reader.recv(1)[0]
    name = signal.Signals(number).name
    time.sleep(min(NOTICE, GRACE))
    request(name)  # the handler does not run while the main thread waits in a call, for another process say
    logger.info(f"{name}: stopping at the next safe point, or after {GRACE:.0f} s")
    time.sleep(max(GRACE - NOTICE, 0))
    logger.error(f"{name}: no safe point reached within {GRACE:.0f} s; exiting. What has been saved is intact.")
    os._exit(128 + number)
