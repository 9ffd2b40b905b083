"""Time of a step on images and on stored features of a frozen backbone, and the losses of both.

    python benchmarks/frozen.py --model=vit_ti8 --side=64 --images=1024 --views=4 --steps=12

The images are random. Both runs start from the same state and see the same views.
"""

import argparse
import time
from typing import Any

import jax
import numpy as np

from tcq import config as configs
from tcq import encode
from tcq.models import retriever
from tcq.runtime import devices
from tcq.train import optimizer, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_ti8")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=12)
    a = parser.parse_args()
    overrides = [f"model.name={a.model}", "model.pooling=cls", f"data.image_size={a.side}", f"data.views={a.views}"]
    overrides += ["optim.frozen_blocks=-1", f"data.batch_size={a.batch}", "optim.warmup_steps=0"]
    c = configs.load("configs/folder.py:nowhere", [*overrides, f"train.total_steps={a.steps}"])
    model, rule = retriever.from_config(c, axis_name=devices.AXIS), optimizer.make(c, a.steps)
    images = np.random.RandomState(0).randint(0, 256, (a.images, a.side, a.side, 3)).astype(np.uint8)
    start = step.initial_state(c, model, rule, images[:256])
    order = np.random.RandomState(1).randint(0, a.images, (a.steps, a.batch))

    def run(rows: np.ndarray) -> tuple[float, list[float], Any]:
        run_step = devices.pmap_step(step.step_body(model, rule, c, a.steps))
        state, losses, times = devices.replicate(start), [], []
        for index in order:
            shape = jax.local_device_count(), -1
            batch = {
                "image": rows[index].reshape(*shape, *rows.shape[1:]),
                "index": index.astype(np.int32).reshape(shape),
            }
            begin = time.perf_counter()
            state, logs = run_step(state, (), batch)
            losses.append(float(logs["loss"]))
            times.append(time.perf_counter() - begin)
        return float(np.median(times[1:])), losses, devices.fetch(state.params)

    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {vars(a)}")
    on_images, losses, params = run(images)
    variables = {"params": start.params} | ({"batch_stats": start.batch_stats} if start.batch_stats else {})
    encoder = encode.Encoder(c, model, variables, 0)
    begin = time.perf_counter()
    rows = encode.embed_views(encoder, images, np.arange(a.images))
    embedding = time.perf_counter() - begin
    on_features, feature_losses, feature_params = run(rows)
    print(f"a step on images {on_images:.3f} s, on features {on_features:.4f} s: x {on_images / on_features:,.0f}")
    print(
        f"embedding {a.images} x {a.views} views once {embedding:.1f} s, as long as {embedding / on_images:.1f} steps"
    )
    difference = max(
        float(np.abs(x - y).max() / max(np.abs(x).max(), 1e-12))
        for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(feature_params), strict=True)
    )
    print(f"loss after {a.steps} steps {losses[-1]:.6f} and {feature_losses[-1]:.6f}; ", end="")
    print(f"parameters differ by at most {difference:.1e}")


if __name__ == "__main__":
    main()
