"""Batches of training images, a function of (seed, step), read ahead in threads by Grain."""

from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from jaxtyping import Int64


def batches(
    images: Any,
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
    """Endless batches of this process.

    Args:
      images: uint8 images, or embeddings of their views; None if they are on the devices already.
      indices: the rows of `images` to train on, shuffled for every epoch. A batch may span two epochs, so no image is
        dropped.
      batch_size: images over all processes; process p of P gets the p-th of P equal parts of every batch.
      seed: of the order.
      first_step: step of the first batch.
      num_devices: local devices, the first axis of the results.
      process, num_processes: p and P.
      threads: that read ahead.

    Yields:
      "image", the rows, (num_devices, b, ...), or without images "row", int32 positions in `indices`; and "index",
      int32 positions in `images`. Both of the latter are (num_devices, b).

    Raises:
      ValueError: the batch size is not divisible by processes and devices.
    """
    share, rest = divmod(batch_size, num_processes * num_devices)
    if rest or not share:
        raise ValueError(
            f"batch_size {batch_size} is not divisible by {num_processes} processes x {num_devices} devices"
        )

    def read(rows: np.ndarray) -> dict[str, np.ndarray]:
        index = indices[rows]
        numbers = {"index": index.astype(np.int32).reshape(num_devices, share)}
        if images is None:
            return numbers | {"row": rows.astype(np.int32).reshape(num_devices, share)}
        batch = images[index]  # a single copy from memory or the mapped cache
        return numbers | {"image": batch.reshape(num_devices, share, *batch.shape[1:])}

    order = grain.MapDataset.range(len(indices)).seed(seed).shuffle().repeat()
    own = order.batch(share * num_devices)[first_step * num_processes + process :: num_processes]
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2 * threads, 2))
    return iter(own.map(read).to_iter_dataset(options))
