"""Training: a config and a workdir to checkpoints, resumed where the workdir has some."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import jax
from ml_collections import ConfigDict

from tcq import config as configs
from tcq import workdir as workdirs
from tcq.models import retriever
from tcq.runtime import locks, processes, storage
from tcq.runtime.devices import AXIS
from tcq.train import loop, run
from tcq.train import optimizer as optimizers
from tcq.train.loop import TrainError
from tcq.train.step import TrainState
from tcq.workdir import checkpoint

__all__ = ["TrainError", "train"]
ADVICE = "a lower optim.learning_rate or a higher loss.temperature may help"

logger = logging.getLogger(__name__)


def train(
    config: ConfigDict, workdir: str | Path, *, profile: tuple[int, int] | None = None, allow_changes: bool = False
) -> dict[str, float]:
    """Trains until the last step, and returns the last validation.

    It resumes from the newest checkpoint of the workdir.

    Args:
      config: as `config.load` returns it.
      workdir: a folder, or a URL in a bucket, which all processes of a run share. It gets config.json, data.json,
        metrics.jsonl, TensorBoard events, checkpoints, and skipped.jsonl if files were skipped.
      profile: a first step and one past the last; a trace of these steps is written to profile/ in the workdir.
      allow_changes: whether a workdir with another config is resumed with the new one, which changes.jsonl records.

    Raises:
      ConfigError, SourceError, ProtocolError, WorkdirError, CheckpointError: something does not fit; the message says
        what.
      LockedError: another process trains in this workdir.
      TrainError: the numbers of the run are not finite, or its devices differ.
      Stopped: the process got a signal to stop; the state is saved.
    """
    checkpoint.check_place(workdir)
    promotion = jax.numpy_dtype_promotion("standard")  # which optax and flax take for granted
    locked = processes.entered_by_first(lambda: _lock(workdir))
    with promotion, locked, storage.mirror(workdir, writes=processes.is_first()) as mirror:
        source, split = run.read_data(config, mirror.folder, workdir, allow_changes=allow_changes)
        changes = run.claim(mirror, workdir, config, source, split, allow_changes=allow_changes)
        model = retriever.from_config(config, axis_name=AXIS)
        optimizer = optimizers.make(config, configs.total_steps(config, len(split.train)))
        processes.set_phase("opening checkpoints")
        with closing(checkpoint.open_manager(workdir, keep=config.checkpoint.keep, writable=True)) as manager:
            state = run.newest_state(config, model, optimizer, manager)
            run.record_changes(mirror, config, changes)
            if state is None:
                state = run.initial_state(config, model, optimizer, source, split)
            run.log_start(config, source, split, state)
            job = run.make_job(
                config, model, optimizer, source, split, state, manager=manager, mirror=mirror, profile=profile
            )

            def newest() -> TrainState | None:
                return run.newest_state(config, model, optimizer, manager)

            return _with_one_rollback(job, state, newest, mirror)


@contextmanager
def _lock(workdir: str | Path) -> Iterator[None]:
    """Holds the lock of a workdir; a bucket has none.

    Raises LockedError if another run writes to it, and WorkdirError.
    """
    with ExitStack() as stack:
        try:
            if not storage.is_url(workdir):
                stack.enter_context(locks.lock(workdir, wait=False))
                storage.delete_abandoned(Path(workdir))
        except OSError as error:
            raise workdirs.WorkdirError(
                f"--workdir {str(workdir)!r} cannot be written: {error.strerror or error}"
            ) from None
        yield


def _with_one_rollback(
    job: loop.Job, state: TrainState, newest: Callable[[], TrainState | None], mirror: storage.Mirror
) -> dict[str, float]:
    """Runs the loop, and once more from the last checkpoint if too many steps are not finite."""
    with closing(job.journal):
        try:
            return loop.loop(job, state)
        except loop.TooManySkippedSteps as error:
            problem = str(error)
    logger.warning(f"{problem}: rolling back to the last checkpoint (one retry)")
    job.manager.wait_until_finished()
    restored = newest()
    if restored is None:
        raise TrainError(f"{problem}; there is no checkpoint to roll back to: {ADVICE}")
    with closing(run.open_journal(mirror, restored)) as journal:
        try:
            return loop.loop(job._replace(journal=journal), restored)
        except loop.TooManySkippedSteps as error:
            raise TrainError(
                f"{error}: failed again after the rollback; checkpoint {int(restored.step):,} is intact: {ADVICE}"
            ) from None
