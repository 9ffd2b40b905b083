"""Whole runs: what they leave in the workdir, and what a workdir refuses."""

import json
import random
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

import small
from tcq import config as configs
from tcq import encode, evaluate, train
from tcq import workdir as workdirs
from tcq.data import protocols
from tcq.evaluate import held_out
from tcq.workdir import checkpoint
from write_images import write_images


def assert_same_bits(a, b):
    leaves = (jax.tree.leaves(encode.load(workdir, which="latest").variables) for workdir in (a, b))
    for x, y in zip(*leaves, strict=True):
        np.testing.assert_array_equal(x, y)


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_leaves_everything_and_the_best_beside_the_newest(digits_run):
    lines = records(digits_run)
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 13))
    validations = [line for line in lines if "validation/mAP" in line]
    assert [line["step"] for line in validations] == [6, 12]
    for key in ("loss", "accuracy", "codeword_usage", "positive_similarity", "negative_similarity", "clip_similarity"):
        assert np.isfinite([line[f"train/{key}"] for line in lines if "train/loss" in line]).all(), key
    names = {"mAP", "loss", "clip_precision", "clip_recall", "false_negative_rate"}
    assert {f"validation/{name}" for name in names} <= validations[-1].keys()
    assert 0.05 < validations[-1]["validation/false_negative_rate"] < 0.15
    assert list((digits_run / "tensorboard").iterdir())
    assert configs.from_json((digits_run / "config.json").read_text()).to_dict() == small.shared().to_dict()
    assert encode.load(digits_run, which="latest").step == 12
    scores = {line["step"]: line["validation/mAP"] for line in validations}
    assert encode.load(digits_run).step == max(scores, key=scores.get)


@pytest.mark.whole
def test_nothing_is_compiled_after_the_first_validation(tmp_path, monkeypatch):
    compiled, after = [], []
    real = held_out.validate

    def validate(*arguments):
        values = real(*arguments)
        after.append(len(compiled))
        return values

    monkeypatch.setattr(held_out, "validate", validate)

    def listen(event, seconds, **_):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        train.train(small.config("quantizer.num_codebooks=3", "train.compare_every_steps=4"), tmp_path)  # new shapes
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(after) == 2 and after[0] == after[1] > 0


def test_resuming_gives_the_bits_of_an_uninterrupted_run(digits_run, tmp_path, logs):
    """After kill -9 in step 8: the checkpoint of step 6 is the newest, the lines of two more steps are written."""
    shutil.copytree(digits_run, tmp_path / "killed")
    for step in (9, 12):
        shutil.rmtree(tmp_path / "killed" / checkpoint.FOLDER / str(step))
    lines = [x for x in (digits_run / "metrics.jsonl").read_text().splitlines() if json.loads(x)["step"] <= 8]
    (tmp_path / "killed" / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 9, "tra')
    train.train(small.shared(), tmp_path / "killed")
    assert "resuming from step 6 of 12" in logs.text
    assert_same_bits(digits_run, tmp_path / "killed")
    steps = [[(line["step"], line.get("train/loss")) for line in records(w)] for w in (digits_run, tmp_path / "killed")]
    assert steps[0] == steps[1]


def test_training_a_complete_run_again_changes_nothing(digits_run, tmp_path):
    shutil.copytree(digits_run, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    values = train.train(small.shared(), tmp_path / "run")
    last = {k: v for line in records(tmp_path / "run") for k, v in line.items() if k.startswith("validation/")}
    assert last and values == {k.removeprefix("validation/"): v for k, v in last.items()}
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    assert_same_bits(digits_run, tmp_path / "run")


def test_another_config_is_refused(digits_run):
    with pytest.raises(configs.ConfigError, match=r"another config(.|\n)*loss.temperature: 0.5 stored, 0.3 given"):
        train.train(small.shared("loss.temperature=0.3"), digits_run)


@pytest.mark.whole
def test_changes_are_recorded_where_they_are_allowed(digits_run, tmp_path, logs):
    shutil.copytree(digits_run, tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(checkpoint.CheckpointError, match="does not fit the model"):
        train.train(small.shared("model.width=24"), tmp_path / "run", allow_changes=True)
    assert (tmp_path / "run" / "config.json").read_text() == before
    assert not (tmp_path / "run" / "changes.jsonl").exists()
    longer = small.shared("train.total_steps=14", "eval.every_steps=0")
    with pytest.raises(configs.ConfigError, match="or --allow_changes"):
        train.train(longer, tmp_path / "run")
    train.train(longer, tmp_path / "run", allow_changes=True)
    assert "the config has changed:\n  - eval.every_steps: 6 stored, 0 given" in logs.text
    assert encode.load(tmp_path / "run", which="latest").step == 14
    assert workdirs.read_config(tmp_path / "run").train.total_steps == 14
    changes = [json.loads(line)["changes"] for line in (tmp_path / "run" / "changes.jsonl").read_text().splitlines()]
    assert len(changes) == 1 and any("train.total_steps" in c for c in changes[0])


class TestFolder:
    """A run on images in a folder, some of which are added, missing or not images."""

    CONFIG = ("data.batch_size=8", "train.total_steps=3", "eval.every_steps=0")

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory):
        root = tmp_path_factory.mktemp("folder")
        write_images(root / "images", [f"{c}/{i:02}.png" for c in "ab" for i in range(12)])
        (root / "images" / "a" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        train.train(small.config(f"data.source=folder:{root / 'images'}", *cls.CONFIG), root / "run")
        return root

    def test_skipped_files_are_listed(self, folder):
        skipped = [json.loads(x) for x in (folder / "run" / "skipped.jsonl").read_text().splitlines()]
        assert [s["path"] for s in skipped] == ["a/broken.png"]

    def test_images_that_changed_are_refused(self, folder):
        added = folder / "images" / "a" / "new.png"
        write_images(folder / "images", ["a/new.png"])
        c = small.config(f"data.source=folder:{folder / 'images'}", *self.CONFIG)
        try:
            for job in (lambda: train.train(c, folder / "run"), lambda: evaluate.evaluate(folder / "run")):
                with pytest.raises(protocols.ProtocolError, match="have changed since this run began: 24 then, 25 now"):
                    job()
        finally:
            added.unlink()

    def test_another_split_of_the_same_images_is_no_change_of_images(self, folder):
        c = small.config(f"data.source=folder:{folder / 'images'}", *self.CONFIG, "data.split_seed=3")
        with pytest.raises(protocols.ProtocolError, match="are those of this run, but their split has changed"):
            train.train(c, folder / "run", allow_changes=True)

    @pytest.mark.whole
    def test_no_labels_and_no_validation(self, folder):
        flags = [f"data.source=folder:{folder / 'images' / 'a'}", *self.CONFIG, "data.query=0"]
        values = train.train(small.config(*flags, "data.validation=0.2"), folder / "unlabelled")
        assert "mAP" not in values and "loss" in values
        assert train.train(small.config(*flags, "data.validation=0"), folder / "alone") == {}
        assert encode.load(folder / "alone").step == 3


def train_and_kill(workdir, flags, devices, kill_after):
    """Trains in a process that gets SIGKILL some seconds after its first new checkpoint; its exit status."""
    process = subprocess.Popen(
        small.command("train", "--config=configs/digits.py", f"--workdir={workdir}", *flags),
        env=small.environment(devices),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    folder = workdir / checkpoint.FOLDER
    before = set(folder.iterdir()) if folder.exists() else set()
    while process.poll() is None:
        if folder.exists() and {p for p in folder.iterdir() if p.name.isdecimal()} - before:
            time.sleep(kill_after)
            process.kill()
            break
        time.sleep(0.01)
    return process.wait(300)


KILLED = ("train.log_every_steps=50", "checkpoint.every_steps=20", "eval.every_steps=0")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("devices", [1, 8])
def test_kill_9_twenty_times(tmp_path, devices):
    flags = small.flags(*KILLED, "train.total_steps=10000")
    chance = random.Random(devices)
    codes = [train_and_kill(tmp_path / "killed", flags, devices, chance.uniform(0, 0.3)) for _ in range(20)]
    assert codes.count(-signal.SIGKILL) > 10 and set(codes) <= {0, -signal.SIGKILL}
    for name in ("killed", "whole"):
        done = small.tcq("train", "--config=configs/digits.py", f"--workdir={tmp_path / name}", *flags, devices=devices)
        assert done.returncode == 0, done.stderr
    assert_same_bits(tmp_path / "whole", tmp_path / "killed")
