"""What a number has to be compared with: FAISS product quantization at the same bits, without any of our training."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, UInt

from tcq import quantizer


def faiss_pq(
    train: Float[np.ndarray, "T D"],
    database: Iterable[Float[np.ndarray, "_ D"]],
    *,
    num_codebooks: int,
    num_codewords: int,
) -> tuple[Float[np.ndarray, "M K d"], UInt[np.ndarray, "N M"]]:
    """Codebooks by FAISS's k-means on `train`, and the codes of the database, which comes in blocks; rank with metric "l2".

    Vectors are padded with zeros to a multiple of M: pad queries with `padded`. Raises ValueError if there are fewer
    training vectors than codewords, or K is above 65,536.
    """
    import faiss

    if len(train) < num_codewords:
        raise ValueError(
            f"FAISS needs at least {num_codewords} vectors to learn {num_codewords} codewords, got {len(train)}"
        )
    train = padded(train, num_codebooks)
    bits = num_codewords.bit_length() - 1
    pq = faiss.ProductQuantizer(train.shape[1], num_codebooks, bits)
    pq.cp.min_points_per_centroid = 1  # small collections are allowed, without a warning on stderr
    pq.train(train)
    codebooks = faiss.vector_to_array(pq.centroids).reshape(num_codebooks, num_codewords, -1)
    packed = np.concatenate([pq.compute_codes(padded(block, num_codebooks)) for block in database])
    codes = faiss.unpack_bitstrings(packed, num_codebooks, bits)
    return codebooks, codes.astype(quantizer.code_dtype(num_codewords))


def padded(vectors: Float[np.ndarray, "N D"], num_codebooks: int) -> Float[np.ndarray, "N E"]:
    """float32 vectors with zeros appended until M divides their width."""
    extra = -vectors.shape[1] % num_codebooks
    return np.ascontiguousarray(np.pad(vectors, [(0, 0), (0, extra)]), np.float32)
