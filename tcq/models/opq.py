"""Optimized product quantization (Ge et al. 2013), by FAISS, and whitening by views.

They give a projection that codes lose least of, of what differs between images and not between views of one.
"""

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
    seed: int,
    strength: float = 1.0,
) -> Float[np.ndarray, "F E"]:
    """`rotation`, after `whitening` of that strength if there are several views of some items."""
    shape = {"num_codebooks": num_codebooks, "num_codewords": num_codewords, "width": width, "seed": seed}
    if views is None or views.shape[1] < 2 or not strength:
        return rotation(rows, **shape)
    white = whitening(views, strength=strength)
    return white @ rotation(rows @ white, **shape)


def whitening(views: Float[np.ndarray, "I V F"], *, strength: float = 1.0) -> Float[np.ndarray, "F F"]:
    """A matrix after which views of one item differ as much in all directions.

    It is the inverse square root of their covariance about the means of their items (relevant component analysis,
    Bar-Hillel et al. 2005), with RIDGE of its mean eigenvalue added. A strength below 1 is a power of that matrix.
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
    train: Float[np.ndarray, "T F"], *, num_codebooks: int, num_codewords: int, width: int, seed: int
) -> Float[np.ndarray, "F E"]:
    """Orthonormal columns, to multiply rows with: at most `width`, and a multiple of M.

    They are for codes of K codewords. FAISS takes 256 by default, which costs 0.05 to 0.09 of mAP at K = 16
    (docs/clipping.md). FAISS always starts from the same rotation. Here the seed draws an order and signs of the
    columns first, so that each seed finds another of many local optima. Raises ValueError if there are fewer than K
    rows to train on.
    """
    import faiss

    if len(train) < num_codewords:
        raise ValueError(f"FAISS needs at least {num_codewords} vectors for its rotation, got {len(train)}")
    random = np.random.RandomState(seed)
    order = random.permutation(train.shape[1])
    signs = random.choice(np.array([-1, 1], np.float32), len(order))
    train = np.ascontiguousarray((train - train.mean(axis=0, keepdims=True))[:, order] * signs[None], np.float32)
    width = max(min(width, train.shape[1]) // num_codebooks, 1) * num_codebooks
    pq = faiss.ProductQuantizer(width, num_codebooks, quantizer.code_bits(num_codewords))
    pq.cp.min_points_per_centroid = 1  # no warning on standard error for small collections
    matrix = faiss.OPQMatrix(train.shape[1], num_codebooks, width)
    matrix.pq = pq
    matrix.train(train)
    columns = np.empty((train.shape[1], width), np.float32)
    columns[order] = (faiss.vector_to_array(matrix.A).reshape(width, train.shape[1]) * signs[None]).T
    return columns
