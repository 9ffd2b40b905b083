"""Checks versions, devices, memory and disk before a long run.

It also checks whether a config and its images fit them.
"""

import os
import platform
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from tcq import config as configs
from tcq.data import protocols, source, sources, splits
from tcq.models import retriever
from tcq.runtime import processes, storage

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
GIB = 2**30
SHOWN = 50  # classes
FILES = 10  # skipped files that are shown


class Expected(NamedTuple):
    """The processes and devices that a run should have; None is not checked."""

    processes: int | None = None
    devices: int | None = None  # of all processes


class Findings(NamedTuple):
    """Lines to show, and problems."""

    lines: list[str]
    problems: list[str]


def report(
    config: str | None = None,
    overrides: Sequence[str] = (),
    *,
    workdir: str | Path | None = None,
    expected: Expected = Expected(),  # noqa: B008  # it is immutable
) -> Findings:
    """Checks the machine and, if given, a workdir, a config and its images.

    The images are decoded and cached. In a run of several processes all of them call it, and all get the problems of
    each.
    """
    findings = [_machine(expected)]
    if workdir:
        findings.append(_workdir(workdir, config, overrides))
    if config:
        findings.append(_config(config, overrides, workdir))
    lines = [line for part in findings for line in part.lines]
    problems = [problem for part in findings for problem in part.problems]
    return Findings(lines, _merge(processes.exchange(problems)))


def _merge(problems: Sequence[Sequence[str]]) -> list[str]:
    """The problems of all processes, each once, with the processes that have it unless all do."""
    owners = {p: [str(i) for i, own in enumerate(problems) if p in own] for listed in problems for p in listed}
    return [p if len(i) == len(problems) else f"process {', '.join(i)}: {p}" for p, i in owners.items()]


def _machine(expected: Expected) -> Findings:
    """Versions, devices, processes, memory."""
    versions = {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()}
    kinds = sorted({d.device_kind for d in jax.devices()})
    lines = [
        f"python {platform.python_version()} on {platform.platform()}",
        ", ".join(f"{name} {versions[name]}" for name in PACKAGES),
        f"{jax.device_count()} devices ({', '.join(kinds)}) in {jax.process_count()} processes",
        f"memory {_free_memory():,.0f} GiB free on this host{_device_memory()}, {os.cpu_count()} CPU cores",
    ]
    problems = [
        f"{what}: {count} found, must be {number}: check the launch command"
        for what, count, number in (
            ("processes", jax.process_count(), expected.processes),
            ("devices", jax.device_count(), expected.devices),
        )
        if number is not None and count != number
    ]
    hosts = processes.exchange([platform.node(), jax.local_device_count(), versions])
    if processes.several():
        lines += [f"process {i} on {host}: {count} devices" for i, (host, count, _) in enumerate(hosts)]
    _, first_count, first_versions = hosts[0]
    for i, (host, count, other) in enumerate(hosts):
        if other != first_versions:
            differing = [f"{k} {v} (not {first_versions[k]})" for k, v in other.items() if v != first_versions[k]]
            problems.append(f"process {i} on {host} has other versions than process 0: {', '.join(differing)}")
        if count != first_count:
            problems.append(f"process {i} on {host} has {count} devices, process 0 has {first_count}")
    return Findings(lines, problems)


def _workdir(workdir: str | Path, config: str | None, overrides: Sequence[str]) -> Findings:
    """Whether all processes can write to a workdir, and whether it holds a run of the config."""
    lines, problems = _bucket(str(workdir)) if storage.is_url(workdir) else _folder(Path(workdir))
    try:
        stored = storage.read(storage.join(workdir, "config.json"))
        if config and stored is not None:
            loaded = configs.load(config, overrides, workdir=workdir)
            changes = configs.differences(configs.from_json(stored.decode()), loaded)
            if changes:
                problems.append(
                    f"{str(workdir)!r} holds a run with another config, which train refuses without --allow_changes: "
                    f"{'; '.join(changes)}"
                )
            else:
                lines.append("it holds a run of this config, which train resumes")
    except (configs.ConfigError, storage.BucketError) as error:
        problems.append(f"{workdir}: {error}")
    return Findings(lines, problems)


def _bucket(url: str) -> Findings:
    """Whether a bucket can be written and read."""
    name = str(storage.join(url, f".doctor-{jax.process_index()}"))
    try:
        storage.write(name, b"written")
        readable = storage.read(name) == b"written"
        storage.remove(name)
    except storage.BucketError as error:
        return Findings([], [f"--workdir {url!r} cannot be written on {platform.node()}: {error}"])
    if not readable:
        return Findings([], [f"{name!r} was written, but is not found"])
    return Findings([f"workdir {url}: writable and readable"], [])


def _folder(workdir: Path) -> Findings:
    """Whether a folder is writable and shared by all processes, and how much disk is free."""
    lines, problems = [], []
    folder = workdir / ".doctor"
    existed = any(processes.exchange(workdir.is_dir()))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{jax.process_index()}").write_text(platform.node())
        written = True
    except OSError as error:
        written = False
        problems.append(f"--workdir {str(workdir)!r} cannot be written on {platform.node()}: {error.strerror}")
    processes.exchange(written)
    visible = sorted(int(p.name) for p in folder.iterdir()) if written else []
    missing = sorted(set(range(jax.process_count())) - set(visible))
    if written and missing:
        problems.append(
            f"--workdir {str(workdir)!r} is not shared: {platform.node()} does not see the files of process "
            f"{', '.join(map(str, missing))}"
        )
    if written:
        free = f"{shutil.disk_usage(workdir).free / GIB:,.0f} GiB free"
        lines.append(f"workdir {workdir}: {free}{'' if missing else ', visible to all processes'}")
    processes.exchange(visible)
    shutil.rmtree(folder, ignore_errors=True)
    processes.exchange(None)
    if written and not existed and processes.is_first() and not any(workdir.iterdir()):
        workdir.rmdir()
    return Findings(lines, problems)


def _config(config: str, overrides: Sequence[str], workdir: str | Path | None) -> Findings:
    """Whether a config and its images fit each other and the devices, as `train` would find."""
    lines = []
    try:
        c = configs.load(config, overrides, workdir=workdir)
        B, rule = c.data.batch_size, configs.clip_rule(c, 1)
        lines.append(
            f"config {config}: batch {B} global, {B // jax.process_count()} per process, "
            f"{B // jax.device_count()} per device, {configs.bits(c)} bits, "
            f"{rule.text(queued=c.loss.queue)}"
        )
        params = retriever.shapes(retriever.from_config(c), c.data.image_size)["params"]
        lines.append(f"model: {retriever.parameter_count(params):,} parameters, weights {c.model.weights or 'random'}")
        images = sources.open_source(c.data)
        lines += _source(c, images)
        split = splits.of_source(images, c.data)
        lines.append(", ".join(f"{len(part):,} {name}" for name, part in split._asdict().items()))
        configs.check_run(
            c, num_devices=jax.device_count(), num_train=len(split.train), num_validation=len(split.validation)
        )
        cache = Path(c.data.cache_dir).expanduser() if c.data.cache_dir else storage.cache_home()
        if cache.is_dir():
            lines.append(f"cache of decoded images: {shutil.disk_usage(cache).free / GIB:,.0f} GiB free")
    except (configs.ConfigError, source.SourceError, protocols.ProtocolError, storage.BucketError, OSError) as error:
        return Findings(lines, [str(error)])
    return Findings(lines, [])


def _source(config: ConfigDict, images: source.Source) -> list[str]:
    """The number of images, classes with sizes, and the first skipped or repaired files."""
    lines = [f"{config.data.source}: {len(images.images):,} images, {len(images.skipped)} skipped"]
    if images.labels is not None:
        hot = images.labels.ndim == 2
        counts = images.labels.sum(axis=0) if hot else np.bincount(images.labels, minlength=len(images.classes))
        listed = [f"{name} {count:,}" for name, count in zip(images.classes, counts.tolist(), strict=True)]
        rest = f" and {len(listed) - SHOWN:,} more" if len(listed) > SHOWN else ""
        lines.append(f"{len(listed):,} classes: {', '.join(listed[:SHOWN])}{rest}")
    for what, rows in (("skipped", images.skipped), ("repaired", images.repaired or [])):
        lines += [f"{what}: {row['path']}: {row['reason']}" for row in rows[:FILES]]
    return lines


def _free_memory() -> float:
    """In GiB."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB


def _device_memory() -> str:
    stats = jax.local_devices()[0].memory_stats() or {}
    return f", {stats['bytes_limit'] / GIB:,.0f} GiB on each device" if "bytes_limit" in stats else ""


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "is not installed"
