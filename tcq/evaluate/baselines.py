"""Baselines without our training, at the same number of bits.

They are FAISS product quantization, PCA, and signs.
"""

from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Float, UInt

from tcq import quantizer
from tcq.runtime import signals


def faiss_pq(
    train: Float[np.ndarray, "T D"],
    database: Iterable[Float[np.ndarray, "_ D"]],
    *,
    num_codebooks: int,
    num_codewords: int,
) -> tuple[Float[np.ndarray, "M K d"], UInt[np.ndarray, "N M"]]:
    """Codebooks by FAISS's k-means on `train`, and the codes of the database.

    The database is given in blocks; rank with metric "l2". Vectors are padded with zeros to a multiple of M; use `pad`
    for queries. Raises ValueError if there are fewer training vectors than codewords, or K is above 65,536.
    """
    import faiss

    if len(train) < num_codewords:
        raise ValueError(
            f"FAISS needs at least {num_codewords} vectors for {num_codewords} codewords, got {len(train)}"
        )
    train = pad(train, num_codebooks)
    bits = quantizer.code_bits(num_codewords)
    pq = faiss.ProductQuantizer(train.shape[1], num_codebooks, bits)
    pq.cp.min_points_per_centroid = 1  # no warning on standard error for small collections
    pq.train(train)
    codebooks = faiss.vector_to_array(pq.centroids).reshape(num_codebooks, num_codewords, -1)
    packed = []
    for block in database:
        signals.poll()
        packed.append(pq.compute_codes(pad(block, num_codebooks)))
    codes = faiss.unpack_bitstrings(np.concatenate(packed), num_codebooks, bits)
    return codebooks, codes.astype(quantizer.code_dtype(num_codewords))


def pad(vectors: Float[np.ndarray, "N D"], num_codebooks: int) -> Float[np.ndarray, "N E"]:
    """float32 vectors, padded with zeros until M divides their width; copied only if padded."""
    extra = -vectors.shape[1] % num_codebooks
    return np.ascontiguousarray(np.pad(vectors, [(0, 0), (0, extra)]) if extra else vectors, np.float32)


def pca(train: Float[np.ndarray, "T D"], width: int) -> Callable[[np.ndarray], np.ndarray]:
    """A map of (N, D) rows to the `width` directions of largest variance of `train`, by FAISS.

    The number of directions is at most D and at most T.
    """
    import faiss

    train = np.ascontiguousarray(train, np.float32)
    matrix = faiss.PCAMatrix(train.shape[1], min(width, *train.shape))
    matrix.train(train)
    return lambda rows: matrix.apply(np.ascontiguousarray(rows, np.float32))


def sign_bits(train: Float[np.ndarray, "T D"], bits: int, *, seed: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """A map of (N, D) rows to float32 (N, bits) of -1 and 1.

    It is PCA to `bits` directions, a random rotation, and signs. The inner product of two results is the number of bits
    less twice the Hamming distance. (The initialization of ITQ, Gong et al. 2013; if features have fewer than `bits`
    directions, the rotation spreads them over all signs.)
    """
    import faiss

    project = pca(train, bits)
    width = project(train[:1]).shape[1]
    rotation = faiss.RandomRotationMatrix(width, bits)
    rotation.init(seed)
    return lambda rows: np.where(rotation.apply(project(rows)) >= 0, 1, -1).astype(np.float32)
