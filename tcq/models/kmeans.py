"""k-means of subvectors, by FAISS: initial codewords."""

import numpy as np
from jaxtyping import Float

from tcq.runtime import signals


def kmeans(
    subvectors: Float[np.ndarray, "N M d"], num_codewords: int, *, spherical: bool, seed: int = 0
) -> Float[np.ndarray, "M K d"]:
    """The K centres of each of M sets of subvectors, float32.

    If spherical, these are unit centres of unit subvectors. Raises ValueError if there are fewer subvectors than
    centres.
    """
    import faiss

    if len(subvectors) < num_codewords:
        raise ValueError(
            f"k-means of {num_codewords} codewords needs at least as many images, got {len(subvectors)}: "
            f"raise quantizer.init_images or set quantizer.init=data"
        )
    centres = []
    for vectors in np.ascontiguousarray(np.swapaxes(subvectors, 0, 1), np.float32):
        signals.poll()
        if spherical:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        run = faiss.Kmeans(
            vectors.shape[1], num_codewords, niter=25, seed=seed, spherical=spherical, min_points_per_centroid=1
        )
        run.train(vectors)
        assert run.centroids is not None
        centres.append(run.centroids)
    return np.stack(centres)
