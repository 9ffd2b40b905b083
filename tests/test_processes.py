"""Real processes that form one run on this machine."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

import small
from tcq import config as configs
from tcq import encode
from tcq import index as indexes
from tcq.runtime import processes

FLAGS = small.small_flags(
    "data.image_size=8",
    "data.batch_size=32",
    "eval.k=0",
    "optim.name=sgd",
    "optim.learning_rate=0.3",
    "loss.clip=0.2",
    "train.total_steps=6",
    "loss.queue=20",
)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one(images, tmp_path_factory):
    """A run of one process with four devices, scored, and an index of it."""
    home = tmp_path_factory.mktemp("one")
    commands = (
        ("train", f"--config=configs/folder.py:{images}", f"--workdir={home / 'run'}", *FLAGS),
        ("evaluate", f"--workdir={home / 'run'}", "--checkpoint=latest"),
        ("index", f"--workdir={home / 'run'}", f"--images={images}", f"--out={home / 'index'}"),
    )
    for command in commands:
        done = small.tcq(*command, devices=4)
        assert done.returncode == 0, done.stderr
    return home


@pytest.mark.parametrize(("count", "devices"), [(2, 2), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_many_processes_do_what_one_does(one, images, tmp_path, count, devices):
    run = ("train", f"--config=configs/folder.py:{images}", f"--workdir={tmp_path / 'run'}", *FLAGS)
    done = small.several(count, *run, devices=devices)
    assert done.returncode == 0, done.stdout
    assert f"batch: 32 global, {32 // count} per process, {32 // count // devices} per device (4 x cpu)" in done.stdout
    assert done.stdout.count("6 steps; the first compiles") == done.stdout.count("trained: ") == 1
    ours, theirs = (encode.load(home / "run", which="latest").variables for home in (tmp_path, one))
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)  # other sums, six steps on
    for here, there in zip(lines(tmp_path / "run"), lines(one / "run"), strict=True):
        for key in there.keys() - {k for k in there if k.startswith("speed/")}:
            assert here[key] == pytest.approx(there[key], rel=1e-3, abs=1e-4), key

    before = json.loads((one / "run" / "results.json").read_text())
    done = small.several(count, "evaluate", f"--workdir={one / 'run'}", "--checkpoint=latest", devices=devices)
    assert done.returncode == 0, done.stdout
    after = json.loads((one / "run" / "results.json").read_text())
    assert after.pop("machine")["device"] == "4 x cpu" and before.pop("machine")
    assert after == before
    out = tmp_path / "index"
    index = ("index", f"--workdir={one / 'run'}", f"--images={images}", f"--out={out}")
    done = small.several(count, *index, devices=devices)
    assert done.returncode == 0 and done.stdout.count("indexed 120 images") == 1, done.stdout
    ours, theirs = indexes.open_index(out), indexes.open_index(one / "index")
    assert ours.paths == theirs.paths
    np.testing.assert_array_equal(ours.codes, theirs.codes)


def test_doctor_leaves_nothing_behind(tmp_path):
    workdir = tmp_path / "new" / "run"
    command = ("doctor", "--config=configs/digits.py", f"--workdir={workdir}", "--expect_devices=4")
    done = small.several(2, *command, devices=2)
    assert done.returncode == 0 and "seen by all processes" in done.stdout, done.stdout
    assert not workdir.exists()
    done = small.several(2, *command[:-1], "--expect_processes=3", devices=2)
    assert done.returncode == 2 and done.stdout.count("2 processes are here, 3 are expected") == 1, done.stdout


class Running:
    """A training run of several processes that does not end by itself; what they say is collected."""

    def __init__(self, workdir, count, *more):
        port = 20_000 + os.getpid() % 20_000
        flags = [*FLAGS, "--config.train.total_steps=1000000", "--config.eval.every_steps=0", *more]
        self.said = [[] for _ in range(count)]
        self.processes, self.readers = [], []
        for i in range(count):
            command = small.command("train", "--config=configs/digits.py", f"--workdir={workdir}", *flags)
            command += [f"--coordinator=localhost:{port}", f"--processes={count}", f"--process_id={i}"]
            options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            self.processes.append(subprocess.Popen(command, env=small.environment(), **options))
            self.readers.append(threading.Thread(target=lambda i=i: self.said[i].extend(self.processes[i].stdout)))
            self.readers[-1].start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process, reader in zip(self.processes, self.readers, strict=True):
            process.kill()
            process.wait()
            reader.join()
            process.stdout.close()

    def wait_for(self, text, i=0, seconds=120):
        end = time.monotonic() + seconds
        while not any(text in line for line in self.said[i]):
            assert time.monotonic() < end, "".join(self.said[i])
            time.sleep(0.05)

    def end(self, i, seconds):
        status = self.processes[i].wait(seconds)
        self.readers[i].join()
        return status, "".join(self.said[i])


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_process_that_is_killed_ends_the_others_with_its_name(tmp_path, victim):
    with Running(tmp_path, 2) as run:
        run.wait_for("step 20/")
        run.processes[victim].kill()
        status, said = run.end(1 - victim, processes.SILENT + 40)
    assert status != 0
    if victim:
        assert f"process 1 (pid {run.processes[1].pid} on " in said and "no sign of life" in said, said
    else:  # JAX may be faster than we are, and calls it so
        assert "process 0, which the others report to, is gone" in said or "leader (usually slice 0 task 0)" in said, (
            said
        )


def test_a_process_that_hangs_ends_the_others_with_its_name(tmp_path):
    with Running(tmp_path, 2) as run:
        run.wait_for("step 20/")
        run.processes[1].send_signal(signal.SIGSTOP)
        status, said = run.end(0, processes.SILENT + 40)
        assert status == 1 and f"process 1 (pid {run.processes[1].pid} on " in said, said
        assert re.search(r"it was last at: step \d+", said), said


def two(commands):
    """Exit status and words of two processes of one run, each with its own command."""
    port, found = 20_000 + (os.getpid() + 7777) % 20_000, []
    for i, command in enumerate(commands):
        command = small.command(*command, f"--coordinator=localhost:{port}", "--processes=2", f"--process_id={i}")
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        found.append(subprocess.Popen(command, env=small.environment(), **options))
    said = [process.communicate(timeout=120)[0] for process in found]
    return [(process.returncode, text) for process, text in zip(found, said, strict=True)]


def test_a_process_with_an_error_tells_the_others(tmp_path):
    """Here the second sees other images than the first."""
    from test_data import write_images

    commands = []
    for i in range(2):
        write_images(tmp_path / f"images{i}", [f"{c}/{n:02}.png" for c in "ab" for n in range(20 + i)])
        commands.append(
            ("train", f"--config=configs/folder.py:{tmp_path / f'images{i}'}", f"--workdir={tmp_path / 'run'}")
        )
    for status, said in two([(*command, *FLAGS, "--config.train.total_steps=5") for command in commands]):
        assert status == 1 and "the images of process 1 on " in said and "are not those of process 0" in said, said


def test_what_the_first_process_refuses_all_refuse(tmp_path):
    (tmp_path / "config.json").write_text(configs.to_json(small.config("loss.temperature=0.3")))
    command = ("train", "--config=configs/digits.py", f"--workdir={tmp_path}", *FLAGS)
    for status, said in two([command, command]):
        assert status == 2 and "holds a run with another config" in said, said


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (["--coordinator=localhost:1", "--processes=2"], 2, "--coordinator needs --processes=N and --process_id=I"),
        (["--processes=2", "--process_id=1"], 2, "--processes and --process_id without --coordinator=HOST:PORT"),
        (["--distributed"], 1, "give --coordinator=HOST:PORT of process 0, --processes and --process_id"),
    ],
)
def test_who_the_others_are_has_to_be_told_whole(tmp_path, flags, status, words):
    done = small.tcq("train", "--config=configs/digits.py", f"--workdir={tmp_path}", *FLAGS, *flags)
    assert done.returncode == status and words in done.stderr, done.stderr


def test_being_asked_to_stop_all_stop_after_one_step_and_go_on(tmp_path):
    flags = [
        *FLAGS,
        "--config.train.total_steps=120",
        "--config.eval.every_steps=0",
        "--config.checkpoint.every_steps=1000",
    ]
    command = small.launcher(2, "train", "--config=configs/digits.py", f"--workdir={tmp_path / 'parts'}", *flags)
    process = subprocess.Popen(command, env=small.environment(), stdout=subprocess.PIPE, text=True)
    said = ""
    for line in process.stdout:
        said += line
        if "step 20/" in line:
            process.send_signal(signal.SIGTERM)
            asked = time.monotonic()
    assert process.wait(60) == 128 + signal.SIGTERM, said
    assert time.monotonic() - asked < 30
    steps = re.findall(r"\[(\d)\] tcq train: stopped by SIGTERM after step (\d+), which is saved", said)
    assert sorted(i for i, _ in steps) == ["0", "1"] and len({step for _, step in steps}) == 1, said
    stopped = int(steps[0][1])
    assert encode.load(tmp_path / "parts", which="latest").step == stopped < 120
    process.stdout.close()
    again = subprocess.run(command, env=small.environment(), capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and f"going on from step {stopped}" in again.stdout, again.stdout
    whole = small.several(2, "train", "--config=configs/digits.py", f"--workdir={tmp_path / 'whole'}", *flags)
    assert whole.returncode == 0, whole.stdout
    a, b = (encode.load(tmp_path / run, which="latest").variables for run in ("parts", "whole"))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    logged = [[(line["step"], line.get("train/loss")) for line in lines(tmp_path / run)] for run in ("parts", "whole")]
    assert logged[0] == logged[1]


def test_the_launcher(tmp_path):
    shown = [*small.launcher(3)[:2], "--processes=3", "--dry_run", "--port=77", "--", "train", "--config=a b.py"]
    done = subprocess.run(shown, capture_output=True, text=True)
    commands = done.stdout.splitlines()
    assert len(commands) == 3 and all("--coordinator=localhost:77 --processes=3" in c for c in commands)
    for i, command in enumerate(commands):
        assert (
            f"JAX_LOCAL_DEVICE_IDS={i} " in command
            and f"--process_id={i}" in command
            and "'--config=a b.py'" in command
        )
    program = "import sys, time; i = int(sys.argv[-1].partition('=')[2]); time.sleep(0 if i else 60); sys.exit(7)"
    file = tmp_path / "tcq" / "__main__.py"
    file.parent.mkdir()
    file.write_text(program)
    start = time.monotonic()
    launcher = [sys.executable, small.launcher(2)[1], "--processes=2", "--grace=1", "--", "train"]
    done = subprocess.run(launcher, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True)
    assert done.returncode == 7 and time.monotonic() - start < 30
    assert done.stdout.decode() == "process 1 ended first, with status 7\n"


def test_what_one_process_does_alone():
    assert processes.exchange({"a": 1}) == [{"a": 1}] and processes.on_first(lambda: 5) == 5
    assert processes.share(7) == (0, 7) and processes.first() and not processes.several()
    assert processes.refused(configs.ConfigError("a")) and processes.refused(OSError("a"))
    assert not processes.refused(ValueError("a defect")) and not processes.refused(processes.ProcessError("a"))
    processes.same("images", [1, 2])
    processes.agree_to_stop()
