"""A user's function as the frozen backbone, and the module that takes its embeddings."""

import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from functools import lru_cache, reduce
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from tcq.runtime import modules

NAME = "embeddings"  # of the model whose backbone is `Standardize`
NUM_SUMS = 4
TOLERANCE = 0.02  # of the largest sum; libraries and machines round differently
ROUNDING = 0.001  # of the largest sum; even one machine rounds differently from call to call, in half precision

# Standard output is for our answers, and a function of a user may not be made for threads.
_ONE_CALL = threading.RLock()

Embed = Callable[[UInt8[np.ndarray, "N S S 3"]], Float[np.ndarray, "N F"]]


class EmbedderError(ValueError):
    """The function of `model.embedder` cannot be used; the message says why and what to do."""


class NotFiniteError(EmbedderError):
    """An embedding has a number that is not finite."""

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message)
        self.row = row  # of the images


class Standardize(nn.Module):
    """Embeddings minus their mean, divided by one number so that their mean square is 1.

    It is not trained.
    """

    width: int

    @nn.compact
    def __call__(self, rows: Float[Array, "N F"], *, train: bool = False) -> Float[Array, "N F"]:
        mean = self.param("mean", nn.initializers.zeros, (self.width,), jnp.float32)
        std = self.param("std", nn.initializers.ones, (self.width,), jnp.float32)
        return (rows - mean[None]) * scale(std)


def scale(std: Float[Array, " F"]) -> Float[Array, ""]:
    """The factor that `Standardize` applies."""
    return jnp.reciprocal(jnp.sqrt(jnp.maximum(jnp.mean(std**2), 1e-12)))


def statistics(rows: Float[np.ndarray, "N F"]) -> dict[str, Float[np.ndarray, " F"]]:
    """The parameters of `Standardize` for some embeddings.

    Raises EmbedderError if all are equal.
    """
    rows = np.asarray(rows, np.float32)
    found = {"mean": rows.mean(axis=0), "std": rows.std(axis=0)}
    if len(rows) > 1 and (rows[0] == rows).all():
        raise EmbedderError(f"all {len(rows):,} embeddings are equal, so nothing can be learned from them")
    return found


@lru_cache(maxsize=4)
def load(spec: str) -> Embed:
    """The function of "file.py:function" or "module:function". Raises EmbedderError."""
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise EmbedderError(f"model.embedder {spec!r} must be file.py:function or module:function")
    if Path(place).suffix == ".ipynb" or ("/" in place and Path(place).expanduser().is_dir()):  # else a package
        raise EmbedderError(f"model.embedder {spec}: {place} must be a .py file or the name of a module")
    try:
        with _ONE_CALL, contextlib.redirect_stdout(sys.stderr):
            module = _module(place)
    except (Exception, SystemExit) as error:
        raise EmbedderError(f"model.embedder {spec}: {type(error).__name__}: {_one_line(error)}") from None
    try:
        function: Embed = reduce(getattr, name.split("."), module)
    except AttributeError:
        raise EmbedderError(f"model.embedder {spec}: {place} has no function {name!r}") from None
    if not callable(function):
        raise EmbedderError(f"model.embedder {spec}: {name} is no function, but of type {type(function).__name__}")
    return function


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    file = Path(place).expanduser()
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # for modules beside it, as with `python file.py`
    return modules.execute(file, _module_name(file))


def _module_name(file: Path) -> str:
    """The name by which other processes import the file; one of ours if another module has it."""
    known = sys.modules.get(file.stem)
    if known is None and file.stem.isidentifier():
        spec = importlib.util.find_spec(file.stem)
        origin = spec.origin if spec else None
    else:
        origin = getattr(known, "__file__", None)
    if origin and Path(origin).resolve() == file.resolve():
        return file.stem
    return f"tcq_embedder_{file.stem}_{hashlib.sha256(os.fsencode(file.resolve())).hexdigest()[:8]}"


def run(spec: str, images: UInt8[np.ndarray, "N S S 3"]) -> Float[np.ndarray, "N F"]:
    """The embeddings of images, float32.

    Raises EmbedderError if the function fails or returns something else.
    """
    function = load(spec)
    try:
        with _ONE_CALL, contextlib.redirect_stdout(sys.stderr):
            returned: Any = function(np.array(images))  # a copy, in case the function changes it
    except EmbedderError:
        raise
    except (Exception, SystemExit) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{type(error).__name__} in {where.filename}:{where.lineno}"
        reason = _one_line(error) or where.line
        raise EmbedderError(f"model.embedder {spec} with {images.shape}: {place}: {reason}") from error
    rows = _array(returned)
    is_float = rows is not None and (rows.dtype.kind == "f" or rows.dtype.name == "bfloat16")
    if rows is None or not is_float or rows.ndim != 2 or len(rows) != len(images) or not rows.shape[1]:
        got = type(returned).__name__ if rows is None else f"{rows.shape} {rows.dtype}"
        expected = f"an array of floats of shape ({len(images)}, F) is expected"
        raise EmbedderError(f"model.embedder {spec} with {images.shape} returned {got}: {expected}")
    with np.errstate(over="ignore"):
        rows = rows.astype(np.float32)
    if not np.isfinite(rows).all():
        which = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
        raise NotFiniteError(
            f"model.embedder {spec} with {images.shape}: the embedding of image {which} (from 0) has a number that is "
            f"not finite in float32",
            which,
        )
    return rows


def _array(returned: Any) -> np.ndarray | None:
    """What a function returned as an array of numbers, or None if it is none."""
    try:
        rows = np.asarray(returned)
    except Exception:  # a ragged list, or a tensor that is on another device
        return None
    return None if rows.dtype.hasobject else rows


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def signature(spec: str, image_size: int) -> tuple[float, ...]:
    """The width of the embeddings, and sums over those of fixed images.

    These numbers tell one function from another. Raises EmbedderError as `run`, and for a function that gives an image
    something else in another batch or at another call, or all fixed images the same.
    """
    images = _fixed_images(image_size)
    rows, alone = run(spec, images), run(spec, images[:1])
    if not _is_near(rows[:1], alone):
        if not _is_near(run(spec, images[:1]), alone):
            cause = "gives the same image another embedding at each call: switch off dropout and random augmentation"
        else:
            cause = "gives an image another embedding in another batch: switch off the statistics of the batch"
        raise EmbedderError(f"model.embedder {spec} {cause} (model.eval() in PyTorch, train=False in Flax)")
    if np.abs(rows - rows[:1]).max() <= ROUNDING * np.abs(rows).max():
        raise EmbedderError(
            f"model.embedder {spec} gives four different images (noise and ramps) one embedding, so another function "
            f"could not be recognized later: let it return features of the whole image where it finds no object"
        )
    sums = rows @ np.random.RandomState(1).randn(rows.shape[1], NUM_SUMS)
    return (float(rows.shape[1]), *(round(float(s), 6) for s in sums.ravel()))


def _fixed_images(size: int) -> UInt8[np.ndarray, "4 S S 3"]:
    """Two images of noise, a dark and a bright one of colours that change slowly."""
    noise = np.random.RandomState(0).randint(0, 256, (2, size, size, 3))
    ramp = np.linspace(0, 120, size)
    dark = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, ::-1], ramp[None] / 3), axis=-1)
    return np.concatenate([noise, [dark, 255 - dark[::-1]]]).astype(np.uint8)


def _is_near(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.allclose(a, b, rtol=0, atol=TOLERANCE * max(np.abs(b).max(initial=0), 1e-30))


def is_same(now: Sequence[float], stored: Sequence[float], tolerance: float = ROUNDING) -> bool:
    """Whether two signatures are of one function: of one width, with nearly the same sums."""
    if len(now) != len(stored) or list(now[:1]) != list(stored[:1]):
        return False
    return not stored or np.allclose(now[1:], stored[1:], rtol=0, atol=tolerance * max(map(abs, stored[1:])))


def require_same(spec: str, image_size: int, stored: tuple[float, ...]) -> None:
    """Raises EmbedderError unless the function computes what it did earlier.

    `stored` is its `signature` of that time.
    """
    now = signature(spec, image_size)
    if not is_same(now, stored, TOLERANCE):
        widths = f" ({now[0]:.0f} numbers, then {stored[0]:.0f})" if now[0] != stored[0] else ""
        raise EmbedderError(
            f"model.embedder {spec} gives other embeddings than those of the training{widths}: use the same function, "
            f"library and weights"
        )
