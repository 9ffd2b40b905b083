"""Steps per second with images that have to be brought, against a batch that already lies on the devices.

    python benchmarks/input.py                                         # configs/cifar10.py on 50,000 random images of 32 pixels
    python benchmarks/input.py --source=folder:cifar/train             # on real ones, decoded once before

"resident" is what training does where the images fit (data.resident): they lie on every device, and a step picks its own.
"streamed" reads them from the disk's cache in Grain's threads and sends them (data.resident=0). Rates are of interleaved pieces.
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
from tcq.runtime import devices as parallel
from tcq.train import optimizer
from tcq.train import step as learner


def random_images(folder: str, count: int, side: int) -> np.ndarray:
    """Like the cache of decoded images: mapped from the disk."""
    images = np.memmap(Path(folder, "images.u8"), np.uint8, "w+", shape=(count, side, side, 3))
    images[:] = np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/cifar10.py:bits=32")
    parser.add_argument("--source", help="a data.source; without it random images")
    parser.add_argument("--count", type=int, default=50_000, help="of random images")
    parser.add_argument("--steps", type=int, default=20, help="in a piece")
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
    for name, found in rates.items():
        print(f"{name:<10} {np.median(found):7.3f} steps/s  x {np.median(found) / synthetic:.3f} of synthetic")
    print(f"{platform.machine()}, {jax.device_count()} x {jax.devices()[0].device_kind}, ", end="")
    print(f"Python {platform.python_version()}, jax {metadata.version('jax')}, grain {metadata.version('grain')}")


def measure(c: Any, images: np.ndarray, *, steps: int, pieces: int) -> dict[str, list[float]]:
    model, rule = retriever.from_config(c, axis_name=parallel.AXIS), optimizer.make(c, 1000)
    run = parallel.pmap_step(learner.step_body(model, rule, c, 1000))
    state = parallel.replicate(learner.initial_state(c, model, rule, np.asarray(images[:1024])))
    resident = parallel.replicate(np.asarray(images))

    def stream(rows: np.ndarray | None) -> Any:
        found = batches(
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
        return parallel.prefetch(found)

    streams = {"resident": (resident, stream(None)), "streamed": ((), stream(images))}
    streams["synthetic"] = (), itertools.repeat(next(streams["streamed"][1]))
    rates: dict[str, list[float]] = {name: [] for name in ("synthetic", "resident", "streamed")}
    for piece in range(pieces + 1):  # the first one compiles
        for name, found in rates.items():
            data, batch = streams[name]
            start = time.perf_counter()
            for _ in range(steps if piece else 2):
                asked = np.zeros(jax.local_device_count(), np.float32)
                state, logs = run(state, data, next(batch) | {"stop": asked})
                parallel.wait_on_cpu(logs)
            jax.block_until_ready(logs)
            if piece:
                found.append(steps / (time.perf_counter() - start))
    return rates


if __name__ == "__main__":
    main()
