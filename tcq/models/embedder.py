"""A user's function as the frozen backbone, and the module that takes its embeddings."""

import contextlib
import importlib
import importlib.util
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

NAME = "embeddings"  # of the model whose backbone is `Standardize`
NUM_TRIAL_IMAGES, NUM_SUMS = 2, 4
TOLERANCE = 0.02  # of the largest sum; libraries and machines round differently
ROUNDING = 0.001  # of the largest sum; even one machine rounds differently from call to call, in half precision

# Standard output is for our answers, and a function of a user may not be made for threads.
_ONE_CALL = threading.RLock()

Embed = Callable[[UInt8[np.ndarray, "N S S 3"]], Float[np.ndarray, "N F"]]


class EmbedderError(ValueError):
    """The function of `model.embedder` cannot be used; the message says why and what to do."""


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
    """The parameters of `Standardize` for some embeddings."""
    rows = np.asarray(rows, np.float32)
    return {"mean": rows.mean(axis=0), "std": rows.std(axis=0)}


@lru_cache(maxsize=4)
def load(spec: str) -> Embed:
    """The function of "file.py:function" or "module:function". Raises EmbedderError."""
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise EmbedderError(f"model.embedder {spec!r} must be file.py:function or module:function")
    try:
        with _ONE_CALL, contextlib.redirect_stdout(sys.stderr):
            module = _module(place)
        function: Embed = getattr(module, name)
    except (Exception, SystemExit) as error:
        raise EmbedderError(f"model.embedder {spec}: {type(error).__name__}: {error}") from None
    return function


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    file = Path(place).expanduser()
    module_spec = importlib.util.spec_from_file_location(f"tcq_embedder_{file.stem}", file)
    assert module_spec and module_spec.loader
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def run(spec: str, images: UInt8[np.ndarray, "N S S 3"]) -> Float[np.ndarray, "N F"]:
    """The embeddings of images, float32.

    Raises EmbedderError if the function fails or returns something else.
    """
    try:
        with _ONE_CALL, contextlib.redirect_stdout(sys.stderr):
            rows = np.asarray(load(spec)(np.array(images)))  # a copy, in case the function changes it
    except EmbedderError:
        raise
    except (Exception, SystemExit) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{type(error).__name__} in {where.filename}:{where.lineno}"
        raise EmbedderError(f"model.embedder {spec} with {images.shape}: {place}: {error}") from error
    if rows.ndim != 2 or len(rows) != len(images) or rows.dtype.kind != "f":
        expected = f"floats of shape ({len(images)}, F) are expected"
        raise EmbedderError(f"model.embedder {spec} with {images.shape} returned {rows.shape} {rows.dtype}: {expected}")
    with np.errstate(over="ignore"):
        rows = rows.astype(np.float32)
    if not np.isfinite(rows).all():
        raise EmbedderError(f"model.embedder {spec}: an embedding has a number that is not finite in float32")
    return rows


def signature(spec: str, image_size: int) -> tuple[float, ...]:
    """The width of the embeddings, and sums over those of fixed images.

    These numbers tell one function from another.
    """
    random = np.random.RandomState(0)
    images = random.randint(0, 256, (NUM_TRIAL_IMAGES, image_size, image_size, 3)).astype(np.uint8)
    rows = run(spec, images)
    sums = rows @ np.random.RandomState(1).randn(rows.shape[1], NUM_SUMS)
    return (float(rows.shape[1]), *(round(float(s), 6) for s in sums.ravel()))


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
        raise EmbedderError(
            f"model.embedder {spec} gives other embeddings than the run was trained on ({now[0]:.0f} numbers, sums "
            f"{now[1:]}; then {stored[0]:.0f}, {tuple(stored[1:])}): use the same function, library and weights"
        )
