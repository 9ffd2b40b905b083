"""A config that trains in a second, and ways to run tcq as a user does."""

import os
import subprocess
import sys
from pathlib import Path

from ml_collections import ConfigDict

from tcq import config as configs

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


def environment(devices: int = 1) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    root = str(Path(__file__).resolve().parent.parent)
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": root}


def small_flags(*overrides: str) -> list[str]:
    return [f"--config.{o}" for o in (*SMALL, *overrides)]
