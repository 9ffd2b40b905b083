"""Speed of the backbones: images/s, model FLOPs, and their share of the measured peak; beside timm if it is installed.

    python benchmarks/backbone.py --models=vit_ti16,vit_s16,resnet18,resnet50 --batch=8

A step is the forward and backward pass of the sum of squared features. Model FLOPs count the matrix products and
convolutions of three forward passes in a step, without what is recomputed (as MaxText defines MFU). The peak is that of
the fastest of three square float32 (or bfloat16) matrix products, measured in the same run.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tcq.models import resnet, vit

VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": jnp.bfloat16},
    "remat": {"remat": True},
    "scan": {"scan": True},
    "scan, remat": {"scan": True, "remat": True},
    "bfloat16, cudnn": {"dtype": jnp.bfloat16, "attention": "cudnn"},
}


def build(name: str, **options: Any) -> Any:
    if name in resnet.NAMED:
        return resnet.ResNet(*resnet.NAMED[name], **options)
    size, patch = vit.NAMED[name]
    return vit.ViT(*size, patch=patch, gelu="erf", **options)


def model_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """2 x the multiply-adds of all matrix products and convolutions of a function."""

    def count(jaxpr: Any) -> float:
        total = 0.0
        for equation in jaxpr.eqns:
            out = np.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
            if equation.primitive.name == "dot_general":
                (contract, _), _ = equation.params["dimension_numbers"]
                total += 2.0 * out * np.prod([equation.invars[0].aval.shape[i] for i in contract])
            elif equation.primitive.name == "conv_general_dilated":
                kernel, numbers = equation.invars[1].aval.shape, equation.params["dimension_numbers"]
                total += 2.0 * out * np.prod(kernel) / kernel[numbers.rhs_spec[0]]
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                total += count(inner) if hasattr(inner, "eqns") else 0.0
        return total

    return count(jax.make_jaxpr(function)(*arguments).jaxpr)


def seconds(run: Callable[[], Any], least: float = 3.0) -> float:
    """The median of the times of a call, after one to warm up."""
    run()
    times: list[float] = []
    while sum(times) < least or len(times) < 3:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def peak(dtype: Any) -> float:
    """FLOP/s of the fastest of three square matrix products."""
    best = 0.0
    for n in (1024, 2048, 4096) if jax.default_backend() == "cpu" else (4096, 8192, 16384):
        a = jnp.ones((n, n), dtype)
        product = jax.jit(lambda x: x @ x)
        run = lambda a=a, product=product: jax.block_until_ready(product(a))  # noqa: E731
        best = max(best, 2.0 * n**3 / seconds(run, 1.0))
    return best


def time_tcq(name: str, side: int, batch: int, options: dict[str, Any]) -> tuple[float, float, float]:
    """Seconds of a step, GiB of temporary memory, seconds to compile."""
    model = build(name, **options)
    images = jax.random.normal(jax.random.key(0), (batch, side, side, 3))
    variables = jax.jit(model.init)(jax.random.key(0), images)
    stats = {k: v for k, v in variables.items() if k != "params"}

    def loss(params: Any) -> Any:
        out = model.apply({"params": params, **stats}, images, train=True, mutable=["batch_stats"])[0]
        return jnp.sum(out**2)

    start = time.perf_counter()
    step = jax.jit(jax.grad(loss)).lower(variables["params"]).compile()
    compiled = time.perf_counter() - start
    memory = step.memory_analysis()
    duration = seconds(lambda: jax.block_until_ready(step(variables["params"])))
    return duration, memory.temp_size_in_bytes / 2**30, compiled


def time_timm(name: str, side: int, batch: int) -> float | None:
    """Seconds of a step of timm's model of the same shape on the CPU; None if timm is not installed."""
    try:
        import sys

        sys.path.append("tests/helpers")
        import torch

        from peer_models import timm
    except ImportError:
        return None
    if name in resnet.NAMED:
        model = timm().create_model(name, num_classes=0)
    else:
        size, patch = vit.NAMED[name]
        model = timm().vision_transformer.VisionTransformer(
            side, patch, embed_dim=size.width, depth=size.depth, num_heads=size.heads, num_classes=0
        )
    model.train()
    images = torch.randn(batch, 3, side, side)

    def step() -> None:
        model.zero_grad()
        (model(images) ** 2).sum().backward()

    return seconds(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="vit_ti16,vit_s16,resnet18,resnet50")
    parser.add_argument("--variants", default="float32,bfloat16,remat,scan,scan + remat")
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    a = parser.parse_args()
    peaks = {d: peak(d) for d in (jnp.float32, jnp.bfloat16)}
    listed = ", ".join(f"{p / 1e9:,.0f} GFLOP/s {jnp.dtype(d).name}" for d, p in peaks.items())
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {a.side} pixels, batch {a.batch}; ", end="")
    print(f"peak of a matrix product {listed}\n")
    print("| model | GFLOP per image and step | variant | images/s | MFU | temporary GiB | compile s | x timm |")
    print("|---|---|---|---|---|---|---|---|")
    for name in a.models.split(","):
        model = build(name)
        image = jnp.zeros((1, a.side, a.side, 3))
        variables = jax.eval_shape(model.init, jax.random.key(0), image)
        flops = 3 * model_flops(model.apply, variables, image)
        peer = time_timm(name, a.side, a.batch)
        if peer:
            share = flops * a.batch / peer / peaks[jnp.float32]
            print(
                f"| {name} | {flops / 1e9:.1f} | timm float32 | {a.batch / peer:.2f} | {share:.0%} | | | 1 |",
                flush=True,
            )
        for variant in (v.replace(" +", ",") for v in a.variants.split(",")):
            options = VARIANTS[variant]
            if name in resnet.NAMED and {"scan", "attention"} & options.keys():
                continue
            duration, memory, compiled = time_tcq(name, a.side, a.batch, options)
            share = flops * a.batch / duration / peaks[options.get("dtype", jnp.float32)]
            ratio = f"{peer / duration:.2f}" if peer else ""
            print(
                f"| {name} | {flops / 1e9:.1f} | {variant} | {a.batch / duration:.2f} | {share:.0%} | {memory:.2f} | "
                f"{compiled:.1f} | {ratio} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
