"""Starts the processes of one run on this machine: one for each GPU, or several on a CPU to try it.

    python launch/local.py --processes=4 -- train --config=configs/digits.py --workdir=runs/digits

Write a tcq command that takes --distributed (train, evaluate, embed, index, doctor) after --. The output of process i
begins with [i]. SIGTERM, SIGINT and SIGHUP are passed to all processes. When one fails, the others have --grace seconds
to exit and are then killed. The exit status is that of the first process that failed.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time


def commands(arguments: argparse.Namespace) -> list[tuple[dict[str, str], list[str]]]:
    """The environment to add and the command line of each process."""
    port = arguments.port or _free_port()
    pairs = []
    for i in range(arguments.processes):
        command = [sys.executable, "-m", "tcq", *arguments.command, f"--coordinator=localhost:{port}"]
        command += [f"--processes={arguments.processes}", f"--process_id={i}"]
        environment = {"PYTHONUNBUFFERED": "1"}
        if arguments.cpu_devices:
            environment["JAX_PLATFORMS"] = "cpu"
            environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={arguments.cpu_devices}"
        else:
            environment["JAX_LOCAL_DEVICE_IDS"] = str(i)  # GPU i
        pairs.append((environment, command))
    return pairs


def run(arguments: argparse.Namespace) -> int:
    """Starts all processes, waits for them, and returns the exit status."""
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that only this program sends them signals
        )
        for environment, command in commands(arguments)
    ]

    def pass_on(number: int, _: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup does
            signal.signal(number, pass_on)
    readers = [threading.Thread(target=_show, args=(i, process)) for i, process in enumerate(processes)]
    for reader in readers:
        reader.start()
    status, deadline = 0, None
    while None in (statuses := [process.poll() for process in processes]):
        failed = [(i, s) for i, s in enumerate(statuses) if s]
        if failed and deadline is None:
            i, status = failed[0]
            print(f"process {i} ended first, with {_describe(status)}", flush=True)
            deadline = time.monotonic() + arguments.grace
        if deadline and time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.1)
    for reader in readers:
        reader.join()
    status = status or next((s for s in statuses if s), 0)
    return 128 - status if status < 0 else status


def _describe(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"


def _show(i: int, process: "subprocess.Popen[bytes]") -> None:
    assert process.stdout
    for line in process.stdout:
        sys.stdout.write(f"[{i}] {line.decode(errors='replace')}")
        sys.stdout.flush()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, required=True, help="number of processes; with GPUs one for each")
    parser.add_argument(
        "--cpu_devices", type=int, default=0, help="simulated CPU devices of each process (default: GPUs)"
    )
    parser.add_argument("--port", type=int, default=0, help="of the coordinator (default: a free one)")
    parser.add_argument("--grace", type=float, default=90.0, help="seconds for the others to exit when one has failed")
    parser.add_argument("--dry_run", action="store_true", help="print the commands and do nothing")
    parser.add_argument("command", nargs="+", metavar="-- COMMAND", help="a tcq command with its flags")
    arguments = parser.parse_args()
    if arguments.processes < 1:
        parser.error(f"--processes={arguments.processes} must be at least 1")
    if arguments.dry_run:
        for environment, command in commands(arguments):
            print(shlex.join([*(f"{k}={v}" for k, v in environment.items()), *command]))
        return 0
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
