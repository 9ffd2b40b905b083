"""The loop of training: steps, logs one step late, validation, checkpoints, and what may go wrong in between."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from tcq.models import retriever
from tcq.runtime import devices as parallel
from tcq.runtime import processes, signals
from tcq.runtime.log import Journal, Progress, duration, say
from tcq.train import optimizer as optimizers
from tcq.train import step as learner
from tcq.workdir import checkpoint


class TrainError(RuntimeError):
    """Training cannot go on; the message says at which step and why."""


class TooManySkipped(Exception):
    """So many steps in a row had numbers that are not finite; the message names step and quantity."""


class Job(NamedTuple):
    """What the loop works with."""

    config: ConfigDict
    steps: int
    run: parallel.Step
    data: Any  # training images that lie on the devices, or ()
    stream: Callable[[int], Iterator[parallel.Batch]]  # batches from a step on
    validate: Callable[[retriever.Variables, int], dict[str, float]]
    manager: Any
    journal: Journal
    trace: tuple[Path, int, int] | None  # where to, the first step and the one behind the last


def loop(job: Job, state: learner.TrainState) -> dict[str, float]:
    """Trains from the step of a state to the last; returns the last validation.

    Raises TooManySkipped, TrainError, or Stopped where the run was asked to stop, after the state was saved.
    """
    c, start = job.config, int(state.step)
    every, devices = c.eval.every_steps, jax.local_device_count()
    rate = optimizers.learning_rate(c, job.steps)
    state = parallel.replicate(state)
    progress = Progress(step=start, total_steps=job.steps, batch_size=c.data.batch_size)
    validated: dict[str, float] = {}
    before: tuple[int, learner.Logs] | None = None

    def due(step: int) -> bool:
        return step == job.steps or bool(every and step % every == 0)

    with signals.deferred(), _tracing(job.trace) as trace:
        if start and due(start) and processes.on_first(lambda: not job.journal.has(start, "validation")):
            validated = _validate(job, state, start)  # the run was stopped before it came to that
        if validated:
            _save(job, start, items(parallel.fetch(state)), score=_score(validated), replace=True)
        stream = parallel.prefetch(job.stream(start))
        for step in range(start + 1, job.steps + 1):
            processes.phase(f"step {step}, waiting for data")
            waiting = time.monotonic()
            batch = next(stream)
            progress.waited(time.monotonic() - waiting)
            processes.phase(f"step {step}")
            trace(step)
            asked = np.full(devices, signals.asked() is not None, np.float32)
            state, logs = job.run(state, job.data, batch | {"stop": asked})
            parallel.wait_on_cpu(logs)
            # one step late, so that the device never waits for the host
            stop, skipped = _look(job, *before) if before else (False, False)
            before = step, logs
            if step == start + 1:
                progress.restart(step)  # the first step compiles

            last, save = step == job.steps, stop or step % c.checkpoint.every_steps == 0
            if last or save or due(step):
                asked_now, skipped = _look(job, step, logs)
                stop, before = stop or asked_now, None
                if skipped and last:
                    raise TooManySkipped(f"step {step:,}, the last one, is not finite")
            now = due(step) and not stop and not skipped  # a state that gives no numbers is not scored, nor kept
            if last or step % c.train.log_every_steps == 0:
                _log(job, step, logs, progress, rate)
            if step % c.train.compare_every_steps == 0 or step == start + 1:
                _compare(step, state)
            if now:
                validated = _validate(job, state, step)
                progress.restart(step)
            if last or stop or (save and not skipped):
                processes.phase(f"step {step}, saving")
                score = _score(validated) if now else None
                _save(job, step, items(parallel.fetch(state)), score=score)
                progress.restart(step)
            if stop or last:
                job.manager.wait_until_finished()
            if stop:
                _stopped(step)
    return validated


def items(state: learner.TrainState) -> dict[str, Any]:
    """The two parts of a checkpoint: what encoding needs, and what only going on needs."""
    variables = {"params": state.params} | ({"batch_stats": state.batch_stats} if state.batch_stats else {})
    training = {"step": state.step, "opt_state": state.opt_state}
    return {"variables": variables, "training": training | ({"queue": state.queue} if len(state.queue) else {})}


def from_items(parts: dict[str, Any]) -> learner.TrainState:
    """Its inverse."""
    variables, rest = parts["variables"], parts["training"]
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    return learner.TrainState(rest["step"], params, batch_stats, rest["opt_state"], rest.get("queue", {}))


def _look(job: Job, step: int, logs: learner.Logs) -> tuple[bool, bool]:
    """Whether one of the processes was asked to stop, and whether the step was skipped, which is said.

    Raises TooManySkipped.
    """
    in_a_row, stop = (float(parallel.fetch(logs[name])) for name in ("skipped_in_a_row", "stop"))
    if in_a_row:
        values = {k: float(v) for k, v in parallel.fetch(logs).items()}
        name = next((k for k in ("loss", *values) if not np.isfinite(values[k])), "a gradient")
        told = f"{name} is {values.get(name, 'not finite')} at step {step:,}"
        most = job.config.train.max_skipped
        if in_a_row >= most:
            raise TooManySkipped(f"{told}, and so were the {most} steps up to it")
        say(f"{told}: skipped, nothing was changed ({values['skipped']:.0f} in all, {in_a_row:.0f} in a row)")
    return stop > 0, in_a_row > 0


def _log(job: Job, step: int, logs: learner.Logs, progress: Progress, rate: Any) -> None:
    values = {k: float(v) for k, v in parallel.fetch(logs).items() if k != "stop"}
    values["learning_rate"] = float(rate(step - 1 - values["skipped"]))
    rates = progress.rates(step)
    job.journal.write(step, {f"train/{k}": v for k, v in values.items()} | {f"speed/{k}": v for k, v in rates.items()})
    speed = (
        (
            f"  {rates['images_per_second']:,.0f} images/s  waiting for data {rates['data_wait']:.0%}  "
            f"left {duration(rates['eta_seconds'])}"
        )
        if rates
        else ""
    )
    say(
        f"step {step:,}/{job.steps:,}  loss {values['loss']:.4f}  accuracy {values['accuracy']:.3f}  "
        f"usage {values['codeword_usage']:.1f}/{job.config.quantizer.num_codewords}{speed}"
    )


def _validate(job: Job, state: learner.TrainState, step: int) -> dict[str, float]:
    processes.phase(f"step {step}, validation")
    try:
        validated = job.validate(parallel.fetch(items(state)["variables"]), step)
    except signals.Stopped:
        if step not in job.manager.all_steps():
            _save(job, step, items(parallel.fetch(state)), score=None)
        _stopped(step)
    if validated:
        job.journal.write(step, {f"validation/{k}": v for k, v in validated.items()})
        listed = "  ".join(f"{k} {v:.4f}" for k, v in validated.items())
        say(f"step {step:,}/{job.steps:,}  validation: {listed}")
    return validated


def _save(job: Job, step: int, parts: dict[str, Any], *, score: float | None, replace: bool = False) -> None:
    job.journal.keep()
    checkpoint.save(job.manager, step, parts, score=score, replace=replace)


def _score(validated: dict[str, float]) -> float | None:
    return validated.get("mAP", -validated["loss"]) if validated else None


def _compare(step: int, state: learner.TrainState) -> None:
    """Raises TrainError where the copies of the state on the devices are not the same bits."""
    found = parallel.checksums(state)
    usual = max(set(found.values()), key=list(found.values()).count)
    others = [device for device, total in found.items() if total != usual]
    if others:
        raise TrainError(
            f"at step {step:,} the state on {', '.join(others)} differs from that on the other {len(found) - len(others)} "
            f"devices: its memory or arithmetic is not to be trusted. The last checkpoint is from before that was seen; "
            f"leave that device out and start again"
        )


def _stopped(step: int) -> None:
    name = signals.asked() or "SIGTERM"
    raise signals.Stopped(
        f"stopped by {name} after step {step:,}, which is saved; the same command goes on", signals.status(name)
    )


@contextmanager
def _tracing(trace: tuple[Path, int, int] | None) -> Iterator[Callable[[int], None]]:
    """To be called before every step: begins and ends the trace; it also ends with the loop."""
    on = False

    def end() -> None:
        nonlocal on
        on = False
        jax.profiler.stop_trace()
        say(f"trace: {trace and trace[0]}")

    def at(step: int) -> None:
        nonlocal on
        if on and trace and step >= trace[2]:
            end()
        elif not on and trace and trace[1] <= step < trace[2]:
            jax.profiler.start_trace(trace[0])
            on = True

    try:
        yield at
    finally:
        if on:
            end()
