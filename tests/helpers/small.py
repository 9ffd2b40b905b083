"""A config that trains in a second, and ways to run tcq as a user does."""

import contextlib
import functools
import io
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from tcq import cli
from tcq import config as configs
from tcq.models import retriever
from tcq.runtime import devices, signals
from tcq.train import optimizer, step

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ROOT / "launch" / "local.py"
SMALL = (
    "model.width=16",
    "model.depth=1",
    "quantizer.num_codebooks=2",
    "quantizer.num_codewords=4",
    "quantizer.codeword_dim=4",
    "quantizer.init_images=64",
    "data.batch_size=16",
    "data.threads=1",
    *(f"data.augment.{name}=0" for name in ("crop", "rotate", "shift", "brightness", "contrast", "jitter")),
    "data.augment.flip=0.5",
    "loss.temperature=0.5",
    "optim.warmup_steps=2",
    "train.total_steps=12",
    "train.log_every_steps=1",
    "eval.every_steps=6",
    "eval.batch_size=16",
    "checkpoint.every_steps=3",
)


def config(*overrides: str, file: str = "configs/digits.py") -> ConfigDict:
    return configs.load(file, [*SMALL, *overrides])


def shared(*overrides: str) -> ConfigDict:
    """The config of the fixture `digits_run`: every checkpoint is kept, and the state has a queue."""
    return config("checkpoint.keep=3", "loss.queue=8", "loss.clip=0.1", *overrides)


def flags(*overrides: str) -> list[str]:
    return [f"--config.{o}" for o in (*SMALL, *overrides)]


def main(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of tcq in this process, which has 8 devices: its exit status and output."""
    out, err = io.StringIO(), io.StringIO()
    logger = logging.getLogger("tcq")
    before = logger.level, logger.propagate
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = cli.main(arguments)
            except SystemExit as stop:  # argparse
                status = stop.code
    finally:
        logger.handlers.clear()
        logger.setLevel(before[0])
        logger.propagate = before[1]
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def assert_refused(done: subprocess.CompletedProcess[str], *messages: str) -> None:
    """One message, without a traceback, and exit status 2."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for message in messages:
        assert message in done.stderr, done.stderr


@contextlib.contextmanager
def signal_at(text: str, number: int = signal.SIGTERM) -> Iterator[None]:
    """Lets this process receive a signal when the training loop logs a text, and forgets the signal afterwards."""

    class Sender(logging.Handler):
        def emit(self, record):
            if text in record.getMessage():
                signals.handle(number, None)

    sender = Sender()
    logger = logging.getLogger("tcq.train.loop")
    logger.addHandler(sender)
    try:
        yield
    finally:
        logger.removeHandler(sender)
        signals.reset()


def tcq(*arguments: str, devices: int = 1, cwd: Path | None = None, timeout: float = 300, **options):
    """`python -m tcq ...` in a process of its own."""
    return subprocess.run(
        command(*arguments),
        env=environment(devices),
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        **options,
    )


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tcq", *arguments]


def several(
    processes: int, *arguments: str, devices: int = 1, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """A command of tcq in several processes with some devices each, as a user runs it on one machine."""
    return subprocess.run(
        launcher(processes, *arguments, devices=devices),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def launcher(processes: int, *arguments: str, devices: int = 1) -> list[str]:
    return [sys.executable, str(LAUNCHER), f"--processes={processes}", f"--cpu_devices={devices}", "--", *arguments]


def environment(devices: int = 1) -> dict[str, str]:
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def first_step(config: ConfigDict, num_images: int = 64) -> tuple[np.ndarray, Any, step.TrainState]:
    """Random images of 8 x 8 pixels, the body of a training step, and the state before the first one."""
    return _first_step(configs.to_json(config), num_images, jax.config.jax_enable_x64)


@functools.lru_cache(maxsize=32)
def _first_step(text: str, num_images: int, x64: bool) -> tuple[np.ndarray, Any, step.TrainState]:
    config = configs.from_json(text)
    model = retriever.from_config(config, axis_name=devices.AXIS)
    rule = optimizer.make(config, config.train.total_steps)
    images = np.random.RandomState(0).randint(0, 256, (num_images, 8, 8, 3)).astype(np.uint8)
    body = step.step_body(model, rule, config, config.train.total_steps)
    return images, body, step.initial_state(config, model, rule, images)


def run_steps(
    body: Any, state: Any, batches: Iterable[dict[str, np.ndarray]], num_devices: int
) -> list[tuple[Any, Any]]:
    """State and logs after each step on the first devices, compiled once."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:num_devices]), (devices.AXIS,))
    state = jax.device_put(state, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    run, results = compiled(body, num_devices), []
    for batch in batches:
        state, logs = jax.block_until_ready(run(state, (), batch))
        results.append(devices.fetch((state, logs)))
    return results


@functools.lru_cache(maxsize=32)
def compiled(body: Any, num_devices: int) -> Any:
    """A step on the first devices, without donation of the state."""
    first = jax.devices()[:num_devices]
    return jax.pmap(body, devices.AXIS, in_axes=(None, None, 0), out_axes=(None, None), devices=first)


def batch(rows: np.ndarray, num_devices: int, first: int = 0) -> dict[str, np.ndarray]:
    """Rows as a training step takes them; their indices count from `first`."""
    index = np.arange(first, first + len(rows), dtype=np.int32)
    return {"image": rows.reshape(num_devices, -1, *rows.shape[1:]), "index": index.reshape(num_devices, -1)}
