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
from tcq.models import embedder, kmeans, opq, resnet, vit

Params = Mapping[str, Any]
Variables = Mapping[str, Any]  # "params", and for a ResNet "batch_stats"
INIT_BATCH = 64  # images


class Outputs(NamedTuple):
    """Features, soft codes and reconstructions of N images, float32."""

    features: Float[Array, "N D"]
    weights: Float[Array, "N M K"]
    reconstructions: Float[Array, "N D"]
    codebooks: Float[Array, "M K d"]  # as used: unit codewords for metric "ip"


class Retriever(nn.Module):
    """The whole model, stateless as all of Flax Linen.

    Images are float (N, H, W, 3) in [0, 1].

    Attributes:
      backbone: a module from images to (N, F).
      num_codebooks, num_codewords, codeword_dim: M, K, d.
      scale, metric: arguments of `quantizer.soft_assign`.
      mean, std: of the pixels of each channel; the backbone gets (pixel - mean) / std.
      frozen: whether the backbone is not trained: no dropout in it, and its batch statistics do not change.
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
        self.codebooks = self.param(
            "codebooks", nn.initializers.normal(1 / np.sqrt(self.codeword_dim)), shape, jnp.float32
        )

    def __call__(self, images: Float[Array, "N H W 3"] | Float[Array, "N F"], *, train: bool = False) -> Outputs:
        return self.head(self.embed(images, train=train))

    def embed(
        self, images: Float[Array, "N H W 3"] | Float[Array, "N F"], *, train: bool = False
    ) -> Float[Array, "N F"]:
        """The output of the backbone, float32, of images, or embeddings if the model takes these."""
        if takes_embeddings(self):
            return self.backbone(images.astype(jnp.float32))
        pixels = normalized(images, self.mean, self.std)
        return self.backbone(pixels, train=train and not self.frozen).astype(jnp.float32)

    def features(self, images: Float[Array, "N H W 3"] | Float[Array, "N F"]) -> Float[Array, "N D"]:
        """The features of images, or of embeddings."""
        return self.projection(self.embed(images))

    def head(self, embedded: Float[Array, "N F"]) -> Outputs:
        """Projection and quantizer, applied to the output of the backbone."""
        features = self.projection(embedded)
        codebooks = quantizer.unit_codewords(self.codebooks) if self.metric == "ip" else self.codebooks
        weights = quantizer.soft_assign(features, codebooks, scale=self.scale, metric=self.metric)
        return Outputs(features, weights, quantizer.reconstruct(weights, codebooks), codebooks)


def normalized(
    images: Float[Array, "N H W 3"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "N H W 3"]:
    """Images in [0, 1] minus the mean of each channel, divided by its deviation.

    The result is the input of a backbone.
    """
    shift, divisor = (jnp.array(x, images.dtype)[None, None, None] for x in (mean, std))
    return (images - shift) / divisor


def takes_embeddings(model: nn.Module) -> bool:
    """Whether the input of a retriever is embeddings (N, F), not images."""
    return isinstance(getattr(model, "backbone", model), embedder.Standardize)


def scaled(images: Any) -> Any:
    """The input of a model: uint8 pixels as float32 in [0, 1]; embeddings as float32."""
    is_pixels = images.dtype == np.uint8
    images = images.astype(jnp.float32)
    return images / 255 if is_pixels else images


def from_config(config: ConfigDict, *, axis_name: str | None = None) -> Retriever:
    """The model of `config.model` and `config.quantizer`; for axis_name see `resnet.ResNet`."""
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
    if m.name == embedder.NAME:
        return embedder.Standardize(m.width)
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
        stem=m.stem if m.stem == vit.STEM else "",
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
        # cuDNN is on NVIDIA GPUs only, and a model may be used on another machine than it was trained on.
        attention=m.attention if jax.default_backend() == "gpu" else "xla",
        remat=m.remat,
        scan=m.scan,
    )


def shapes(model: nn.Module, image_size: int) -> Variables:
    """Shapes and dtypes of the variables of a retriever or a backbone, without computing them."""
    shape: tuple[int, ...] = (1, image_size, image_size, 3)
    if takes_embeddings(model):
        backbone: Any = getattr(model, "backbone", model)
        shape = (1, backbone.width)
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    with jax.numpy_dtype_promotion("standard"):  # which flax takes for granted
        return jax.eval_shape(model.init, jax.random.key(0), image)


def init(
    key: Key[Array, ""],
    model: Retriever,
    images: UInt8[np.ndarray, "N H W 3"] | Float[np.ndarray, "N F"],
    *,
    codewords: str,
    backbone: Variables | None = None,
    views: np.ndarray | None = None,
    whitening: float = 1.0,
) -> dict[str, Any]:
    """Initial variables of the model.

    Args:
      key: source of randomness.
      model: as `from_config` gives it.
      images: training images, uint8, of the size that the model is for; or embeddings, whose mean and spread are kept.
      codewords: how the codebooks are initialized, see below.
      backbone: variables of the backbone, such as published weights; None: random ones.
      views: embeddings (I, V, F) of V views of some images, which "opq" whitens by.
      whitening: the strength of that whitening, 0 to 1.

    With codewords "data", "kmeans" or "opq" (our choice) the projection is centred and scaled, so that over `images`
    the features have mean zero and the subvectors a mean squared length of 1. Each codebook then consists of such
    subvectors, drawn without replacement if there are enough, or of their k-means centres. Soft codes start spread over
    the codewords: with larger features they would start almost hard, with hardly any gradient. "opq" starts with the
    projection of `opq.projection`, and k-means. With "random" the bias is zero and the codewords are normal.
    """
    init_key, draw_key = jax.random.split(key)
    variables: dict[str, Any] = dict(jax.jit(model.init)(init_key, scaled(images[:1])))
    if takes_embeddings(model):
        backbone = {"params": embedder.statistics(images)}
    for collection, values in (backbone or {}).items():
        variables[collection] = {**variables[collection], "backbone": values}
    if codewords == "random":
        return variables
    if codewords == "opq":
        seed = int(jax.random.bits(draw_key, dtype=jnp.uint32))
        kernel = _projection(model, variables, images, views if whitening else None, seed=seed, strength=whitening)
        variables["params"]["projection"] = {**variables["params"]["projection"], "kernel": kernel}
    features = _outputs(model, variables, images, "features")
    mean = features.mean(axis=0)
    subvectors = (features - mean[None]).reshape(len(images), model.num_codebooks, model.codeword_dim)
    shrink = jax.lax.rsqrt(jnp.maximum(jnp.mean(jnp.sum(subvectors**2, axis=-1)), 1e-12))
    subvectors = subvectors * shrink
    if codewords in ("kmeans", "opq"):
        spherical = model.metric == "ip"
        codebooks: ArrayLike = kmeans.kmeans(np.asarray(subvectors), model.num_codewords, spherical=spherical)
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


def _projection(
    model: Retriever, variables: Variables, images: np.ndarray, views: np.ndarray | None, *, seed: int, strength: float
) -> Float[Array, "F D"]:
    """The kernel of the projection by OPQ.

    It has columns of zeros where the embedding has fewer numbers than the features.
    """
    width = model.num_codebooks * model.codeword_dim
    shape = {"num_codebooks": model.num_codebooks, "num_codewords": model.num_codewords, "width": width}
    embedded = np.asarray(_outputs(model, variables, images, "embed"))
    if views is not None:
        rows = np.asarray(_outputs(model, variables, views.reshape(-1, views.shape[-1]), "embed"))
        views = rows.reshape(views.shape)
    kernel = opq.projection(embedded, views, **shape, seed=seed, strength=strength)
    parts = kernel.reshape(len(kernel), model.num_codebooks, -1)
    padded = np.pad(parts, [(0, 0), (0, 0), (0, model.codeword_dim - parts.shape[-1])])
    return jnp.asarray(padded.reshape(len(kernel), -1))


def _outputs(model: Retriever, variables: Variables, images: np.ndarray, method: str) -> Float[Array, "N D"]:
    """What a method of the model returns for images, computed in batches.

    The activations of a large backbone on all images would not fit in memory.
    """
    run = jax.jit(lambda v, x: model.apply(v, scaled(x), method=method))
    size = min(INIT_BATCH, len(images))
    padded = np.pad(images, [(0, -len(images) % size)] + [(0, 0)] * (images.ndim - 1))
    parts = [run(variables, padded[i : i + size]) for i in range(0, len(padded), size)]
    return jnp.concatenate(parts)[: len(images)]


def parameter_count(params: Params) -> int:
    """The number of scalars in a tree of parameters."""
    return sum(x.size for x in jax.tree.leaves(params))
