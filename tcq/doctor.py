"""The check before money is spent: versions, devices, memory and disk, and whether a config and its images fit them."""

import os
import platform
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax

from tcq import config as configs
from tcq.data import protocols, sources, splits
from tcq.models import retriever
from tcq.runtime import processes
from tcq.runtime import storage as buckets

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


class Expected(NamedTuple):
    """What a run was paid for; None is not checked."""

    processes: int | None = None
    devices: int | None = None  # of all processes


def report(
    config: str | None = None,
    overrides: Sequence[str] = (),
    *,
    workdir: str | Path | None = None,
    expected: Expected = Expected(),  # noqa: B008  # it cannot be changed
) -> tuple[list[str], list[str]]:
    """What is found, one line each; and the problems. With a config the images are opened (and decoded, once) too.

    In a run of several processes all of them call it, and all get all of their problems.
    """
    lines, problems = [], []
    for part in (
        lambda: _machine(expected),
        lambda: _workdir(workdir, config, overrides) if workdir else ([], []),
        lambda: _config(config, overrides) if config else ([], []),
    ):
        found, wrong = part()
        lines += found
        problems += wrong
    return lines, _of_all(processes.exchange(problems))


def _of_all(listed: Sequence[Sequence[str]]) -> list[str]:
    """The problems of all processes, each once, with whose it is unless it is everybody's."""
    whose = {p: [str(i) for i, mine in enumerate(listed) if p in mine] for problems in listed for p in problems}
    return [p if len(i) == len(listed) else f"process {', '.join(i)}: {p}" for p, i in whose.items()]


def _machine(expected: Expected) -> tuple[list[str], list[str]]:
    """Versions, devices, processes, memory."""
    versions = {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()}
    lines = [f"python {platform.python_version()} on {platform.platform()}"]
    lines.append(", ".join(f"{name} {versions[name]}" for name in PACKAGES))
    kinds = sorted({d.device_kind for d in jax.devices()})
    lines.append(f"{jax.device_count()} devices ({', '.join(kinds)}) in {jax.process_count()} processes")
    lines.append(f"memory {_memory():,.0f} GiB of this host{_device_memory()}, {os.cpu_count()} CPU cores")
    problems = [
        f"{found} {what} are here, {want} are expected"
        for what, found, want in (
            ("processes", jax.process_count(), expected.processes),
            ("devices", jax.device_count(), expected.devices),
        )
        if want is not None and found != want
    ]
    counts = processes.exchange([platform.node(), jax.local_device_count(), versions])
    if processes.several():
        lines += [f"  process {i} on {host}: {count} devices" for i, (host, count, _) in enumerate(counts)]
    for i, (host, count, other) in enumerate(counts):
        if other != counts[0][2]:
            odd = ", ".join(f"{k} {v} (not {counts[0][2][k]})" for k, v in other.items() if v != counts[0][2][k])
            problems.append(f"process {i} on {host} has other versions than process 0: {odd}")
        if count != counts[0][1]:
            problems.append(f"process {i} on {host} has {count} devices, process 0 has {counts[0][1]}")
    return lines, problems


def _workdir(workdir: str | Path, config: str | None, overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Whether all processes can write to a workdir, and what it holds."""
    if buckets.is_url(workdir):
        lines, problems = _bucket(str(workdir))
    else:
        lines, problems = _shared(Path(workdir))
    try:
        stored = buckets.read(buckets.join(workdir, "config.json"))
        if config and stored is not None:
            changed = configs.differences(
                configs.from_json(stored.decode()), configs.load(config, overrides, workdir=workdir)
            )
            if changed:
                problems.append(
                    f"{str(workdir)!r} holds a run with another config, which train refuses unless --allow_changes: "
                    f"{'; '.join(changed)}"
                )
            else:
                lines.append("  it holds a run of this config, which will go on")
    except (configs.ConfigError, buckets.BucketError) as error:
        problems.append(f"{workdir}: {error}")
    return lines, problems


def _bucket(url: str) -> tuple[list[str], list[str]]:
    """Whether a bucket can be written and read."""
    name = str(buckets.join(url, f".doctor-{jax.process_index()}"))
    try:
        buckets.write(name, b"written")
        written = buckets.read(name) == b"written"
        buckets.remove(name)
    except buckets.BucketError as error:
        return [], [f"--workdir {url!r} cannot be written on {platform.node()}: {error}"]
    return ([f"workdir {url}: written and read"], []) if written else ([], [f"{name!r} was written, and is not there"])


def _shared(workdir: Path) -> tuple[list[str], list[str]]:
    """Whether a folder can be written by all processes and seen by them, and how much room it has."""
    lines, problems = [], []
    folder, mine = workdir / ".doctor", f"{jax.process_index()}"
    existed = any(processes.exchange(workdir.is_dir()))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / mine).write_text(platform.node())
        written = True
    except OSError as error:
        written = False
        problems.append(f"--workdir {str(workdir)!r} cannot be written on {platform.node()}: {error.strerror}")
    processes.exchange(written)
    seen = sorted(int(p.name) for p in folder.iterdir()) if written else []
    missing = sorted(set(range(jax.process_count())) - set(seen))
    if written and missing:
        problems.append(
            f"--workdir {str(workdir)!r} is not shared: on {platform.node()} what process {', '.join(map(str, missing))} wrote "
            f"is not seen"
        )
    if written:
        room = f"{shutil.disk_usage(workdir).free / 2**30:,.0f} GiB free"
        lines.append(f"workdir {workdir}: {room}{'' if missing else ', seen by all processes'}")
    processes.exchange(seen)
    shutil.rmtree(folder, ignore_errors=True)
    processes.exchange(None)
    if written and not existed and processes.first() and not any(workdir.iterdir()):
        workdir.rmdir()
    return lines, problems


def _config(config: str, overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Whether a config and its images fit each other and the devices."""
    lines = []
    try:
        c = configs.load(config, overrides)
        B, negatives = c.data.batch_size, 2 * c.data.batch_size - 2 + c.loss.queue
        lines.append(
            f"config {config}: batch {B} global, {B // jax.process_count()} per process, {B // jax.device_count()} per device, "
            f"{configs.bits(c)} bits, clip {configs.clip_count(c.loss.clip, B, queue=c.loss.queue)} of {negatives}"
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
            c, num_devices=jax.device_count(), num_train=len(split.train), num_validation=len(split.validation)
        )
        cache = Path(c.data.cache_dir or "~/.cache").expanduser()
        if cache.is_dir():
            lines.append(f"cache of decoded images: {shutil.disk_usage(cache).free / 2**30:,.0f} GiB free")
    except (configs.ConfigError, sources.SourceError, protocols.ProtocolError) as error:
        return lines, [str(error)]
    return lines, []


def _memory() -> float:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def _device_memory() -> str:
    found = jax.local_devices()[0].memory_stats() or {}
    return f", {found['bytes_limit'] / 2**30:,.0f} GiB of each device" if "bytes_limit" in found else ""


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "is not installed"
