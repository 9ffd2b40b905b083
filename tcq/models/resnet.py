"""Residual networks (He et al. 2016) in Flax Linen: images to one feature per image.

The feature is the mean of the last feature map. Bottlenecks have their stride in the 3 x 3 convolution, as the
published weights of torchvision and timm ("v1.5").
"""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

STEMS = ("imagenet", "cifar")
WIDTHS = (64, 128, 256, 512)


class Size(NamedTuple):
    """Blocks of each of the four stages, and whether they are bottlenecks.

    The output of a bottleneck is four times as wide.
    """

    stages: tuple[int, ...]
    bottleneck: bool


NAMED = {
    "resnet18": Size((2, 2, 2, 2), False),
    "resnet34": Size((3, 4, 6, 3), False),
    "resnet50": Size((3, 4, 6, 3), True),
    "resnet101": Size((3, 4, 23, 3), True),
}


class ResNet(nn.Module):
    """Images (N, H, W, 3), float, to float32 features (N, 512), or (N, 2048) with bottlenecks.

    Its variables are "params" and "batch_stats" (running means and variances), which `apply` with train=True and
    mutable=["batch_stats"] updates.

    Attributes:
      stages, bottleneck: see `Size`.
      stem: "imagenet" (7 x 7 convolution of stride 2, then max-pooling) or "cifar" (3 x 3 of stride 1, no pooling).
      axis_name: the mapped axis over which training averages the batch statistics; None: this device alone.
      frozen_blocks: number of first blocks that, with the stem, use running statistics in training; -1: all.
      dtype: of the computation; parameters and statistics are float32.
      remat: recompute the blocks in the backward pass instead of storing their activations.
    """

    stages: tuple[int, ...]
    bottleneck: bool
    stem: str = "imagenet"
    axis_name: str | None = None
    frozen_blocks: int = 0
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, images: Float[Array, "N H W 3"], *, train: bool = False) -> Float[Array, "N F"]:
        frozen = self.frozen_blocks if self.frozen_blocks >= 0 else sum(self.stages)
        norm = _norm(train and not frozen, self.axis_name, self.dtype)
        x = images.astype(self.dtype)
        if self.stem == "imagenet":
            x = _conv(64, 7, 2, self.dtype, "stem")(x)
        else:
            x = _conv(64, 3, 1, self.dtype, "stem")(x)
        x = nn.relu(norm(name="stem_norm")(x))
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        block = nn.remat(Block) if self.remat else Block
        done = 0
        for stage, (count, width) in enumerate(zip(self.stages, WIDTHS, strict=True)):
            for i in range(count):
                stride = 2 if i == 0 and stage > 0 else 1
                norm = _norm(train and done >= frozen, self.axis_name, self.dtype)
                x = block(width, stride, self.bottleneck, norm, self.dtype, name=f"stage_{stage}_block_{i}")(x)
                done += 1
        return x.astype(jnp.float32).mean(axis=(1, 2))


class Block(nn.Module):
    """Two convolutions, or three in a bottleneck, with a residual connection.

    The two are 3 x 3; the three are 1 x 1, 3 x 3 and 1 x 1.
    """

    width: int
    stride: int
    bottleneck: bool
    norm: partial[nn.BatchNorm]
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N h w F"]:
        layers: tuple[tuple[int, int, int], ...]
        if self.bottleneck:
            layers = ((self.width, 1, 1), (self.width, 3, self.stride), (4 * self.width, 1, 1))
        else:
            layers = ((self.width, 3, self.stride), (self.width, 3, 1))
        y = x
        for i, (width, kernel, stride) in enumerate(layers, 1):
            y = _conv(width, kernel, stride, self.dtype, f"conv_{i}")(y)
            y = self.norm(name=f"norm_{i}")(y)
            if i < len(layers):
                y = nn.relu(y)
        if x.shape != y.shape:
            x = _conv(y.shape[-1], 1, self.stride, self.dtype, "shortcut")(x)
            x = self.norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


def _conv(width: int, kernel: int, stride: int, dtype: DTypeLike, name: str) -> nn.Conv:
    """A convolution without bias, padded as in PyTorch ("SAME" differs with strides)."""
    pad = kernel // 2
    return nn.Conv(
        width,
        (kernel, kernel),
        (stride, stride),
        padding=((pad, pad), (pad, pad)),
        use_bias=False,
        dtype=dtype,
        kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        name=name,
    )


def _norm(train: bool, axis_name: str | None, dtype: DTypeLike) -> partial[nn.BatchNorm]:
    return partial(
        nn.BatchNorm,
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        dtype=dtype,
        axis_name=axis_name if train else None,
    )
