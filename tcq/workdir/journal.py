"""The measurements of a run: metrics.jsonl and TensorBoard events."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from tcq.runtime import storage

METRICS = "metrics.jsonl"


class Journal:
    """Appends to the records of a workdir for steps after `step`.

    Removes lines of later steps from a killed run. With writes=False, for all processes of a run but the first, nothing
    is read or written. `upload` is called before a checkpoint is saved.
    """

    def __init__(
        self, folder: Path, *, step: int, writes: bool = True, upload: Callable[[], None] = lambda: None
    ) -> None:
        self._writes, self._upload = writes, upload
        self._groups: set[tuple[int, str]] = set()
        self._before: list[Any] = []
        if not writes:
            return
        from tensorboardX import SummaryWriter

        path = folder / METRICS
        lines = [line for line in read(path) if line["step"] <= step]
        self._before = lines
        self._groups = {(line["step"], key.partition("/")[0]) for line in lines for key in line}
        storage.write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        self._lines: TextIO = open(path, "a")
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def has(self, step: int, group: str) -> bool:
        """Whether this step had values of a group ("validation", say) when the journal was opened."""
        return (step, group) in self._groups

    def last(self, group: str) -> dict[str, float]:
        """The newest values of a group when the journal was opened; empty if there were none."""
        for line in reversed(self._before):
            values = {k.removeprefix(f"{group}/"): v for k, v in line.items() if k.startswith(f"{group}/")}
            if values:
                return values
        return {}

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes a line of JSON and a TensorBoard scalar for each value.

        A value that is not finite is null in JSON.
        """
        if not self._writes:
            return
        finite = {k: v if abs(v) < float("inf") else None for k, v in values.items()}
        self._lines.write(json.dumps({"step": step, **finite}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        """Writes and uploads everything.

        Call it before a checkpoint, which a resumed run finds with all its lines.
        """
        if self._writes:
            self._events.flush()
            self._upload()

    def close(self) -> None:
        """Closes the files."""
        if self._writes:
            self._lines.close()
            self._events.close()


def read(path: Path) -> list[Any]:
    """All lines of a file that are whole; the last line of a killed run may be cut."""
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except (ValueError, RecursionError):
            continue
    return lines
