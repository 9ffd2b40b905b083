"""Weights from recipes: tensors by names and shapes, the same on any machine, written in published formats.

activations.json has for each family the names and shapes, the JSON files beside the weights, and the features that the
library of the format computes from them. tests/helpers/peer_models.py writes it.
"""

import io
import json
import zlib
from pathlib import Path

import jax
import numpy as np

from tcq import config as configs
from tcq.encode import backbone_from_weights
from tcq.models import retriever

PATH = Path(__file__).with_name("activations.json")
SIDES = (32, 48, 24)  # pixels; the weights are for the first
RTOL = 1e-5  # of the largest feature


def tensors(shapes):
    """float32 values for {name: shape}, of a size that keeps activations near 1."""
    return {name: tensor(name, tuple(shape)) for name, shape in shapes.items()}


def tensor(name, shape):
    random = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return np.array(7, np.int64)
    if name.endswith("running_var"):
        return random.uniform(0.5, 2, shape).astype("f4")
    if len(shape) == 4:  # a convolution, as PyTorch (out, in, h, w) or as Flax (h, w, in, out) lays it out
        fan_in = np.prod(shape[:3]) if name.endswith("kernel") else np.prod(shape[1:])
        return (random.randn(*shape) / np.sqrt(fan_in)).astype("f4")
    if len(shape) == 1 and name.endswith(("weight", "scale")):
        return (1 + 0.3 * random.randn(*shape)).astype("f4")
    return (random.randn(*shape) * 0.2).astype("f4")


def images(side):
    """Input of the backbone, (3, side, side, 3)."""
    return np.random.RandomState(side).randn(3, side, side, 3).astype("f4")


def families():
    return json.loads(PATH.read_text())["families"]


def write(family, folder):
    """Writes the weights of a family in its published format; returns the folder."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    values = tensors(family["shapes"])
    if family["file"].endswith(".npz"):
        np.savez(folder / family["file"], **values)
    else:
        save_file(values, folder / family["file"])
    for name, facts in family["beside"].items():
        (folder / name).write_text(json.dumps(facts))
    return folder


def ours(path, side, *overrides):
    """The output of our backbone for `images(side)`, set up by a config as a user does."""
    c = configs.load("configs/digits.py", [f"model.weights={path}", f"data.image_size={side}", *overrides])
    model = retriever.from_config(c)
    return jax.jit(model.backbone.apply)(backbone_from_weights(c, model), images(side))


def photo(size):
    """A smooth random picture of (width, height), and its PNG file."""
    from PIL import Image

    noise = np.random.RandomState(0).randint(0, 256, (12, 12, 3)).astype("u1")
    picture = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    out = io.BytesIO()
    picture.save(out, "PNG")
    return picture, out.getvalue()


def assert_close(features, want):
    want = np.asarray(want)
    error = np.abs(np.asarray(features) - want).max() / np.abs(want).max()
    assert error < RTOL, f"{error:.1e} of the largest feature"
