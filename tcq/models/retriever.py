"""Backbone, projection and codebooks: images to features, soft codes and reconstructions."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, UInt8
from ml_collections import ConfigDict

from tcq import quantizer
from tcq.models import kmeans as clusters
from tcq.models import resnet, vit

Params = Mapping[str, Any]
Variables = Mapping[str, Any]  # "params", and for a ResNet "batch_stats"
INIT_BATCH = 64  # images at a time


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
      mean, std: of the pixels of each channel, which the backbone sees as (pixel - mean) / std.
      frozen: the backbone is not trained, so nothing in it is random and its batch statistics stand.
    """

    backbone: nn.Module
    num_codebooks: int
    num_codewords: int
    codeword_dim: int
    scale: float
    metric: str
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    frozen: bool = False

    def setup(self) -> None:
        width = self.num_codebooks * self.codeword_dim
        self.projection = nn.Dense(width, kernel_init=nn.initializers.xavier_uniform())
        shape = (self.num_codebooks, self.num_codewords, self.codeword_dim)
        self.codebooks = self.param("codebooks", nn.initializers.normal(1 / np.sqrt(self.codeword_dim)), shape)

    def __call__(self, images: Float[Array, "N H W 3"], *, train: bool = False) -> Outputs:
        return self.head(self.embed(images, train=train))

    def embed(self, images: Float[Array, "N H W 3"], *, train: bool = False) -> Float[Array, "N F"]:
        """What the backbone makes of images, float32."""
        pixels = (images - jnp.array(self.mean, images.dtype)) / jnp.array(self.std, images.dtype)
        return self.backbone(pixels, train=train and not self.frozen).astype(jnp.float32)

    def head(self, embedded: Float[Array, "N F"]) -> Outputs:
        """Projection and quantizer."""
        features = self.projection(embedded)
        codebooks = quantizer.unit_codewords(self.codebooks) if self.metric == "ip" else self.codebooks
        weights = quantizer.soft_assign(features, codebooks, scale=self.scale, metric=self.metric)
        return Outputs(features, weights, quantizer.reconstruct(weights, codebooks), codebooks)


def from_config(config: ConfigDict, *, axis_name: str | None = None) -> Retriever:
    """The model that `config.model` and `config.quantizer` describe; axis_name: see `resnet.ResNet`."""
    q = config.quantizer
    return Retriever(
        _backbone(config, axis_name),
        q.num_codebooks,
        q.num_codewords,
        q.codeword_dim,
        q.scale,
        q.metric,
        tuple(config.model.mean),
        tuple(config.model.std),
        config.optim.frozen_blocks < 0,
    )


def _backbone(config: ConfigDict, axis_name: str | None) -> nn.Module:
    m = config.model
    if m.name in resnet.NAMED:
        return resnet.ResNet(
            *resnet.NAMED[m.name],
            stem=m.stem,
            axis_name=axis_name,
            frozen_blocks=config.optim.frozen_blocks,
            dtype=jnp.dtype(m.dtype),
            remat=m.remat,
        )
    size, patch = vit.NAMED.get(m.name, (vit.Size(m.width, m.depth, m.heads), m.patch))
    return vit.ViT(
        width=size.width,
        depth=size.depth,
        heads=size.heads,
        patch=patch,
        pooling=m.pooling,
        positions=m.positions,
        mlp_ratio=m.mlp_ratio,
        class_token=m.class_token,
        registers=m.registers,
        layer_scale=m.layer_scale,
        gelu=m.gelu,
        norm_eps=m.norm_eps,
        dropout=m.dropout,
        drop_path=m.drop_path,
        dtype=jnp.dtype(m.dtype),
        attention=m.attention
        if jax.default_backend() == "gpu"
        else "xla",  # a model may be used where it was not trained
        remat=m.remat,
        scan=m.scan,
    )


def shapes(model: nn.Module, image_size: int) -> Variables:
    """Shapes and dtypes of the variables of a retriever or a backbone; nothing is computed."""
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image)


def init(
    key: Key[Array, ""],
    model: Retriever,
    images: UInt8[np.ndarray, "N H W 3"],
    *,
    codewords: str,
    backbone: Variables | None = None,
) -> dict[str, Any]:
    """Variables for images of this size; those of the backbone are drawn, or given.

    With codewords "data" or "kmeans" (our choice), the projection is centred and scaled so that over `images` features have
    mean zero and subvectors a mean squared length of 1, and each codebook is made of such subvectors: drawn without
    replacement while they last, or their k-means centres. Soft codes then start spread over the codewords: with larger
    features they would start as good as hard, and hardly any gradient would pass. With "random" the bias is zero and the
    codewords are normal.
    """
    init_key, draw_key = jax.random.split(key)
    variables: dict[str, Any] = dict(jax.jit(model.init)(init_key, jnp.asarray(images[:1], jnp.float32) / 255))
    for collection, values in (backbone or {}).items():
        variables[collection] = {**variables[collection], "backbone": values}
    if codewords == "random":
        return variables
    features = _features(model, variables, images)
    mean = features.mean(axis=0)
    subvectors = (features - mean).reshape(len(images), model.num_codebooks, model.codeword_dim)
    shrink = jax.lax.rsqrt(jnp.maximum(jnp.mean(jnp.sum(subvectors**2, axis=-1)), 1e-12))
    subvectors = subvectors * shrink
    if codewords == "kmeans":
        codebooks: ArrayLike = clusters.kmeans(
            np.asarray(subvectors), model.num_codewords, spherical=model.metric == "ip"
        )
    else:
        replace = len(images) < model.num_codewords
        draws = [
            jax.random.choice(k, len(images), (model.num_codewords,), replace=replace)
            for k in jax.random.split(draw_key, model.num_codebooks)
        ]
        codebooks = jnp.stack([subvectors[draw, m] for m, draw in enumerate(draws)])
    projection = {"kernel": variables["params"]["projection"]["kernel"] * shrink, "bias": -mean * shrink}
    variables["params"] = {**variables["params"], "projection": projection, "codebooks": jnp.asarray(codebooks)}
    return variables


def _features(model: Retriever, variables: Variables, images: UInt8[np.ndarray, "N H W 3"]) -> Float[Array, "N D"]:
    """In batches, because a large backbone on a thousand large images would not fit in memory at once."""
    run = jax.jit(lambda v, x: model.apply(v, x.astype(jnp.float32) / 255).features)  # type: ignore[union-attr]
    size = min(INIT_BATCH, len(images))
    padded = np.pad(images, [(0, -len(images) % size), (0, 0), (0, 0), (0, 0)])
    parts = [run(variables, padded[i : i + size]) for i in range(0, len(padded), size)]
    return jnp.concatenate(parts)[: len(images)]


def parameter_count(params: Params) -> int:
    """Number of trained scalars."""
    return sum(x.size for x in jax.tree.leaves(params))
