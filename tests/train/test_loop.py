"""What can happen between steps: signals, numbers that are not finite, devices that differ, traces."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

import small
from tcq import encode, train
from tcq.runtime import devices, signals
from tcq.train import loop, run
from tcq.workdir import checkpoint


def assert_same_run(workdir, other):
    a, b = (encode.load(w, which="latest") for w in (workdir, other))
    assert a.step == b.step
    jax.tree.map(np.testing.assert_array_equal, a.variables, b.variables)
    lines = [[json.loads(x) for x in (w / "metrics.jsonl").read_text().splitlines()] for w in (workdir, other)]
    without = [[{k: v for k, v in line.items() if not k.startswith("speed/")} for line in part] for part in lines]
    assert without[0] == without[1]
    assert encode.load(workdir).step == encode.load(other).step  # the best


@pytest.mark.parametrize(
    ("text", "saved"),
    [
        ("step 5/12", 6),  # step 6 tells all processes, and its logs are read at once because it is saved anyway
        ("step 9/12", 11),  # step 10 tells all processes, and its logs are read after step 11
    ],
)
@pytest.mark.whole
def test_a_signal_stops_after_a_step_that_is_saved_and_the_run_resumes(digits_run, tmp_path, logs, text, saved):
    with small.signal_at(text), pytest.raises(signals.Stopped, match=rf"after step {saved}, which is saved") as stopped:
        train.train(small.shared(), tmp_path)
    assert stopped.value.status == 143 and encode.load(tmp_path, which="latest").step == saved
    train.train(small.shared(), tmp_path)
    assert f"resuming from step {saved} of 12" in logs.text
    assert_same_run(tmp_path, digits_run)


@pytest.mark.whole
def test_a_validation_that_was_interrupted_is_repeated(digits_run, tmp_path, monkeypatch, logs):
    real = devices.map_in_batches

    def interrupted(*arguments):
        if "step 6/12  loss" in logs.text:
            signals.request("SIGTERM")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(devices, "map_in_batches", interrupted)
        with pytest.raises(signals.Stopped, match="after step 6, which is saved"):
            train.train(small.shared(), tmp_path)
    signals.reset()
    assert "step 6/12  validation" not in logs.text
    assert encode.load(tmp_path, which="latest").step == 6
    train.train(small.shared(), tmp_path)
    assert logs.text.index("step 6/12  validation") < logs.text.index("step 7/12")
    assert_same_run(tmp_path, digits_run)


@pytest.mark.whole
def test_too_many_steps_that_are_not_finite_roll_back_once_and_then_stop(tmp_path, logs):
    flags = ("optim.name=sgd", "optim.clip_norm=0", "optim.warmup_steps=8", "train.max_skipped=2", "eval.every_steps=0")
    c = small.config(*flags, "optim.learning_rate=1e30", "checkpoint.every_steps=1", "train.total_steps=40")
    with pytest.raises(loop.TrainError) as error:
        train.train(c, tmp_path)
    assert re.search(
        r"loss is (nan|inf) at step \d+, the last of 2 consecutive steps that were not finite: failed again after the "
        r"rollback; checkpoint \d+ is intact: a lower optim.learning_rate",
        str(error.value),
    )
    assert logs.text.count("step skipped, nothing changed (1 skipped in all, 1 in a row)") == 2
    assert logs.text.count("rolling back to the last checkpoint (one retry)") == 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(encode.load(tmp_path, which="latest").variables))


def test_a_run_without_a_finite_step_saves_nothing(tmp_path):
    flags = ("optim.name=sgd", "optim.clip_norm=0", "optim.warmup_steps=0", "train.max_skipped=2", "eval.every_steps=0")
    c = small.config(*flags, "optim.learning_rate=1e38", "checkpoint.every_steps=2", "train.total_steps=40")
    with pytest.raises(train.TrainError, match="there is no checkpoint to roll back to"):
        train.train(c, tmp_path)
    assert checkpoint.open_manager(tmp_path).all_steps() == []


def test_a_device_with_other_bits_is_named():
    _, _, start = small.first_step(small.config())
    state = devices.replicate(start)
    loop.compare_replicas(7, state)
    kernel = state.params["projection"]["kernel"]
    for place in ((0, 0), (3, 5)):
        copies = [np.array(s.data) for s in kernel.addressable_shards]
        bits = copies[5].view(np.uint32)
        bits[place] ^= 1  # the lowest
        shards = [jax.device_put(x, s.device) for x, s in zip(copies, kernel.addressable_shards, strict=True)]
        changed = jax.make_array_from_single_device_arrays(kernel.shape, kernel.sharding, shards)
        params = {**state.params, "projection": {**state.params["projection"], "kernel": changed}}
        device = kernel.addressable_shards[5].device.id
        message = rf"at step 7 the state on device {device} \(cpu of process 0\) differs"
        with pytest.raises(loop.TrainError, match=message):
            loop.compare_replicas(7, state._replace(params=params))


@pytest.mark.whole
def test_replicas_are_compared_after_the_first_step_and_regularly(digits_run, tmp_path, monkeypatch):
    compared = []
    monkeypatch.setattr(loop, "compare_replicas", lambda step, state: compared.append(step))
    shutil.copytree(digits_run, tmp_path / "run")
    for step in (9, 12):
        shutil.rmtree(tmp_path / "run" / checkpoint.FOLDER / str(step))
    train.train(small.shared("train.compare_every_steps=4"), tmp_path / "run")
    assert compared == [7, 8, 12]


@pytest.mark.whole
def test_images_on_the_devices_and_a_stream_of_them_give_the_same_bits(digits_run, tmp_path, logs):
    train.train(small.shared("data.resident=0"), tmp_path)
    assert "the training images are on every device" not in logs.text
    assert "collapsed" not in logs.text
    assert_same_run(tmp_path, digits_run)


def test_events_are_due_at_their_steps():
    c = small.config("train.log_every_steps=2", "eval.every_steps=5", "checkpoint.every_steps=4")
    due = {step: loop.events(c, 11, step) for step in range(1, 12)}
    assert [s for s, e in due.items() if e.log] == [2, 4, 6, 8, 10, 11]
    assert [s for s, e in due.items() if e.validate] == [5, 10, 11]
    assert [s for s, e in due.items() if e.save] == [4, 5, 8, 10, 11]
    assert [s for s, e in due.items() if e.last] == [11]
    c = small.config("eval.every_steps=0")
    assert [s for s in range(1, 12) if loop.events(c, 11, s).validate] == [11]


def test_a_checkpoint_holds_the_whole_state():
    _, _, start = small.first_step(small.shared())
    again = loop.from_items(loop.items(start))
    assert jax.tree.structure(again) == jax.tree.structure(start)
    jax.tree.map(np.testing.assert_array_equal, again, start)


@pytest.mark.whole
@pytest.mark.parametrize(("first", "stop"), [(2, 20), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_a_trace_starts_and_ends_with_its_steps(digits_run, tmp_path, logs, first, stop):
    shutil.copytree(digits_run, tmp_path / "run")
    longer = small.shared("train.total_steps=14", "eval.every_steps=0")
    train.train(longer, tmp_path / "run", profile=(12 + first, 12 + stop), allow_changes=True)
    assert logs.text.count("trace: ") == 1
    assert len(list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))) == 1


def test_a_bad_range_of_a_trace_is_refused(tmp_path):
    done = small.main("train", "--config=configs/digits.py", f"--workdir={tmp_path}", "--profile=6:3")
    assert done.returncode == 2 and "must have the form 10:20" in done.stderr


def test_a_warmup_that_does_not_fit_is_logged(tmp_path, logs):
    c = small.config("train.total_steps=10", "optim.warmup_steps=100", "eval.every_steps=0")
    source, split = run.read_data(c, tmp_path, tmp_path, allow_changes=False)
    _, _, start = small.first_step(c)
    run.log_start(c, source, split, start)
    assert "optim.warmup_steps 100 does not fit a run of 10 steps and is reduced to 1" in logs.text


@pytest.mark.whole
def test_a_collapsed_codebook_is_a_warning(tmp_path, logs):
    train.train(small.config("train.total_steps=10", "eval.every_steps=0", "optim.learning_rate=1.0"), tmp_path)
    assert logs.text.count("a codebook has collapsed: images use 1.") == 1
