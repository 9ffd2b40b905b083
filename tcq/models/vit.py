"""Vision Transformer (Dosovitskiy et al. 2021), pre-norm, in Flax Linen: images to one feature per image."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

POOLINGS = ("cls", "mean", "flat", "attention")
POSITIONS = ("learned", "sincos2d")


class Size(NamedTuple):
    """Width, number of blocks and number of heads."""

    width: int
    depth: int
    heads: int


SIZES = {"Ti": Size(192, 12, 3), "S": Size(384, 12, 6), "B": Size(768, 12, 12), "L": Size(1024, 24, 16)}


class ViT(nn.Module):
    """Images (N, H, W, 3), float, to features (N, width), or (N, tokens * width) with pooling "flat"; float32.

    Attributes:
      width, depth, heads: size; heads divides width.
      patch: side of the square patches in pixels; divides H and W.
      pooling: "cls" (a class token), "mean", "flat" (all tokens side by side; for small images) or "attention" (one
        learned query attends to the tokens).
      positions: "learned" or "sincos2d" (fixed).
      mlp_ratio: hidden width of the MLP over width.
      dropout: rate, after positions, attention and MLP.
      drop_path: rate of stochastic depth in the last block, growing linearly from 0 in the first.
      dtype: of the computation; parameters, normalisation and softmax are float32.
    """

    width: int
    depth: int
    heads: int
    patch: int
    pooling: str = "cls"
    positions: str = "learned"
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    drop_path: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "N H W 3"], *, train: bool = False) -> Float[Array, "N F"]:
        n, height, width, _ = images.shape
        rows, columns = height // self.patch, width // self.patch
        x = nn.Conv(
            self.width,
            (self.patch, self.patch),
            (self.patch, self.patch),
            padding="VALID",
            dtype=self.dtype,
            name="embed",
        )(images.astype(self.dtype))
        x = x.reshape(n, rows * columns, self.width)
        if self.positions == "learned":
            positions = self.param("positions", nn.initializers.normal(0.02), (1, rows * columns, self.width))
        else:
            positions = jnp.asarray(sincos2d(rows, columns, self.width))[None]
        x = x + positions.astype(self.dtype)
        if self.pooling == "cls":
            cls = self.param("cls", nn.initializers.zeros, (1, 1, self.width))
            x = jnp.concatenate([jnp.broadcast_to(cls.astype(self.dtype), (n, 1, self.width)), x], axis=1)
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        for i in range(self.depth):
            drop_path = self.drop_path * i / max(self.depth - 1, 1)
            x = Block(self.heads, self.mlp_ratio, self.dropout, drop_path, self.dtype, name=f"block_{i}")(
                x, train=train
            )
        x = nn.LayerNorm(dtype=jnp.float32, name="norm")(x)
        if self.pooling == "cls":
            return x[:, 0]
        if self.pooling == "mean":
            return x.mean(axis=1)
        if self.pooling == "flat":
            return x.reshape(n, -1)
        query = self.param("query", nn.initializers.normal(0.02), (1, 1, self.width))
        query = jnp.broadcast_to(query, (n, 1, self.width))
        return Attention(self.heads, jnp.float32, name="pool")(query, x)[:, 0]


class Block(nn.Module):
    """Attention and MLP, each normalised before and added to its input."""

    heads: int
    mlp_ratio: float
    dropout: float
    drop_path: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "N T W"], *, train: bool) -> Float[Array, "N T W"]:
        y = nn.LayerNorm(dtype=jnp.float32, name="norm_1")(x).astype(self.dtype)
        y = Attention(self.heads, self.dtype, name="attention")(y, y)
        y = nn.Dropout(self.dropout)(y, deterministic=not train)
        x = x + DropPath(self.drop_path)(y, train=train)
        y = nn.LayerNorm(dtype=jnp.float32, name="norm_2")(x).astype(self.dtype)
        y = nn.Dense(int(self.mlp_ratio * x.shape[-1]), dtype=self.dtype, name="mlp_in")(y)
        y = nn.Dense(x.shape[-1], dtype=self.dtype, name="mlp_out")(nn.gelu(y))
        y = nn.Dropout(self.dropout)(y, deterministic=not train)
        return x + DropPath(self.drop_path)(y, train=train)


class Attention(nn.Module):
    """Multi-head dot-product attention; logits and softmax in float32."""

    heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, queries: Float[Array, "N Q W"], tokens: Float[Array, "N T W"]) -> Float[Array, "N Q W"]:
        width = queries.shape[-1]
        per_head = (self.heads, width // self.heads)
        q = nn.DenseGeneral(per_head, dtype=self.dtype, name="query")(queries)
        k = nn.DenseGeneral(per_head, dtype=self.dtype, name="key")(tokens)
        v = nn.DenseGeneral(per_head, dtype=self.dtype, name="value")(tokens)
        logits = jnp.einsum("nqhd,nthd->nhqt", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits / np.sqrt(per_head[1]), axis=-1).astype(self.dtype)
        mixed = jnp.einsum("nhqt,nthd->nqhd", weights, v)
        return nn.DenseGeneral(width, axis=(-2, -1), dtype=self.dtype, name="out")(mixed)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): a whole residual branch is dropped for an image, the others scaled up."""

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "N T W"], *, train: bool) -> Float[Array, "N T W"]:
        if not train or self.rate == 0:
            return x
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, (x.shape[0], 1, 1))
        return jnp.where(keep, x / (1 - self.rate), 0).astype(x.dtype)


def sincos2d(rows: int, columns: int, width: int) -> Float[np.ndarray, "tokens width"]:
    """Fixed 2-D sine-cosine positions (as MoCo v3 uses): a quarter of the width each for sin and cos of y and x.

    float32 (rows * columns, width). Raises ValueError unless 4 divides the width.
    """
    if width % 4:
        raise ValueError(f"sincos2d positions need a width divisible by 4, got {width}")
    omega = 1.0 / 10_000 ** (np.arange(width // 4) / max(width // 4 - 1, 1))
    y, x = np.mgrid[:rows, :columns].reshape(2, -1, 1)
    return np.concatenate([np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega)], 1).astype("f4")
