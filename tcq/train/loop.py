"""The training loop: steps, logs read one step late, validation, checkpoints, failures."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from tcq.models import retriever
from tcq.runtime import devices, log, processes, signals
from tcq.train import optimizer as optimizers
from tcq.train.speed import Speed
from tcq.train.step import Logs, TrainState
from tcq.workdir import checkpoint
from tcq.workdir.journal import Journal

ONE_BIT = 2.0  # codewords: a perplexity below is less than one bit of information

logger = logging.getLogger(__name__)


class TrainError(RuntimeError):
    """Training cannot continue; the message says at which step and why."""


class TooManySkippedSteps(Exception):
    """Too many consecutive steps were not finite; the message has the step and the quantity."""


class Job(NamedTuple):
    """The inputs of the loop."""

    config: ConfigDict
    steps: int
    run: devices.Step
    data: Any  # training images on the devices, or ()
    stream: Callable[[int], Iterator[devices.Batch]]  # batches from a step on
    validate: Callable[[retriever.Variables, int], dict[str, float]]
    manager: Any
    journal: Journal
    profile: tuple[Path, int, int] | None  # folder, first step, and one past the last


class Events(NamedTuple):
    """What is due after a step."""

    last: bool
    log: bool
    compare: bool
    validate: bool
    save: bool


class Outcome(NamedTuple):
    """Flags from the logs of a step, equal on all processes."""

    stop: bool = False  # a process got a signal to stop
    skipped: bool = False  # the step was not finite


def events(config: ConfigDict, steps: int, step: int) -> Events:
    """What is due after a step of a run of some steps."""
    last, every = step == steps, config.eval.every_steps
    validate = last or bool(every and step % every == 0)
    return Events(
        last=last,
        log=last or step % config.train.log_every_steps == 0,
        compare=step % config.train.compare_every_steps == 0,
        validate=validate,
        save=validate or step % config.checkpoint.every_steps == 0,  # a score belongs to a checkpoint
    )


def loop(job: Job, state: TrainState) -> dict[str, float]:
    """Trains from the step of a state to the last one; returns the last validation.

    Raises TooManySkippedSteps, TrainError, or Stopped when a process got a signal to stop, after the state was saved.
    """
    start = int(state.step)
    state = devices.replicate(state)
    speed = Speed(step=start, total_steps=job.steps, batch_size=job.config.data.batch_size)
    rate = optimizers.learning_rate(job.config, job.steps)
    validated = _missed_validation(job, state, start) or processes.on_first(lambda: job.journal.last("validation"))
    stream, pending = devices.prefetch(job.stream(start)), None
    with closing(_Profiler(job.profile)) as profiler:
        for step in range(start + 1, job.steps + 1):
            batch = _next_batch(stream, speed, step)
            profiler.before(step)
            state, logs = job.run(state, job.data, batch)
            devices.wait_on_cpu(logs)
            # Logs are read one step late, so that the device never waits for the host.
            outcome = _outcome(job, *pending) if pending else Outcome()
            pending = step, logs
            due = events(job.config, job.steps, step)
            if step == start + 1:
                speed.restart(step)  # the first step includes compilation
            if due.save or due.validate or outcome.stop:
                current, pending = _outcome(job, step, logs), None
                outcome = Outcome(outcome.stop or current.stop, current.skipped)
                if outcome.skipped and due.last:
                    raise TooManySkippedSteps(f"step {step:,}, the last one, is not finite")
            if due.log:
                _log(job, step, logs, speed, rate)
            if due.compare or step == start + 1:
                compare_replicas(step, state)
            # After a skipped step nothing is validated, and nothing is saved unless the run stops.
            validates = due.validate and not outcome.stop and not outcome.skipped
            if validates:
                validated = _validate(job, state, step)
            if due.last or outcome.stop or (due.save and not outcome.skipped):
                _save(job, step, state, score=_score(validated) if validates else None)
            if validates or due.save:
                speed.restart(step)
            if outcome.stop or due.last:
                _verify(job, state, step)
            if outcome.stop:
                _raise_stopped(step)
    return validated


def _next_batch(stream: Iterator[devices.Batch], speed: Speed, step: int) -> devices.Batch:
    """The next batch, with whether this process got a signal to stop."""
    processes.set_phase(f"step {step}, waiting for data")
    start = time.monotonic()
    batch = next(stream)
    speed.wait(time.monotonic() - start)
    processes.set_phase(f"step {step}")
    stop = np.full(jax.local_device_count(), signals.requested() is not None, np.float32)
    return batch | devices.shard({"stop": stop})


def items(state: TrainState) -> dict[str, Any]:
    """The two parts of a checkpoint: what encoding needs, and what only training needs."""
    variables = {"params": state.params} | ({"batch_stats": state.batch_stats} if state.batch_stats else {})
    training = {"step": state.step, "opt_state": state.opt_state}
    return {"variables": variables, "training": training | ({"queue": state.queue} if len(state.queue) else {})}


def from_items(parts: dict[str, Any]) -> TrainState:
    """The inverse of `items`."""
    variables, training = parts["variables"], parts["training"]
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    return TrainState(training["step"], params, batch_stats, training["opt_state"], training.get("queue", {}))


def _outcome(job: Job, step: int, logs: Logs) -> Outcome:
    """Reads the logs of a step; a skipped step is logged. Raises TooManySkippedSteps."""
    in_a_row, stop = (float(devices.fetch(logs[name])) for name in ("skipped_in_a_row", "stop"))
    if in_a_row:
        values = {k: float(v) for k, v in devices.fetch(logs).items()}
        name = next((k for k in ("loss", *values) if not np.isfinite(values[k])), "a gradient")
        problem = f"{name} is {values.get(name, 'not finite')} at step {step:,}"
        limit = job.config.train.max_skipped
        if in_a_row >= limit:
            raise TooManySkippedSteps(f"{problem}, the last of {limit} consecutive steps that were not finite")
        counts = f"{values['skipped']:.0f} skipped in all, {in_a_row:.0f} in a row"
        logger.warning(f"{problem}: step skipped, nothing changed ({counts})")
    return Outcome(stop > 0, in_a_row > 0)


def _log(job: Job, step: int, logs: Logs, speed: Speed, rate: Any) -> None:
    """Writes and shows the logs of a step."""
    values = {k: float(v) for k, v in devices.fetch(logs).items() if k != "stop"}
    values["learning_rate"] = float(rate(step - 1 - values["skipped"]))
    rates = speed.rates(step)
    job.journal.write(step, {f"train/{k}": v for k, v in values.items()} | {f"speed/{k}": v for k, v in rates.items()})
    line = (
        f"step {step:,}/{job.steps:,}  loss {values['loss']:.4f}  accuracy {values['accuracy']:.3f}  "
        f"usage {values['codeword_usage']:.1f}/{job.config.quantizer.num_codewords}"
    )
    if rates:
        line += f"  {rates['images_per_second']:,.0f} images/s  waiting for data {rates['data_wait']:.0%}"
        line += f"  {log.duration(rates['eta_seconds'])} left"
    logger.info(line)
    lowest, size = values["codeword_usage_min"], job.config.quantizer.num_codewords
    if step == job.steps and lowest < ONE_BIT:
        logger.warning(
            f"a codebook has collapsed: images use {lowest:.2f} of its {size} codewords, less than one bit; a lower "
            f"optim.learning_rate or a higher loss.temperature may help"
        )


def _missed_validation(job: Job, state: TrainState, step: int) -> dict[str, float]:
    """Validates a resumed state if the run stopped before a due validation; empty otherwise."""
    if not step or not events(job.config, job.steps, step).validate:
        return {}
    if not processes.on_first(lambda: not job.journal.has(step, "validation")):
        return {}
    validated = _validate(job, state, step)
    if validated:
        _save(job, step, state, score=_score(validated), replace=True)
    return validated


def _validate(job: Job, state: TrainState, step: int) -> dict[str, float]:
    """Validates and records the results.

    If stopped meanwhile, saves the state first and raises Stopped.
    """
    processes.set_phase(f"step {step}, validation")
    try:
        validated = job.validate(devices.fetch(items(state)["variables"]), step)
    except signals.Stopped:
        if step not in job.manager.all_steps():
            _save(job, step, state, score=None)
            _verify(job, state, step)
        _raise_stopped(step)
    if validated:
        job.journal.write(step, {f"validation/{k}": v for k, v in validated.items()})
        listed = "  ".join(f"{k} {v:.4f}" for k, v in validated.items())
        logger.info(f"step {step:,}/{job.steps:,}  validation: {listed}")
    return validated


def _save(job: Job, step: int, state: TrainState, *, score: float | None, replace: bool = False) -> None:
    processes.set_phase(f"step {step}, saving")
    job.journal.flush()
    current = items(devices.fetch(state))
    if not checkpoint.verify_newest(job.manager, current):
        logger.warning(f"step {step:,} is saved in its place")
    checkpoint.save(job.manager, step, current, score=score, replace=replace)


def _verify(job: Job, state: TrainState, step: int) -> None:
    """Reads the last checkpoint back, then deletes those that are not kept.

    Raises TrainError if the last one is corrupted.
    """
    processes.set_phase(f"step {step}, reading the checkpoint back")
    if not checkpoint.verify_newest(job.manager, items(devices.fetch(state))):
        raise TrainError(f"checkpoint {step:,} cannot be read back: check the disk, then run the same command again")
    checkpoint.prune(job.manager, keep=job.config.checkpoint.keep)


def _score(validated: dict[str, float]) -> float | None:
    """The score of a checkpoint, higher is better: mAP, or minus the loss without labels."""
    return validated.get("mAP", -validated["loss"]) if validated else None


def compare_replicas(step: int, state: TrainState) -> None:
    """Raises TrainError if the copies of the state on the devices differ in any bit."""
    sums = devices.checksums(state)
    majority = max(set(sums.values()), key=list(sums.values()).count)
    different = [device for device, total in sums.items() if total != majority]
    if different:
        raise TrainError(
            f"at step {step:,} the state on {', '.join(different)} differs from that on the other "
            f"{len(sums) - len(different)} devices: its memory or arithmetic may be faulty. The last checkpoint "
            f"predates this check; restart without that device."
        )


def _raise_stopped(step: int) -> None:
    name = signals.requested() or "SIGTERM"
    status = signals.status(name)
    raise signals.Stopped(f"stopped by {name} after step {step:,}, which is saved; the same command resumes", status)


class _Profiler:
    """Writes a trace of some steps."""

    def __init__(self, profile: tuple[Path, int, int] | None) -> None:
        self._profile, self._running = profile, False

    def before(self, step: int) -> None:
        """Starts or ends the trace before a step."""
        if not self._profile:
            return
        folder, first, stop = self._profile
        if self._running and step >= stop:
            self.close()
        elif not self._running and first <= step < stop:
            jax.profiler.start_trace(folder)
            self._running = True

    def close(self) -> None:
        """Ends the trace if it is running."""
        if self._running and self._profile:
            self._running = False
            jax.profiler.stop_trace()
            logger.info(f"trace: {self._profile[0]}")
