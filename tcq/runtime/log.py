"""What a run writes down: metrics.jsonl, TensorBoard events, and the progress line."""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO


class Journal:
    """Opens the records of a workdir for steps after `step`; lines of later steps, left by a killed run, are dropped.

    With writes=False, in a process of several that is not the first, nothing is read or written. `send` takes what was
    written to where it belongs.
    """

    def __init__(
        self, workdir: Path, *, step: int, writes: bool = True, send: Callable[[], None] = lambda: None
    ) -> None:
        self._writes, self._kept, self._send = writes, set[tuple[int, str]](), send
        if not writes:
            return
        from tensorboardX import SummaryWriter

        path = workdir / "metrics.jsonl"
        kept = [line for line in _lines(path) if line["step"] <= step]
        self._kept = {(line["step"], key.partition("/")[0]) for line in kept for key in line}
        half = path.with_suffix(".half")
        half.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(half, path)
        self._lines: TextIO = open(path, "a")
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def has(self, step: int, group: str) -> bool:
        """Whether there was a line with values of this group, such as "validation", at this step when it was opened."""
        return (step, group) in self._kept

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line of JSON, and one TensorBoard scalar per value. Values that are not finite are written as null."""
        if not self._writes:
            return
        finite = {k: v if abs(v) < float("inf") else None for k, v in values.items()}
        self._lines.write(json.dumps({"step": step, **finite}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def keep(self) -> None:
        """Before a checkpoint, so that a run that goes on from it has all lines up to it."""
        if self._writes:
            self._events.flush()
            self._send()

    def close(self) -> None:
        if not self._writes:
            return
        self._lines.close()
        self._events.close()


class Progress:
    """Rates since the last call of `rates` or `restart`."""

    def __init__(self, *, step: int, total_steps: int, batch_size: int) -> None:
        self.total_steps, self.batch_size = total_steps, batch_size
        self._step, self._start, self._waited = step, time.monotonic(), 0.0

    def waited(self, seconds: float) -> None:
        """Counts time spent waiting for data."""
        self._waited += seconds

    def rates(self, step: int) -> dict[str, float]:
        """images_per_second, data_wait (share of time) and eta_seconds; none where no step was timed."""
        if step == self._step:
            return {}
        elapsed = max(time.monotonic() - self._start, 1e-9)
        steps = step - self._step
        rates = {
            "images_per_second": steps * self.batch_size / elapsed,
            "data_wait": min(self._waited / elapsed, 1.0),
            "eta_seconds": (self.total_steps - step) * elapsed / steps,
        }
        self.restart(step)
        return rates

    def restart(self, step: int) -> None:
        """Starts the clock anew after `step`, and after something that is not training."""
        self._step, self._start, self._waited = step, time.monotonic(), 0.0


quiet = False  # another process speaks for this one


class Moves:
    """How often this process got further with something that may take long."""

    count = 0


def moved() -> None:
    Moves.count += 1


def say(message: str) -> None:
    """A line for the person who watches, on standard error."""
    if not quiet:
        print(message, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:  # the last line of a killed run may be cut
            continue
    return lines
