"""Nothing is lost: one writer, checkpoints that are read back, full disks, and names that look like patterns."""

import os
import shutil
import subprocess
from collections import namedtuple

import numpy as np
import pytest

import small
from tcq import encode, train
from tcq.runtime import locks
from tcq.workdir import checkpoint

STATE = {"variables": {"a": np.arange(3000, dtype=np.float32)}}


def corrupt(folder):
    for path in folder.rglob("*"):
        if path.is_file() and "variables" in path.parts and path.stat().st_size > 200:
            path.write_bytes(path.read_bytes()[:100])


@pytest.fixture
def manager(tmp_path):
    opened = checkpoint.open_manager(tmp_path, writable=True, keep=1)
    yield opened
    opened.close()


def test_what_was_saved_is_read_back_before_an_older_one_is_deleted(manager, tmp_path, logs):
    for step in (1, 2):
        checkpoint.save(manager, step, STATE, score=float(-step))
        assert checkpoint.verify_newest(manager, STATE)
    checkpoint.save(manager, 3, STATE, score=-3.0)
    manager.wait_until_finished()
    assert sorted(manager.all_steps()) == [1, 2, 3]  # the best, the last verified, and the newest
    corrupt(tmp_path / checkpoint.FOLDER / "3")
    assert not checkpoint.verify_newest(manager, STATE)
    assert "corrupted: checkpoint 3" in logs.text
    assert sorted(manager.all_steps()) == [1, 2]
    checkpoint.save(manager, 3, STATE, score=-3.0)
    assert checkpoint.verify_newest(manager, STATE)
    checkpoint.prune(manager, keep=1)
    assert sorted(manager.all_steps()) == [1, 3]


@pytest.mark.parametrize("step", [6, 12])
@pytest.mark.whole
def test_a_run_ends_only_with_a_checkpoint_that_can_be_read(tmp_path, monkeypatch, logs, step):
    real = checkpoint.verify_newest

    def verify(manager, state):
        manager.wait_until_finished()
        if manager.latest_step() == step and not logs.text.count("corrupted: "):
            corrupt(tmp_path / checkpoint.FOLDER / str(step))
        return real(manager, state)

    monkeypatch.setattr(checkpoint, "verify_newest", verify)
    if step == 12:
        with pytest.raises(train.TrainError, match="checkpoint 12 cannot be read back"):
            train.train(small.shared(), tmp_path)
    train.train(small.shared(), tmp_path)
    assert f"corrupted: checkpoint {step}" in logs.text
    assert encode.load(tmp_path, which="latest").step == 12


@pytest.mark.parametrize("name", ["run[1]", "[2026] runs/a", "what?", "a*"])
def test_a_path_that_looks_like_a_pattern_is_refused_before_anything_is_written(tmp_path, name):
    done = small.main("train", "--config=configs/digits.py", f"--workdir={tmp_path / name}")
    small.assert_refused(done, "which Orbax takes for a pattern")
    assert list(tmp_path.iterdir()) == []


def test_image_folders_and_indexes_may_look_like_patterns(run, images, tmp_path):
    photos = shutil.copytree(images / "class 3", tmp_path / "[2026] photos?" / "a*b")
    out = tmp_path / "index[1]"
    done = small.main("index", f"--workdir={run}", f"--images={photos}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    done = small.main("search", f"--index={out}", f"--query={photos / '003.png'}", "--k=1")
    assert done.returncode == 0 and "[2026] photos?" in done.stdout, done.stderr
    assert small.main("index", f"--out={out}", "--update").returncode == 0


def test_a_refusal_leaves_no_folder_behind(tmp_path):
    done = small.main("train", "--config=configs/folder.py:/no/such", f"--workdir={tmp_path / 'a' / 'b' / 'run'}")
    small.assert_refused(done, "not found")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.whole
def test_what_a_killed_run_was_writing_goes_at_the_next_one(tmp_path):
    (tmp_path / "run").mkdir()
    old, new = (tmp_path / "run" / f".tmp-config.json-{i}" for i in (1, 2))
    for path in (old, new):
        path.write_text("{")
    os.utime(old, (0, 0))
    train.train(small.shared("train.total_steps=1"), tmp_path / "run")
    assert not old.exists() and new.exists()  # which may belong to a process that lives


def test_a_folder_that_another_process_deletes_is_locked_anew(tmp_path, monkeypatch):
    def opening(path, mode):
        if not deleted:
            deleted.append(path.parent.rmdir())
        return open(path, mode)

    deleted = []
    monkeypatch.setattr(locks, "open", opening, raising=False)
    with locks.lock(tmp_path / "run", wait=True):
        assert deleted and (tmp_path / "run" / locks.NAME).exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError), locks.lock(tmp_path / "file", wait=True):
        pass


def test_a_second_run_in_a_workdir_is_refused_and_named(tmp_path):
    with locks.lock(tmp_path / "run", wait=False):
        done = small.main("train", "--config=configs/digits.py", f"--workdir={tmp_path / 'run'}")
        small.assert_refused(done, f"in use by process {os.getpid()} on ")
        assert [p.name for p in (tmp_path / "run").iterdir()] == [locks.NAME]
    assert not (tmp_path / "run").exists()


@pytest.mark.whole
def test_a_full_disk_is_one_message_and_the_last_checkpoint_stands(digits_run, tmp_path, monkeypatch):
    copy = shutil.copytree(digits_run, tmp_path / "run")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage(1, 1, 1000))
    with pytest.raises(checkpoint.CheckpointError, match=r"needs 0\.\d MiB, 0.0 MiB are free.* up to step 12 stand"):
        train.train(small.shared("train.total_steps=14"), copy, allow_changes=True)
    assert encode.load(copy, which="latest").step == 12


HANGS_UP = """
import os, signal, time
{before}
from tcq.runtime import signals
signals.install()
os.kill(os.getpid(), signal.SIGHUP)
time.sleep(0.1)
try:
    signals.check()
    print("goes on")
except signals.Stopped as stopped:
    print(stopped, stopped.status)
"""


@pytest.mark.parametrize(
    ("before", "words"),
    [("", "stopped by SIGHUP 129"), ("signal.signal(signal.SIGHUP, signal.SIG_IGN)", "goes on")],  # nohup
)
def test_a_terminal_that_closes(before, words):
    code = HANGS_UP.format(before=before)
    done = subprocess.run([small.command()[0], "-c", code], capture_output=True, text=True, env=small.environment())
    assert done.stdout.strip() == words, done.stderr


NO_HOME = """
import os, pathlib, tempfile
from tcq.runtime import log, storage
tempfile.tempdir = {temporary!r}
os.environ.pop("HOME", None)
os.environ.pop("XDG_CACHE_HOME", None)
os.setuid(54321)
log.show()
print(storage.cache_home())
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become a user without a home")
def test_a_user_without_a_home(tmp_path):
    tmp_path.chmod(0o777)
    for folder in tmp_path.parents:
        folder.chmod(folder.stat().st_mode | 0o055)
    code = NO_HOME.format(temporary=str(tmp_path))
    done = subprocess.run([small.command()[0], "-c", code], capture_output=True, text=True, env=small.environment())
    assert done.stdout.strip() == str(tmp_path / "tcq-54321"), done.stderr
    assert "set XDG_CACHE_HOME" in done.stderr


def test_a_home_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    code = "from tcq.runtime import log, storage; log.show(); print(storage.cache_home())"
    environment = small.environment() | {"XDG_CACHE_HOME": str(tmp_path / "file")}
    done = subprocess.run([small.command()[0], "-c", code], capture_output=True, text=True, env=environment)
    assert f"tcq-{os.getuid()}" in done.stdout and "caching in" in done.stderr, done.stderr
