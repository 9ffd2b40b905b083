"""A grid of configs, each trained and scored in a process of its own.

It is resumable, with one table and one plot. A cell is an ordinary training run in `<workdir>/cells/<its values>`.
Cells that are done are not run again.
"""

import csv
import itertools
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import tcq
from tcq import config as configs
from tcq import plots
from tcq.data import sources
from tcq.runtime import checkout, locks, log, signals, storage

SEED = "train.seed"
TABLE, MARKDOWN, PLOT = "table.csv", "table.md", "sweep.png"
POLL = 0.5  # seconds between two looks at running cells
EVERY = 30.0  # seconds after which the newest lines of the running cells are shown
MEASURED = (
    "validation_mAP",
    "test_mAP",
    "symmetric_mAP",
    "float_mAP",
    "clip_precision",
    "clip_recall",
    "false_negative_rate",
    "distinct_codes",
)

logger = logging.getLogger(__name__)


class SweepError(ValueError):
    """This sweep cannot be run; the message says why."""


class CellError(RuntimeError):
    """Some cells failed; the message says which, and where their output is."""


class Cell(NamedTuple):
    """One config of the grid."""

    values: dict[str, str]  # of the keys of the grid
    folder: Path


class Grid(NamedTuple):
    """A sweep: what its cells share, and the cells."""

    config: str
    overrides: Sequence[str]
    checkpoint: str
    keys: dict[str, list[str]]
    cells: list[Cell]
    workdir: Path
    axes: Sequence[str] = ()  # keys: the x axis of the plot, and its lines


def sweep(
    config: str,
    grid: str,
    workdir: str | Path,
    *,
    overrides: Sequence[str] = (),
    jobs: int = 1,
    checkpoint: str = "best",
    axes: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Trains and scores every cell that is not done, `jobs` at a time.

    Returns the rows of the table. `axes` are up to two keys of the grid: the x axis of the plot, and its lines; other
    keys get panels. Without them the key of most values is the x axis, and all others are lines.

    Writes table.csv, table.md and sweep.png to the workdir after every cell, and log.txt to the folder of a cell.
    Raises SweepError or ConfigError before training if a cell cannot work, LockedError if another sweep runs in the
    workdir, and CellError at the end.
    """
    import jax

    if not any(name in os.environ for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME")):
        jax.config.update("jax_platforms", "cpu")  # leaves the accelerator to the processes of the cells
    keys = parse_grid(grid)
    settings = [dict(zip(keys, values, strict=True)) for values in itertools.product(*keys.values())]
    cells = [Cell(values, Path(workdir) / "cells" / _name(values)) for values in settings]
    whole = Grid(config, overrides, checkpoint, keys, cells, Path(workdir), _axes(axes, keys))
    _check(whole)
    with locks.lock(workdir, wait=False):
        waiting = [cell for cell in cells if not _is_done(whole, cell)]
        logger.info(f"{len(cells)} cells, {len(cells) - len(waiting)} of them done; {jobs} at a time")
        failed = _run_all(whole, waiting, jobs)
        rows = _report(whole)
    if failed:
        listed = "\n".join(f"  - {cell.folder}/log.txt: {_last_line(cell.folder / 'log.txt')}" for cell in failed)
        raise CellError(f"{len(failed)} of {len(cells)} cells failed:\n{listed}")
    return rows


def _run_all(grid: Grid, waiting: Sequence[Cell], jobs: int) -> list[Cell]:
    """Runs cells, `jobs` at a time; returns those that failed.

    If it is stopped, it stops the running cells, which save.
    """
    start, lock, ended = time.monotonic(), threading.Lock(), 0
    running: dict[subprocess.Popen[bytes], Cell] = {}

    def run(cell: Cell) -> bool:
        nonlocal ended
        done, seconds = _run(grid, cell, running)
        with lock:
            ended += 1
            left = (time.monotonic() - start) / ended * (len(waiting) - ended)
            row = _row(cell)
            scores = "  ".join(f"{k} {row[k]:.4f}" for k in MEASURED[:2] if row[k] is not None)
            took = f"in {log.duration(seconds)}, {log.duration(left)} left"
            outcome = scores if done else "stopped" if signals.requested() else "failed"
            logger.info(f"{ended}/{len(waiting)}  {cell.folder.name}: {outcome}  {took}")
            _report(grid)
        return done

    with ThreadPoolExecutor(jobs) as pool:
        futures: list[Future[bool]] = [pool.submit(run, cell) for cell in waiting]
        try:
            shown, lines = start, dict[Path, str]()
            while wait(futures, timeout=POLL).not_done:
                signals.poll()
                if time.monotonic() - shown >= EVERY:
                    shown = time.monotonic()
                    for cell in list(running.values()):
                        line = _last_line(cell.folder / "log.txt")
                        if lines.get(cell.folder) != line:
                            lines[cell.folder] = line
                            logger.info(f"{cell.folder.name}: {log.message(line)}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.terminate()
            for process in list(running):
                process.wait()
            raise
    return [cell for cell, future in zip(waiting, futures, strict=True) if not future.result()]


def parse_grid(text: str) -> dict[str, list[str]]:
    """{"loss.clip": ["0", "0.1"], ...} from "loss.clip=0,0.1; train.seed=0,1".

    Commas in brackets do not separate.
    Raises SweepError for any other text, a key or value that is given twice, or a key without values.
    """
    keys: dict[str, list[str]] = {}
    for part in filter(None, (p.strip() for p in re.split(r"[;\n]", text))):
        key, equals, listed = part.partition("=")
        key = key.strip().removeprefix("--").removeprefix("config.")
        values = [v.strip() for v in re.split(r",(?![^(\[]*[)\]])", listed)]
        if not equals or not key or not all(values):
            raise SweepError(f"--grid: {part!r} must have the form key=value,value,...; separate keys by ;")
        if key in keys:
            raise SweepError(f"--grid: {key} is given twice")
        if len(set(values)) < len(values):
            raise SweepError(f"--grid: a value of {key} is given twice in {listed.strip()!r}")
        keys[key] = values
    if not keys:
        raise SweepError("--grid is empty: write for example 'loss.clip=0,0.1; train.seed=0,1,2'")
    return keys


def _axes(axes: Sequence[str], keys: Mapping[str, Sequence[str]]) -> list[str]:
    """The keys of the axes of the plot.

    Raises SweepError if they are not different keys of the grid, at most two.
    """
    given = [key.strip().removeprefix("--").removeprefix("config.") for key in axes]
    known = [key for key in keys if key != SEED]
    if len(given) > 2 or len(set(given)) < len(given) or not set(given) <= set(known):
        raise SweepError(f"--axes {','.join(given)} must be one or two of the keys of the grid: {', '.join(known)}")
    return given


def _name(values: Mapping[str, str]) -> str:
    """The folder of a cell: the last words of the keys, if these differ, and the values."""
    last = [key.rpartition(".")[2] for key in values]
    short = last if len(set(last)) == len(last) else list(values)
    return ",".join(f"{k}={re.sub(r'[^A-Za-z0-9.+()-]', '_', v)}" for k, v in zip(short, values.values(), strict=True))


def _check(grid: Grid) -> None:
    """Raises if a cell's config does not work, or its folder holds a run with another config."""
    names = [cell.folder.name for cell in grid.cells]
    duplicates = {name for name in names if names.count(name) > 1}
    if duplicates:
        raise SweepError(
            f"--grid: different values give the same folder {min(duplicates)!r}: write one of them differently"
        )
    for number, cell in enumerate(grid.cells):
        config = configs.load(grid.config, [*grid.overrides, *_overrides(cell)], workdir=cell.folder)
        stored = cell.folder / "config.json"
        changes = configs.differences(configs.from_json(stored.read_text()), config) if stored.is_file() else []
        if changes:
            listed = "\n".join(f"  - {c}" for c in changes)
            raise SweepError(
                f"{cell.folder} holds a run with another config: use another --workdir, or the same values\n{listed}"
            )
        if not number and sources.open_source(config.data).labels is None:
            raise SweepError(f"{config.data.source} has no labels, so no cell could be scored: use tcq train")


def _overrides(cell: Cell) -> list[str]:
    return [f"--config.{key}={value}" for key, value in cell.values.items()]


def _run(grid: Grid, cell: Cell, running: dict[subprocess.Popen[bytes], Cell]) -> tuple[bool, float]:
    """Trains and scores a cell; returns whether it is done, and the seconds it took."""
    command = [sys.executable, "-m", "tcq", "train", f"--config={grid.config}", f"--workdir={cell.folder}"]
    command += [f"--evaluate={grid.checkpoint}", *grid.overrides, *_overrides(cell)]
    cell.folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with open(cell.folder / "log.txt", "ab") as output:
        output.write((" ".join(command) + "\n").encode())
        output.flush()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=_environment(grid))
        running[process] = cell
        status = process.wait()
        del running[process]
    seconds = time.monotonic() - start
    record = _read_record(cell)
    record["seconds"] = record.get("seconds", 0) + seconds  # of all attempts
    record |= {
        "command": command[1:],
        "commit": checkout.commit() or f"tcq {tcq.__version__}",
        "checkpoint": grid.checkpoint,
    }
    storage.write_text(cell.folder / "sweep.json", json.dumps(record, indent=2) + "\n")
    return status == 0 and _is_done(grid, cell), seconds


def _is_done(grid: Grid, cell: Cell) -> bool:
    """Whether a cell is scored, at the checkpoint of this sweep."""
    of = _read_record(cell).get("checkpoint", grid.checkpoint)
    return of == grid.checkpoint and isinstance(_read(cell.folder / "results.json").get("mAP"), dict)


def _environment(grid: Grid) -> dict[str, str]:
    """The environment of the cells, which share compiled programs."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str((grid.workdir / "compiled").resolve())}
    return {**cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5", **os.environ}


def _read_record(cell: Cell) -> dict[str, Any]:
    return _read(cell.folder / "sweep.json")


def _read(path: Path) -> dict[str, Any]:
    """The contents of a JSON file; none if it is missing or damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _last_line(output: Path) -> str:
    lines = output.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"


def _row(cell: Cell) -> dict[str, Any]:
    """The row of a cell in the table; None for what is not known yet."""
    record, results = _read_record(cell), _read(cell.folder / "results.json")
    scores, validation, machine = (results.get(k, {}) for k in ("mAP", "validation", "machine"))
    measured = {
        "validation_mAP": validation.get("mAP"),
        "test_mAP": scores.get("asymmetric"),
        "symmetric_mAP": scores.get("symmetric"),
        "float_mAP": scores.get("float"),
        **{k: validation.get(k) for k in ("clip_precision", "clip_recall", "false_negative_rate")},
        "distinct_codes": results.get("distinct_codes"),
    }
    about = {
        "step": results.get("step"),
        "k": results.get("k"),
        "seconds": record.get("seconds") and round(record["seconds"], 1),
        "commit": record.get("commit"),
        "machine": ", ".join(str(v) for v in machine.values()),
        "config": str(cell.folder / "config.json"),
    }
    return {**cell.values, **measured, **about}


def _report(grid: Grid) -> list[dict[str, Any]]:
    """Writes table.csv, table.md and sweep.png; returns the rows.

    table.csv has a row for each cell; table.md also has means over the seeds.
    """
    rows = [_row(cell) for cell in grid.cells]
    with storage.atomic(grid.workdir / TABLE) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    groups = summary(grid.keys, rows)
    storage.write_text(grid.workdir / MARKDOWN, _markdown(grid.keys, rows, groups))
    if any(group["n"] for group in groups):
        others = [k for k in grid.keys if k != SEED] or [SEED]
        x = grid.axes[0] if grid.axes else max(others, key=lambda k: len(grid.keys[k]))
        lines = list(grid.axes[1:]) or [k for k in others if k != x]
        panels = [k for k in others if k not in (x, *lines)]
        plots.sweep(grid.workdir / PLOT, groups, x=x, lines=lines, panels=panels)
    return rows


def summary(keys: Mapping[str, Sequence[str]], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each setting apart from its seed: n and {measured: (mean, deviation)}.

    n is the number of cells that are done.
    """
    others = [k for k in keys if k != SEED] or [SEED]
    groups = []
    for values in itertools.product(*(keys[k] for k in others)):
        same = [r for r in rows if all(r[k] == v for k, v in zip(others, values, strict=True))]
        done = [r for r in same if r["test_mAP"] is not None]
        spread = {}
        for name in MEASURED:
            numbers = [r[name] for r in done if r[name] is not None]
            spread[name] = (float(np.mean(numbers)), float(np.std(numbers))) if numbers else None
        groups.append({**dict(zip(others, values, strict=True)), "n": len(done), **spread})
    return groups


def _markdown(
    keys: Mapping[str, Sequence[str]], rows: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]
) -> str:
    def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
        return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]

    def spread(value: tuple[float, float] | None, n: int) -> str:
        return "" if value is None else f"{value[0]:.4g}" + (f" +- {value[1]:.2g}" if n > 1 else "")

    def number(value: Any) -> str:
        return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)

    others = [k for k in groups[0] if k in keys]
    text = ["Mean and standard deviation over the seeds (n cells).", ""]
    text += table(
        [*others, "n", *MEASURED],
        [[*(g[k] for k in others), str(g["n"]), *(spread(g[m], g["n"]) for m in MEASURED)] for g in groups],
    )
    text += ["", "Every cell.", "", *table(list(rows[0]), [[number(v) for v in row.values()] for row in rows])]
    return "\n".join(text) + "\n"
