"""The check before money is spent: versions, devices, memory and disk, and whether a config and its images fit them."""

import os
import platform
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import jax

from tcq import config as configs
from tcq.data import protocols, sources, splits
from tcq.models import retriever

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorflow-datasets",
    "ml-collections",
    "numpy",
)


def report(config: str | None = None, overrides: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """What is found, one line each; and the problems. With a config the images are opened (and decoded, once) too."""
    lines = [f"python {platform.python_version()} on {platform.platform()}"]
    lines.append(", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    kinds = sorted({d.device_kind for d in jax.devices()})
    lines.append(f"{jax.device_count()} devices ({', '.join(kinds)}) in {jax.process_count()} processes")
    lines.append(f"free disk here {shutil.disk_usage(Path.cwd()).free / 2**30:,.0f} GiB, {os.cpu_count()} CPU cores")
    if config is None:
        return lines, []
    try:
        c = configs.load(config, overrides)
        B = c.data.batch_size
        lines.append(
            f"config {config}: batch {B}, {configs.bits(c)} bits, clip {configs.clip_count(c.loss.clip, B)} of {2 * B - 2}"
        )
        found = retriever.shapes(retriever.from_config(c), c.data.image_size)
        lines.append(
            f"model: {retriever.parameter_count(found['params']):,} parameters, weights {c.model.weights or 'drawn'}"
        )
        source = sources.open_source(c.data)
        lines.append(f"{c.data.source}: {len(source.images):,} images, {len(source.skipped)} skipped")
        split = splits.of_source(source, c.data)
        lines.append(", ".join(f"{len(part):,} {name}" for name, part in split._asdict().items()))
        configs.check_run(
            c,
            num_devices=jax.device_count(),
            num_train=len(split.train),
            num_validation=len(split.validation),
            platform=jax.default_backend(),
        )
    except (configs.ConfigError, sources.SourceError, protocols.ProtocolError) as error:
        return lines, [str(error)]
    return lines, []


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "is not installed"
