"""Optimized product quantization (Ge et al. 2013), by FAISS, and whitening by views.

They give a projection that codes lose least of, of what differs between images and not between views of one.
"""

from functools import partial

import numpy as np
from jaxtyping import Float

from tcq import quantizer

RIDGE = 0.1  # of the mean variance, added to all: our choice


def projection(
    rows: Float[np.ndarray, "N F"],
    views: Float[np.ndarray, "I V F"] | None,
    *,
    num_codebooks: int,
    num_codewords: int,
    width: int,
    seed: int | None,
    strength: float = 1.0,
) -> Float[np.ndarray, "F E"]:
    """The projection by `rotation`, after `whitening` if there are several views."""
    rotate = partial(rotation, num_codebooks=num_codebooks, num_codewords=num_codewords, width=width, seed=seed)
    if views is None or views.shape[1] < 2:
        return rotate(rows)
    white = whitening(views, strength=strength)
    return white @ rotate(rows @ white)


def whitening(views: Float[np.ndarray, "I V F"], *, strength: float = 1.0) -> Float[np.ndarray, "F F"]:
    """A matrix after which views of one item differ as much in all directions.

    It is the inverse square root of their covariance about the means of their items (relevant component analysis,
    Bar-Hillel et al. 2005), with RIDGE of its mean eigenvalue added. The result is that matrix to the power `strength`.
    """
    covariance = np.zeros((views.shape[2],) * 2)
    for block in np.array_split(views, max(len(views) // 1024, 1)):
        apart = (block - block.mean(axis=1, keepdims=True)).reshape(-1, views.shape[2])
        covariance += apart.T @ apart
    values, vectors = np.linalg.eigh(covariance)
    values = np.maximum(values, 0) + max(RIDGE * values.mean(), 1e-12)
    values /= values.mean()
    return (vectors * values[None] ** (-strength / 2) @ vectors.T).astype(np.float32)


def rotation(
    train: Float[np.ndarray, "T F"], *, num_codebooks: int, num_codewords: int, width: int, seed: int | None
) -> Float[np.ndarray, "F E"]:
    """Orthonormal columns, to multiply rows with: at most `width`, and a multiple of M.

    They are for codes of K codewords. FAISS takes 256 by default, which costs 0.05 to 0.09 of mAP at K = 16
    (docs/clipping.md). FAISS always starts from the same rotation, as here without a seed. A seed draws an order and
    signs of the columns first, so that each seed leads to another solution. Raises ValueError if there are fewer than
    K rows to train on.
    """
    import faiss

    if len(train) < num_codewords:
        raise ValueError(f"FAISS needs at least {num_codewords} vectors for its rotation, got {len(train)}")
    order, signs = np.arange(train.shape[1]), np.ones(train.shape[1], np.float32)
    if seed is not None:
        random = np.random.RandomState(seed)
        order, signs = random.permutation(order), random.choice(np.array([-1, 1], np.float32), len(order))
    train = np.ascontiguousarray((train - train.mean(axis=0, keepdims=True))[:, order] * signs[None], np.float32)
    width = max(min(width, train.shape[1]) // num_codebooks, 1) * num_codebooks
    train = np.tile(train, (-(-width // len(train)), 1))  # with fewer rows than `width` FAISS writes out of bounds
    pq = faiss.ProductQuantizer(width, num_codebooks, quantizer.code_bits(num_codewords))
    pq.cp.min_points_per_centroid = 1  # no warning on standard error for small collections
    matrix = faiss.OPQMatrix(train.shape[1], num_codebooks, width)
    matrix.pq = pq
    matrix.train(train)
    columns = np.empty((train.shape[1], width), np.float32)
    columns[order] = (faiss.vector_to_array(matrix.A).reshape(width, train.shape[1]) * signs[None]).T
    return columns
