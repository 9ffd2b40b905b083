"""Search: reads query images, finds the k nearest indexed images of each, draws the hits."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from tcq import config as configs
from tcq import encode, nearest, plots, ranking
from tcq.data.images import ImageError, decode, resize_of
from tcq.index.store import Index, IndexFileError
from tcq.models import retriever
from tcq.runtime import storage

MANY_QUERIES = 16  # in one call, for which an engine is built: building costs as much as some scans
THUMBNAIL = 96  # pixels; smaller images are enlarged to it


class Hit(NamedTuple):
    """An indexed image and its score; higher scores are closer."""

    path: str
    score: float


def read_queries(index: Index, paths: Sequence[str | Path]) -> UInt8[np.ndarray, "Q H W 3"] | Float[np.ndarray, "Q F"]:
    """Query images, decoded as the encoder needs them, or the embeddings of .npy files, one row or several in each.

    Raises IndexFileError with the file and the reason.
    """
    data, m = index.encoder.config.data, index.encoder.config.model
    takes_embeddings = retriever.takes_embeddings(index.encoder.model)
    if any(str(path).endswith(".npy") for path in paths):
        return np.concatenate([_read_embeddings(path, m.width if takes_embeddings else 0) for path in paths])
    if takes_embeddings and not m.embedder:
        raise IndexFileError(f"query {str(paths[0])!r}: the model was trained on embeddings: give a .npy file of them")
    queries = []
    for path in paths:
        try:
            queries.append(decode(path, size=data.image_size, resize=resize_of(data), max_pixels=data.max_pixels))
        except ImageError as error:
            raise IndexFileError(f"query {str(path)!r}: {error}") from None
    return np.stack(queries)


def _read_embeddings(path: str | Path, width: int) -> Float[np.ndarray, "_ F"]:
    if not width:
        raise IndexFileError(f"query {str(path)!r}: the model takes images, not embeddings")
    try:
        rows = np.atleast_2d(np.load(path, allow_pickle=False)).astype(np.float32)
    except (OSError, ValueError) as error:
        raise IndexFileError(f"query {str(path)!r}: embeddings cannot be read: {error}") from None
    if rows.ndim != 2 or rows.shape[1] != width or not np.isfinite(rows).all():
        raise IndexFileError(f"query {str(path)!r}: {rows.shape} must be finite rows of {width} numbers")
    return rows


def build_engine(index: Index) -> nearest.Engine:
    """The items of an index, ready for many searches: see `nearest.build`."""
    return nearest.build(index.codes, index.encoder.codebooks.shape[1], norms=index.norms)


def search(index: Index, images: np.ndarray, *, k: int = 10, engine: nearest.Engine | None = None) -> list[list[Hit]]:
    """The k nearest indexed images of each query, best first: images uint8 (Q, H, W, 3), or embeddings (Q, F).

    Raises ValueError as `encode.encode` and `nearest.top_k`.
    """
    features = encode.encode(index.encoder, images).features
    scores, ids = search_features(index, features, k=k, engine=engine)
    return [[Hit(index.paths[i], float(s)) for i, s in zip(*row, strict=True)] for row in zip(ids, scores, strict=True)]


def search_features(
    index: Index, features: Float[np.ndarray, "Q D"], *, k: int, engine: nearest.Engine | None = None
) -> tuple[Float[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
    """Scores and positions of the k nearest items of float features, best first; the first position among ties.

    `engine` is what `build_engine` returns, for more than one call. Without it few queries scan the items.
    """
    config, codebooks = index.encoder.config, index.encoder.codebooks
    tables = ranking.lookup_table(
        features,
        codebooks,
        metric=config.eval.score,
        squared=config.eval.squared,
        normalize=configs.query_norm(config),
    )
    build = nearest.build if len(features) >= MANY_QUERIES else nearest.scan.build
    engine = build(index.codes, codebooks.shape[1], norms=index.norms) if engine is None else engine
    return nearest.top_k(engine, np.asarray(tables), k)


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
