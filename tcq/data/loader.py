"""Batches of training images: a pure function of (seed, step), read ahead in threads by Grain."""

from collections.abc import Iterator

import grain
import numpy as np
from jaxtyping import Int64, Shaped


def batches(
    images: Shaped[np.ndarray, "N ..."] | None,
    indices: Int64[np.ndarray, " T"],
    *,
    batch_size: int,
    seed: int,
    first_step: int = 0,
    num_devices: int = 1,
    process: int = 0,
    num_processes: int = 1,
    threads: int = 2,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches of this process, beginning with that of `first_step`: "image", rows of `images` (uint8 pictures, or
    features of them) as (num_devices, b, ...), and "index", their places among `images`, int32 (num_devices, b). Without
    `images`, because they lie on the devices already, "row" instead: the places among `indices`.

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

    def read(places: np.ndarray) -> dict[str, np.ndarray]:
        index = indices[places]
        numbers = {"index": index.astype(np.int32).reshape(num_devices, share)}
        if images is None:
            return numbers | {"row": places.astype(np.int32).reshape(num_devices, share)}
        batch = images[index]  # one fancy index: a single copy out of memory or the mapped cache
        return numbers | {"image": batch.reshape(num_devices, share, *batch.shape[1:])}

    order = grain.MapDataset.range(len(indices)).seed(seed).shuffle().repeat()
    mine = order.batch(share * num_devices)[first_step * num_processes + process :: num_processes]
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2 * threads, 2))
    return iter(mine.map(read).to_iter_dataset(options))
