"""Speed of whole training steps: images/s, their share of the measured peak (MFU), and the time of their parts.

    python benchmarks/step.py    # for a GPU: ViT-S/4 at 32 pixels and ViT-B/16 at 224 pixels, in bfloat16
    python benchmarks/step.py --cases=vit_ti4:32:16 --config.model.dtype=float32    # for a CPU: model:pixels:batch

The parts are compiled and timed alone, on one device: two views of every image, the backbone and quantizer with their
gradient, the loss with its gradient, the optimizer. "rest" is the difference of the whole step to their sum; it may be
negative. Model FLOPs count the matrix products and convolutions of three forward passes of both views (as MaxText
defines MFU), without augmentation, loss or rematerialization.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from backbone import model_flops, peak, seconds

from tcq import augment, losses
from tcq import config as configs
from tcq.models import retriever
from tcq.runtime import devices
from tcq.train import optimizer, step

CASES = "vit_s4:32:512,vit_b16:224:128"
STEPS = 1000


def time_of(function: Callable[..., Any], *arguments: Any) -> float:
    compiled = jax.jit(function)
    return seconds(lambda: jax.block_until_ready(compiled(*arguments)))


def whole(c: Any, images: np.ndarray) -> float:
    """Seconds of a step, as training runs it, on all devices."""
    model, rule = retriever.from_config(c, axis_name=devices.AXIS), optimizer.make(c, STEPS)
    run = devices.pmap_step(step.step_body(model, rule, c, STEPS))
    state = devices.replicate(step.initial_state(c, model, rule, images))
    n = jax.local_device_count()
    batch = {"image": images.reshape(n, -1, *images.shape[1:]), "stop": np.zeros(n, np.float32)}
    batch["index"] = np.arange(len(images), dtype=np.int32).reshape(n, -1)
    batch = next(devices.prefetch(iter([batch])))

    def run_step() -> None:
        nonlocal state
        state, logs = run(state, (), batch)
        jax.block_until_ready(logs)

    return seconds(run_step)


def parts(c: Any, images: np.ndarray) -> dict[str, float]:
    """Seconds of each part for the images of one device."""
    model, rule = retriever.from_config(c), optimizer.make(c, STEPS)
    state = step.initial_state(c, model, rule, images)
    rest = {"batch_stats": state.batch_stats} if state.batch_stats else {}
    strengths = dict(c.data.augment)
    keys = jax.random.split(jax.random.key(0), 2 * len(images)).reshape(2, -1)

    def views(keys: Any, images: Any) -> Any:
        image = images.astype(jnp.float32) / 255
        return [jax.vmap(lambda k, x: augment.random_view(k, x, strengths))(key, image) for key in keys]

    def forward(params: Any, both: Any) -> Any:
        return model.apply(
            {"params": params, **rest}, both, train=True, mutable=["batch_stats"], rngs={"dropout": keys[0, 0]}
        )[0]

    def total(params: Any, both: Any) -> Any:
        out = forward(params, both)
        return jnp.sum(out.features**2) + jnp.sum(out.reconstructions**2)

    def loss(features: Any, reconstructions: Any) -> Any:
        pairs = *jnp.split(features, 2), *jnp.split(reconstructions, 2)
        clip = configs.clip_rule(c, STEPS).count(0)
        return losses.contrastive_loss(*pairs, pairing=c.loss.pairing, temperature=c.loss.temperature, clip=clip)[0]

    both = jnp.concatenate(jax.jit(views)(keys, images))
    out = jax.jit(forward)(state.params, both)
    return {
        "views": time_of(views, keys, images),
        "backbone, quantizer": time_of(jax.grad(total), state.params, both),
        "loss": time_of(jax.grad(loss, (0, 1)), out.features, out.reconstructions),
        "optimizer": time_of(rule.update, state.params, state.opt_state, state.params),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=CASES, help="model:pixels:batch of one device, separated by commas")
    arguments, rest = parser.parse_known_args()
    overrides = [flag.removeprefix("--config.") for flag in rest if flag.startswith("--config.")]
    if len(overrides) < len(rest):
        parser.error(f"unknown arguments: {' '.join(flag for flag in rest if not flag.startswith('--config.'))}")
    device, n = jax.devices()[0], jax.local_device_count()
    print(f"{n} x {device.device_kind}, jax {jax.__version__}\n")
    print("| step | images/s | ms | MFU | peak TFLOP/s | views | backbone, quantizer | loss | optimizer | rest |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for case in arguments.cases.split(","):
        name, side, batch = case.split(":")
        sizes = [f"model.name={name}", f"data.image_size={side}", f"data.batch_size={int(batch) * n}"]
        fixed = ["model.dtype=bfloat16", "loss.clip=0.01", "data.source=digits", f"train.total_steps={STEPS}"]
        c = configs.load("configs/base.py", [*sizes, *fixed, *overrides])
        images = np.random.default_rng(0).integers(0, 256, (int(batch) * n, int(side), int(side), 3), np.uint8)
        model = retriever.from_config(c)
        one = jnp.zeros((1, int(side), int(side), 3))
        flops = 3 * 2 * model_flops(model.apply, retriever.shapes(model, int(side)), one)
        best = peak(jnp.dtype(c.model.dtype))
        duration, times = whole(c, images), parts(c, images[: int(batch)])
        shares = [f"{t / duration:.0%}" for t in (*times.values(), duration - sum(times.values()))]
        mfu = flops * int(batch) / duration / best
        print(
            f"| {name}, {side} px, {batch} images, {c.model.dtype} | {len(images) / duration:,.1f} | "
            f"{duration * 1e3:,.1f} | {mfu:.1%} | {best / 1e12:,.2f} | {' | '.join(shares)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
