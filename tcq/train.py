"""Learning: the loop around the step."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from tcq import checkpoint, encode, learner, parallel, validation
from tcq import config as configs
from tcq import optimizer as optimizers
from tcq.data import protocols, splits
from tcq.data.loader import batches
from tcq.data.sources import Source, open_source
from tcq.journal import Journal, Progress, duration, say
from tcq.models import retriever
from tcq.parallel import AXIS


class TrainError(RuntimeError):
    """Training cannot go on; the message says at which step and why."""


def train(config: ConfigDict, workdir: str | Path) -> dict[str, float]:
    """Trains until the last step, going on from the newest checkpoint of the workdir; returns the last validation.

    Leaves config.json, metrics.jsonl, TensorBoard events, checkpoints and, where files were skipped, skipped.jsonl.
    Raises ConfigError, SourceError, CheckpointError or TrainError.
    """
    workdir = Path(workdir)
    source = open_source(config.data)
    split = splits.of_source(source, config.data)
    configs.check_run(
        config,
        num_devices=jax.device_count(),
        num_train=len(split.train),
        num_validation=len(split.validation),
        platform=jax.default_backend(),
    )
    _claim(workdir, config, source)
    splits.claim(workdir, source, split)

    steps = configs.total_steps(config, len(split.train))
    model = retriever.from_config(config, axis_name=AXIS)
    optimizer = optimizers.make(config, steps)
    with closing(checkpoint.open_manager(workdir, keep=config.checkpoint.keep, writable=True)) as manager:
        newest = manager.latest_step()
        if newest is not None:
            like = learner.state_like(config, model, optimizer)
            state = _from_items(checkpoint.restore(manager, newest, _items(like)))
        else:  # drawn, because folders are in the order of their classes
            drawn = np.random.RandomState(config.train.seed).permutation(split.train)[: config.quantizer.init_images]
            state = learner.initial_state(config, model, optimizer, np.asarray(source.images[np.sort(drawn)]))
        _introduce(config, source, split, state, steps)
        with closing(Journal(workdir, step=int(state.step))) as journal:
            run = parallel.pmap_step(learner.step_body(model, optimizer, config, steps))

            def validate(variables: retriever.Variables, step: int) -> dict[str, float]:
                return validation.held_out(encode.Encoder(config, model, variables, step), source, split)

            stream = _batches(config, *_training_rows(config, model, source, split, state), int(state.step))
            return _loop(config, state, steps, run, stream, validate, manager, journal)


def _loop(
    config: ConfigDict,
    state: learner.TrainState,
    steps: int,
    run: parallel.Step,
    stream: Iterator[dict[str, np.ndarray]],
    validate: Callable[[retriever.Variables, int], dict[str, float]],
    manager: Any,
    journal: Journal,
) -> dict[str, float]:
    t, start = config.train, int(state.step)
    rate = optimizers.learning_rate(config, steps)
    state = parallel.replicate(state)
    progress = Progress(step=start, total_steps=steps, batch_size=config.data.batch_size)
    validated: dict[str, float] = {}
    before: tuple[int, learner.Logs] | None = None
    for step in range(start + 1, steps + 1):
        waiting = time.monotonic()
        batch = next(stream)
        progress.waited(time.monotonic() - waiting)
        state, logs = run(state, batch)
        parallel.wait_on_cpu(logs)
        if before:
            _finite(*before)  # one step late, so that the device never waits for the host
        before = step, logs
        if step == start + 1:
            progress.restart(step)  # the first step compiles

        last = step == steps
        if last or step % t.log_every_steps == 0:
            values = _finite(step, logs) | {"learning_rate": float(rate(step - 1))}
            rates = progress.rates(step)
            journal.write(
                step, {f"train/{k}": v for k, v in values.items()} | {f"speed/{k}": v for k, v in rates.items()}
            )
            speed = (
                (
                    f"  {rates['images_per_second']:,.0f} images/s  waiting for data {rates['data_wait']:.0%}  "
                    f"left {duration(rates['eta_seconds'])}"
                )
                if rates
                else ""
            )
            say(
                f"step {step:,}/{steps:,}  loss {values['loss']:.4f}  accuracy {values['accuracy']:.3f}  "
                f"usage {values['codeword_usage']:.1f}/{config.quantizer.num_codewords}{speed}"
            )
        validated_now = last or (config.eval.every_steps and step % config.eval.every_steps == 0)
        if validated_now:
            _finite(step, logs)
            validated = validate(parallel.fetch(_items(state)["variables"]), step)
            if validated:
                journal.write(step, {f"validation/{k}": v for k, v in validated.items()})
                say(f"step {step:,}/{steps:,}  validation: " + "  ".join(f"{k} {v:.4f}" for k, v in validated.items()))
            progress.restart(step)
        if last or step % config.checkpoint.every_steps == 0:
            _finite(step, logs)  # a poisoned state is never saved
            score = validated.get("mAP", -validated["loss"]) if validated_now and validated else None
            checkpoint.save(manager, step, _items(parallel.fetch(state)), score=score)
            progress.restart(step)
    return validated


def _items(state: learner.TrainState) -> dict[str, Any]:
    """The two parts of a checkpoint: what encoding needs, and what only going on needs."""
    variables = {"params": state.params} | ({"batch_stats": state.batch_stats} if state.batch_stats else {})
    training = {"step": state.step, "opt_state": state.opt_state}
    return {"variables": variables, "training": training | ({"queue": state.queue} if len(state.queue) else {})}


def _from_items(items: dict[str, Any]) -> learner.TrainState:
    variables, rest = items["variables"], items["training"]
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    return learner.TrainState(rest["step"], params, batch_stats, rest["opt_state"], rest.get("queue", {}))


def _training_rows(
    config: ConfigDict, model: retriever.Retriever, source: Source, split: protocols.Split, state: learner.TrainState
) -> tuple[np.ndarray, np.ndarray]:
    """What is trained on, and which rows of it: images, or where nothing before the projection changes, their features."""
    if config.optim.frozen_blocks >= 0 or not config.data.views:
        return source.images, split.train
    encoder = encode.Encoder(config, model, _items(state)["variables"], int(state.step))
    start = time.monotonic()
    rows = encode.embed_views(encoder, source.images, split.train)
    say(
        f"the backbone is frozen: {rows.shape[0]:,} x {rows.shape[1]} views embedded once in "
        f"{duration(time.monotonic() - start)} ({rows.nbytes / 2**30:,.2f} GiB)"
    )
    return rows, np.arange(len(rows))


def _batches(
    config: ConfigDict, rows: np.ndarray, indices: np.ndarray, first_step: int
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


def _finite(step: int, logs: learner.Logs) -> dict[str, float]:
    values = {k: float(v) for k, v in parallel.fetch(logs).items()}
    for name, value in values.items():
        if not np.isfinite(value):
            raise TrainError(
                f"{name} is {value} at step {step}: training stopped; the last checkpoint is from before it. "
                f"A lower optim.learning_rate or a higher loss.temperature may help"
            )
    return values


def _claim(workdir: Path, config: ConfigDict, source: Source) -> None:
    """Writes config.json into a new workdir, or refuses one that holds another run."""
    path = workdir / "config.json"
    if path.is_file():
        changed = configs.differences(configs.from_json(path.read_text()), config)
        if changed:
            raise configs.ConfigError(
                f"{str(workdir)!r} holds a run with another config; use another --workdir, or the same values:\n"
                + "\n".join(f"  - {c}" for c in changed)
            )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(".half")
        half.write_text(configs.to_json(config))
        half.replace(path)
        if source.skipped:
            (workdir / "skipped.jsonl").write_text("".join(json.dumps(s) + "\n" for s in source.skipped))
    except OSError as error:
        raise configs.ConfigError(f"--workdir {str(workdir)!r} cannot be written: {error.strerror}") from None


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
