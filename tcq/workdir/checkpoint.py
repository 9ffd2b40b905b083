"""The only file that knows Orbax: checkpoints of a workdir, saved as NumPy trees, so that they restore on any devices."""

import hashlib
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from tcq.runtime import processes, signals
from tcq.runtime import storage as buckets
from tcq.runtime.log import say

FOLDER = "checkpoints"
DIGESTS = "digests"
_UNSCORED = -1e30  # ranks below every score; Orbax would call NaN the best, and keep every checkpoint without a score
_NOT_DAMAGE = (MemoryError, PermissionError, TimeoutError, ConnectionError)  # the files may be as they should
MOVED, REPLACED = "damaged", "replaced"
WORDS = {
    MOVED: "Checkpoints whose files are not what was written. Nothing here is used again.\n",
    REPLACED: "A checkpoint until the same one with its score is written.\n",
}


class CheckpointError(ValueError):
    """There is no checkpoint to restore, or it does not fit; the message says why."""


class DamagedError(CheckpointError):
    """The files of a checkpoint are not what was written."""


def open_manager(workdir: str | Path, *, keep: int = 1, writable: bool = False) -> ocp.CheckpointManager:
    """The checkpoints of a workdir; the `keep` newest and the best are preserved. Close it when done."""
    folder = epath.Path(buckets.join(workdir, FOLDER))
    folder = folder if buckets.is_url(workdir) else folder.resolve()
    if not writable and not folder.is_dir():
        raise CheckpointError(f"{str(workdir)!r} holds no checkpoints: is it the --workdir of a training run?")
    best = policies.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
        best_fn=_score,  # or else scores are not stored, and the best would be lost when a run goes on
        create=writable,
        cleanup_tmp_directories=writable,
    )
    if writable:
        processes.on_first(lambda: _put_back(folder))
    manager = ocp.CheckpointManager(folder, options=options)
    processes.same("checkpoints", sorted(manager.all_steps()))
    return manager


def save(
    manager: ocp.CheckpointManager, step: int, state: Mapping[str, Any], *, score: float | None, replace: bool = False
) -> None:
    """Saves named trees of NumPy arrays in the background, with a digest of every array; higher scores are better, None
    ranks last. `replace` a checkpoint of this step, which had no score.

    Raises CheckpointError where a number is not finite: such a state is never saved.
    """
    digests = {name: _digests(tree) for name, tree in state.items()}
    for name, tree in state.items():
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            if np.asarray(x).dtype.kind == "f" and not np.isfinite(x).all():
                raise CheckpointError(f"{name}{jax.tree_util.keystr(path)} is not finite at step {step}: not saved")
    aside = replace and step in manager.all_steps()
    if aside:  # it stays until the new one is there
        processes.on_first(lambda: _move_away(manager.directory, step, REPLACED))
        manager.reload()
    rank = _UNSCORED if score is None or not np.isfinite(score) else float(score)
    items = {name: ocp.args.PyTreeSave(tree) for name, tree in state.items()}
    items[DIGESTS] = ocp.args.JsonSave(digests)
    manager.save(step, args=ocp.args.Composite(**items), metrics={"score": rank})
    if aside:
        manager.wait_until_finished()
        processes.on_first(lambda: _beside(manager.directory, REPLACED).rmtree())


def in_order(manager: ocp.CheckpointManager, which: str) -> list[int]:
    """The steps to try: of "latest" the newest first, of "best" by validation score; a number stands alone.

    Raises CheckpointError if there is none.
    """
    steps = sorted(manager.all_steps(), reverse=True)
    if not steps:
        raise CheckpointError(f"there is no checkpoint in {manager.directory}")
    if which == "latest":
        return steps
    if which == "best":
        return sorted(steps, key=lambda s: (_score(_metrics(manager, s)), s), reverse=True)
    if not which.isdecimal() or int(which) not in steps:
        known = ", ".join(map(str, sorted(steps)))
        raise CheckpointError(f"checkpoint {which!r} is not in {manager.directory}: use latest, best or one of {known}")
    return [int(which)]


def restore_first_good(
    manager: ocp.CheckpointManager, steps: Iterable[int], like: Mapping[str, Any], *, move: bool = False
) -> tuple[int, dict[str, Any]]:
    """The first of some checkpoints whose files are what was written, and its step; of damaged ones it is said loudly.

    With `move` they are moved out of the way, to checkpoints_damaged/ beside the folder, so that their steps can be saved
    again. Raises CheckpointError as `restore`, DamagedError where all are damaged.
    """
    told: list[str] = []
    for step in steps:
        try:
            with signals.deferred():
                restored, damage = restore(manager, step, like), None
        except DamagedError as error:
            restored, damage = {}, str(error)
        processes.agree_to_stop()
        found = [d for d in processes.exchange(damage) if d]
        if not found:
            if told:
                say(f"GOING BACK to checkpoint {step}, which is as it was written")
            processes.same("checkpoint", step)
            return step, restored
        told.append(found[0])
        say(f"DAMAGED: {found[0]}")
        if move:
            processes.on_first(partial(_move_away, manager.directory, step, MOVED))
            manager.reload()
    raise DamagedError("\n".join(told) or f"there is no checkpoint in {manager.directory}")


def restore(manager: ocp.CheckpointManager, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
    """The saved trees that `like` names, as NumPy arrays; `like` has their structures, shapes and dtypes.

    Raises CheckpointError where keys or shapes differ, DamagedError where the files cannot be read or are not what was
    written.
    """
    where = f"checkpoint {step} in {manager.directory}"
    target = {name: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree) for name, tree in like.items()}
    absent = [n for n in (*target, DIGESTS) if not (manager.directory / str(step) / n).exists()]
    if absent:
        raise CheckpointError(f"{where} holds no {' and no '.join(absent)}: it is not whole, or an older tcq made it")
    try:
        digests = manager.restore(step, args=ocp.args.Composite(**{DIGESTS: ocp.args.JsonRestore()}))[DIGESTS]
        stored = {name: {key: tuple(leaf["shape"]) for key, leaf in digests[name].items()} for name in target}
    except _NOT_DAMAGE as error:
        raise CheckpointError(f"{where} cannot be read now: {_short(error)}") from None
    except Exception as error:  # Orbax, JSON and TensorStore raise many kinds
        raise DamagedError(f"{where} has no readable digests: {_short(error)}") from None
    for name, tree in target.items():
        want = {jax.tree_util.keystr(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(tree)}
        if want != stored[name]:
            odd = sorted(k for k in want.keys() | stored[name].keys() if want.get(k) != stored[name].get(k))
            listed = [
                f"{name}{k}: {stored[name].get(k, 'missing')} there, {want.get(k, 'nothing')} expected" for k in odd
            ]
            raise CheckpointError(f"{where} does not fit the model:\n" + "\n".join(listed))
    try:
        items = {name: ocp.args.PyTreeRestore(tree) for name, tree in target.items()}
        found = manager.restore(step, args=ocp.args.Composite(**items))
        restored = {name: found[name] for name in target}
        bad = [
            f"{name}{key}"
            for name in target
            for key, leaf in _digests(restored[name]).items()
            if leaf["sha256"] != digests[name][key]["sha256"]
        ]
    except _NOT_DAMAGE as error:
        raise CheckpointError(f"{where} cannot be read now: {_short(error)}") from None
    except Exception as error:
        raise DamagedError(f"{where} cannot be read: {_short(error)}") from None
    if bad:
        raise DamagedError(f"{where}: the numbers of {', '.join(bad[:5])} are not those that were saved")
    return restored


def _digests(tree: Any) -> dict[str, dict[str, Any]]:
    """SHA-256 and shape of every array of a tree."""
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        x = np.asarray(x)
        digest = hashlib.sha256(f"{x.dtype.str} {x.shape} ".encode() + x.tobytes()).hexdigest()
        found[jax.tree_util.keystr(path)] = {"shape": list(np.shape(x)), "sha256": digest}
    return found


def _beside(folder: epath.Path, what: str) -> epath.Path:
    return folder.with_name(f"{folder.name}_{what}")


def _move_away(folder: epath.Path, step: int, what: str) -> None:
    place = _beside(folder, what)
    place.mkdir(exist_ok=True)
    (place / "README").write_text(WORDS[what])  # in a bucket it makes the folder
    name = f"{step}-{len(list(place.iterdir()))}" if what == MOVED else f"{step}"
    (folder / str(step)).rename(place / name)


def _put_back(folder: epath.Path) -> None:
    """A checkpoint whose replacement was not written to its end."""
    place = _beside(folder, REPLACED)
    if not place.exists():
        return
    for kept in place.iterdir():
        if kept.name.isdecimal() and not (folder / kept.name).exists():
            kept.rename(folder / kept.name)
    place.rmtree()


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:500]}"


def _metrics(manager: ocp.CheckpointManager, step: int) -> dict[str, float]:
    try:
        return manager.metrics(step) or {}
    except Exception:  # damaged as well
        return {}


def _score(metrics: dict[str, float]) -> float:
    return metrics.get("score", _UNSCORED)
