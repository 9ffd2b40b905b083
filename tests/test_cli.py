"""What the command line refuses, and how it ends."""

import subprocess

import pytest

import small
from tcq import cli


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/digits.py", "--config.loss.tempreture=1"], "did you mean loss.temperature?"),
        (
            ["--config=configs/digits.py", "--config.data.batch_size=129"],
            "129 is not divisible by the 8 devices: use 128 or 136",
        ),
        (["--config=configs/none.py"], "not found; tcq comes with"),
        (["--config=configs/digits.py", "--stepz=1"], "unknown argument '--stepz=1' for train"),
        (["--config=configs/folder.py:/no/such/folder"], "image folder '/no/such/folder' not found"),
        (["--config=configs/cifar10.py", "--config.data.tfds_dir=/no/such"], "python -m tcq prepare --dataset=cifar10"),
    ],
)
def test_a_mistake_is_one_message_and_leaves_nothing_behind(tmp_path, arguments, message):
    small.assert_refused(small.main("train", *arguments, f"--workdir={tmp_path / 'run'}"), message)
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    done = small.main("train", "--config=configs/digits.py", f"--workdir={tmp_path / 'run'}")
    small.assert_refused(done, "cannot be written")


def test_as_a_process_of_its_own(tmp_path):
    """`python -m tcq` from another directory: status, and one message."""
    done = small.tcq("train", "--config=digits", "--config.loss.tempreture=1", f"--workdir={tmp_path}", cwd=tmp_path)
    small.assert_refused(done, "tcq train: --config.loss.tempreture is unknown: did you mean loss.temperature?")
    assert len(done.stderr.splitlines()) == 1 and done.stdout == ""


def test_help_is_fast():
    """It imports neither jax nor numpy."""
    code = "import sys; from tcq import cli; cli.make_parser().format_help(); "
    code += "print('jax' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([small.command()[0], "-c", code], env=small.environment(), capture_output=True, text=True)
    assert done.stdout.strip() == "False False", done.stderr


@pytest.mark.whole
def test_quiet_and_levels(tmp_path):
    flags = ("--config=configs/digits.py", "--config.data.validation=0")
    assert small.main("doctor", *flags).returncode == 0
    train = (
        "train",
        *small.flags("train.total_steps=2", "optim.learning_rate=1e-4", "optim.warmup_steps=0", "eval.every_steps=0"),
        "--config=configs/digits.py",
    )
    loud = small.main(*train, f"--workdir={tmp_path / 'loud'}")
    quiet = small.main(*train, f"--workdir={tmp_path / 'quiet'}", "--quiet")
    assert loud.returncode == quiet.returncode == 0
    assert "step 2/2" in loud.stderr and quiet.stderr == ""
    assert quiet.stdout == f"trained: {tmp_path / 'quiet'}\n"


def test_a_defect_shows_its_traceback(monkeypatch):
    def broken(arguments, overrides):
        raise ValueError("a defect")

    monkeypatch.setattr(cli, "_doctor", broken)
    with pytest.raises(ValueError, match="a defect"):
        small.main("doctor")


def test_output_to_a_closed_pipe_is_no_error(run, index, images):
    command = small.command("search", f"--index={index}", f"--query={images / 'class 3' / '003.png'}", "--k=120")
    process = subprocess.Popen(command, env=small.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 1
    process.stderr.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("search", "--index=i", "--query=q", "--min_score=nan"), "'nan' must be a number\n"),
        (("search", "--index=i", "--query=q", "--min_score=high"), "'high' must be a number\n"),
        (("duplicates", "--index=i", "--min_likeness=1.1"), "'1.1' must be a number from 0 to 1\n"),
        (("duplicates", "--index=i", "--min_likeness=-0.1"), "'-0.1' must be a number from 0 to 1\n"),
        (("cache", "--delete_unused=-1"), "'-1' must be a number of at least 0\n"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, message):
    small.assert_refused(small.main(*arguments), message)
