"""SIGTERM and SIGINT at any phase: the state is saved, the process ends soon, and the same command goes on."""

import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter

import jax
import numpy as np
import pytest
from PIL import Image

import small
from tcq import encode
from tcq import index as indexes
from tcq.data.images import decode
from tcq.runtime import signals
from tcq.workdir import checkpoint

FLAGS = small.small_flags("train.total_steps=40", "eval.every_steps=10", "checkpoint.every_steps=15", "loss.queue=8")


def start(workdir, *more, command="train"):
    arguments = [command, "--config=configs/digits.py", f"--workdir={workdir}", *FLAGS, *more]
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(small.command(*arguments), env=small.environment(), **options)


def stop_when(process, text, number, delay=0.0):
    """Sends the signal that long after a line with this text; what was said, and the seconds that it then took."""
    said, asked = [], []

    def ask():
        time.sleep(delay)
        asked.append(time.monotonic())
        process.send_signal(number)

    for line in process.stderr:
        said.append(line)
        if text in line and not asked:
            threading.Thread(target=ask).start()
    process.wait(60)
    process.stderr.close()
    return "".join(said), time.monotonic() - asked[0] if asked else None


def logged(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("speed/")} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    said, _ = stop_when(start(workdir), "never", signal.SIGTERM)
    assert encode.load(workdir, which="latest").step == 40, said
    return workdir


def assert_the_same_run(workdir, whole):
    a, b = (encode.load(w, which="latest") for w in (workdir, whole))
    assert a.step == b.step == 40
    jax.tree.map(np.testing.assert_array_equal, a.variables, b.variables)
    assert logged(workdir) == logged(whole)
    assert encode.load(workdir).step == encode.load(whole).step  # the best


@pytest.mark.parametrize(
    ("phase", "text", "delay"),
    [
        pytest.param("start-up", "300 query", 0.0, marks=pytest.mark.slow),
        ("compile", "the first compiles", 0.3),
        ("train", "step 23/40", 0.0),
        pytest.param("validation", "step 20/40  loss", 0.0, marks=pytest.mark.slow),
        pytest.param("validation", "step 40/40  loss", 0.01, marks=pytest.mark.slow),
        pytest.param("saving", "step 15/40", 0.0, marks=pytest.mark.slow),
    ],
)
def test_any_phase(tmp_path, whole, phase, text, delay):
    number = signal.SIGINT if phase == "train" else signal.SIGTERM
    process = start(tmp_path)
    said, seconds = stop_when(process, text, number, delay)
    assert process.returncode in (128 + number, 0), said  # 0: it was done already
    assert seconds < 30 and "Traceback" not in said, said
    if process.returncode and "is saved" in said:
        saved = int(said.rpartition(" after step ")[2].split(",")[0])
        assert encode.load(tmp_path, which="latest").step == saved
    elif process.returncode:
        assert phase in ("start-up", "compile"), said
    again, _ = stop_when(start(tmp_path), "never", number)
    assert "Traceback" not in again
    assert_the_same_run(tmp_path, whole)


def test_validation_that_was_cut_off_is_made_up_for(tmp_path, whole):
    """A validation that takes long: by images encoded one at a time."""
    process = start(tmp_path, "--config.eval.batch_size=1")
    said, seconds = stop_when(process, "step 10/40  loss", signal.SIGTERM, 0.05)
    assert process.returncode == 128 + signal.SIGTERM and seconds < 30, said
    assert "after step 10, which is saved" in said and "step 10/40  validation" not in said, said
    again, _ = stop_when(start(tmp_path), "never", signal.SIGTERM)
    assert again.index("step 10/40  validation") < again.index("step 11/40")
    assert_the_same_run(tmp_path, whole)


def test_insisting_is_at_once_and_a_signal_that_comes_twice_is_one(monkeypatch):
    monkeypatch.setattr(signals, "_asked", [])
    monkeypatch.setattr(signals, "_received", [])
    monkeypatch.setattr(signals, "INSIST", 0.3)
    with signals.deferred():
        signals.ask("SIGTERM")  # of another process, which is no signal to this one
        signals._handle(signal.SIGINT, None)
        signals._handle(signal.SIGINT, None)
        time.sleep(0.4)
        with pytest.raises(KeyboardInterrupt):
            signals._handle(signal.SIGINT, None)


def test_other_commands_stop_and_leave_nothing_behind(run, images, tmp_path):
    out = tmp_path / "index"
    command = small.command("index", f"--workdir={run}", f"--images={images}", f"--out={out}")
    process = subprocess.Popen(command, env=small.environment(), stderr=subprocess.PIPE, text=True)
    time.sleep(1.5)  # it is importing, restoring or encoding
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode in (143, -15, 0), said
    if process.returncode and out.exists():  # it came when all was done
        assert len(indexes.open_index(out).paths) == 120
    elif process.returncode:
        assert list(tmp_path.iterdir()) == []


def test_what_does_not_come_to_a_point_is_ended(tmp_path):
    code = (
        "import time; from tcq import signals; signals.GRACE = 1.0; signals.install()\n"
        "with signals.deferred():\n"
        "    print('ready', flush=True)\n"
        "    while True: time.sleep(0.1)"
    )
    process = subprocess.Popen(
        [small.command()[0], "-c", code],
        env=small.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 143 and "SIGTERM: not at a point to stop at within 1 s" in said


def in_a_finalizer(send):
    class Forgets:
        def __del__(self):
            send()

    [Forgets()].clear()
    time.sleep(5)


def in_a_callback(send):
    async def wait():
        asyncio.get_running_loop().call_soon(send)
        await asyncio.sleep(5)

    asyncio.run(wait())


@pytest.mark.parametrize("forget", [in_a_finalizer, in_a_callback])
def test_where_python_would_forget_it_comes_again(monkeypatch, forget):
    monkeypatch.setattr(signals, "_asked", [])
    monkeypatch.setattr(signals, "_received", [])
    before = signal.signal(signal.SIGUSR1, signals._handle)
    start = time.monotonic()
    with pytest.raises(signals.Stopped):
        forget(lambda: signal.raise_signal(signal.SIGUSR1))
    assert time.monotonic() - start < 3
    signal.signal(signal.SIGUSR1, before)


def test_what_forgives_errors_does_not_forgive_it(images, tmp_path, monkeypatch):
    """An image that is being decoded is not a damaged one, nor is a checkpoint that is being read."""
    monkeypatch.setattr(signals, "_asked", [])
    monkeypatch.setattr(Image, "open", lambda *_, **__: signals._handle(signal.SIGTERM, None))
    monkeypatch.setattr(signals, "_received", [])
    with pytest.raises(signals.Stopped):
        decode(images / "class 3" / "003.png", size=8)
    monkeypatch.setattr(signals, "_received", [])
    manager = checkpoint.open_manager(tmp_path, writable=True)
    checkpoint.save(manager, 3, {"variables": {"a": np.ones(2)}}, score=None)
    manager.wait_until_finished()
    monkeypatch.setattr(manager, "restore", lambda *_, **__: signals._handle(signal.SIGTERM, None))
    with pytest.raises(signals.Stopped):
        checkpoint.restore(manager, 3, {"variables": {"a": np.ones(2)}})
    manager.close()


def test_stopped_outside_of_what_looks_by_itself(monkeypatch):
    monkeypatch.setattr(signals, "_asked", [])
    monkeypatch.setattr(signals, "_received", [])
    with signals.deferred():
        signals._handle(signal.SIGTERM, None)
        assert signals.asked() == "SIGTERM"
    with pytest.raises(signals.Stopped, match="stopped by SIGTERM") as caught:
        signals.check()
    assert caught.value.status == 143


@pytest.mark.slow
@pytest.mark.timeout(36_000)
def test_signals_and_kills_at_random_moments(tmp_path):
    """TCQ_KILLS times (40), at any moment from the start of the process on; whenever a run ends, it is the whole one."""
    flags = ["--config.train.total_steps=4000", "--config.train.log_every_steps=100", "--config.eval.every_steps=400"]
    flags += ["--config.checkpoint.every_steps=150"]
    stop_when(start(tmp_path / "whole", *flags), "never", signal.SIGTERM)
    chance, killed, ended = random.Random(os.environ.get("TCQ_SEED", "0")), Counter(), 0
    while killed.total() < int(os.environ.get("TCQ_KILLS", "40")):
        process = start(tmp_path / "parts", *flags)
        number = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        timer = threading.Timer(chance.uniform(1, 12), process.send_signal, [number])
        timer.start()
        said = process.stderr.read()
        timer.cancel()
        process.stderr.close()
        code = process.wait(60)
        assert code in (0, -number, 128 + number) and (code in (-2, -15) or "Traceback" not in said), (code, said)
        killed += Counter({} if code == 0 else {number.name: 1})
        if code == 0 or killed.total() == int(os.environ.get("TCQ_KILLS", "40")):
            stop_when(start(tmp_path / "parts", *flags), "never", signal.SIGTERM)
            assert_whole(tmp_path / "parts", tmp_path / "whole")
            ended += 1
            print(f"{dict(killed)}, {ended} runs ended with the bits and lines of the whole one", flush=True)
            shutil.rmtree(tmp_path / "parts")


def assert_whole(parts, whole):
    a, b = (encode.load(w, which="latest") for w in (parts, whole))
    assert a.step == b.step == 4000
    jax.tree.map(np.testing.assert_array_equal, a.variables, b.variables)
    assert logged(parts) == logged(whole)
    assert not list(parts.glob(f"{checkpoint.FOLDER}_damaged"))
