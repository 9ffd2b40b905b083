"""Backbone, projection and codebooks: images to features, soft codes and reconstructions."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8
from ml_collections import ConfigDict

from tcq import quantizer
from tcq.models.vit import SIZES, Size, ViT

Params = Mapping[str, Any]


class Outputs(NamedTuple):
    """What the retriever computes for N images, all float32."""

    features: Float[Array, "N D"]
    weights: Float[Array, "N M K"]
    reconstructions: Float[Array, "N D"]
    codebooks: Float[Array, "M K d"]  # as used: unit codewords for metric "ip"


class Retriever(nn.Module):
    """`init` and `apply` it; it holds no state. Images are float (N, H, W, 3) in [0, 1].

    Attributes:
      backbone: images to (N, F).
      num_codebooks, num_codewords, codeword_dim: M, K, d.
      scale, metric: of `quantizer.soft_assign`.
    """

    backbone: nn.Module
    num_codebooks: int
    num_codewords: int
    codeword_dim: int
    scale: float
    metric: str

    @nn.compact
    def __call__(self, images: Float[Array, "N H W 3"], *, train: bool = False) -> Outputs:
        features = self.backbone(2 * images - 1, train=train).astype(jnp.float32)
        features = nn.Dense(
            self.num_codebooks * self.codeword_dim, kernel_init=nn.initializers.xavier_uniform(), name="projection"
        )(features)
        shape = (self.num_codebooks, self.num_codewords, self.codeword_dim)
        codebooks = self.param("codebooks", nn.initializers.normal(1 / np.sqrt(self.codeword_dim)), shape)
        if self.metric == "ip":
            codebooks = quantizer.unit_codewords(codebooks)
        weights = quantizer.soft_assign(features, codebooks, scale=self.scale, metric=self.metric)
        return Outputs(features, weights, quantizer.reconstruct(weights, codebooks), codebooks)


def from_config(config: ConfigDict) -> Retriever:
    """The model that `config.model` and `config.quantizer` describe."""
    m, q = config.model, config.quantizer
    size = SIZES[m.name] if m.name else Size(m.width, m.depth, m.heads)
    backbone = ViT(
        *size,
        patch=m.patch,
        pooling=m.pooling,
        positions=m.positions,
        mlp_ratio=m.mlp_ratio,
        dropout=m.dropout,
        drop_path=m.drop_path,
        dtype=jnp.dtype(m.dtype),
    )
    return Retriever(backbone, q.num_codebooks, q.num_codewords, q.codeword_dim, q.scale, q.metric)


def init(key: Key[Array, ""], model: Retriever, images: UInt8[np.ndarray, "N H W 3"], *, from_data: bool) -> Params:
    """Parameters for images of this size.

    With `from_data` (our choice), the projection is centred and scaled so that over `images` features have mean zero and
    subvectors a mean squared length of 1, and each codebook is made of such subvectors, drawn without replacement while
    they last. Soft codes then start spread over the codewords: with larger features they would start as good as hard,
    and hardly any gradient would pass. Otherwise the bias is zero and the codewords are normal.
    """
    init_key, draw_key = jax.random.split(key)
    pixels = jnp.asarray(images, jnp.float32) / 255
    params = dict(jax.jit(model.init)(init_key, pixels[:1])["params"])
    if not from_data:
        return params
    features = jax.jit(model.apply)({"params": params}, pixels).features
    mean = features.mean(axis=0)
    subvectors = (features - mean).reshape(len(images), model.num_codebooks, model.codeword_dim)
    shrink = jax.lax.rsqrt(jnp.maximum(jnp.mean(jnp.sum(subvectors**2, axis=-1)), 1e-12))
    params["projection"] = {"kernel": params["projection"]["kernel"] * shrink, "bias": -mean * shrink}
    subvectors = subvectors * shrink
    replace = len(images) < model.num_codewords
    draws = [
        jax.random.choice(k, len(images), (model.num_codewords,), replace=replace)
        for k in jax.random.split(draw_key, model.num_codebooks)
    ]
    params["codebooks"] = jnp.stack([subvectors[draw, m] for m, draw in enumerate(draws)])
    return params


def parameter_count(params: Params) -> int:
    """Number of trained scalars."""
    return sum(x.size for x in jax.tree.leaves(params))
