"""Checkpoints of a workdir; the only file that knows Orbax.

Checkpoints are NumPy trees, so they restore on any devices.
"""

import glob
import hashlib
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from tcq.runtime import processes, storage

FOLDER = "checkpoints"
DIGESTS = "digests"
CORRUPTED, REPLACED = "corrupted", "replaced"  # folders beside FOLDER, named FOLDER_corrupted and FOLDER_replaced
README = {
    CORRUPTED: "Corrupted checkpoints, moved here by tcq, which does not read them.\n",
    REPLACED: "A checkpoint, kept here until the same one with its score is written.\n",
}
SPARE = 1.2  # free disk space that a checkpoint needs, over the bytes of its arrays
_UNSCORED = -1e30  # ranks below every score; Orbax ranks NaN as the best, and keeps all checkpoints without a score
_TRANSIENT = (MemoryError, PermissionError, TimeoutError, ConnectionError)  # the files may be intact

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """There is no checkpoint to restore, or it does not fit; the message says why."""


class CorruptedError(CheckpointError):
    """The files of a checkpoint are not what was written."""


def check_place(workdir: str | Path) -> None:
    """Raises CheckpointError for a folder that Orbax takes for a pattern.

    No checkpoint could be read in such a folder.
    """
    place = str(workdir) if storage.is_url(workdir) else str(Path(workdir).resolve())
    if glob.has_magic(place):
        raise CheckpointError(
            f"{place!r} holds one of the characters * ? [ in a name, which Orbax takes for a pattern: its checkpoints "
            f"could not be read; choose another --workdir"
        )


def open_manager(workdir: str | Path, *, keep: int = 1, writable: bool = False) -> ocp.CheckpointManager:
    """The checkpoints of a workdir, of which the `keep` newest and the best are kept.

    Close the manager when done. While a run writes, one more is kept: an older one is deleted only when `verify_newest`
    has read the newer one.
    """
    folder = epath.Path(storage.join(workdir, FOLDER))
    folder = folder if storage.is_url(workdir) else folder.resolve()
    if not writable and not folder.is_dir():
        raise CheckpointError(f"{str(workdir)!r} holds no checkpoints: is it the --workdir of a training run?")
    best = policies.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep + 1), best]),
        best_fn=_score,  # without it scores are not stored, and a resumed run would lose the best checkpoint
        create=writable,
        cleanup_tmp_directories=writable,
    )
    if writable:
        processes.on_first(lambda: _undo_replacement(folder))
    manager = ocp.CheckpointManager(folder, options=options)
    processes.require_same("checkpoints", sorted(manager.all_steps()))
    return manager


def save(
    manager: ocp.CheckpointManager, step: int, state: Mapping[str, Any], *, score: float | None, replace: bool = False
) -> None:
    """Saves named trees of NumPy arrays in the background, with a digest of each array.

    Args:
      manager: as `open_manager` returned it, writable.
      step: of the checkpoint.
      state: the trees.
      score: the highest one is the best; None ranks last.
      replace: whether to replace a checkpoint of this step, whose checkpoint has no score yet.

    Raises:
      CheckpointError: a number is not finite, or the disk is full; then nothing is saved.
    """
    processes.on_first(lambda: _check_space(manager, state))
    digests = {name: _digests(tree) for name, tree in state.items()}
    for name, tree in state.items():
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            if np.asarray(x).dtype.kind == "f" and not np.isfinite(x).all():
                raise CheckpointError(f"{name}{jax.tree_util.keystr(path)} is not finite at step {step}: not saved")
    replaces = replace and step in manager.all_steps()
    if replaces:  # the old one stays beside the folder until the new one is complete
        processes.on_first(lambda: _move(manager.directory, step, REPLACED))
        manager.reload()
    rank = _UNSCORED if score is None or not np.isfinite(score) else float(score)
    items = {name: ocp.args.PyTreeSave(tree) for name, tree in state.items()}
    items[DIGESTS] = ocp.args.JsonSave(digests)
    with _one_message(manager, step):
        manager.save(step, args=ocp.args.Composite(**items), metrics={"score": rank})
        if replaces:
            manager.wait_until_finished()
    if replaces:
        processes.on_first(lambda: _sibling(manager.directory, REPLACED).rmtree())


def _check_space(manager: ocp.CheckpointManager, state: Mapping[str, Any]) -> None:
    """Raises CheckpointError on a full disk, where Orbax would fail in its threads."""
    folder = str(manager.directory)
    if storage.is_url(folder):
        return
    needed = int(SPARE * sum(np.asarray(x).nbytes for x in jax.tree.leaves(dict(state))))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder}: a checkpoint needs {needed / 2**20:,.1f} MiB, {free / 2**20:,.1f} MiB are free: make room and "
            f"run the same command again; the checkpoints up to step {manager.latest_step() or 0:,} stand"
        )


@contextmanager
def _one_message(manager: ocp.CheckpointManager, step: int | None) -> Iterator[None]:
    """Turns the many errors of Orbax's threads into a CheckpointError.

    Errors of other processes stay as they are.
    """
    try:
        yield
    except (CheckpointError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        which = "a checkpoint" if step is None else f"checkpoint {step}"
        raise CheckpointError(f"{which} cannot be written to {manager.directory}: {_describe(error)}") from None


def verify_newest(manager: ocp.CheckpointManager, state: Mapping[str, Any]) -> bool:
    """Whether the newest checkpoint, once complete, holds what was saved.

    A corrupted one is moved, with a warning. `state` has the structure of what was saved. True if there is no
    checkpoint.
    """
    with _one_message(manager, None):
        manager.wait_until_finished()
    newest = manager.latest_step()
    if newest is None:
        return True
    try:
        restore(manager, newest, state)
        problem = None
    except CorruptedError as error:
        problem = str(error)
    problems = [p for p in processes.exchange(problem) if p]
    if problems:
        logger.warning(f"corrupted: {problems[0]}")
        processes.on_first(partial(_move, manager.directory, newest, CORRUPTED))
        manager.reload()
    return not problems


def prune(manager: ocp.CheckpointManager, *, keep: int) -> None:
    """Deletes all checkpoints but the `keep` newest and the best."""
    steps = sorted(manager.all_steps())
    if not steps:
        return
    best = max(steps, key=lambda s: (_score(_metrics(manager, s)), s))
    for step in steps[:-keep]:
        if step != best:
            manager.delete(step)


def candidates(manager: ocp.CheckpointManager, which: str) -> list[int]:
    """The steps to try in order.

    For "latest" the newest is first, for "best" the one with the highest score; a number is tried alone. Raises
    CheckpointError if there is none.
    """
    steps = sorted(manager.all_steps(), reverse=True)
    if not steps:
        raise CheckpointError(f"no checkpoint found in {manager.directory}")
    if which == "latest":
        return steps
    if which == "best":
        return sorted(steps, key=lambda s: (_score(_metrics(manager, s)), s), reverse=True)
    if not which.isdecimal() or int(which) not in steps:
        known = ", ".join(map(str, sorted(steps)))
        raise CheckpointError(
            f"checkpoint {which!r} not found in {manager.directory}: use latest, best or one of {known}"
        )
    return [int(which)]


def restore_first_intact(
    manager: ocp.CheckpointManager, steps: Iterable[int], template: Mapping[str, Any], *, move: bool = False
) -> tuple[int, dict[str, Any]]:
    """The first of some checkpoints that is intact, and its step.

    Logs a warning for each corrupted one. With `move` corrupted checkpoints are moved to checkpoints_corrupted/, so
    that their steps can be saved again.
    Raises CheckpointError as `restore`, and CorruptedError if all are corrupted.
    """
    problems: list[str] = []
    for step in steps:
        try:
            restored, problem = restore(manager, step, template), None
        except CorruptedError as error:
            restored, problem = {}, str(error)
        processes.agree_to_stop()
        corrupted = [p for p in processes.exchange(problem) if p]
        if not corrupted:
            if problems:
                logger.warning(f"falling back to checkpoint {step}, which is intact")
            processes.require_same("checkpoint", step)
            return step, restored
        problems.append(corrupted[0])
        logger.warning(f"corrupted: {corrupted[0]}")
        if move:
            processes.on_first(partial(_move, manager.directory, step, CORRUPTED))
            manager.reload()
    raise CorruptedError("\n".join(problems) or f"no checkpoint found in {manager.directory}")


def restore(manager: ocp.CheckpointManager, step: int, template: Mapping[str, Any]) -> dict[str, Any]:
    """The saved trees named in `template`, as NumPy arrays.

    `template` has their structures, shapes and dtypes. Raises CheckpointError if keys or shapes differ, CorruptedError
    if the files cannot be read or are not what was written.
    """
    where = f"checkpoint {step} in {manager.directory}"
    target = {name: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree) for name, tree in template.items()}
    missing = [n for n in (*target, DIGESTS) if not (manager.directory / str(step) / n).exists()]
    if missing:
        raise CheckpointError(f"{where} lacks {' and '.join(missing)}: it is incomplete, or of an older version of tcq")
    digests = _read_digests(manager, step, where, target)
    _check_shapes(where, target, digests)
    items = {name: ocp.args.PyTreeRestore(tree) for name, tree in target.items()}
    try:
        result = manager.restore(step, args=ocp.args.Composite(**items))
        restored = {name: result[name] for name in target}
        changed = [
            f"{name}{key}"
            for name in target
            for key, leaf in _digests(restored[name]).items()
            if leaf["sha256"] != digests[name][key]["sha256"]
        ]
    except _TRANSIENT as error:
        raise CheckpointError(f"{where} cannot be read now: {_describe(error)}") from None
    except Exception as error:  # Orbax and TensorStore raise errors of many kinds
        raise CorruptedError(f"{where} cannot be read: {_describe(error)}") from None
    if changed:
        raise CorruptedError(f"{where}: the numbers of {', '.join(changed[:5])} differ from those that were saved")
    return restored


def _read_digests(manager: ocp.CheckpointManager, step: int, where: str, target: Mapping[str, Any]) -> dict[str, Any]:
    """The stored digests and shapes of all arrays of the target's trees."""
    try:
        digests = manager.restore(step, args=ocp.args.Composite(**{DIGESTS: ocp.args.JsonRestore()}))[DIGESTS]
        return {
            name: {
                key: {"shape": tuple(leaf["shape"]), "sha256": leaf["sha256"]} for key, leaf in digests[name].items()
            }
            for name in target
        }
    except _TRANSIENT as error:
        raise CheckpointError(f"{where} cannot be read now: {_describe(error)}") from None
    except Exception as error:  # Orbax, JSON and TensorStore raise errors of many kinds
        raise CorruptedError(f"{where} has no readable digests: {_describe(error)}") from None


def _check_shapes(where: str, target: Mapping[str, Any], digests: Mapping[str, Any]) -> None:
    for name, tree in target.items():
        have = {key: leaf["shape"] for key, leaf in digests[name].items()}
        want = {jax.tree_util.keystr(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(tree)}
        different = sorted(k for k in want.keys() | have.keys() if want.get(k) != have.get(k))
        if different:
            listed = [f"{name}{k}: {have.get(k, 'missing')}, must be {want.get(k, 'absent')}" for k in different]
            raise CheckpointError(f"{where} does not fit the model:\n" + "\n".join(listed))


def _digests(tree: Any) -> dict[str, dict[str, Any]]:
    """SHA-256 and shape of each array of a tree."""
    digests = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        x = np.asarray(x)
        sha256 = hashlib.sha256(f"{x.dtype.str} {x.shape} ".encode() + x.tobytes()).hexdigest()
        digests[jax.tree_util.keystr(path)] = {"shape": list(np.shape(x)), "sha256": sha256}
    return digests


def _sibling(folder: epath.Path, suffix: str) -> epath.Path:
    return folder.with_name(f"{folder.name}_{suffix}")


def _move(folder: epath.Path, step: int, suffix: str) -> None:
    """Moves a checkpoint to a folder beside the checkpoints."""
    target = _sibling(folder, suffix)
    target.mkdir(exist_ok=True)
    (target / "README").write_text(README[suffix])  # in a bucket this creates the folder
    name = f"{step}-{len(list(target.iterdir()))}" if suffix == CORRUPTED else f"{step}"
    (folder / str(step)).rename(target / name)


def _undo_replacement(folder: epath.Path) -> None:
    """Moves back a checkpoint whose replacement was not completed."""
    replaced = _sibling(folder, REPLACED)
    if not replaced.exists():
        return
    for old in replaced.iterdir():
        if old.name.isdecimal() and not (folder / old.name).exists():
            old.rename(folder / old.name)
    replaced.rmtree()


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:500]}"


def _metrics(manager: ocp.CheckpointManager, step: int) -> dict[str, float]:
    try:
        return manager.metrics(step) or {}
    except Exception:  # corrupted as well
        return {}


def _score(metrics: dict[str, float]) -> float:
    return metrics.get("score", _UNSCORED)
