"""Vision Transformer (Dosovitskiy et al. 2021), pre-norm, in Flax Linen.

It maps images to one feature per image.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Key

POOLINGS = ("cls", "mean", "flat", "attention")
POSITIONS = ("learned", "sincos2d")
GELUS = ("tanh", "erf")
ATTENTIONS = ("xla", "cudnn")
STEM = "conv"


class Size(NamedTuple):
    """Width, blocks and heads of a ViT."""

    width: int
    depth: int
    heads: int


SIZES = {"ti": Size(192, 12, 3), "s": Size(384, 12, 6), "b": Size(768, 12, 12), "l": Size(1024, 24, 16)}
PATCHES = (4, 8, 14, 16, 32)
NAMED = {f"vit_{size}{patch}": (SIZES[size], patch) for size in SIZES for patch in PATCHES}


class ViT(nn.Module):
    """Images (N, H, W, 3), float, to float32 features (N, width).

    With pooling "flat" the features are (N, patches * width).

    Attributes:
      width, depth, heads: see `Size`; heads divides width.
      patch: side of the square patches in pixels; divides H and W.
      pooling: "cls" (the class token), "mean", "flat" (all patches concatenated; for small images) or "attention" (one
        learned query attends to the patches).
      stem: "" (a linear map of each patch) or "conv" (see `ConvStem`; the patch is a power of two).
      positions: "learned" or "sincos2d" (fixed).
      mlp_ratio: hidden width of the MLP over width.
      class_token: whether there is a class token also with another pooling, which then ignores it.
      registers: number of further learned tokens, which are not pooled (Darcet et al. 2024).
      layer_scale: whether each branch is multiplied by a learned vector, initially 1e-5 (CaiT, Touvron et al. 2021).
      gelu: "tanh" (an approximation, common in JAX models) or "erf" (exact, common in PyTorch models).
      norm_eps: added to the variance in normalization.
      dropout: rate, after positions, attention and MLP.
      drop_path: rate of stochastic depth in the last block, growing linearly from 0 in the first.
      dtype: of the computation; parameters, normalization and softmax are float32.
      attention: "xla" or "cudnn" (on NVIDIA GPUs, dtype bfloat16), see `jax.nn.dot_product_attention`.
      remat: recompute the blocks in the backward pass instead of storing their activations. (Without `scan` it has no
        effect on CPUs, where XLA merges both computations.)
      scan: compile the blocks as one loop; parameters keep their names, and are stacked in every step.
    """

    width: int
    depth: int
    heads: int
    patch: int
    pooling: str = "cls"
    stem: str = ""
    positions: str = "learned"
    mlp_ratio: float = 4.0
    class_token: bool = False
    registers: int = 0
    layer_scale: bool = False
    gelu: str = "tanh"
    norm_eps: float = 1e-6
    dropout: float = 0.0
    drop_path: float = 0.0
    dtype: DTypeLike = jnp.float32
    attention: str = "xla"
    remat: bool = False
    scan: bool = False

    @nn.compact
    def __call__(self, images: Float[Array, "N H W 3"], *, train: bool = False) -> Float[Array, "N F"]:
        n, height, width, _ = images.shape
        rows, columns = height // self.patch, width // self.patch
        x = images.astype(self.dtype)
        if self.stem:
            x = ConvStem(self.width, self.patch, self.norm_eps, self.dtype, name="stem")(x)
        else:
            side = (self.patch, self.patch)
            x = nn.Conv(self.width, side, side, padding="VALID", dtype=self.dtype, name="embed")(x)
        x = x.reshape(n, rows * columns, self.width)
        if self.positions == "learned":
            positions = self._token("positions", rows * columns)
        else:
            positions = jnp.asarray(sincos2d(rows, columns, self.width))[None]
        x = x + positions.astype(self.dtype)
        extra = []  # tokens that are not patches
        if self.pooling == "cls" or self.class_token:
            extra.append(self.param("cls", nn.initializers.zeros, (1, 1, self.width), jnp.float32))  # with its position
        if self.registers:
            extra.append(self._token("registers", self.registers))
        tokens = [jnp.broadcast_to(e.astype(self.dtype), (n, *e.shape[1:])) for e in extra]
        x = jnp.concatenate([*tokens, x], axis=1)
        random = train and (self.dropout > 0 or self.drop_path > 0)
        key = self.make_rng("dropout") if random else None
        if key is not None:
            key, first = jax.random.split(key)
            x = nn.Dropout(self.dropout)(x, deterministic=False, rng=first)
        x = self._blocks(x, key)
        x = nn.LayerNorm(self.norm_eps, dtype=jnp.float32, name="norm")(x)
        if self.pooling == "cls":
            return x[:, 0]
        x = x[:, sum(e.shape[1] for e in extra) :]
        if self.pooling == "mean":
            return x.mean(axis=1)
        if self.pooling == "flat":
            return x.reshape(n, -1)
        query = jnp.broadcast_to(self._token("query", 1), (n, 1, self.width))
        return Attention(self.heads, jnp.float32, "xla", name="pool")(query, x)[:, 0]

    def _token(self, name: str, count: int) -> Float[Array, "1 count W"]:
        return self.param(name, nn.initializers.normal(0.02), (1, count, self.width), jnp.float32)

    def _blocks(self, x: Float[Array, "N T W"], key: Key[Array, ""] | None) -> Float[Array, "N T W"]:
        """Applies all blocks; the key for dropout and stochastic depth is None outside training."""
        options: dict[str, Any] = {
            "heads": self.heads,
            "mlp_ratio": self.mlp_ratio,
            "layer_scale": self.layer_scale,
            "gelu": self.gelu,
            "norm_eps": self.norm_eps,
            "dropout": self.dropout,
            "dtype": self.dtype,
            "attention": self.attention,
        }
        names = [f"block_{i}" for i in range(self.depth)]
        rates = jnp.linspace(0, self.drop_path, self.depth, dtype=jnp.float32)
        keys = None if key is None else jax.random.split(key, self.depth)
        if not self.scan or self.is_initializing():
            block_class = nn.remat(Block) if self.remat else Block
            for i, name in enumerate(names):
                x = block_class(**options, name=name)(x, rates[i], None if keys is None else keys[i])
            return x

        def body(x: Array, block: tuple[Any, Array, Array | None]) -> tuple[Array, None]:
            params, drop_path, block_key = block
            x = Block(**options, parent=None).apply({"params": params}, x, drop_path, block_key)  # type: ignore[assignment]
            return x, None

        params = self.variables["params"]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name] for name in names))
        step = jax.checkpoint(body, prevent_cse=False) if self.remat else body
        return jax.lax.scan(step, x, (stacked, rates, keys))[0]


class ConvStem(nn.Module):
    """Images (N, H, W, 3) to one vector for each patch (Xiao et al. 2021).

    It applies 3 x 3 convolutions of stride 2. The channels double up to `width` in log2(patch) convolutions, and a
    1 x 1 convolution follows. Each is normalized over its channels (our choice, for batch normalization, whose
    statistics the model would have to carry).
    """

    width: int
    patch: int
    norm_eps: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "N H W 3"]) -> Float[Array, "N rows columns width"]:
        count = self.patch.bit_length() - 1
        for i in range(count):
            channels = max(self.width >> (count - 1 - i), 1)
            x = nn.Conv(channels, (3, 3), (2, 2), padding=1, use_bias=False, dtype=self.dtype, name=f"conv_{i}")(x)
            x = nn.relu(nn.LayerNorm(self.norm_eps, dtype=jnp.float32, name=f"norm_{i}")(x)).astype(self.dtype)
        return nn.Conv(self.width, (1, 1), dtype=self.dtype, name="out")(x)


class Block(nn.Module):
    """Attention and MLP, each with pre-normalization and a residual connection.

    Without a key nothing is dropped.
    """

    heads: int
    mlp_ratio: float
    layer_scale: bool
    gelu: str
    norm_eps: float
    dropout: float
    dtype: DTypeLike
    attention: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "N T W"], drop_path: Float[Array, ""], key: Key[Array, ""] | None
    ) -> Float[Array, "N T W"]:
        keys = [None, None] if key is None else list(jax.random.split(key))
        y = nn.LayerNorm(self.norm_eps, dtype=jnp.float32, name="norm_1")(x).astype(self.dtype)
        y = Attention(self.heads, self.dtype, self.attention, name="attention")(y, y)
        x = x + self._branch(y, "scale_1", drop_path, keys[0])
        y = nn.LayerNorm(self.norm_eps, dtype=jnp.float32, name="norm_2")(x).astype(self.dtype)
        y = nn.Dense(round(self.mlp_ratio * x.shape[-1]), dtype=self.dtype, name="mlp_in")(y)
        y = nn.gelu(y, approximate=self.gelu == "tanh")
        y = nn.Dense(x.shape[-1], dtype=self.dtype, name="mlp_out")(y)
        return x + self._branch(y, "scale_2", drop_path, keys[1])

    def _branch(
        self, y: Float[Array, "N T W"], name: str, drop_path: Float[Array, ""], key: Key[Array, ""] | None
    ) -> Float[Array, "N T W"]:
        if self.layer_scale:
            scale = self.param(name, nn.initializers.constant(1e-5), (y.shape[-1],), jnp.float32)
            y = y * scale.astype(y.dtype)[None, None]
        if key is None:
            return y
        dropout_key, path_key = jax.random.split(key)
        y = nn.Dropout(self.dropout)(y, deterministic=False, rng=dropout_key)
        return stochastic_depth(y, drop_path, path_key)


class Attention(nn.Module):
    """Multi-head dot-product attention; logits and softmax in float32."""

    heads: int
    dtype: DTypeLike
    implementation: str

    @nn.compact
    def __call__(self, queries: Float[Array, "N Q W"], tokens: Float[Array, "N T W"]) -> Float[Array, "N Q W"]:
        width = queries.shape[-1]
        per_head = (self.heads, width // self.heads)
        q = nn.DenseGeneral(per_head, dtype=self.dtype, name="query")(queries)
        k = nn.DenseGeneral(per_head, dtype=self.dtype, name="key")(tokens)
        v = nn.DenseGeneral(per_head, dtype=self.dtype, name="value")(tokens)
        mixed = jax.nn.dot_product_attention(q, k, v, implementation=self.implementation)  # type: ignore[call-overload]
        return nn.DenseGeneral(width, axis=(-2, -1), dtype=self.dtype, name="out")(mixed)


def stochastic_depth(
    x: Float[Array, "N T W"], rate: Float[ArrayLike, ""], key: Key[Array, ""]
) -> Float[Array, "N T W"]:
    """Stochastic depth (Huang et al. 2016): drops the whole branch of an image at `rate`.

    It scales the others up.
    """
    keep = jax.random.bernoulli(key, 1 - rate, (x.shape[0], 1, 1))
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def sincos2d(rows: int, columns: int, width: int) -> Float[np.ndarray, "tokens width"]:
    """Fixed 2-D sine-cosine positions, as in MoCo v3, float32 (rows * columns, width).

    The sin and cos of x and y have a quarter of the width each. Raises ValueError unless 4 divides the width.
    """
    if width % 4:
        raise ValueError(f"sincos2d positions need a width divisible by 4, got {width}")
    omega = 1.0 / 10_000 ** (np.arange(width // 4) / max(width // 4 - 1, 1))
    y, x = np.mgrid[:rows, :columns].reshape(2, -1, 1)
    return np.concatenate([np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega)], 1).astype("f4")
