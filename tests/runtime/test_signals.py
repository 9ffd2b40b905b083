"""SIGTERM, SIGINT and SIGKILL in any phase: the same command resumes, and the run ends with the same bits."""

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

import small
from tcq import encode
from tcq import index as indexes
from tcq.runtime import signals
from tcq.workdir import checkpoint

FLAGS = small.flags("train.total_steps=40", "eval.every_steps=10", "checkpoint.every_steps=15", "loss.queue=8")


def start(workdir, *more):
    arguments = ["train", "--config=configs/digits.py", f"--workdir={workdir}", *FLAGS, *more]
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(small.command(*arguments), env=small.environment(8), **options)


def finish(workdir, *more):
    """The same command in this process, which has as many devices; returns its output."""
    done = small.main("train", "--config=configs/digits.py", f"--workdir={workdir}", *FLAGS, *more)
    assert done.returncode == 0, done.stderr
    return done.stderr


def stop_when(process, text, number, delay=0.0):
    """Sends a signal some seconds after a line with a text; returns the output and the seconds until the end."""
    lines, sent = [], []

    def send():
        time.sleep(delay)
        sent.append(time.monotonic())
        process.send_signal(number)

    for line in process.stderr:
        lines.append(line)
        if text in line and not sent:
            threading.Thread(target=send).start()
    process.wait(60)
    process.stderr.close()
    return "".join(lines), time.monotonic() - sent[0] if sent else None


def records(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("speed/")} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    finish(workdir)
    return workdir


def assert_same_run(workdir, whole, steps=40):
    a, b = (encode.load(w, which="latest") for w in (workdir, whole))
    assert a.step == b.step == steps
    jax.tree.map(np.testing.assert_array_equal, a.variables, b.variables)
    assert records(workdir) == records(whole)
    assert encode.load(workdir).step == encode.load(whole).step  # the best


@pytest.mark.parametrize(
    ("phase", "text", "delay"),
    [
        pytest.param("killed", "step 23/40", 0.0, marks=pytest.mark.whole),
        pytest.param("start-up", "300 query", 0.0, marks=pytest.mark.slow),
        pytest.param("compile", "the first one compiles", 0.3, marks=pytest.mark.slow),
        pytest.param("train", "step 23/40", 0.0, marks=pytest.mark.whole),
        pytest.param("validation", "step 20/40  loss", 0.0, marks=pytest.mark.slow),
        pytest.param("validation", "step 40/40  loss", 0.01, marks=pytest.mark.slow),
        pytest.param("saving", "step 15/40", 0.0, marks=pytest.mark.slow),
    ],
)
def test_any_phase(tmp_path, whole, phase, text, delay):
    number = {"train": signal.SIGINT, "killed": signal.SIGKILL}.get(phase, signal.SIGTERM)
    process = start(tmp_path)
    output, seconds = stop_when(process, text, number, delay)
    assert seconds < 30 and "Traceback" not in output, output
    if phase == "train":  # 17 more steps follow: there is time to stop
        assert process.returncode == 128 + number and "is saved" in output, output
    if phase == "killed":
        assert process.returncode == -number, output
    else:
        assert process.returncode in (128 + number, 0), output  # 0: the run had ended
    if process.returncode and "is saved" in output:
        saved = int(output.rpartition(" after step ")[2].split(",")[0])
        assert encode.load(tmp_path, which="latest").step == saved
    elif process.returncode:
        assert phase in ("start-up", "compile", "killed"), output
    finish(tmp_path)
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_a_validation_that_was_interrupted_is_repeated(tmp_path, whole):
    """Images are encoded one at a time, so that the validation takes long."""
    process = start(tmp_path, "--config.eval.batch_size=1")
    output, seconds = stop_when(process, "step 10/40  loss", signal.SIGTERM, 0.05)
    assert process.returncode == 128 + signal.SIGTERM and seconds < 30, output
    assert "after step 10, which is saved" in output and "step 10/40  validation" not in output, output
    again = finish(tmp_path)
    assert again.index("step 10/40  validation") < again.index("step 11/40")
    assert_same_run(tmp_path, whole)


def test_the_handler_sets_a_flag_and_a_later_second_signal_ends_the_process(monkeypatch):
    ended = []
    monkeypatch.setattr(signals, "INSIST", 0.2)
    monkeypatch.setattr(os, "_exit", ended.append)
    signals.request("SIGTERM")  # of another process, not a signal to this one
    signals.handle(signal.SIGINT, None)
    signals.handle(signal.SIGINT, None)  # terminals may send it twice
    assert signals.requested() == "SIGTERM" and ended == []
    time.sleep(0.3)
    signals.handle(signal.SIGINT, None)
    assert ended == [130]


def test_poll_raises_and_counts():
    before = signals.polls()
    signals.poll()
    signals.advance()
    assert signals.polls() == before + 2
    signals.handle(signal.SIGTERM, None)
    with pytest.raises(signals.Stopped, match="stopped by SIGTERM") as stopped:
        signals.poll()
    assert stopped.value.status == 143 and not isinstance(stopped.value, Exception)


@pytest.mark.slow
def test_index_stops_and_leaves_nothing_behind(run, images, tmp_path):
    out = tmp_path / "index"
    command = small.command("index", f"--workdir={run}", f"--images={images}", f"--out={out}")
    process = subprocess.Popen(command, env=small.environment(), stderr=subprocess.PIPE, text=True)
    time.sleep(1.5)  # it is importing, restoring or encoding
    process.send_signal(signal.SIGTERM)
    _, output = process.communicate(timeout=30)
    assert process.returncode in (143, -15, 0), output
    if process.returncode:
        assert list(tmp_path.iterdir()) == []
    else:
        assert len(indexes.open_index(out).paths) == 120


@pytest.mark.parametrize("loop", ["decode", "encode", "score", "download", "serve", "kmeans", "pq"])
def test_long_loops_poll(loop, run, images, tmp_path):
    """Each of them stops when the flag is set, and leaves nothing behind."""
    from tcq.data import cache, sources
    from tcq.evaluate import baselines, retrieval
    from tcq.index import serve
    from tcq.models import kmeans
    from tcq.runtime import storage

    points = np.random.RandomState(0).randn(64, 2, 4).astype("f4")
    encoder = encode.load(run)
    if loop == "serve":
        indexes.build(run, images / "class 3", tmp_path / "index")
    if loop == "download":
        import fsspec

        fsspec.filesystem("memory").pipe("/polled/a.txt", b"a")
    work = {
        "decode": lambda: sources.folder(images, cache.Rule(7, home=str(tmp_path / "cache"))),
        "encode": lambda: encode.encode(encoder, np.zeros((3, 8, 8, 3), np.uint8)),
        "score": lambda: retrieval.retrieve(
            lambda block: np.zeros((3, 4))[block], np.arange(3), np.arange(4), k=2, ks=[1]
        ),
        "download": lambda: storage.download("memory://polled"),
        "serve": lambda: serve.serve(tmp_path / "index", port=0),
        "kmeans": lambda: kmeans.kmeans(points, 4, spherical=False),
        "pq": lambda: baselines.faiss_pq(points[:, 0], [points[:, 0]], num_codebooks=2, num_codewords=4),
    }[loop]
    signals.handle(signal.SIGTERM, None)
    with pytest.raises(signals.Stopped):
        work()
    signals.reset()
    if loop == "decode":
        assert not list((tmp_path / "cache").glob("images/*.u8"))


def test_without_a_safe_point_the_process_ends_after_the_grace_period():
    code = (
        "import time; from tcq.runtime import log, signals; log.show(); signals.GRACE = 1.0; signals.install()\n"
        "print('ready', flush=True)\n"
        "while True: time.sleep(0.1)"
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
    _, output = process.communicate(timeout=20)
    assert (
        process.returncode == 143
        and "error: SIGTERM: no safe point reached within 1 s; exiting" in output
        and "SIGTERM: stopping at the next safe point" in output
    )


@pytest.mark.slow
@pytest.mark.timeout(36_000)
def test_signals_and_kills_at_random_moments(tmp_path):
    """TCQ_KILLS signals (40) at any moment; every run that ends equals the uninterrupted one."""
    flags = ["--config.train.total_steps=4000", "--config.train.log_every_steps=100", "--config.eval.every_steps=400"]
    flags += ["--config.checkpoint.every_steps=150"]
    finish(tmp_path / "whole", *flags)
    chance, killed, ended = random.Random(os.environ.get("TCQ_SEED", "0")), Counter(), 0
    while killed.total() < int(os.environ.get("TCQ_KILLS", "40")):
        process = start(tmp_path / "parts", *flags)
        number = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        timer = threading.Timer(chance.uniform(1, 12), process.send_signal, [number])
        timer.start()
        output = process.stderr.read()
        timer.cancel()
        process.stderr.close()
        code = process.wait(60)
        assert code in (0, -number, 128 + number) and (code in (-2, -15) or "Traceback" not in output), (code, output)
        killed += Counter({} if code == 0 else {number.name: 1})
        if code == 0 or killed.total() == int(os.environ.get("TCQ_KILLS", "40")):
            finish(tmp_path / "parts", *flags)
            assert_same_run(tmp_path / "parts", tmp_path / "whole", 4000)
            assert not list((tmp_path / "parts").glob(f"{checkpoint.FOLDER}_{checkpoint.CORRUPTED}"))
            ended += 1
            print(f"{dict(killed)}, {ended} runs ended with the bits and lines of the whole one", flush=True)
            shutil.rmtree(tmp_path / "parts")
