"""A config that trains in a second, and ways to run tcq as a user does."""

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from tcq import config as configs
from tcq.models import retriever
from tcq.runtime import devices as parallel
from tcq.train import optimizer
from tcq.train import step as learner

SMALL = (
    "model.width=16",
    "model.depth=1",
    "quantizer.num_codebooks=2",
    "quantizer.num_codewords=4",
    "quantizer.codeword_dim=4",
    "quantizer.init_images=64",
    "data.batch_size=16",
    "data.threads=1",
    "optim.warmup_steps=2",
    "train.total_steps=12",
    "train.log_every_steps=1",
    "eval.every_steps=6",
    "eval.batch_size=16",
    "checkpoint.every_steps=3",
)


def config(*overrides: str, file: str = "configs/digits.py") -> ConfigDict:
    return configs.load(file, [*SMALL, *overrides])


def tcq(*arguments: str, devices: int = 1, cwd: Path | None = None, timeout: float = 300, **options):
    """Runs `python -m tcq ...` in a process of its own."""
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
    """Runs a command of tcq in so many processes with so many devices each, as a user does on one machine."""
    return subprocess.run(
        launcher(processes, *arguments, devices=devices),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def launcher(processes: int, *arguments: str, devices: int = 1) -> list[str]:
    file = str(Path(__file__).resolve().parent.parent / "launch" / "local.py")
    return [sys.executable, file, f"--processes={processes}", f"--cpu_devices={devices}", "--", *arguments]


def environment(devices: int = 1) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    root = str(Path(__file__).resolve().parent.parent)
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": root}


def small_flags(*overrides: str) -> list[str]:
    return [f"--config.{o}" for o in (*SMALL, *overrides)]


def step(config: ConfigDict, num_images: int = 64) -> tuple[np.ndarray, Any, learner.TrainState]:
    """Random images of 8 x 8 pixels, the body of a training step, and the state before the first one."""
    model = retriever.from_config(config, axis_name=parallel.AXIS)
    rule = optimizer.make(config, config.train.total_steps)
    images = np.random.RandomState(0).randint(0, 256, (num_images, 8, 8, 3)).astype(np.uint8)
    body = learner.step_body(model, rule, config, config.train.total_steps)
    return images, body, learner.initial_state(config, model, rule, images)


def steps(body: Any, state: Any, batches: Iterable[dict[str, np.ndarray]], devices: int) -> list[tuple[Any, Any]]:
    """State and logs after each step on the first so many devices, compiled once."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), (parallel.AXIS,))
    state = jax.device_put(state, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    step = jax.pmap(
        body, parallel.AXIS, in_axes=(None, None, 0), out_axes=(None, None), devices=jax.devices()[:devices]
    )
    results = []
    for batch in batches:
        state, logs = jax.block_until_ready(step(state, (), batch))
        results.append(parallel.fetch((state, logs)))
    return results


def batch(rows: np.ndarray, devices: int, first: int = 0) -> dict[str, np.ndarray]:
    """Rows as a training step takes them; their places count from `first`."""
    index = np.arange(first, first + len(rows), dtype=np.int32)
    return {"image": rows.reshape(devices, -1, *rows.shape[1:]), "index": index.reshape(devices, -1)}
