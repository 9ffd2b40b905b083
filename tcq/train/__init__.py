"""Learning: everything that the loop needs, from a config and a workdir."""

import json
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from tcq import config as configs
from tcq import encode
from tcq.data import protocols, splits
from tcq.data.loader import batches
from tcq.data.sources import Source, open_source
from tcq.evaluate import held_out as validation
from tcq.models import retriever
from tcq.runtime import devices as parallel
from tcq.runtime import processes
from tcq.runtime import storage as buckets
from tcq.runtime.devices import AXIS
from tcq.runtime.log import Journal, duration, say
from tcq.train import optimizer as optimizers
from tcq.train import step as learner
from tcq.train.loop import Job, TooManySkipped, TrainError, from_items, items, loop
from tcq.workdir import checkpoint

ADVICE = "A lower optim.learning_rate or a higher loss.temperature may help"


def train(
    config: ConfigDict, workdir: str | Path, *, profile: tuple[int, int] | None = None, allow_changes: bool = False
) -> dict[str, float]:
    """Trains until the last step, going on from the newest checkpoint of the workdir; returns the last validation.

    Leaves in it, which may be in a bucket, config.json, metrics.jsonl, TensorBoard events, checkpoints and, where files were
    skipped, skipped.jsonl; with `profile`, a first step and the one behind the last, also a trace of these in profile/.
    A workdir of another config is refused, or with `allow_changes` goes on with the new values, and changes.jsonl tells.
    In a run of several processes all of them call it, with one workdir that all of them see.
    Raises ConfigError, SourceError, CheckpointError, TrainError, or Stopped when asked to stop, with the state saved.
    """
    with buckets.at(workdir, writes=processes.first()) as at:
        return _train(config, workdir, at, profile=profile, allow_changes=allow_changes)


def _train(
    config: ConfigDict,
    workdir: str | Path,
    at: buckets.At,
    *,
    profile: tuple[int, int] | None,
    allow_changes: bool,
) -> dict[str, float]:
    processes.phase("reading the images")
    source = open_source(config.data)
    split = splits.of_source(source, config.data)
    configs.check_run(
        config,
        num_devices=jax.device_count(),
        num_train=len(split.train),
        num_validation=len(split.validation),
    )
    processes.same("images", {"names": splits.names_digest(source), "split": protocols.digest(split)})
    processes.same("config", configs.identity(config))
    changed = processes.on_first(lambda: _claim(workdir, at, config, source, split, allow_changes=allow_changes))
    processes.sees(buckets.join(workdir, "config.json"))

    steps = configs.total_steps(config, len(split.train))
    model = retriever.from_config(config, axis_name=AXIS)
    optimizer = optimizers.make(config, steps)
    processes.phase("opening checkpoints")
    with closing(checkpoint.open_manager(workdir, keep=config.checkpoint.keep, writable=True)) as manager:
        state = _newest(config, model, optimizer, manager)
        if changed:
            processes.on_first(lambda: _change(at, config, changed))
        if state is None:  # drawn, because folders are in the order of their classes
            processes.phase("initialising")
            drawn = np.random.RandomState(config.train.seed).permutation(split.train)[: config.quantizer.init_images]
            state = learner.initial_state(config, model, optimizer, np.asarray(source.images[np.sort(drawn)]))
        _introduce(config, source, split, state, steps)
        rows: np.ndarray | None
        rows, indices = _training_rows(config, model, source, split, state)
        data: Any = ()
        if len(indices) * rows[:1].nbytes <= config.data.resident * 2**20:
            data, rows = parallel.replicate(np.asarray(rows[indices])), None
            say(f"the training images lie on every device ({data.nbytes / 2**20:,.1f} MiB)")
        job = Job(
            config=config,
            steps=steps,
            run=parallel.pmap_step(learner.step_body(model, optimizer, config, steps)),
            data=data,
            stream=partial(_batches, config, rows, indices),
            validate=lambda variables, step: validation.held_out(
                encode.Encoder(config, model, variables, step), source, split
            ),
            manager=manager,
            journal=Journal(at.folder, step=int(state.step), writes=processes.first(), send=at.send),
            trace=(at.folder / "profile", *profile) if profile else None,
        )
        with closing(job.journal):
            try:
                return loop(job, state)
            except TooManySkipped as error:
                told = str(error)
        say(f"{told}: GOING BACK to the last checkpoint, once")
        manager.wait_until_finished()
        state = _newest(config, model, optimizer, manager)
        if state is None:
            raise TrainError(f"{told}; there is no checkpoint to go back to. {ADVICE}")
        with closing(Journal(at.folder, step=int(state.step), writes=processes.first(), send=at.send)) as journal:
            try:
                return loop(job._replace(journal=journal), state)
            except TooManySkipped as error:
                raise TrainError(
                    f"{error}, again; the checkpoint of step {int(state.step):,} stands. {ADVICE}"
                ) from None


def _newest(
    config: ConfigDict, model: retriever.Retriever, optimizer: optax.GradientTransformation, manager: Any
) -> learner.TrainState | None:
    """The state of the newest checkpoint that is as it was written; None where there is none at all."""
    if not manager.all_steps():
        return None
    like = items(learner.state_like(config, model, optimizer))
    _, parts = checkpoint.restore_first_good(manager, checkpoint.in_order(manager, "latest"), like, move=True)
    return from_items(parts)


def _training_rows(
    config: ConfigDict, model: retriever.Retriever, source: Source, split: protocols.Split, state: learner.TrainState
) -> tuple[np.ndarray, np.ndarray]:
    """What is trained on, and which rows of it: images, or where nothing before the projection changes, their features."""
    if config.optim.frozen_blocks >= 0 or not config.data.views:
        return source.images, split.train
    encoder = encode.Encoder(config, model, items(state)["variables"], int(state.step))
    start = time.monotonic()
    rows = encode.embed_views(encoder, source.images, split.train)
    say(
        f"the backbone is frozen: {rows.shape[0]:,} x {rows.shape[1]} views embedded once in "
        f"{duration(time.monotonic() - start)} ({rows.nbytes / 2**30:,.2f} GiB)"
    )
    return rows, np.arange(len(rows))


def _batches(
    config: ConfigDict, rows: np.ndarray | None, indices: np.ndarray, first_step: int
) -> Iterator[dict[str, np.ndarray]]:
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


def _claim(
    workdir: str | Path,
    at: buckets.At,
    config: ConfigDict,
    source: Source,
    split: protocols.Split,
    *,
    allow_changes: bool,
) -> list[str]:
    """Writes config.json into a new workdir, or refuses one that holds another run; the changes, where these are allowed."""
    path, changed = at.folder / "config.json", []
    if path.is_file():
        changed = configs.differences(configs.from_json(path.read_text()), config)
    if changed and not allow_changes:
        raise configs.ConfigError(
            f"{str(workdir)!r} holds a run with another config; use another --workdir, the same values, or "
            f"--allow_changes:\n" + "\n".join(f"  - {c}" for c in changed)
        )
    try:
        at.folder.mkdir(parents=True, exist_ok=True)
        if not changed:
            _write_config(at, config)
        if source.skipped:
            (at.folder / "skipped.jsonl").write_text("".join(json.dumps(s) + "\n" for s in source.skipped))
    except OSError as error:
        raise configs.ConfigError(f"--workdir {str(workdir)!r} cannot be written: {error.strerror}") from None
    splits.claim(at.folder, source, split)
    at.send()
    return changed


def _change(at: buckets.At, config: ConfigDict, changed: list[str]) -> None:
    """The run goes on with another config, now that its checkpoint fits it."""
    say("CHANGED config:\n" + "\n".join(f"  - {c}" for c in changed))
    with open(at.folder / "changes.jsonl", "a") as file:
        file.write(json.dumps({"time": time.time(), "changes": changed}) + "\n")
    _write_config(at, config)
    at.send()


def _write_config(at: buckets.At, config: ConfigDict) -> None:
    half = at.folder / "config.half"
    half.write_text(configs.to_json(config))
    half.replace(at.folder / "config.json")


def _some(names: list[str]) -> str:
    return f"{len(names)} classes ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"


def _introduce(
    config: ConfigDict, source: Source, split: protocols.Split, state: learner.TrainState, steps: int
) -> None:
    """The start-up lines: what is trained on what."""
    B, q = config.data.batch_size, config.quantizer
    clip = configs.clip_count(config.loss.clip, B, queue=config.loss.queue)
    labels = "no labels" if source.labels is None else f"labels of {_some(source.classes)}, used only to score"
    say(f"{config.data.source}: {len(source.images):,} images, {labels}; {len(source.skipped)} files skipped")
    say("  " + ", ".join(f"{len(part):,} {name}" for name, part in split._asdict().items()))
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    trained = sum(x.size for path, x in leaves if not optimizers.frozen(path, config))
    say(
        f"model: {retriever.parameter_count(state.params):,} parameters, {trained:,} of them trained, "
        f"{configs.bits(config)} bits per image ({q.num_codebooks} codebooks of {q.num_codewords} codewords), "
        f"{clip} of {2 * B - 2 + config.loss.queue} negatives clipped"
    )
    say(
        f"batch: {B} global, {B // jax.process_count()} per process, {B // jax.device_count()} per device "
        f"({jax.device_count()} x {jax.devices()[0].device_kind})"
    )
    say(
        f"going on from step {int(state.step):,} of {steps:,}"
        if int(state.step)
        else f"{steps:,} steps; the first compiles"
    )
