"""An oracle: a ViT of Flax's own layers with the parameter names and shapes of Google's published .npz."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from scipy import ndimage


class ViT(nn.Module):
    heads: int
    patch: int
    depth: int
    mlp: int

    @nn.compact
    def __call__(self, images):
        width = self.get_variable("params", "cls").shape[-1]
        x = nn.Conv(width, (self.patch,) * 2, (self.patch,) * 2, padding="VALID", name="embedding")(images)
        x = x.reshape(len(x), -1, width)
        cls = jnp.tile(self.param("cls", nn.initializers.zeros, (1, 1, width)), (len(x), 1, 1))
        return Encoder(self.heads, self.depth, self.mlp, name="Transformer")(jnp.concatenate([cls, x], axis=1))[:, 0]


class Encoder(nn.Module):
    heads: int
    depth: int
    mlp: int

    @nn.compact
    def __call__(self, x):
        x = AddPositions(name="posembed_input")(x)
        for i in range(self.depth):
            x = Block(self.heads, self.mlp, name=f"encoderblock_{i}")(x)
        return nn.LayerNorm(name="encoder_norm")(x)


class AddPositions(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + self.param("pos_embedding", nn.initializers.zeros, (1, *x.shape[1:]))


class Block(nn.Module):
    heads: int
    mlp: int

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(name="LayerNorm_0")(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="MultiHeadDotProductAttention_1")(y, y)
        return x + Mlp(self.mlp, name="MlpBlock_3")(nn.LayerNorm(name="LayerNorm_2")(x))


class Mlp(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(x.shape[-1], name="Dense_1")(nn.gelu(nn.Dense(self.hidden, name="Dense_0")(x)))


def features(tensors, images):
    """The class token's features; positions are resampled by scipy.ndimage.zoom of order 1, as in Google's code."""
    tensors = {k: v for k, v in tensors.items() if not k.startswith("head")}
    patch, name = tensors["embedding/kernel"].shape[0], "Transformer/posembed_input/pos_embedding"
    old, new = int((tensors[name].shape[1] - 1) ** 0.5), images.shape[1] // patch
    grid = tensors[name][0, 1:].reshape(old, old, -1)
    grid = ndimage.zoom(grid, (new / old, new / old, 1), order=1).reshape(1, new * new, -1)
    tensors[name] = np.concatenate([tensors[name][:, :1], grid], axis=1)
    depth = sum(k.endswith("LayerNorm_0/bias") for k in tensors)
    heads = tensors["Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"].shape[1]
    mlp = tensors["Transformer/encoderblock_0/MlpBlock_3/Dense_0/bias"].shape[0]
    model = ViT(heads, patch, depth, mlp)
    return model.apply({"params": traverse_util.unflatten_dict(tensors, sep="/")}, images)
