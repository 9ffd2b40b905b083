"""A user's function: colours of a grid of cells, and one that computes something else."""

import os
import sys
import time

import jax
import numpy as np


def embed(images):
    n, side = images.shape[:2]
    cell = side // 4
    cells = images.reshape(n, 4, cell, 4, cell, 3).mean(axis=(2, 4)).reshape(n, 48)
    return (cells / 255).astype(np.float32)


def other(images):
    return embed(images)[:, ::-1]


def rounding(images):
    """The same, rounded in another way at each call."""
    return embed(images) * (1 + 1e-6 * np.random.default_rng().standard_normal((len(images), 1)))


def narrow(images):
    return embed(images)[:, :5]


def nothing(images):
    return np.zeros((len(images), 2, 2))


def huge(images):
    return embed(images).astype(np.float64) * 1e300


def leaving(images):
    sys.exit(0)


def wide_as_the_batch(images):
    return embed(images)[:, : 40 + 8 * (len(images) > 8)]


def of_the_batch(images):
    rows = embed(images)
    return rows - rows.mean(axis=0)


def random(images):
    return embed(images) * np.random.default_rng().uniform(0.5, 2, (len(images), 48))


def bfloat16(images):
    return jax.numpy.asarray(embed(images), jax.numpy.bfloat16)


def bytes_of(images):
    return (embed(images) * 255).astype(np.uint8)


def ragged(images):
    return [[0.0] * (i + 1) for i in range(len(images))]


def empty(images):
    return embed(images)[:, :0]


def returns_nothing(images):
    embed(images)


def asserts(images):
    assert len(images) > 64


class Model:
    def embed(self, images):
        return embed(images)


model, number = Model(), 3


def careless(images):
    """Changes its argument, and prints."""
    print("loading")
    images[:] = 255 - images
    return embed(255 - images)


def broken(images):
    raise RuntimeError("no weights")


def logged(images):
    """The same, with a line for each call: the process and the number of images. Process 1 takes longer."""
    time.sleep(0.05 * jax.process_index())
    with open(os.environ["EMBEDDED_BY"], "a") as file:
        file.write(f"{os.getpid()} {len(images)}\n")
    return embed(images)
