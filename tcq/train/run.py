"""From config and workdir to a job for the loop: images, split, checkpoint, initial state."""

import logging
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from tcq import config as configs
from tcq import embed, encode
from tcq import workdir as workdirs
from tcq.data import protocols, splits
from tcq.data.loader import batches
from tcq.data.source import Source
from tcq.evaluate import clipped, held_out, kinds
from tcq.models import retriever
from tcq.runtime import devices, log, processes, storage
from tcq.train import loop, step
from tcq.train import optimizer as optimizers
from tcq.workdir import CONFIG, checkpoint
from tcq.workdir import journal as journals
from tcq.workdir.journal import Journal

NEIGHBOURS = "validation/neighbours"  # the name of `held_out.neighbours` in metrics.jsonl
LOST = 0.7  # of the nearest neighbours that the start finds: with fewer there is a warning (our choice)
INIT_VIEWS = 65_536  # of which the first projection learns in which directions views of one image differ

logger = logging.getLogger(__name__)


def read_data(
    config: ConfigDict, folder: Path, workdir: str | Path, *, allow_changes: bool
) -> tuple[Source, protocols.Split]:
    """The images and their split, the same in all processes.

    They are checked against the config, the devices and the run in the workdir, before images are embedded. `folder` is
    the local mirror of the workdir, which knows the order of the images.
    """
    processes.set_phase("reading the images")
    processes.on_first(lambda: workdirs.compare_config(folder, workdir, config, allow_changes=allow_changes))

    def ordered(source: Source) -> Source:
        source = workdirs.unchanged(folder, config.data, source)
        split = splits.of_source(source, config.data)
        configs.check_run(
            config, num_devices=jax.device_count(), num_train=len(split.train), num_validation=len(split.validation)
        )
        return source

    source = embed.open_source(config, ordered)
    split = splits.of_source(source, config.data)
    processes.require_same("config", configs.identity(config))
    return source, split


def claim(
    mirror: storage.Mirror,
    workdir: str | Path,
    config: ConfigDict,
    source: Source,
    split: protocols.Split,
    *,
    allow_changes: bool,
) -> list[str]:
    """`workdir.claim` by process 0, visible to all; returns the allowed changes of the config."""

    def claim() -> list[str]:
        changes = workdirs.claim(mirror.folder, workdir, config, source, split, allow_changes=allow_changes)
        mirror.upload()
        return changes

    changes = processes.on_first(claim)
    processes.require_visible(storage.join(workdir, CONFIG))
    return changes


def record_changes(mirror: storage.Mirror, config: ConfigDict, changes: list[str]) -> None:
    """`workdir.record_changes` by process 0."""

    def record() -> None:
        workdirs.record_changes(mirror.folder, config, changes)
        mirror.upload()

    if changes:
        processes.on_first(record)


def newest_state(
    config: ConfigDict, model: retriever.Retriever, optimizer: optax.GradientTransformation, manager: Any
) -> step.TrainState | None:
    """The state of the newest intact checkpoint; None if there is no checkpoint."""
    if not manager.all_steps():
        return None
    template = loop.items(step.state_template(config, model, optimizer))
    steps = checkpoint.candidates(manager, "latest")
    _, parts = checkpoint.restore_first_intact(manager, steps, template, move=True)
    return loop.from_items(parts)


def initial_state(
    config: ConfigDict,
    model: retriever.Retriever,
    optimizer: optax.GradientTransformation,
    source: Source,
    split: protocols.Split,
) -> step.TrainState:
    """The state before the first step, from training images.

    They are drawn randomly, as folders are sorted by class.
    """
    processes.set_phase("initializing")
    shuffled = np.random.RandomState(config.train.seed).permutation(split.train)
    drawn = np.sort(shuffled[: config.quantizer.init_images])
    views = None
    if config.quantizer.init == "opq":
        logger.info(f"optimizing the first projection on {len(drawn):,} images (quantizer.init=opq)")
        if source.views is not None:
            views = np.asarray(source.views[np.sort(shuffled[: INIT_VIEWS // source.views.shape[1]])])
    state = step.initial_state(config, model, optimizer, np.asarray(source.images[drawn]), views)
    return devices.from_first(state)  # FAISS may round differently on other machines


def make_job(
    config: ConfigDict,
    model: retriever.Retriever,
    optimizer: optax.GradientTransformation,
    source: Source,
    split: protocols.Split,
    state: step.TrainState,
    *,
    manager: Any,
    mirror: storage.Mirror,
    profile: tuple[int, int] | None,
) -> loop.Job:
    """Everything the loop needs to train from a state on."""
    steps = configs.total_steps(config, len(split.train))
    rows, indices = _training_rows(config, model, source, split, state)
    data: Any = ()
    if len(indices) * rows[:1].nbytes <= config.data.resident * 2**20:
        data, rows = devices.replicate(np.asarray(rows[indices])), None
        logger.info(f"the training images are on every device ({data.nbytes / 2**20:,.1f} MiB)")

    journal = open_journal(mirror, state)
    if not int(state.step) and retriever.takes_embeddings(model) and len(split.validation) > 1:
        _log_neighbours(
            encode.Encoder(config, model, devices.place(loop.items(state)["variables"]), 0), source, split, journal
        )

    def validate(variables: retriever.Variables, number: int) -> dict[str, float]:
        encoder = encode.Encoder(config, model, devices.place(variables), number)
        values = held_out.validate(encoder, source, split)
        if number == steps:
            _warn_of_lost_neighbours(mirror.folder, values)
            _name_judge(config, mirror.folder)
            clipped.write(mirror.folder, encoder, source, split)
        return values

    return loop.Job(
        config=config,
        steps=steps,
        run=devices.pmap_step(step.step_body(model, optimizer, config, steps)),
        data=data,
        stream=partial(_batches, config, rows, indices),
        validate=validate,
        manager=manager,
        journal=journal,
        profile=(mirror.folder / "profile", *profile) if profile else None,
    )


def _log_neighbours(encoder: encode.Encoder, source: Source, split: protocols.Split, journal: Journal) -> None:
    """Records `held_out.neighbours` before the first step."""
    share = held_out.neighbours(encoder, source, split)
    journal.write(0, {NEIGHBOURS: share})
    logger.info(f"before the first step: neighbours {share:.4f}")


def _warn_of_lost_neighbours(folder: Path, values: dict[str, float]) -> None:
    """Compares with the record of the start, which a resumed run has, too."""
    if not processes.is_first() or "neighbours" not in values:
        return
    start = next((line[NEIGHBOURS] for line in journals.read(folder / journals.METRICS) if NEIGHBOURS in line), 0)
    if values["neighbours"] < LOST * start:
        logger.warning(
            f"codes find {values['neighbours']:.0%} of the nearest embeddings, and {start:.0%} before the first step: "
            f"they tell fewer, coarser kinds apart. If that is not wanted, say how many kinds there are (kinds=), or "
            f"lower loss.temperature"
        )


def _name_judge(config: ConfigDict, folder: Path) -> None:
    """Names `tcq judge` to those who train on photographs, and have not said what is alike.

    Only its own settings and those of `kinds=` have its temperature.
    """
    if processes.is_first() and config.model.embedder and config.loss.temperature != kinds.TEMPERATURE:
        logger.info(
            f"`tcq judge --workdir={folder}` asks which images are alike, and says how much to clip; on photographs "
            f"ten answers gained mAP over the shipped settings (docs/clipping.md)"
        )


def open_journal(mirror: storage.Mirror, state: step.TrainState) -> Journal:
    """The journal of the run from a state on."""
    return Journal(mirror.folder, step=int(state.step), writes=processes.is_first(), upload=mirror.upload)


def _training_rows(
    config: ConfigDict, model: retriever.Retriever, source: Source, split: protocols.Split, state: step.TrainState
) -> tuple[Any, np.ndarray]:
    """Training data and its rows to train on: images, or views a frozen backbone embeds once."""
    if retriever.takes_embeddings(model):
        views = source.views
        if views is None:
            views = source.images[:, None] if isinstance(source.images, np.ndarray) else source.images.with_axis()
        return views, split.train
    if config.optim.frozen_blocks >= 0 or not config.data.views:
        return source.images, split.train
    encoder = encode.Encoder(config, model, loop.items(state)["variables"], int(state.step))
    start = time.monotonic()
    rows = encode.embed_views(encoder, source.images, split.train)
    logger.info(
        f"the backbone is frozen: {rows.shape[0]:,} x {rows.shape[1]} views embedded once in "
        f"{log.duration(time.monotonic() - start)} ({rows.nbytes / 2**30:,.2f} GiB)"
    )
    return rows, np.arange(len(rows))


def _batches(config: ConfigDict, rows: Any, indices: np.ndarray, first_step: int) -> Iterator[dict[str, np.ndarray]]:
    return batches(
        rows,
        indices,
        batch_size=config.data.batch_size,
        seed=config.train.seed,
        first_step=first_step,
        num_devices=jax.local_device_count(),
        process=jax.process_index(),
        num_processes=jax.process_count(),
        threads=config.data.threads,
    )


def log_start(config: ConfigDict, source: Source, split: protocols.Split, state: step.TrainState) -> None:
    """Logs source, split, model, batch and steps at the start of a run."""
    B, q, steps = config.data.batch_size, config.quantizer, configs.total_steps(config, len(split.train))
    rule = configs.clip_rule(config, steps)
    labels = "no labels" if source.labels is None else f"labels of {_summarize(source.classes)}, used only to score"
    kind = "images" if source.images.ndim == 4 else f"embeddings of {source.images.shape[1]:,} numbers"
    logger.info(f"{config.data.source}: {len(source.images):,} {kind}, {labels}; {len(source.skipped)} files skipped")
    logger.info(", ".join(f"{len(part):,} {name}" for name, part in split._asdict().items()))
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    trained = sum(x.size for path, x in leaves if not optimizers.is_frozen(path, config))
    logger.info(
        f"model: {retriever.parameter_count(state.params):,} parameters, {trained:,} of them trained, "
        f"{configs.bits(config)} bits per image ({q.num_codebooks} codebooks of {q.num_codewords} codewords), "
        f"{rule.text(queued=config.loss.queue)}"
    )
    logger.info(
        f"batch: {B} global, {B // jax.process_count()} per process, {B // jax.device_count()} per device "
        f"({jax.device_count()} x {jax.devices()[0].device_kind})"
    )
    warmup = configs.warmup_steps(config, steps)
    if isinstance(config.optim.warmup_steps, int) and warmup != config.optim.warmup_steps:
        logger.warning(
            f"optim.warmup_steps {config.optim.warmup_steps} does not fit a run of {steps:,} steps "
            f"and is reduced to {warmup}"
        )
    if int(state.step):
        logger.info(f"resuming from step {int(state.step):,} of {steps:,}")
    else:
        logger.info(f"{steps:,} steps; the first one compiles")


def _summarize(names: list[str]) -> str:
    return f"{len(names)} classes ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
