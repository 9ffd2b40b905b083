"""Learning: the state, the step body, the loop."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int32, UInt8
from ml_collections import ConfigDict

from tcq import augment, checkpoint, encode, losses, parallel, quantizer, validation
from tcq import config as configs
from tcq import optimizer as optimizers
from tcq.data import protocols, splits
from tcq.data.loader import batches
from tcq.data.sources import Source, open_source
from tcq.journal import Journal, Progress, duration, say
from tcq.models import retriever
from tcq.parallel import AXIS

Logs = dict[str, Array]


class TrainError(RuntimeError):
    """Training cannot go on; the message says at which step and why."""


class TrainState(NamedTuple):
    """All that changes from step to step."""

    step: Int32[Array, ""]
    params: retriever.Params
    opt_state: Any


def step_body(
    model: retriever.Retriever, optimizer: optax.GradientTransformation, config: ConfigDict, steps: int
) -> Callable[[TrainState, UInt8[Array, "b H W 3"]], tuple[TrainState, Logs]]:
    """The training step of one device, to be mapped over `AXIS`; what it returns is the same on all of them.

    Views are a function of (seed, step, place in the global batch), so they do not depend on the number of devices.
    """
    c = config.loss
    clip_at = clip_schedule(config, steps)
    strengths = dict(config.data.augment.items())

    def view_pair(key: Array, image: Float[Array, "H W 3"]) -> tuple[Array, Array]:
        first, second = (augment.random_view(k, image, strengths) for k in jax.random.split(key))
        return first, second

    def body(state: TrainState, images: UInt8[Array, "b H W 3"]) -> tuple[TrainState, Logs]:
        step_key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        device = jax.lax.axis_index(AXIS)
        place = device * len(images) + jnp.arange(len(images))
        keys = jax.vmap(lambda i: jax.random.fold_in(step_key, i))(place)
        views = jnp.concatenate(jax.vmap(view_pair)(keys, images.astype(jnp.float32) / 255))
        dropout_key = jax.random.fold_in(jax.random.fold_in(step_key, config.data.batch_size), device)

        def loss_fn(params: retriever.Params) -> tuple[Array, Logs]:
            out = model.apply({"params": params}, views, train=True, rngs={"dropout": dropout_key})
            assert isinstance(out, retriever.Outputs)
            loss, logs = losses.contrastive_loss(
                *jnp.split(out.features, 2),
                *jnp.split(out.reconstructions, 2),
                pairing=c.pairing,
                temperature=c.temperature,
                clip=clip_at(state.step),
                axis_name=AXIS,
            )
            if c.entropy_weight:
                loss += c.entropy_weight * losses.assignment_entropy(out.weights)
            if c.diversity_weight:
                loss += c.diversity_weight * losses.codeword_diversity(out.codebooks)
            codes = quantizer.hard_assign(out.features, out.codebooks, metric=model.metric)
            usage = quantizer.codeword_usage(codes, num_codewords=model.num_codewords, axis_name=AXIS)
            return loss, logs | {"loss": loss, "codeword_usage": usage.mean(), "codeword_usage_min": usage.min()}

        grads, logs = jax.grad(loss_fn, has_aux=True)(state.params)
        grads = jax.lax.pmean(grads, AXIS)
        logs = jax.lax.pmean(logs, AXIS)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), logs | {"gradient_norm": optax.tree.norm(grads)}

    return body


def clip_schedule(config: ConfigDict, steps: int) -> Callable[[Array], int | Array]:
    """How many negatives are clipped at a step (counted from 0): all of `loss.clip`, or fewer before `loss.clip_full`."""
    c, count = config.loss, configs.clip_count(config.loss.clip, config.data.batch_size)
    first, full = c.clip_from * steps, c.clip_full * steps
    if not count or not full:
        return lambda step: count
    return lambda step: jnp.floor(count * jnp.clip((step - first + 1) / max(full - first, 1), 0, 1)).astype(jnp.int32)


def initial_state(config: ConfigDict, model: retriever.Retriever, optimizer: Any, images: np.ndarray) -> TrainState:
    """The state before the first step; `images` are some training images (see `retriever.init`)."""
    key = jax.random.fold_in(jax.random.key(config.train.seed), 2**31 - 1)  # no step has this number
    params = retriever.init(key, model, images, from_data=config.quantizer.init == "data")
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def train(config: ConfigDict, workdir: str | Path) -> dict[str, float]:
    """Trains until the last step, going on from the newest checkpoint of the workdir; returns the last validation.

    Leaves config.json, metrics.jsonl, TensorBoard events, checkpoints and, where files were skipped, skipped.jsonl.
    Raises ConfigError, SourceError, CheckpointError or TrainError.
    """
    workdir = Path(workdir)
    source = open_source(config.data)
    split = splits.of_source(source, config.data)
    configs.check_run(
        config, num_devices=jax.device_count(), num_train=len(split.train), num_validation=len(split.validation)
    )
    _claim(workdir, config, source)
    splits.claim(workdir, source, split)

    steps = configs.total_steps(config, len(split.train))
    model = retriever.from_config(config)
    optimizer = optimizers.make(config, steps)
    # Drawn, because folders are in the order of their classes.
    drawn = np.random.RandomState(config.train.seed).permutation(split.train)[: config.quantizer.init_images]
    state = initial_state(config, model, optimizer, np.asarray(source.images[np.sort(drawn)]))
    with closing(checkpoint.open_manager(workdir, keep=config.checkpoint.keep, writable=True)) as manager:
        if manager.latest_step() is not None:
            saved = checkpoint.restore(manager, manager.latest_step(), _items(state))
            state = TrainState(params=saved["params"], **saved["training"])
        _introduce(config, source, split, state, steps)
        with closing(Journal(workdir, step=int(state.step))) as journal:
            run = parallel.pmap_step(step_body(model, optimizer, config, steps))
            validate = partial(_validate, config, model, source, split)
            return _loop(
                config, state, steps, run, _batches(config, source, split, int(state.step)), validate, manager, journal
            )


def _loop(
    config: ConfigDict,
    state: TrainState,
    steps: int,
    run: parallel.Step,
    stream: Iterator[np.ndarray],
    validate: Callable[[retriever.Params, int], dict[str, float]],
    manager: Any,
    journal: Journal,
) -> dict[str, float]:
    t, start = config.train, int(state.step)
    rate = optimizers.learning_rate(config, steps)
    state = parallel.replicate(state)
    progress = Progress(step=start, total_steps=steps, batch_size=config.data.batch_size)
    validated: dict[str, float] = {}
    before: tuple[int, Logs] | None = None
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
            validated = validate(parallel.fetch(state.params), step)
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


def _items(state: TrainState) -> dict[str, Any]:
    """The two parts of a checkpoint: what encoding needs, and what only going on needs."""
    return {"params": state.params, "training": {"step": state.step, "opt_state": state.opt_state}}


def _validate(
    config: ConfigDict,
    model: retriever.Retriever,
    source: Source,
    split: protocols.Split,
    params: retriever.Params,
    step: int,
) -> dict[str, float]:
    """Loss and clip quality on validation images; with labels also mAP of validation queries against training images."""
    if len(split.validation) < 2:
        return {}
    encoder = encode.Encoder(config, model, params, step)
    images = source.images[split.validation]
    labels = None if source.labels is None else source.labels[split.validation]
    values = validation.clip_quality(encoder, images, labels)
    if source.labels is not None:
        chosen = np.random.RandomState(0).permutation(split.train)[: config.eval.max_database]
        database = encode.encode(encoder, source.images[np.sort(chosen)])
        queries = encode.encode(encoder, images)
        score = validation.scorers(encoder, queries, database)["asymmetric"]
        k = protocols.cut_off(config.data.protocol, config.eval.k, len(chosen))
        result = validation.retrieve(
            score, labels, source.labels[np.sort(chosen)], k=k, ks=[1], conventions=validation.conventions_of(config)
        )
        values = {"mAP": result.mean_average_precision} | values
    return values


def _batches(config: ConfigDict, source: Source, split: protocols.Split, first_step: int) -> Iterator[np.ndarray]:
    return batches(
        source.images,
        split.train,
        batch_size=config.data.batch_size,
        seed=config.train.seed,
        first_step=first_step,
        num_devices=jax.local_device_count(),
        process=jax.process_index(),
        num_processes=jax.process_count(),
        threads=config.data.threads,
    )


def _finite(step: int, logs: Logs) -> dict[str, float]:
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


def _introduce(config: ConfigDict, source: Source, split: protocols.Split, state: TrainState, steps: int) -> None:
    """The start-up lines: what is trained on what."""
    B, q = config.data.batch_size, config.quantizer
    clip = configs.clip_count(config.loss.clip, B)
    labels = "no labels" if source.labels is None else f"labels of {_some(source.classes)}, used only to score"
    say(f"{config.data.source}: {len(source.images):,} images, {labels}; {len(source.skipped)} files skipped")
    say("  " + ", ".join(f"{len(part):,} {name}" for name, part in split._asdict().items()))
    say(
        f"model: {retriever.parameter_count(state.params):,} parameters, {configs.bits(config)} bits per image "
        f"({q.num_codebooks} codebooks of {q.num_codewords} codewords), {clip} of {2 * B - 2} negatives clipped"
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
