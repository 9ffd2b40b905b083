"""A grid of configs, each trained and scored in a process of its own: resumable, with one table and one picture.

A cell is a training run like any other, in `<workdir>/cells/<its values>`; what is done is not done again.
"""

import csv
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tcq import config as configs
from tcq import plots as pictures
from tcq.runtime.log import duration, say

SEED = "train.seed"
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


class SweepError(ValueError):
    """This sweep cannot be run; the message says why."""


class CellsFailed(RuntimeError):
    """Some cells did not come to an end; the message says which, and where their output is."""


class Cell(NamedTuple):
    """One config of the grid."""

    values: dict[str, str]  # of the keys of the grid
    folder: Path


def sweep(
    config: str,
    grid: str,
    workdir: str | Path,
    *,
    overrides: Sequence[str] = (),
    jobs: int = 1,
    checkpoint: str = "best",
) -> list[dict[str, Any]]:
    """Trains and scores every cell that is not done, `jobs` at a time; the rows of the table.

    Leaves table.csv, table.md and sweep.png in the workdir, after every cell, and log.txt in the folder of a cell.
    Raises SweepError or ConfigError before anything is trained where a cell cannot work, and CellsFailed at the end.
    """
    import jax

    if not any(name in os.environ for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME")):
        jax.config.update("jax_platforms", "cpu")  # the accelerator is for the processes of the cells
    workdir = Path(workdir)
    keys = parse_grid(grid)
    cells = [
        Cell(dict(zip(keys, values, strict=True)), workdir / "cells" / _name(dict(zip(keys, values, strict=True))))
        for values in itertools.product(*keys.values())
    ]
    _check(config, overrides, cells)
    waiting = [cell for cell in cells if not (cell.folder / "results.json").is_file()]
    say(f"{len(cells)} cells, {len(cells) - len(waiting)} of them done; {jobs} at a time")
    start, lock, ended = time.monotonic(), threading.Lock(), 0
    running: set[subprocess.Popen[bytes]] = set()

    def run(cell: Cell) -> bool:
        nonlocal ended
        done, seconds = _run(config, overrides, cell, checkpoint, running)
        with lock:
            ended += 1
            left = (time.monotonic() - start) / ended * (len(waiting) - ended)
            row = _row(cell)
            told = "failed" if not done else "  ".join(f"{k} {row[k]:.4f}" for k in MEASURED[:2] if row[k] is not None)
            say(f"{ended}/{len(waiting)}  {cell.folder.name}: {told}  in {duration(seconds)}, left {duration(left)}")
            _report(workdir, keys, cells)
        return done

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run, cell) for cell in waiting]
        try:
            results = [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.terminate()
            for process in list(running):
                process.wait()  # each saves where it is
            raise
    rows = _report(workdir, keys, cells)
    failed = [cell for cell, done in zip(waiting, results, strict=True) if not done]
    if failed:
        listed = "\n".join(f"  - {cell.folder}/log.txt: {_last_words(cell.folder / 'log.txt')}" for cell in failed)
        raise CellsFailed(f"{len(failed)} of {len(cells)} cells failed:\n{listed}")
    return rows


def parse_grid(text: str) -> dict[str, list[str]]:
    """{"loss.clip": ["0", "0.1"], ...} of "loss.clip=0,0.1; train.seed=0,1". Commas in brackets do not separate.

    Raises SweepError for anything else, a key or a value that stands twice, or a key without values.
    """
    keys: dict[str, list[str]] = {}
    for part in filter(None, (p.strip() for p in re.split(r"[;\n]", text))):
        key, equals, listed = part.partition("=")
        key = key.strip().removeprefix("--").removeprefix("config.")
        values = [v.strip() for v in re.split(r",(?![^(\[]*[)\]])", listed)]
        if not equals or not key or not all(values):
            raise SweepError(f"--grid: {part!r} is not of the form key=value,value,...; keys are separated by ;")
        if key in keys:
            raise SweepError(f"--grid: {key} stands twice")
        if len(set(values)) < len(values):
            raise SweepError(f"--grid: a value of {key} stands twice in {listed.strip()!r}")
        keys[key] = values
    if not keys:
        raise SweepError("--grid is empty: write for example 'loss.clip=0,0.1; train.seed=0,1,2'")
    return keys


def _name(values: Mapping[str, str]) -> str:
    """A folder's name for a cell: the last words of the keys where these tell them apart, and the values."""
    last = [key.rpartition(".")[2] for key in values]
    short = last if len(set(last)) == len(last) else list(values)
    return ",".join(f"{k}={re.sub(r'[^A-Za-z0-9.+()-]', '_', v)}" for k, v in zip(short, values.values(), strict=True))


def _check(config: str, overrides: Sequence[str], cells: Sequence[Cell]) -> None:
    """Raises where a cell's config does not work, or its folder holds a run of another one."""
    names = [cell.folder.name for cell in cells]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise SweepError(f"--grid: different values give one folder, {sorted(twice)[0]!r}")
    for cell in cells:
        now = configs.load(config, [*overrides, *_overrides(cell)], workdir=cell.folder)
        stored = cell.folder / "config.json"
        changed = configs.differences(configs.from_json(stored.read_text()), now) if stored.is_file() else []
        if changed:
            listed = "\n".join(f"  - {c}" for c in changed)
            raise SweepError(
                f"{cell.folder} holds a run with another config; use another --workdir, or the same:\n{listed}"
            )


def _overrides(cell: Cell) -> list[str]:
    return [f"--config.{key}={value}" for key, value in cell.values.items()]


def _run(
    config: str, overrides: Sequence[str], cell: Cell, checkpoint: str, running: set[subprocess.Popen[bytes]]
) -> tuple[bool, float]:
    """Trains and scores a cell; whether it came to its end, and the seconds it took."""
    command = [sys.executable, "-m", "tcq", "train", f"--config={config}", f"--workdir={cell.folder}"]
    command += [f"--evaluate={checkpoint}", *overrides, *_overrides(cell)]
    cell.folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with open(cell.folder / "log.txt", "ab") as log:
        log.write((" ".join(command) + "\n").encode())
        log.flush()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=_environment(cell))
        running.add(process)
        code = process.wait()
        running.discard(process)
    seconds = time.monotonic() - start
    facts = _facts(cell)
    facts["seconds"] = facts.get("seconds", 0) + seconds  # of all attempts
    facts |= {"command": command[1:], "commit": _commit()}
    (cell.folder / "sweep.json").write_text(json.dumps(facts, indent=2) + "\n")
    return code == 0 and (cell.folder / "results.json").is_file(), seconds


def _environment(cell: Cell) -> dict[str, str]:
    """Cells share what was compiled."""
    folder = {"JAX_COMPILATION_CACHE_DIR": str((cell.folder.parent.parent / "compiled").resolve())}
    return {**folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5", **os.environ}


def _facts(cell: Cell) -> dict[str, Any]:
    path = cell.folder / "sweep.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _commit() -> str:
    """Of the checkout that this code lies in, with + where it was changed since; else the version of the package."""
    import tcq

    here = Path(tcq.__file__).resolve().parent
    git = ["git", "-C", str(here)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "--", "."], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return f"tcq {tcq.__version__}"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"


def _row(cell: Cell) -> dict[str, Any]:
    """What is known of a cell; None for what is not."""
    facts, path = _facts(cell), cell.folder / "results.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    scores, held_out, machine = (results.get(k, {}) for k in ("mAP", "validation", "machine"))
    measured = {
        "validation_mAP": held_out.get("mAP"),
        "test_mAP": scores.get("asymmetric"),
        "symmetric_mAP": scores.get("symmetric"),
        "float_mAP": scores.get("float"),
        **{k: held_out.get(k) for k in ("clip_precision", "clip_recall", "false_negative_rate")},
        "distinct_codes": results.get("distinct_codes"),
    }
    about = {
        "step": results.get("step"),
        "k": results.get("k"),
        "seconds": facts.get("seconds") and round(facts["seconds"], 1),
        "commit": facts.get("commit"),
        "machine": ", ".join(str(v) for v in machine.values()),
        "config": str(cell.folder / "config.json"),
    }
    return {**cell.values, **measured, **about}


def _report(workdir: Path, keys: Mapping[str, Sequence[str]], cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Writes table.csv (a row for each cell), table.md (also means over the seeds) and sweep.png."""
    rows = [_row(cell) for cell in cells]
    for name, write in (("table.csv", _write_csv), ("table.md", _write_markdown)):
        half = workdir / f"{name}.half"
        write(half, keys, rows)
        half.replace(workdir / name)
    groups = summary(keys, rows)
    if any(group["n"] for group in groups):
        others = [k for k in keys if k != SEED] or [SEED]
        x = max(others, key=lambda k: len(keys[k]))
        pictures.sweep(workdir / "sweep.png", groups, x=x, lines=[k for k in others if k != x])
    return rows


def summary(keys: Mapping[str, Sequence[str]], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each setting without its seed the number n of cells that are done, and mean and standard deviation of what was
    measured: {key: (mean, sd)}."""
    others = [k for k in keys if k != SEED] or [SEED]
    groups = []
    for values in itertools.product(*(keys[k] for k in others)):
        same = [r for r in rows if all(r[k] == v for k, v in zip(others, values, strict=True))]
        done = [r for r in same if r["test_mAP"] is not None]
        spread = {}
        for name in MEASURED:
            found = [r[name] for r in done if r[name] is not None]
            spread[name] = (float(np.mean(found)), float(np.std(found))) if found else None
        groups.append({**dict(zip(others, values, strict=True)), "n": len(done), **spread})
    return groups


def _write_csv(path: Path, keys: Mapping[str, Sequence[str]], rows: Sequence[Mapping[str, Any]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _write_markdown(path: Path, keys: Mapping[str, Sequence[str]], rows: Sequence[Mapping[str, Any]]) -> None:
    def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
        return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]

    def spread(value: tuple[float, float] | None) -> str:
        return "" if value is None else f"{value[0]:.4g} +- {value[1]:.2g}"

    def one(value: Any) -> str:
        return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)

    groups = summary(keys, rows)
    others = [k for k in groups[0] if k in keys]
    text = ["Mean and standard deviation over the seeds (n cells).", ""]
    text += table(
        [*others, "n", *MEASURED],
        [[*(g[k] for k in others), str(g["n"]), *(spread(g[m]) for m in MEASURED)] for g in groups],
    )
    text += ["", "Every cell.", "", *table(list(rows[0]), [[one(v) for v in row.values()] for row in rows])]
    path.write_text("\n".join(text) + "\n")
