"""Logging on the command line: the handler of the "tcq" loggers, progress, durations.

Every module logs to `logging.getLogger(__name__)`. Library code adds no handler: a Python program silences, filters and
captures tcq's messages as those of any other library. The command line calls `show` once.
"""

import logging
import re
import sys
import time

EVERY = 5.0  # seconds between two progress lines


def show(level: int = logging.INFO) -> None:
    """Writes records of "tcq" at or above `level` to standard error.

    They have the time, and the level from warnings on.
    """
    logger = logging.getLogger("tcq")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False


class _Formatter(logging.Formatter):
    """ "12:34:56 message", with "warning: " or "error: " before the message where it is one."""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        return f"{self.formatTime(record, '%H:%M:%S')} {level}{super().format(record)}"


def message(line: str) -> str:
    """A line that `show` has written, without its time."""
    return re.sub(r"^\d\d:\d\d:\d\d ", "", line)


class Progress:
    """Logs the progress of a long task at most every `EVERY` seconds.

    The end of the task is logged if it took that long.
    Lines read "<task>: <done> of <total> <unit>, <rate>/s, <h:mm:ss> left". A task that goes on starts with `done`.
    """

    def __init__(self, logger: logging.Logger, task: str, total: int, *, unit: str = "images", done: int = 0) -> None:
        self._logger, self._task, self._total, self._unit, self._before = logger, task, total, unit, done
        self._start = self._last = time.monotonic()

    def update(self, done: int) -> None:
        """`done` of the total are complete, counted from the start."""
        now = time.monotonic()
        complete = done >= self._total and self._last > self._start
        if now - self._last < EVERY and not complete:
            return
        self._last = now
        rate = (done - self._before) / max(now - self._start, 1e-9)
        left = f"{duration((self._total - done) / rate)} left" if rate else "time left unknown"
        self._logger.info(f"{self._task}: {done:,} of {self._total:,} {self._unit}, {rate:,.0f}/s, {left}")


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
