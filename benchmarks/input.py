"""Steps per second with images that are read, against one batch that stays on the devices.

    python benchmarks/input.py                                 # configs/cifar10.py, 50,000 random images of 32 pixels
    python benchmarks/input.py --source=folder:cifar/train     # real images, decoded once before

"resident": all images are on every device, as in training if they fit (data.resident). "streamed": Grain's threads read
them from the cache of decoded images, and they are sent (data.resident=0). The pieces of the three are interleaved.
"""

import argparse
import itertools
import platform
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tcq import config as configs
from tcq.data import sources
from tcq.data.loader import batches
from tcq.models import retriever
from tcq.runtime import devices
from tcq.train import optimizer, step


def random_images(folder: str, count: int, side: int) -> np.ndarray:
    """Mapped from a file, as the cache of decoded images is."""
    images = np.memmap(Path(folder, "images.u8"), np.uint8, "w+", shape=(count, side, side, 3))
    images[:] = np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/cifar10.py:bits=32")
    parser.add_argument("--source", help="a data.source (default: random images)")
    parser.add_argument("--count", type=int, default=50_000, help="number of random images")
    parser.add_argument("--steps", type=int, default=20, help="steps in a piece")
    parser.add_argument("--pieces", type=int, default=5)
    arguments = parser.parse_args()
    overrides = [f"data.source={arguments.source}", "data.protocol=folder"] if arguments.source else []
    c = configs.load(arguments.config, overrides)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.source:
            images = sources.open_source(c.data).images
        else:
            images = random_images(folder, arguments.count, c.data.image_size)
        rates = measure(c, images, steps=arguments.steps, pieces=arguments.pieces)
    synthetic = float(np.median(rates["synthetic"]))
    for name, values in rates.items():
        print(f"{name:<10} {np.median(values):7.3f} steps/s  x {np.median(values) / synthetic:.3f} of synthetic")
    print(f"{platform.machine()}, {jax.device_count()} x {jax.devices()[0].device_kind}, ", end="")
    print(f"Python {platform.python_version()}, jax {metadata.version('jax')}, grain {metadata.version('grain')}")


def measure(c: Any, images: np.ndarray, *, steps: int, pieces: int) -> dict[str, list[float]]:
    model, rule = retriever.from_config(c, axis_name=devices.AXIS), optimizer.make(c, 1000)
    run = devices.pmap_step(step.step_body(model, rule, c, 1000))
    state = devices.replicate(step.initial_state(c, model, rule, np.asarray(images[:1024])))
    resident = devices.replicate(np.asarray(images))

    def stream(rows: np.ndarray | None) -> Any:
        rows_of_steps = batches(
            rows,
            np.arange(len(images)),
            batch_size=c.data.batch_size,
            seed=0,
            first_step=0,
            num_devices=jax.local_device_count(),
            process=0,
            num_processes=1,
            threads=c.data.threads,
        )
        return devices.prefetch(rows_of_steps)

    streams = {"resident": (resident, stream(None)), "streamed": ((), stream(images))}
    streams["synthetic"] = (), itertools.repeat(next(streams["streamed"][1]))
    rates: dict[str, list[float]] = {name: [] for name in ("synthetic", "resident", "streamed")}
    for piece in range(pieces + 1):  # the first one compiles
        for name, values in rates.items():
            data, batch = streams[name]
            start = time.perf_counter()
            for _ in range(steps if piece else 2):
                stop = np.zeros(jax.local_device_count(), np.float32)
                state, logs = run(state, data, next(batch) | {"stop": stop})
                devices.wait_on_cpu(logs)
            jax.block_until_ready(logs)
            if piece:
                values.append(steps / (time.perf_counter() - start))
    return rates


if __name__ == "__main__":
    main()
