"""The only file that knows Orbax: checkpoints of a workdir, saved as NumPy trees, so that they restore on any devices."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

FOLDER = "checkpoints"
_UNSCORED = -1e30  # ranks below every score; Orbax would call NaN the best, and keep every checkpoint without a score


class CheckpointError(ValueError):
    """There is no checkpoint to restore, or it does not fit; the message says why."""


def open_manager(workdir: str | Path, *, keep: int = 1, writable: bool = False) -> ocp.CheckpointManager:
    """The checkpoints of a workdir; the `keep` newest and the best are preserved. Close it when done."""
    folder = (Path(workdir) / FOLDER).resolve()
    if not writable and not folder.is_dir():
        raise CheckpointError(f"{str(workdir)!r} holds no checkpoints: is it the --workdir of a training run?")
    best = policies.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
        best_fn=_score,  # or else scores are not stored, and the best would be lost when a run goes on
        create=writable,
        cleanup_tmp_directories=writable,
    )
    return ocp.CheckpointManager(folder, options=options)


def save(manager: ocp.CheckpointManager, step: int, state: Mapping[str, Any], *, score: float | None) -> None:
    """Saves named trees of NumPy arrays in the background; higher scores are better, None ranks last."""
    rank = _UNSCORED if score is None or not np.isfinite(score) else float(score)
    items = {name: ocp.args.PyTreeSave(tree) for name, tree in state.items()}
    manager.save(step, args=ocp.args.Composite(**items), metrics={"score": rank})


def find_step(manager: ocp.CheckpointManager, which: str) -> int:
    """The step of "latest", "best" (by validation score; the latest where there is none) or a number.

    Raises CheckpointError if there is none.
    """
    steps = sorted(manager.all_steps())
    if not steps:
        raise CheckpointError(f"there is no checkpoint in {manager.directory}")
    if which == "latest":
        return steps[-1]
    if which == "best":
        return max(steps, key=lambda s: (_score(manager.metrics(s) or {}), s))
    if not which.isdecimal() or int(which) not in steps:
        known = ", ".join(map(str, steps))
        raise CheckpointError(f"checkpoint {which!r} is not in {manager.directory}: use latest, best or one of {known}")
    return int(which)


def restore(manager: ocp.CheckpointManager, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
    """The saved trees that `like` names, as NumPy arrays; `like` has their structures, shapes and dtypes.

    Raises CheckpointError where keys or shapes differ, or the files cannot be read.
    """
    target = {name: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree) for name, tree in like.items()}
    items = {name: ocp.args.PyTreeRestore(tree) for name, tree in target.items()}
    absent = [name for name in target if not (Path(manager.directory) / str(step) / name).exists()]
    if absent:
        raise CheckpointError(
            f"checkpoint {step} in {manager.directory} holds no {' and no '.join(absent)}: it is not whole, or an older tcq made it"
        )
    try:
        restored = manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise CheckpointError(
            f"checkpoint {step} in {manager.directory} does not fit the model, or cannot be read: {str(error)[:2000]}"
        ) from None
    restored = {name: restored[name] for name in target}
    wrong = [
        f"{jax.tree_util.keystr(path)}: {np.shape(got)} there, {want.shape} expected"
        for (path, want), got in zip(
            jax.tree_util.tree_leaves_with_path(target), jax.tree.leaves(restored), strict=True
        )
        if np.shape(got) != want.shape
    ]
    if wrong:
        raise CheckpointError(f"checkpoint {step} in {manager.directory} does not fit the model:\n" + "\n".join(wrong))
    return restored


def _score(metrics: dict[str, float]) -> float:
    return metrics.get("score", _UNSCORED)
