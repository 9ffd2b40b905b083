"""The only file that knows pmap, processes and where arrays lie.

State has no leading device axis: it goes into the mapped step whole (`in_axes=None`) and comes out whole. Batches have
one: (local devices, b, ...). jax.pmap is jit(shard_map) since JAX 0.8; `shard_map_step` compiles the same body that way.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "batch"
Step = Callable[[Any, Any], tuple[Any, Any]]


def pmap_step(body: Step) -> Step:
    """Compiles body(state, batch of one device) -> (state, logs) for all devices; the state is donated.

    What body returns must be the same on every device (average it over `AXIS`): one device's value is kept.
    """
    return jax.pmap(body, axis_name=AXIS, in_axes=(None, 0), out_axes=(None, None), donate_argnums=0)


def shard_map_step(body: Step) -> Step:
    """The same step under jit(shard_map), for a check that both give the same bits."""
    mesh = Mesh(np.array(jax.devices()), (AXIS,))

    def one_device(state: Any, batch: Any) -> tuple[Any, Any]:
        return body(state, jax.tree.map(lambda x: x[0], batch))  # shard_map keeps the mapped axis, with length 1

    # check_vma=False: with it on, the gradient of a per-device loss would already be summed over the devices.
    mapped = partial(jax.shard_map, mesh=mesh, check_vma=False)
    specs = PartitionSpec(), PartitionSpec(AXIS)
    return jax.jit(mapped(one_device, in_specs=specs, out_specs=(PartitionSpec(), PartitionSpec())), donate_argnums=0)


def pmap_rows(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Compiles function(params, rows of one device) -> rows for all devices: (devices, b, ...) in and out."""
    return jax.pmap(function, axis_name=AXIS, in_axes=(None, 0))


def replicate(tree: Any) -> Any:
    """A copy on every local device, laid out as the mapped step leaves it (donation needs this with many processes)."""
    sharding = NamedSharding(Mesh(np.array(jax.local_devices()), (AXIS,)), PartitionSpec())
    return jax.tree.map(lambda x: jax.device_put(np.array(x), sharding), tree)


def fetch(tree: Any) -> Any:
    """NumPy copies of replicated arrays. Copies, because a donated buffer may be written to by the next step."""
    return jax.tree.map(lambda x: np.array(x.addressable_shards[0].data), tree)


def wait_on_cpu(tree: Any) -> None:
    """Waits for the step where devices are simulated on a CPU: steps queued on them can deadlock."""
    if jax.default_backend() == "cpu":
        jax.block_until_ready(tree)


def map_in_batches(function: Callable[[Any, Any], Any], params: Any, rows: Any, batch_size: int) -> Any:
    """Applies a `pmap_rows` function to all rows, in batches padded to one shape; padding never comes out.

    `rows` is an array or a tree of arrays of one length, at least 1. batch_size is of each device, so that the shapes, and with
    them the rounding, are the same on any number of devices. Returns NumPy arrays of that length.
    """
    length = len(jax.tree.leaves(rows)[0])
    devices = jax.local_device_count()
    share = min(batch_size, length)

    def device_batch(x: np.ndarray, start: int) -> np.ndarray:
        part = np.asarray(x[start : start + share * devices])
        padded = np.pad(part, [(0, share * devices - len(part))] + [(0, 0)] * (part.ndim - 1))
        return padded.reshape(devices, share, *part.shape[1:])

    results = []
    for start in range(0, length, share * devices):
        result = function(params, jax.tree.map(partial(device_batch, start=start), rows))
        results.append(jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), result))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:length], *results)
