"""The k nearest items of queries among items shared out over this machine's accelerators.

Each device scores its items block by block and keeps the k best; those of all devices are merged here. A score becomes
a whole number of the same order, so that an item that is not allowed ranks below every score, also below -inf.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, UInt

from tcq.nearest import columns
from tcq.runtime import devices

BLOCK = 2**16  # items of a device that are scored at a time
QUERIES = 64  # that are scored together
LEAST = -(2**31)  # below the number of every score


class Shards(NamedTuple):
    """Items in the order of their ids, here and on D devices, with n of them or fewer on each."""

    columns: UInt[np.ndarray, "C N"]
    norms: Float[np.ndarray, " N"] | None
    on_devices: dict[str, Any]  # columns (D, C, n), inverse norms (D, n) if there are norms
    allowed: Any  # (D, n): all but the padding


def build(
    codes: UInt[np.ndarray, "N M"], num_codewords: int, *, norms: Float[np.ndarray, " N"] | None = None
) -> Shards:
    """Places a share of the items on each device."""
    cols = columns.of_codes(codes, num_codewords)
    arrays = {"columns": _shares(cols).swapaxes(0, 1)}
    if norms is not None:
        arrays["inverse"] = _shares(columns.inverse(norms))
    allowed = _shares(np.ones(len(codes), bool))
    return Shards(cols, norms, devices.shard(arrays), devices.shard(allowed))


def _shares(rows: np.ndarray) -> np.ndarray:
    """An array (..., N) as (..., D, n), where n is a whole number of blocks."""
    number = jax.local_device_count()
    size = -(-rows.shape[-1] // number)
    size = max(-(-size // BLOCK), 1) * BLOCK if size > BLOCK else max(size, 1)
    padded = np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, number * size - rows.shape[-1])])
    return padded.reshape(*rows.shape[:-1], number, size)


def search(
    items: Shards, tables: Float[np.ndarray, "Q C W"], k: int, allowed: Bool[np.ndarray, " N"] | None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Scores and ids of the k best items that are allowed, best first, of each query."""
    mask = items.allowed if allowed is None else devices.shard(_shares(allowed))
    rows = {**items.on_devices, "allowed": mask}
    program, size = _program(1 << (k - 1).bit_length()), mask.shape[1]
    answers = []
    for first in range(0, len(tables), QUERIES):
        part = tables[first : first + QUERIES]
        padded = np.concatenate([part, np.repeat(part[-1:], (1 << (len(part) - 1).bit_length()) - len(part), axis=0)])
        numbers, places = (np.asarray(x) for x in program(padded, rows))  # (D, Q, k)
        places = places + size * np.arange(len(places))[:, None, None]
        for query in range(len(part)):
            is_item = numbers[:, query] > LEAST
            scores = _scores(numbers[:, query][is_item])
            answers.append(columns.best(scores, places[:, query][is_item].astype(np.int64), k))
    return answers


@lru_cache(maxsize=64)
def _program(k: int) -> Any:
    """Compiles function(tables, items of each device) -> numbers and places.

    They are those of the k best items of each device.
    """

    def search_shard(tables: jax.Array, rows: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        queries, size = tables.shape[0], rows["columns"].shape[1]
        block = min(BLOCK, size)

        def merge(best: tuple[jax.Array, jax.Array], start: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            here = {name: jax.lax.dynamic_slice_in_dim(x, start, block, axis=-1) for name, x in rows.items()}
            numbers = jnp.where(here["allowed"][None], _numbers(_sums(tables, here)), LEAST)
            places = jnp.broadcast_to(start + jnp.arange(block), numbers.shape)
            numbers = jnp.concatenate([best[0], numbers], axis=1)
            places = jnp.concatenate([best[1], places], axis=1)
            numbers, order = jax.lax.top_k(numbers, k)  # the first of ties, which has the lowest id
            return (numbers, jnp.take_along_axis(places, order, axis=1)), None

        none = jnp.full((queries, k), LEAST, jnp.int32), jnp.zeros((queries, k), jnp.int32)
        return jax.lax.scan(merge, none, jnp.arange(0, size, block))[0]

    return devices.pmap_rows(search_shard)


def _sums(tables: Float[jax.Array, "Q C W"], rows: dict[str, jax.Array]) -> Float[jax.Array, "Q n"]:
    """The scores, added in the order of `ranking.scores`."""
    total = jnp.zeros((tables.shape[0], rows["columns"].shape[1]), jnp.float32)
    for table, column in zip(jnp.swapaxes(tables, 0, 1), rows["columns"], strict=True):
        total = total + jnp.take(table, column, axis=1, mode="clip")
    return total * rows["inverse"][None] if "inverse" in rows else total


def _numbers(scores: Float[jax.Array, "..."]) -> Int[jax.Array, "..."]:
    """Whole numbers in the order of the scores; 0 and -0 are equal."""
    bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _scores(numbers: Int[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    return (numbers ^ ((numbers >> 31) & 0x7FFFFFFF)).astype(np.int32).view(np.float32)
