import csv
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import small
from tcq import plots, sweep
from tcq.runtime import locks

GRID = "optim.learning_rate=1e-3,1e30; train.seed=0"
FLAGS = small.flags("optim.name=sgd", "optim.clip_norm=0", "loss.clip=0.1", "train.total_steps=6")


def test_a_grid_is_keys_and_values():
    text = " loss.clip = 0,0.1 ;--config.train.seed=0,1,2\n model.mean=(0.1,0.2,0.3),(0,0,0)"
    assert sweep.parse_grid(text) == {
        "loss.clip": ["0", "0.1"],
        "train.seed": ["0", "1", "2"],
        "model.mean": ["(0.1,0.2,0.3)", "(0,0,0)"],
    }


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("", "--grid is empty"),
        ("loss.clip", "'loss.clip' must have the form key=value,value"),
        ("loss.clip=0,,1", "'loss.clip=0,,1' must have the form"),
        ("loss.clip=0; loss.clip=1", "loss.clip is given twice"),
        ("loss.clip=0,1,0", "a value of loss.clip is given twice"),
        ("loss.clp=0,1", "--config.loss.clp is unknown: did you mean loss.clip?"),
        ("loss.clip_scope=anchor; loss.clip=0.0001,0", "is less than one of the 254 negatives of an anchor"),
        ("loss.entropy_weight=inf", "loss.entropy_weight inf must be a finite number"),
        ("loss.clip=0,9999", "loss.clip 9999 must be from 0 to 253"),
        ("data.source=folder:/a_b,folder:/a/b", "different values give the same folder 'source=folder__a_b'"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(grid, message, tmp_path):
    done = small.main("sweep", "--config=configs/digits.py", f"--grid={grid}", f"--workdir={tmp_path / 'sweep'}")
    small.assert_refused(done, message)
    assert not (tmp_path / "sweep").exists()


def test_images_without_labels_are_refused_before_anything_runs(images, tmp_path):
    shutil.copytree(images / "class 3", tmp_path / "images")
    flags = f"--config=configs/folder.py:{tmp_path / 'images'}", *small.flags("data.image_size=8", "data.batch_size=4")
    done = small.main("sweep", *flags, "--grid=loss.clip=0,1", f"--workdir={tmp_path / 'sweep'}")
    small.assert_refused(done, "has no labels, so no cell could be scored")
    assert not (tmp_path / "sweep").exists()


def test_means_are_over_the_seeds_that_are_done():
    keys = {"loss.clip": ["0", "5"], "train.seed": ["0", "1", "2"]}
    blank = dict.fromkeys(sweep.MEASURED)
    scores = {("0", "0"): 0.5, ("0", "1"): 0.7, ("5", "2"): 0.9}
    rows = [
        {**blank, "loss.clip": c, "train.seed": s, "test_mAP": scores.get((c, s))}
        for c in keys["loss.clip"]
        for s in keys["train.seed"]
    ]
    none, some = sweep.summary(keys, rows)
    assert (none["loss.clip"], none["n"], some["n"]) == ("0", 2, 1)
    np.testing.assert_allclose(none["test_mAP"], (0.6, 0.1))
    assert some["test_mAP"] == (0.9, 0.0) and some["clip_recall"] is None
    assert "| 0.6 +- 0.1 |" in sweep._markdown(keys, rows, [none, some])
    assert "| 0.9 |" in sweep._markdown(keys, rows, [none, some])  # one seed has no deviation


@pytest.mark.parametrize("axes", ["a.c", "a.b,a.b", "a.b,x.d,a.b", "train.seed"])
def test_axes_are_keys_of_the_grid(axes):
    keys = {"a.b": ["0", "1"], "x.d": ["0"], "train.seed": ["0", "1"]}
    with pytest.raises(sweep.SweepError, match="must be one or two of the keys of the grid: a.b, x.d"):
        sweep._axes(axes.split(","), keys)
    assert sweep._axes(["--config.a.b", "x.d"], keys) == ["a.b", "x.d"]


@pytest.mark.parametrize(
    ("axes", "x", "drawn", "panels"),
    [
        ([], "loss.temperature", 4, 1),  # all others are lines
        (["loss.clip"], "loss.clip", 6, 1),
        (["loss.clip", "loss.temperature"], "loss.clip", 3, 2),
    ],
)
def test_the_plot_has_the_axes_that_were_asked_for(tmp_path, monkeypatch, axes, x, drawn, panels):
    keys = {"loss.clip": ["0", "5"], "loss.temperature": ["0.1", "0.2", "0.3"], "loss.clip_scope": ["anchor", "batch"]}
    cells = []
    for number, values in enumerate(itertools.product(*keys.values())):
        folder = tmp_path / "cells" / str(number)
        folder.mkdir(parents=True)
        results = {"mAP": {"asymmetric": number / 12}, "validation": {"mAP": number / 24}}
        (folder / "results.json").write_text(json.dumps(results))
        cells.append(sweep.Cell(dict(zip(keys, values, strict=True)), folder))
    figures = []
    monkeypatch.setattr(plots, "_figure", lambda *size: figures.append(Figure(figsize=size)) or figures[-1])
    sweep._report(sweep.Grid("", [], "best", keys, cells, tmp_path, axes))
    shown = figures[0].axes
    assert len(shown) == 2 * panels and {axis.get_xlabel() for axis in shown} == {x}
    assert all(len(axis.containers) == drawn for axis in shown)
    heights = sorted(y for axis in shown[1::2] for line in axis.containers for y in line[0].get_ydata())
    np.testing.assert_allclose(heights, np.arange(12) / 12)


@pytest.mark.whole
def test_cells_that_are_done_stay_and_those_that_fail_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "EVERY", 0.0)
    workdir = tmp_path / "sweep"

    def run(grid=GRID, *more):
        return small.main(
            "sweep", "--config=configs/digits.py", f"--grid={grid}", f"--workdir={workdir}", "--jobs=2", *FLAGS, *more
        )

    done = run()
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "1 of 2 cells failed" in done.stderr and "learning_rate=1e30,seed=0/log.txt: tcq train:" in done.stderr
    shown = re.findall(r"^\d\d:\d\d:\d\d learning_rate=1e-3,seed=0: (.*)", done.stderr, re.MULTILINE)
    assert len(shown) > 3 and not any(re.match(r"\d\d:", line) for line in shown), done.stderr
    assert all(a != b for a, b in itertools.pairwise(shown))
    assert "2 cells, 0 of them done" in done.stderr and "0:00:00 left" in done.stderr
    with open(workdir / "table.csv") as file:
        good, bad = csv.DictReader(file)
    assert (good["optim.learning_rate"], good["train.seed"], good["step"]) == ("1e-3", "0", "6")
    results = json.loads((workdir / "cells" / "learning_rate=1e-3,seed=0" / "results.json").read_text())
    assert float(good["test_mAP"]) == results["mAP"]["asymmetric"]
    assert float(good["validation_mAP"]) == results["validation"]["mAP"]
    assert 0 < float(good["clip_precision"]) < 1 and float(good["seconds"]) > 1 and good["commit"] and good["machine"]
    assert bad["test_mAP"] == "" and float(bad["seconds"]) > 1
    assert "| 1e-3 | 1 | " in (workdir / "table.md").read_text()
    with Image.open(workdir / "sweep.png") as picture:
        assert min(picture.size) > 200

    damaged = workdir / "cells" / "learning_rate=1e-3,seed=0" / "sweep.json"
    whole = damaged.read_text()
    with locks.lock(workdir, wait=False):
        small.assert_refused(run(), "is in use by process")
    before = (workdir / "cells" / "learning_rate=1e-3,seed=0" / "results.json").stat().st_mtime_ns
    again = run("optim.learning_rate=1e-3; train.seed=0")
    assert again.returncode == 0 and "1 cells, 1 of them done" in again.stderr, again.stderr
    assert (workdir / "cells" / "learning_rate=1e-3,seed=0" / "results.json").stat().st_mtime_ns == before
    damaged.write_text(whole[:9])
    assert "1 cells, 1 of them done" in run("optim.learning_rate=1e-3; train.seed=0").stderr
    damaged.write_text(whole)
    latest = run("optim.learning_rate=1e-3; train.seed=0", "--checkpoint=latest")
    assert latest.returncode == 0 and "1 cells, 0 of them done" in latest.stderr, latest.stderr
    results = workdir / "cells" / "learning_rate=1e-3,seed=0" / "results.json"
    results.write_text("{}")
    assert "1 cells, 0 of them done" in run("optim.learning_rate=1e-3; train.seed=0", "--checkpoint=latest").stderr
    small.assert_refused(run(GRID, "--checkpoint=bset"), "must be best, latest, or the number of a step")
    other = run(GRID, "--config.train.total_steps=7")
    assert other.returncode == 2 and "train.total_steps: 6 stored, 7 given" in other.stderr, other.stderr


@pytest.mark.whole
def test_a_sweep_that_is_stopped_goes_on_within_its_cell(tmp_path):
    workdir, cell = tmp_path / "sweep", tmp_path / "sweep" / "cells" / "seed=0"
    more = "--config.train.total_steps=400", "--config.checkpoint.every_steps=400"
    command = small.command("sweep", "--config=configs/digits.py", "--grid=train.seed=0", f"--workdir={workdir}")
    process = subprocess.Popen(
        [*command, *FLAGS, *more], env=small.environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while process.poll() is None and "train/loss" not in text(cell / "metrics.jsonl"):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)  # as `timeout` and Ctrl-C, which reach the cell, too
    assert process.wait(60) == 128 + signal.SIGTERM
    output = process.stderr.read()
    process.stderr.close()
    assert "stopped by SIGTERM" in output and "failed" not in output, output
    assert not (cell / "results.json").exists()
    done = small.main(*command[3:], *FLAGS, *more)
    assert done.returncode == 0 and (cell / "results.json").exists(), done.stderr
    assert re.search(r"resuming from step [1-9]", text(cell / "log.txt"))


def text(path):
    return path.read_text() if path.exists() else ""
