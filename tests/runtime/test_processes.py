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
from tcq.workdir import checkpoint
from write_images import write_images

pytestmark = pytest.mark.whole

STEPS, FIRST = 16, 4
FLAGS = small.flags(
    "data.image_size=8",
    "data.batch_size=32",
    "eval.k=0",
    "optim.name=sgd",
    "optim.learning_rate=0.03",
    "loss.clip=0.2",
    "loss.clip_scope=batch",
    "loss.queue=20",
    f"train.total_steps={STEPS}",
    f"eval.every_steps={STEPS}",
    f"checkpoint.every_steps={FIRST}",
    "checkpoint.keep=9",
)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def train_arguments(images, workdir):
    return "train", f"--config=configs/folder.py:{images}", f"--workdir={workdir}", *FLAGS


@pytest.fixture(scope="module")
def two(images, tmp_path_factory):
    """A run of two processes with two devices each, stopped by a signal to one of them, resumed, and scored."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    command = small.launcher(2, *train_arguments(images, workdir), "--evaluate=latest", devices=2)
    process = subprocess.Popen(command, env=small.environment(), stdout=subprocess.PIPE, text=True)
    output = ""
    for line in process.stdout:
        output += line
        if "step 5/" in line:
            process.send_signal(signal.SIGTERM)
            sent = time.monotonic()
    process.stdout.close()
    assert process.wait(60) == 128 + signal.SIGTERM, output
    assert time.monotonic() - sent < 30
    done = subprocess.run(command, env=small.environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    return workdir, output, done.stdout


def test_a_signal_to_one_stops_all_after_the_same_step_and_they_resume(two):
    workdir, stopped, resumed = two
    steps = re.findall(r"\[(\d)\] tcq train: stopped by SIGTERM after step (\d+), which is saved", stopped)
    assert sorted(i for i, _ in steps) == ["0", "1"] and len({step for _, step in steps}) == 1, stopped
    assert 5 <= int(steps[0][1]) < STEPS
    assert f"resuming from step {steps[0][1]}" in resumed, resumed
    assert "batch: 32 global, 16 per process, 8 per device (4 x cpu)" in resumed
    assert stopped.count("the first one compiles") == resumed.count("trained: ") == 1
    assert [line["step"] for line in lines(workdir) if "train/loss" in line] == list(range(1, STEPS + 1))


@pytest.fixture(scope="module")
def one(images, tmp_path_factory):
    """The same run of one process."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    done = small.main(*train_arguments(images, workdir))
    assert done.returncode == 0, done.stderr
    return workdir


def test_many_processes_train_as_one(two, one):
    assert_began_equally(two[0], one)


def test_many_processes_pass_the_columns_round(one, images, tmp_path):
    ring = "--config.loss.gather=ring", "--config.loss.block_size=5"
    done = small.several(2, *train_arguments(images, tmp_path / "run"), *ring, devices=2)
    assert done.returncode == 0, done.stdout
    assert_began_equally(tmp_path / "run", one)


def assert_began_equally(workdir, other):
    """The parameters after FIRST steps, and what these logged."""
    parameters = (encode.load(w, which=str(FIRST)).variables for w in (workdir, other))
    for x, y in zip(*map(jax.tree.leaves, parameters), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)  # sums in another order
    for one, two in zip(lines(workdir)[:FIRST], lines(other)[:FIRST], strict=True):
        for key in two.keys() - {k for k in two if k.startswith("speed/")}:
            assert one[key] == pytest.approx(two[key], rel=1e-3, abs=1e-4), key


@pytest.mark.slow
def test_a_resumed_run_of_many_has_the_bits_of_an_uninterrupted_one(two, images, tmp_path):
    done = small.several(2, *train_arguments(images, tmp_path / "run"), devices=2)
    assert done.returncode == 0, done.stdout
    a, b = (encode.load(workdir, which="latest").variables for workdir in (tmp_path / "run", two[0]))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    logged = [[(line["step"], line.get("train/loss")) for line in lines(w)] for w in (tmp_path / "run", two[0])]
    assert logged[0] == logged[1]


def test_a_signal_to_one_that_waits_reaches_the_others(tmp_path, monkeypatch):
    monkeypatch.setenv("EMBEDDED_BY", str(tmp_path / "log"))
    embedder = small.ROOT / "tests" / "helpers" / "tiny_embedder.py"
    flags = small.flags("data.image_size=16", "data.views=40", f"model.embedder={embedder}:logged")
    command = small.launcher(2, "embed", "--config=configs/digits.py", *flags, f"--out={tmp_path / 'e'}")
    process = subprocess.Popen(command, env=small.environment(), stdout=subprocess.PIPE, text=True)
    found = {}
    while len(found) < 2 or min(found.values()) < 100:  # process 1 takes longer, and process 0 waits for it then
        assert process.poll() is None
        time.sleep(0.05)
        pids = (tmp_path / "log").read_text().split()[::2] if (tmp_path / "log").exists() else []
        found = {int(pid): pids.count(pid) for pid in pids}
    os.kill(max(found, key=found.get), signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert "[1] tcq embed: stopped by SIGTERM" in output, output
    assert process.returncode == 128 + signal.SIGTERM


def test_many_processes_evaluate_and_index_as_one(two, images, tmp_path):
    workdir, *_ = two
    by_two = json.loads((workdir / "results.json").read_text())
    done = small.main("evaluate", f"--workdir={workdir}", "--checkpoint=latest")
    assert done.returncode == 0, done.stderr
    by_one = json.loads((workdir / "results.json").read_text())
    assert by_two.pop("machine")["device"] == "4 x cpu" and by_one.pop("machine")["device"] == "8 x cpu"
    assert by_one.pop("validation") == pytest.approx(by_two.pop("validation"), rel=1e-5)
    assert by_one.pop("time") and by_two.pop("time")
    assert by_one == by_two
    arguments = "index", f"--workdir={workdir}", f"--images={images}"
    done = small.several(2, *arguments, f"--out={tmp_path / 'two'}", devices=2)
    assert done.returncode == 0 and done.stdout.count("indexed 120 images") == 1, done.stdout
    assert small.main(*arguments, f"--out={tmp_path / 'one'}").returncode == 0
    many, one = indexes.open_index(tmp_path / "two"), indexes.open_index(tmp_path / "one")
    assert list(many.paths) == list(one.paths)
    np.testing.assert_array_equal(many.codes, one.codes)


@pytest.mark.slow
def test_four_processes_train_as_two(two, images, tmp_path):
    done = small.several(4, *train_arguments(images, tmp_path / "run"), devices=1)
    assert done.returncode == 0, done.stdout
    four, other = (encode.load(workdir, which=str(FIRST)).variables for workdir in (tmp_path / "run", two[0]))
    for x, y in zip(jax.tree.leaves(four), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)


def test_doctor_leaves_nothing_behind(tmp_path):
    workdir = tmp_path / "new" / "run"
    command = ("doctor", "--config=configs/digits.py", f"--workdir={workdir}", "--expect_devices=4")
    done = small.several(2, *command, "--expect_processes=3", devices=2)
    assert "visible to all processes" in done.stdout and not workdir.exists(), done.stdout
    assert done.returncode == 2 and done.stdout.count("processes: 2 found, must be 3") == 1, done.stdout
    assert "devices: " not in done.stdout


class Running:
    """Several processes of one run, whose output is collected."""

    def __init__(self, commands):
        port = 20_000 + os.getpid() % 20_000
        self.output = [[] for _ in commands]
        self.processes, self.readers = [], []
        for i, command in enumerate(commands):
            joined = [f"--coordinator=localhost:{port}", f"--processes={len(commands)}", f"--process_id={i}"]
            options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            self.processes.append(subprocess.Popen([*command, *joined], env=small.environment(), **options))
            self.readers.append(threading.Thread(target=lambda i=i: self.output[i].extend(self.processes[i].stdout)))
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
        while not any(text in line for line in self.output[i]):
            assert time.monotonic() < end, "".join(self.output[i])
            time.sleep(0.05)

    def end(self, i, seconds=120):
        status = self.processes[i].wait(seconds)
        self.readers[i].join()
        return status, "".join(self.output[i])


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_which_name_it(tmp_path, victim):
    endless = (
        "--config.train.total_steps=1000000",
        "--config.eval.every_steps=0",
        "--config.checkpoint.every_steps=99999",
    )
    command = small.command("train", "--config=configs/digits.py", f"--workdir={tmp_path}", *FLAGS, *endless)
    with Running([command, command]) as run:
        run.wait_for("step 20/")
        run.processes[victim].kill()
        status, output = run.end(1 - victim, processes.SILENT + 40)
    assert status != 0
    if victim:
        assert f"process 1 (pid {run.processes[1].pid} on " in output and "has sent no heartbeat" in output, output
    else:  # JAX may notice it first
        message = "process 0, which hosts the coordination service, is gone"
        assert message in output or "leader (usually slice 0 task 0)" in output, output


SCRIPT = """
import os, signal, sys, time
from tcq.runtime import log, processes
coordinator, count, number = (argument.partition("=")[2] for argument in sys.argv[1:])
log.show()
processes.join(coordinator=coordinator, processes=int(count), process_id=int(number))
processes.exchange(number)
processes.set_phase("step 812")
time.sleep(2)
if number == "1" and {event}:
    os.kill(os.getpid(), {event})
time.sleep(60)
"""


@pytest.mark.parametrize("event", [signal.SIGSTOP, signal.SIGKILL, 0], ids=["hangs", "is killed", "stalls"])
def test_a_process_that_fails_ends_the_others_which_name_it(monkeypatch, event):
    monkeypatch.setenv("TCQ_STALLED_SECONDS", "60" if event else "3")
    with Running([[sys.executable, "-c", SCRIPT.format(event=int(event))]] * 2) as run:
        status, output = run.end(0)
        assert status == 1, output
        if event:
            assert f"process 1 (pid {run.processes[1].pid} on " in output and "its last phase: step 812" in output, (
                output
            )
        else:
            assert "no process has advanced for" in output and re.search(r"process 1 on \S+: step 812", output), output


NEGATED = """
import sys
from tcq import cli
from tcq.models import opq
rotation = opq.rotation
if sys.argv[-1] == "--process_id=1":
    opq.rotation = lambda *arguments, **options: -rotation(*arguments, **options)
sys.exit(cli.main(sys.argv[1:]))
"""


def test_all_start_from_the_state_of_process_0(images, tmp_path):
    """Process 1 gets another rotation, and training, which compares the bits of all replicas, goes on."""
    start = ("--config.quantizer.init=opq", "--config.train.total_steps=4", "--config.train.compare_every_steps=1")
    command = [sys.executable, "-c", NEGATED, *train_arguments(images, tmp_path / "run"), *start]
    with Running([command, command]) as run:
        for i in range(2):
            status, output = run.end(i)
            assert status == 0, output


def both_end(*commands):
    """Exit status and output of two processes of one run."""
    with Running([small.command(*command) for command in commands]) as run:
        return [run.end(i) for i in range(2)]


def test_a_process_with_other_images_ends_both(tmp_path):
    commands = []
    for i in range(2):
        write_images(tmp_path / f"images{i}", [f"{c}/{n:02}.png" for c in "ab" for n in range(20 + i)])
        commands.append(train_arguments(tmp_path / f"images{i}", tmp_path / "run"))
    for status, output in both_end(*commands):
        assert status == 1 and "the images of process 1 on " in output, output
        assert "differ from those of process 0" in output, output


def test_what_process_0_refuses_all_refuse(tmp_path):
    (tmp_path / "config.json").write_text(configs.to_json(small.config("loss.temperature=0.3")))
    command = ("train", "--config=configs/digits.py", f"--workdir={tmp_path}", *FLAGS)
    for status, output in both_end(command, command):
        assert status == 2 and "holds a run with another config" in output, output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--coordinator=localhost:1", "--processes=2"], "--coordinator needs --processes=N and --process_id=I"),
        (["--processes=2", "--process_id=1"], "--processes and --process_id must come with --coordinator=HOST:PORT"),
    ],
)
def test_an_incomplete_coordinator_is_refused(tmp_path, flags, message):
    done = small.main("train", "--config=configs/digits.py", f"--workdir={tmp_path}", *FLAGS, *flags)
    assert done.returncode == 2 and message in done.stderr, done.stderr


def test_processes_that_jax_cannot_find_are_an_error(tmp_path):
    done = small.tcq("train", "--config=configs/digits.py", f"--workdir={tmp_path}", "--distributed")
    assert done.returncode == 1 and "give each of them --coordinator=HOST:PORT of process 0" in done.stderr, done.stderr


def test_the_launcher(tmp_path):
    shown = [*small.launcher(3)[:2], "--processes=3", "--dry_run", "--port=77", "--", "train", "--config=a b.py"]
    done = subprocess.run(shown, capture_output=True, text=True)
    commands = done.stdout.splitlines()
    assert len(commands) == 3 and all("--coordinator=localhost:77 --processes=3" in c for c in commands)
    for i, command in enumerate(commands):
        assert f"JAX_LOCAL_DEVICE_IDS={i} " in command and f"--process_id={i}" in command, command
        assert "'--config=a b.py'" in command
    program = "import sys, time; i = int(sys.argv[-1].partition('=')[2]); time.sleep(0 if i else 60); sys.exit(7)"
    file = tmp_path / "tcq" / "__main__.py"
    file.parent.mkdir()
    file.write_text(program)
    start = time.monotonic()
    launcher = [sys.executable, small.launcher(2)[1], "--processes=2", "--grace=1", "--", "train"]
    done = subprocess.run(launcher, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True)
    assert done.returncode == 7 and time.monotonic() - start < 30
    assert done.stdout.decode() == "process 1 ended first, with status 7\n"


def test_one_process_alone():
    assert processes.exchange({"a": 1}) == [{"a": 1}] and processes.on_first(lambda: 5) == 5
    assert processes.share(7) == (0, 7) and processes.is_first() and not processes.several()
    assert processes.is_refusal(configs.ConfigError("a")) and processes.is_refusal(OSError("a"))
    assert not processes.is_refusal(ValueError("a defect")) and not processes.is_refusal(processes.ProcessError("a"))
    assert processes.is_refusal(checkpoint.CheckpointError("a"))
    processes.require_same("images", [1, 2])
    processes.agree_to_stop()
