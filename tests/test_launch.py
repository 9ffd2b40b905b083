"""The launch scripts with mock programs that record their arguments."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import small

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
TRAIN = ["train", "--config=configs/a b.py:bits=32", "--workdir=gs://bucket/run", "--config.loss.clip=0.1"]


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Runs a script; the arguments and the standard input of each program that it called."""
    record = tmp_path / "calls.jsonl"
    for name in ("gcloud", "sbatch", "kubectl", "xpk", "docker"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(
            f"#!{sys.executable}\nimport json, sys\n"
            f"given = '' if sys.stdin.isatty() else sys.stdin.read()\n"
            f"print(json.dumps([['{name}', *sys.argv[1:]], given]), file=open({str(record)!r}, 'a'))\n"
        )
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def run(script, *arguments, status=0):
        record.unlink(missing_ok=True)
        done = subprocess.run(
            [str(LAUNCH / script), *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60
        )
        assert done.returncode == status, done.stderr
        called = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
        return called, done.stdout + done.stderr

    return run


def test_scripts_pass_shellcheck():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    scripts = sorted(str(p) for p in LAUNCH.glob("*.sh"))
    done = subprocess.run([str(shellcheck), *scripts], capture_output=True, text=True)
    assert len(scripts) == 4 and done.returncode == 0, done.stdout


def split(text):
    """The words that a shell makes of a command line."""
    done = subprocess.run(["bash", "-c", f'printf "%s\\0" {text}'], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def test_tpu(calls):
    where = ("--name=pod", "--zone=us-west4-a")
    (create, _), *rest = calls("tpu.sh", *where, "--type=v5litepod-16", "--spot", "create")[0]
    assert create[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "create", "pod"] and not rest
    assert {"--zone=us-west4-a", "--accelerator-type=v5litepod-16", "--spot"} <= set(create)
    (queue, _), *_ = calls("tpu.sh", *where, "--type=v6e-8", "queue")[0]
    assert {"queued-resources", "--node-id=pod", "--runtime-version=tpu-ubuntu2204-base"} <= set(queue)
    (copy, _), (install, _) = calls("tpu.sh", *where, "install")[0]
    assert (
        "scp" in copy and "--worker=all" in copy and any(c.endswith("tcq.tar.gz") and Path(c).is_file() for c in copy)
    )
    assert "--worker=all" in install and "requirements.txt" in install[-1] and "jax[tpu]==" in install[-1]
    shutil.rmtree(Path(next(c for c in copy if c.startswith("/"))).parent)
    ((train, _),) = calls("tpu.sh", *where, *TRAIN)[0]
    command = train[-1].partition("--command=")[2]
    assert "--worker=all" in train and command.startswith("cd tcq && { nohup ../venv/bin/tcq train --distributed ")
    assert split(command.partition("nohup ")[2].partition(" >")[0]) == [
        "../venv/bin/tcq",
        "train",
        "--distributed",
        *TRAIN[1:],
    ]
    assert "--command=kill -TERM $(cat tcq.pid)" in calls("tpu.sh", *where, "stop")[0][0][0]
    assert "tail -n 100 -F tcq.log" in calls("tpu.sh", *where, "logs")[0][0][0][-1]
    assert {"delete", "--quiet"} <= set(calls("tpu.sh", *where, "delete")[0][0][0])
    called, output = calls("tpu.sh", *where, "--dry_run", *TRAIN)
    assert not called and "gcloud compute tpus tpu-vm ssh pod" in output and "bits=32" in output
    for wrong in (
        ["create"],
        ["--zone=z", "create"],
        [*where, "create"],
        [*where, "fly"],
        [*where, "--tipe=x", "create"],
    ):
        assert calls("tpu.sh", *wrong, status=2)[0] == []


def test_slurm(calls):
    ((command, _),), _ = calls("slurm.sh", "--nodes=2", "--gpus=8", "--time=1:00:00", "--partition=gpu", "--", *TRAIN)
    assert {"--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=1:00:00", "--partition=gpu"} <= set(
        command
    )
    assert {"--requeue", "--signal=TERM@60", "--open-mode=append"} <= set(command)
    work = command[-1].removeprefix("--wrap=")
    assert split(work.splitlines()[0])[2:] == ["python", "-m", "tcq", "train", "--distributed", *TRAIN[1:]]
    for status, requeued in ((0, False), (143, True), (1, False)):
        script = f"srun() {{ return {status}; }}; scontrol() {{ echo $*; }}; SLURM_JOB_ID=7\n{work}"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
        assert done.returncode == status and (done.stdout == "requeue 7\n") == requeued
    called, output = calls("slurm.sh", "--dry_run", "--", *TRAIN)
    assert not called and output.startswith("sbatch ")
    calls("slurm.sh", "--nodes=2", status=2)
    calls("slurm.sh", "--nods=2", "--", "train", status=2)


def test_kubernetes(calls):
    ((command, given),), _ = calls(
        "kubernetes.sh", "--name=a", "--image=r/tcq", "--pods=4", "--gpus=8", "--claim=disk", "start", *TRAIN
    )
    assert command == ["kubectl", "apply", "-f", "-"]
    job = yaml.safe_load(given)
    assert job["kind"] == "JobSet" and job["metadata"]["name"] == "a"
    workers = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (workers["parallelism"], workers["completions"], workers["completionMode"]) == (4, 4, "Indexed")
    pod = workers["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == [
        *["python", "-m", "tcq", *TRAIN, "--coordinator=a-workers-0-0.a:8476", "--processes=4", "--process_id=$(INDEX)"]
    ]
    assert container["image"] == "r/tcq" and container["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert container["volumeMounts"] == [{"name": "shared", "mountPath": "/shared"}]
    assert pod["volumes"] == [{"name": "shared", "persistentVolumeClaim": {"claimName": "disk"}}]
    assert pod["terminationGracePeriodSeconds"] > 30
    assert calls("kubernetes.sh", "--name=a", "logs")[0][0][0] == [
        "kubectl",
        "logs",
        "-f",
        "job/a-workers-0",
        "-c",
        "tcq",
    ]
    assert calls("kubernetes.sh", "--name=a", "delete")[0][0][0] == ["kubectl", "delete", "jobset", "a"]
    called, output = calls("kubernetes.sh", "--dry_run", "--image=r/tcq", "start", *TRAIN)
    assert not called and "kubectl apply -f -" in output and "kind: JobSet" in output
    calls("kubernetes.sh", "start", *TRAIN, status=2)


def test_gke(calls):
    where = ("--cluster=c", "--project=p", "--zone=z")
    ((command, _),), _ = calls("gke.sh", *where, "--type=v5litepod-16", "--image=r/tcq", "start", *TRAIN)
    assert command[:4] == ["xpk", "workload", "create", "--cluster=c"]
    assert {"--tpu-type=v5litepod-16", "--docker-image=r/tcq", "--num-slices=1"} <= set(command)
    assert split(command[-1].removeprefix("--command=")) == [
        "python",
        "-m",
        "tcq",
        "train",
        "--distributed",
        *TRAIN[1:],
    ]
    assert calls("gke.sh", *where, "delete")[0][0][0][:3] == ["xpk", "workload", "delete"]
    calls("gke.sh", "start", *TRAIN, status=2)
    assert calls("gke.sh", *where, "--dry_run", "status")[1].startswith("xpk workload list")


@pytest.mark.whole
def test_a_closed_terminal_ends_all_processes(tmp_path):
    flags = small.flags("train.total_steps=100000")
    command = small.launcher(2, "train", "--config=configs/digits.py", f"--workdir={tmp_path}", *flags)
    process = subprocess.Popen(command, env=small.environment(), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "step 5/" in line:
            process.send_signal(signal.SIGHUP)
            break
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGHUP and output.count("stopped by SIGHUP after step") == 2, output
