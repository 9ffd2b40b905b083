"""The only file that knows `jax.pmap` and how arrays are placed on devices.

State has no leading device axis: it goes into the mapped step whole (`in_axes=None`) and comes out whole. Batches have
one: (local devices, b, ...). Since JAX 0.8 `jax.pmap` is `jit(shard_map)`.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tcq.runtime import processes, signals, storage

AXIS = "batch"
Batch = dict[str, Any]
Step = Callable[[Any, Any, Any], tuple[Any, Any]]


def cache_compilations() -> None:
    """Keeps compiled programs for the next start.

    They are below `storage.cache_home()` unless JAX has another folder for them. The function does nothing on CPUs: a
    cache saves only seconds there, and XLA rejects some of its own cached programs
    (https://github.com/jax-ml/jax/issues/38445).
    """
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None and accelerated():
        folder = storage.cache_home() / "compiled" / f"jaxlib-{jaxlib.__version__}"
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _standard(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, traced with the usual promotion of dtypes, which optax and flax assume."""

    @wraps(function)
    def traced(*arguments: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*arguments)

    return traced


def accelerated() -> bool:
    """Whether JAX computes on accelerators, such as GPUs and TPUs."""
    return jax.default_backend() != "cpu"


def scorers() -> list[jax.Device]:
    """The devices that work on blocks of queries in turn.

    They are all local accelerators, or one CPU, which has all cores.
    """
    return jax.local_devices() if accelerated() else jax.local_devices()[:1]


def pmap_step(body: Step) -> Step:
    """Compiles body(state, data, batch of one device) -> (state, logs) for all devices.

    The state is donated. State and data are the same on all devices, and so must be what the body returns (average it
    over `AXIS`): the value of one device is kept.
    """
    return jax.pmap(_standard(body), axis_name=AXIS, in_axes=(None, None, 0), out_axes=(None, None), donate_argnums=0)


def pmap_rows(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Compiles function(params, rows of one device) -> rows for the local devices.

    The rows are (devices, b, ...) in and out.
    """
    return jax.pmap(_standard(function), axis_name=AXIS, in_axes=(None, 0), devices=jax.local_devices())


def replicate(tree: Any) -> Any:
    """A copy on each local device, with the sharding of a mapped step's results.

    Donation needs this sharding.
    """
    sharding = NamedSharding(Mesh(np.array(jax.local_devices()), (AXIS,)), PartitionSpec())
    return jax.tree.map(lambda x: jax.device_put(np.array(x), sharding), tree)


def from_first(tree: Any) -> Any:
    """The arrays of the first process, in all processes."""
    return multihost_utils.broadcast_one_to_all(tree) if jax.process_count() > 1 else tree


def place(tree: Any) -> Any:
    """As `replicate`, but arrays that are on all local devices already stay as they are.

    Never donate the result.
    """
    sharding = NamedSharding(Mesh(np.array(jax.local_devices()), (AXIS,)), PartitionSpec())

    def one(x: Any) -> Any:
        placed = isinstance(x, jax.Array) and x.sharding == sharding
        return x if placed else jax.device_put(np.array(x), sharding)

    return jax.tree.map(one, tree)


def shard(batch: Any) -> Any:
    """Arrays (local devices, b, ...) placed on the local devices, one slice on each."""
    sharding = NamedSharding(Mesh(np.array(jax.local_devices()), (AXIS,)), PartitionSpec(AXIS))
    return jax.device_put(batch, sharding)


def prefetch(stream: Iterator[Batch], count: int = 2) -> Iterator[Batch]:
    """The batches of this process, on its devices, with `count` of them transferred ahead."""
    ahead: deque[Batch] = deque()
    for batch in stream:
        ahead.append(shard(batch))
        if len(ahead) >= count:
            yield ahead.popleft()
    yield from ahead


def fetch(tree: Any) -> Any:
    """NumPy copies of replicated arrays, because the next step may overwrite a donated buffer."""
    return jax.tree.map(lambda x: np.array(x.addressable_shards[0].data), tree)


def wait_on_cpu(tree: Any) -> None:
    """Waits for arrays on simulated CPU devices, where queued steps can deadlock."""
    if jax.default_backend() == "cpu":
        jax.block_until_ready(tree)


def checksums(tree: Any) -> dict[str, int]:
    """For each device of the run, by a readable name, a checksum of replicated arrays.

    The checksum is over all bits of the copy of that device.
    """
    devices = {d.id: d for d in jax.devices()}
    rows = fetch(_compiled_checksum()(tree, np.array([d.id for d in jax.local_devices()], np.uint32)))
    return {
        f"device {i} ({devices[i].device_kind} of process {devices[i].process_index})": int(checksum)
        for i, checksum in rows.tolist()
    }


@lru_cache(maxsize=1)
def _compiled_checksum() -> Any:
    """For each device its number and a checksum, on all devices.

    The result is one function, which is compiled once for each tree.
    """

    def checksum(tree: Any, number: Any) -> Any:
        words = [_words(x) for x in jax.tree.leaves(tree)]
        sums = jnp.stack([jnp.sum(w * (2 * jnp.arange(w.size, dtype=jnp.uint32) + 1)) for w in words])
        mixed = jnp.sum(sums * (2 * jnp.arange(len(words), dtype=jnp.uint32) + 1))
        return jax.lax.all_gather(jnp.stack([number, mixed.astype(jnp.uint32)]), AXIS)

    return jax.pmap(checksum, axis_name=AXIS, in_axes=(None, 0), out_axes=None)


def _words(x: Any) -> Any:
    """The bits of an array as a vector of uint32."""
    if x.dtype.itemsize == 4:
        return jax.lax.bitcast_convert_type(x, jnp.uint32).ravel()
    return x.astype(jnp.uint32).ravel() if x.dtype.kind in "bui" else _words(x.astype(jnp.float32))


def map_in_batches(function: Callable[[Any, Any], Any], params: Any, rows: Any, batch_size: int) -> Any:
    """Applies a `pmap_rows` function to all rows, in batches padded to one shape.

    Padding is cut off again.

    Args:
      function: compiled by `pmap_rows`.
      params: its first argument, the same for all batches.
      rows: an array, or a tree of arrays of one length, at least 1.
      batch_size: rows for each device, so that shapes, and with them rounding, are the same on any number of devices.

    Returns:
      NumPy arrays of the length of the rows. The processes of a run share the work, and each gets all results.

    Raises:
      Stopped: a process of the run got a signal to stop.
    """
    length = len(jax.tree.leaves(rows)[0])
    size = min(batch_size, length)
    begin, end = (edge * size for edge in processes.share(-(-length // size)))
    results = _map(function, params, rows, size, begin, end)
    processes.agree_to_stop()
    return gather(_joined(results))


def map_here(function: Callable[[Any, Any], Any], params: Any, rows: Any, batch_size: int) -> Any:
    """As `map_in_batches`, but each process maps rows of its own, all by itself."""
    length = len(jax.tree.leaves(rows)[0])
    results = _map(function, params, rows, min(batch_size, length), 0, length)
    signals.check()
    return _joined(results)


def _map(function: Callable[[Any, Any], Any], params: Any, rows: Any, size: int, begin: int, end: int) -> list[Any]:
    """The results of the batches from row `begin` to `end`, fewer after a signal to stop."""
    length, devices = len(jax.tree.leaves(rows)[0]), jax.local_device_count()

    def device_batch(x: Any, start: int) -> np.ndarray:
        part = np.asarray(x[start : min(start + size * devices, end)])
        padded = np.pad(part, [(0, size * devices - len(part))] + [(0, 0)] * (part.ndim - 1))
        return padded.reshape(devices, size, *part.shape[1:])

    results = []
    for start in range(begin, end, size * devices) or (begin,):  # at least one batch, for the shapes of the results
        if signals.requested():
            break
        result = function(params, jax.tree.map(partial(device_batch, start=start), rows))
        signals.advance()
        count = min(max(min(end, length) - start, 0), size * devices)
        results.append(jax.tree.map(lambda x, n=count: np.asarray(x).reshape(-1, *x.shape[2:])[:n], result))
    return results


def _joined(results: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *parts: np.concatenate(parts), *results)


def gather(tree: Any) -> Any:
    """The rows of all processes in their order, bit for bit.

    They are NumPy arrays, whose lengths may differ.
    """
    if not processes.several():
        return tree

    def one(x: np.ndarray) -> np.ndarray:
        lengths = processes.exchange(len(x))
        width = int(np.prod(x.shape[1:])) * x.dtype.itemsize
        raw = np.frombuffer(np.ascontiguousarray(x).tobytes(), np.uint8).reshape(len(x), width)
        padded = np.pad(raw, [(0, max(lengths) - len(x)), (0, 0)])
        everyone = np.asarray(multihost_utils.process_allgather(padded))
        rows = np.concatenate([part[:n] for part, n in zip(everyone, lengths, strict=True)])
        return np.frombuffer(rows.tobytes(), x.dtype).reshape(-1, *x.shape[1:])

    return jax.tree.map(one, tree)
