"""Corrupted checkpoints are never used, and nothing is lost when one is replaced."""

import json
import random
import re
import shutil

import jax
import numpy as np
import pytest

import small
from tcq import encode, train
from tcq.runtime import signals
from tcq.workdir import checkpoint

# By Orbax, about reads beside the one that failed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def files(folder):
    """All files but a few that Orbax can do without."""
    return [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size > 200 and "metrics" not in p.parts]


def flip(folder, chance):
    """Flips one random bit in the files of a folder."""
    candidates = sorted(files(folder))
    path = chance.choices(candidates, [p.stat().st_size for p in candidates])[0]
    data = bytearray(path.read_bytes())
    place = chance.randrange(len(data))
    data[place] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


@pytest.fixture
def copy(digits_run, tmp_path):
    return shutil.copytree(digits_run, tmp_path / "run")


@pytest.mark.parametrize("flips", [10, pytest.param(300, marks=pytest.mark.slow)])
def test_flipped_bits_never_give_other_numbers(digits_run, tmp_path, logs, flips):
    want = encode.load(digits_run, which="12").variables
    chance, noticed = random.Random(flips), 0
    for i in range(flips):
        run = shutil.copytree(digits_run, tmp_path / "run")
        flip(run / checkpoint.FOLDER / "12" / "variables", chance)
        logs.clear()
        loaded = encode.load(run, which="latest")
        if loaded.step == 12:  # a bit that nothing depends on, such as a timestamp
            jax.tree.map(np.testing.assert_array_equal, loaded.variables, want)
        else:
            noticed += 1
            assert loaded.step == 9
            assert re.search(r"corrupted: checkpoint 12 (.|\n)*falling back to checkpoint 9", logs.text), i
            with pytest.raises(checkpoint.CorruptedError, match="checkpoint 12 "):
                encode.load(run, which="12")
        shutil.rmtree(run)
    assert noticed > (flips / 3 if flips > 100 else 0)  # of ten, three or fewer are noticed in one run of twenty or so


def test_training_resumes_from_the_last_intact_one(digits_run, copy, logs):
    for step in (12, 9):
        for file in files(copy / checkpoint.FOLDER / str(step) / "training"):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    train.train(small.shared(), copy)
    assert logs.text.count("corrupted: ") == 2
    assert "falling back to checkpoint 6" in logs.text and "resuming from step 6 of 12" in logs.text
    again, want = (encode.load(w, which="12").variables for w in (copy, digits_run))
    jax.tree.map(np.testing.assert_array_equal, again, want)
    corrupted = copy / f"{checkpoint.FOLDER}_{checkpoint.CORRUPTED}"
    names = sorted(p.name.partition("-")[0] for p in corrupted.iterdir())
    assert names == ["12", "9", "README"]  # nothing is deleted
    steps = [json.loads(line)["step"] for line in (copy / "metrics.jsonl").read_text().splitlines()]
    assert [s for s in range(1, 13) if s not in steps] == []


def test_a_signal_while_it_is_read_moves_nothing(copy, monkeypatch):
    real = checkpoint.restore

    def signalled(*arguments):
        signals.handle(15, None)
        return real(*arguments)

    monkeypatch.setattr(checkpoint, "restore", signalled)
    with pytest.raises(signals.Stopped):
        train.train(small.shared(), copy)
    assert (copy / checkpoint.FOLDER / "12").is_dir()
    assert not (copy / f"{checkpoint.FOLDER}_{checkpoint.CORRUPTED}").exists()


def test_an_incomplete_replacement_is_undone(copy, logs):
    replaced = copy / f"{checkpoint.FOLDER}_{checkpoint.REPLACED}"
    replaced.mkdir()
    (copy / checkpoint.FOLDER / "12").rename(replaced / "12")
    train.train(small.shared(), copy)
    assert "resuming from step 12 of 12" in logs.text
    assert encode.load(copy, which="latest").step == 12 and not replaced.exists()


def test_without_an_intact_one_nothing_is_loaded(copy):
    for file in files(copy / checkpoint.FOLDER):
        file.write_bytes(b"")
    with pytest.raises(checkpoint.CorruptedError, match=r"checkpoint 12(.|\n)*checkpoint 6"):
        encode.load(copy, which="latest")


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    manager = checkpoint.open_manager(tmp_path, writable=True)
    tree = {"variables": {"a": np.array([1.0, np.nan], "f4")}}
    with pytest.raises(checkpoint.CheckpointError, match=r"variables\['a'\] is not finite at step 3: not saved"):
        checkpoint.save(manager, 3, tree, score=None)
    assert manager.all_steps() == []
    manager.close()


def test_other_shapes_and_steps_are_named(digits_run):
    manager = checkpoint.open_manager(digits_run)
    with pytest.raises(checkpoint.CheckpointError, match=r"'7' not found in .*: use latest, best or one of 6, 9, 12"):
        checkpoint.candidates(manager, "7")
    like = {"training": {"step": np.zeros(3)}}
    with pytest.raises(checkpoint.CheckpointError, match=r"training\['step'\]: \(\), must be \(3,\)"):
        checkpoint.restore(manager, 12, like)
    with pytest.raises(checkpoint.CheckpointError, match="lacks weights: it is incomplete"):
        checkpoint.restore(manager, 12, {"weights": {}})
    manager.close()
