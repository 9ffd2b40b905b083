"""Search: reads query images, finds the k nearest indexed images of each, draws the hits."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from tcq import config as configs
from tcq import encode, plots, ranking
from tcq.data.images import ImageError, decode, resize_of
from tcq.index.store import Index, IndexFileError
from tcq.runtime import storage

THUMBNAIL = 96  # pixels; smaller images are enlarged to it


class Hit(NamedTuple):
    """An indexed image and its score; higher scores are closer."""

    path: str
    score: float


def read_queries(index: Index, paths: Sequence[str | Path]) -> UInt8[np.ndarray, "Q H W 3"]:
    """Query images, decoded as the encoder needs them. Raises IndexFileError with the file and the reason."""
    data, queries = index.encoder.config.data, []
    for path in paths:
        try:
            queries.append(decode(path, size=data.image_size, resize=resize_of(data)))
        except ImageError as error:
            raise IndexFileError(f"query {str(path)!r}: {error}") from None
    return np.stack(queries)


def search(index: Index, images: UInt8[np.ndarray, "Q H W 3"], *, k: int = 10) -> list[list[Hit]]:
    """The k nearest indexed images of each query image, best first. Raises ValueError as `ranking.top_k`."""
    features = encode.encode(index.encoder, images).features
    scores, ids = search_features(index, features, k=k)
    return [[Hit(index.paths[i], float(s)) for i, s in zip(*row, strict=True)] for row in zip(ids, scores, strict=True)]


def search_features(
    index: Index, features: Float[np.ndarray, "Q D"], *, k: int
) -> tuple[Float[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
    """Scores and positions of the k nearest items of float features, best first."""
    config = index.encoder.config
    tables = ranking.lookup_table(
        features,
        index.encoder.codebooks,
        metric=config.eval.score,
        squared=config.eval.squared,
        normalize=configs.query_norm(config),
    )
    return ranking.top_k(tables, index.codes, k, norms=index.norms)


def image_of(hit: Hit) -> str | bytes:
    """The image of an answer, as an argument of `decode`. Raises BucketError."""
    return (storage.read(hit.path) or b"") if storage.is_url(hit.path) else hit.path


def draw(
    index: Index, queries: UInt8[np.ndarray, "Q H W 3"], answers: Sequence[Sequence[Hit]], out: str | Path
) -> None:
    """Writes a picture of queries and hits; missing images are gray. Raises IndexFileError."""
    size = max(index.encoder.config.data.image_size, THUMBNAIL)

    def image(hit: Hit) -> np.ndarray:
        try:
            return decode(image_of(hit), size=size)
        except (ImageError, storage.BucketError):
            return np.full((THUMBNAIL, THUMBNAIL, 3), 128, np.uint8)

    captions = [[f"{h.score:.3g} {Path(h.path).name[-14:]}" for h in hits] for hits in answers]
    try:
        plots.gallery(out, list(queries), [[image(h) for h in hits] for hits in answers], captions=captions)
    except (OSError, ValueError) as error:
        raise IndexFileError(f"--gallery {str(out)!r} cannot be written: {error}") from None
