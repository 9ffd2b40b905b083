"""Batches of training images: a pure function of (seed, step), read ahead in threads by Grain."""

from collections.abc import Iterator

import grain
import numpy as np
from jaxtyping import Int64, UInt8


def batches(
    images: UInt8[np.ndarray, "N H W 3"],
    indices: Int64[np.ndarray, " T"],
    *,
    batch_size: int,
    seed: int,
    first_step: int = 0,
    num_devices: int = 1,
    process: int = 0,
    num_processes: int = 1,
    threads: int = 2,
) -> Iterator[UInt8[np.ndarray, "devices b H W 3"]]:
    """Endless batches of this process, uint8 (num_devices, b, H, W, 3), beginning with that of `first_step`.

    `indices` are shuffled anew for every epoch; batches run on over the end of an epoch, so that no image is dropped.
    batch_size is global: process p of P gets the p-th of P equal stretches of every batch, whatever the number of its
    devices.

    Raises:
      ValueError: the batch cannot be divided evenly.
    """
    share, rest = divmod(batch_size, num_processes * num_devices)
    if rest or not share:
        raise ValueError(
            f"a batch of {batch_size} cannot be divided by {num_processes} processes x {num_devices} devices"
        )

    def read(places: np.ndarray) -> np.ndarray:
        batch = images[indices[places]]  # one fancy index: a single copy out of memory or the mapped cache
        return batch.reshape(num_devices, share, *batch.shape[1:])

    order = grain.MapDataset.range(len(indices)).seed(seed).shuffle().repeat()
    mine = order.batch(share * num_devices)[first_step * num_processes + process :: num_processes]
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2 * threads, 2))
    return iter(mine.map(read).to_iter_dataset(options))
