"""The only file that knows pmap, processes and where arrays lie.

State has no leading device axis: it goes into the mapped step whole (`in_axes=None`) and comes out whole. Batches have
one: (local devices, b, ...). jax.pmap is jit(shard_map) since JAX 0.8; `shard_map_step` compiles the same body that way.
"""

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tcq.runtime import log as journal
from tcq.runtime import processes, signals

AXIS = "batch"
Batch = dict[str, Any]
Step = Callable[[Any, Any, Any], tuple[Any, Any]]


def keep_compiled() -> None:
    """What is compiled from now on is kept for the next start, in ~/.cache/tcq/compiled if no other place is set.

    Not on CPUs, where it saves seconds, and XLA refuses what it kept on some of them, with an error for each program.
    """
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None and jax.default_backend() != "cpu":
        folder = Path("~/.cache/tcq/compiled").expanduser() / f"jaxlib-{jaxlib.__version__}"
        jax.config.update("jax_compilation_cache_dir", str(folder))


def pmap_step(body: Step) -> Step:
    """Compiles body(state, data, batch of one device) -> (state, logs) for all devices; the state is donated.

    State and data are the same on all devices. What body returns must be the same on every device (average it over `AXIS`):
    one device's value is kept.
    """
    return jax.pmap(body, axis_name=AXIS, in_axes=(None, None, 0), out_axes=(None, None), donate_argnums=0)


def shard_map_step(body: Step) -> Step:
    """The same step under jit(shard_map), for a check that both give the same bits."""
    mesh = Mesh(np.array(jax.devices()), (AXIS,))

    def one_device(state: Any, data: Any, batch: Any) -> tuple[Any, Any]:
        return body(state, data, jax.tree.map(lambda x: x[0], batch))  # shard_map keeps the mapped axis, with length 1

    # check_vma=False: with it on, the gradient of a per-device loss would already be summed over the devices.
    mapped = partial(jax.shard_map, mesh=mesh, check_vma=False)
    specs = PartitionSpec(), PartitionSpec(), PartitionSpec(AXIS)
    return jax.jit(mapped(one_device, in_specs=specs, out_specs=(PartitionSpec(), PartitionSpec())), donate_argnums=0)


def pmap_rows(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Compiles function(params, rows of one device) -> rows for the devices of this process: (devices, b, ...) in and out."""
    return jax.pmap(function, axis_name=AXIS, in_axes=(None, 0), devices=jax.local_devices())


def replicate(tree: Any) -> Any:
    """A copy on every local device, laid out as the mapped step leaves it (donation needs this with many processes)."""
    sharding = NamedSharding(Mesh(np.array(jax.local_devices()), (AXIS,)), PartitionSpec())
    return jax.tree.map(lambda x: jax.device_put(np.array(x), sharding), tree)


def prefetch(stream: Iterator[Batch], count: int = 2) -> Iterator[Batch]:
    """The batches of this process, so many of them on their way to its devices while one is used."""
    sharding = NamedSharding(Mesh(np.array(jax.local_devices()), (AXIS,)), PartitionSpec(AXIS))
    coming: deque[Batch] = deque()
    for batch in stream:
        coming.append(jax.device_put(batch, sharding))
        if len(coming) >= count:
            yield coming.popleft()
    yield from coming


def fetch(tree: Any) -> Any:
    """NumPy copies of replicated arrays. Copies, because a donated buffer may be written to by the next step."""
    return jax.tree.map(lambda x: np.array(x.addressable_shards[0].data), tree)


def wait_on_cpu(tree: Any) -> None:
    """Waits for the step where devices are simulated on a CPU: steps queued on them can deadlock."""
    if jax.default_backend() == "cpu":
        jax.block_until_ready(tree)


def checksums(tree: Any) -> dict[str, int]:
    """For each device of the run, by a name for people, a number made of all bits of its copy of replicated arrays."""

    def total(tree: Any, number: Any) -> Any:
        words = [_words(x) for x in jax.tree.leaves(tree)]
        mixed = jnp.stack([jnp.sum(w * (2 * jnp.arange(w.size, dtype=jnp.uint32) + 1)) for w in words])
        mixed = jnp.sum(mixed * (2 * jnp.arange(len(words), dtype=jnp.uint32) + 1))
        return jax.lax.all_gather(jnp.stack([number, mixed]), AXIS)

    mapped = jax.pmap(total, axis_name=AXIS, in_axes=(None, 0), out_axes=None)
    devices = {d.id: d for d in jax.devices()}
    found = fetch(mapped(tree, np.array([d.id for d in jax.local_devices()], np.uint32)))
    return {
        f"device {i} ({devices[i].device_kind} of process {devices[i].process_index})": int(x)
        for i, x in found.tolist()
    }


def _words(x: Any) -> Any:
    """The bits of an array as uint32."""
    if x.dtype.itemsize == 4:
        return jax.lax.bitcast_convert_type(x, jnp.uint32).ravel()
    return x.astype(jnp.uint32).ravel() if x.dtype.kind in "bui" else _words(x.astype(jnp.float32))


def map_in_batches(function: Callable[[Any, Any], Any], params: Any, rows: Any, batch_size: int) -> Any:
    """Applies a `pmap_rows` function to all rows, in batches padded to one shape; padding never comes out.

    `rows` is an array or a tree of arrays of one length, at least 1. batch_size is of each device, so that the shapes, and with
    them the rounding, are the same on any number of devices. The processes of a run share the work, and all get all of the
    results: NumPy arrays of that length. Raises Stopped where the process was asked to stop.
    """
    length = len(jax.tree.leaves(rows)[0])
    devices = jax.local_device_count()
    share = min(batch_size, length)
    begin, end = (edge * share for edge in processes.share(-(-length // share)))

    def device_batch(x: np.ndarray, start: int) -> np.ndarray:
        part = np.asarray(x[start : min(start + share * devices, end)])
        padded = np.pad(part, [(0, share * devices - len(part))] + [(0, 0)] * (part.ndim - 1))
        return padded.reshape(devices, share, *part.shape[1:])

    results = []
    for start in range(begin, end, share * devices) or (begin,):  # one where there is nothing, for its shapes
        if signals.asked():
            break
        result = function(params, jax.tree.map(partial(device_batch, start=start), rows))
        journal.moved()
        count = min(max(min(end, length) - start, 0), share * devices)
        results.append(jax.tree.map(lambda x, n=count: np.asarray(x).reshape(-1, *x.shape[2:])[:n], result))
    processes.agree_to_stop()
    return gather(jax.tree.map(lambda *parts: np.concatenate(parts), *results))


def gather(tree: Any) -> Any:
    """The rows of all processes, in their order; of NumPy arrays whose lengths may differ, bit for bit."""
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
