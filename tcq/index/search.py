"""Search: reads query images, finds the k nearest indexed images of each, draws the hits."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from tcq import config as configs
from tcq import encode, nearest, plots, ranking
from tcq.data import folders
from tcq.data.images import ImageError, decode, resize_of
from tcq.index import changes, columns
from tcq.index.contents import Index, IndexFileError
from tcq.models import retriever
from tcq.runtime import storage

MANY_QUERIES = 16  # in one call, for which an engine is built: building costs as much as some scans
THUMBNAIL = 96  # pixels; smaller images are enlarged to it

logger = logging.getLogger(__name__)


class Hit(NamedTuple):
    """An indexed image and its score; higher scores are closer."""

    path: str
    score: float
    id: int
    columns: Mapping[str, Any] = MappingProxyType({})  # own columns of the image


def read_queries(index: Index, paths: Sequence[str | Path]) -> UInt8[np.ndarray, "Q H W 3"] | Float[np.ndarray, "Q F"]:
    """Query images, decoded as the encoder needs them, or the embeddings of .npy files.

    A .npy file has one row or several. Raises IndexFileError with the file and the reason.
    """
    data, m = index.config.data, index.config.model
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


def query_blocks(
    index: Index, paths: Sequence[str | Path], *, size: int
) -> Iterator[tuple[list[str], UInt8[np.ndarray, "Q H W 3"] | Float[np.ndarray, "Q F"]]]:
    """Names and contents of queries, at most `size` images at a time.

    Queries are images, all images of folders, or .npy files. Images of a folder that cannot be read are left out, with
    a warning. Raises as `read_queries`.
    """
    waiting: list[tuple[str, np.ndarray]] = []
    for path, below in [(str(p), below) for p in paths for below in _images_below(p)]:
        if path.endswith(".npy"):
            rows = read_queries(index, [path])
            yield [f"{path} row {i}" for i in range(len(rows))], rows
            continue
        try:
            waiting.append((below or path, read_queries(index, [below or path])[0]))
        except IndexFileError as error:
            if not below:
                raise
            logger.warning(f"left out: {error}")
        if len(waiting) == size:
            yield _block(waiting)
            waiting = []
    if waiting:
        yield _block(waiting)


def _block(queries: Sequence[tuple[str, np.ndarray]]) -> tuple[list[str], np.ndarray]:
    names, pictures = zip(*queries, strict=True)
    return list(names), np.stack(pictures)


def _images_below(path: str | Path) -> list[str]:
    """The files below a folder; "" for what is not a folder."""
    if not Path(path).is_dir():
        return [""]
    files = folders.walk(Path(path), "").files
    if not files:
        raise IndexFileError(f"query {str(path)!r}: the folder holds no files")
    return [str(Path(path, name)) for name in files]


def read_features(index: Index, path: str | Path) -> Float[np.ndarray, "Q D"]:
    """The features in a .npy file, as `encode.encode` returns them, one row or several.

    Raises IndexFileError.
    """
    q = index.config.quantizer
    return _read_embeddings(path, q.num_codebooks * q.codeword_dim)


def _read_embeddings(path: str | Path, width: int) -> Float[np.ndarray, "_ F"]:
    if not width:
        raise IndexFileError(f"query {str(path)!r}: the model takes images, not embeddings")
    try:
        rows = np.atleast_2d(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise IndexFileError(f"query {str(path)!r}: embeddings cannot be read: {error}") from None
    if rows.ndim != 2 or rows.shape[1] != width or not len(rows) or rows.dtype.kind != "f":
        raise IndexFileError(
            f"query {str(path)!r}: {rows.shape} {rows.dtype} must be one row or several of {width} floats"
        )
    rows = rows.astype(np.float32)
    if not np.isfinite(rows).all():
        raise IndexFileError(f"query {str(path)!r}: a number is not finite")
    return rows


def build_engine(index: Index) -> nearest.Engine:
    """The items of an index, ready for many searches: see `nearest.build`."""
    return nearest.build(index.codes, index.config.quantizer.num_codewords, norms=index.norms)


def search(
    index: Index,
    images: np.ndarray,
    *,
    k: int = 10,
    allowed: Bool[np.ndarray, " N"] | None = None,
    min_score: float = -np.inf,
    engine: nearest.Engine | None = None,
) -> list[list[Hit]]:
    """The k nearest indexed images of each query, best first.

    Queries are images uint8 (Q, H, W, 3), or embeddings (Q, F).
    Only images that are `allowed` (see `where`) and reach `min_score` are returned.
    Raises ValueError as `encode.encode` and `nearest.top_k`.
    """
    features = encode.encode(index.encoder, images).features
    answers = search_features(index, features, k=k, allowed=allowed, engine=engine)
    return hits(index, *answers, min_score=min_score)


def hits(
    index: Index, scores: Float[np.ndarray, "Q k"], items: Int[np.ndarray, "Q k"], *, min_score: float = -np.inf
) -> list[list[Hit]]:
    """The answers of `search_features` with paths, ids and own columns."""
    answers = []
    for row, values in zip(items, scores, strict=True):
        chosen = row[values >= min_score]
        own = columns.of(index, chosen).to_pylist() if index.columns is not None else [{}] * len(chosen)
        answers.append(
            [Hit(index.paths[i], float(s), int(index.ids[i]), o) for i, s, o in zip(chosen, values, own, strict=False)]
        )
    return answers


def search_features(
    index: Index,
    features: Float[np.ndarray, "Q D"],
    *,
    k: int,
    allowed: Bool[np.ndarray, " N"] | None = None,
    engine: nearest.Engine | None = None,
) -> tuple[Float[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
    """Scores and positions of the k nearest items of float features, best first.

    Among ties the first position comes first. `engine` is what `build_engine` returns, for more than one call. Without
    it few queries scan the items.
    """
    return search_tables(index, tables(index, features), k=k, allowed=allowed, engine=engine)


def tables(index: Index, features: Float[np.ndarray, "Q D"]) -> Float[np.ndarray, "Q M K"]:
    """The lookup tables of float features, as `ranking.lookup_table`."""
    config = index.config
    result = ranking.lookup_table(
        features,
        index.encoder.codebooks,
        metric=config.eval.score,
        squared=config.eval.squared,
        normalize=configs.query_norm(config),
    )
    return np.asarray(result)


def search_tables(
    index: Index,
    tables: Float[np.ndarray, "Q M K"],
    *,
    k: int,
    allowed: Bool[np.ndarray, " N"] | None = None,
    engine: nearest.Engine | None = None,
) -> tuple[Float[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
    """As `search_features` for lookup tables.

    The mean of several tables ranks by the mean score of their queries.
    """
    build = nearest.build if len(tables) >= MANY_QUERIES else nearest.scan.build
    engine = build(index.codes, tables.shape[2], norms=index.norms) if engine is None else engine
    return nearest.top_k(engine, tables, k, allowed=allowed)


def features_of_items(index: Index, which: Sequence[int]) -> Float[np.ndarray, "Q D"]:
    """Indexed images as queries: what their codes stand for. No image or model is needed."""
    codes, codebooks = index.codes[np.asarray(which, np.int64)], index.encoder.codebooks
    parts = codebooks[np.arange(len(codebooks)), codes.astype(np.int64)]  # (Q, M, d)
    return parts.reshape(len(codes), codebooks[:, 0].size)


def find(index: Index, text: str) -> int:
    """The position of an image by its id or path.

    Raises IndexFileError if there is none, or several.
    """
    if text.isdecimal() and len(text) <= 18:  # fits 64 bits
        place = int(np.searchsorted(index.ids, int(text)))
        if place < len(index.ids) and index.ids[place] == int(text):
            return place
    places = changes.matches(index, text)
    if len(places) != 1:
        what = f"{len(places):,} images" if places else "no image"
        raise IndexFileError(
            f"{text!r} names {what} of the index: give a path as tcq search prints it, or an id as with --json"
        )
    return places[0]


def image_of(path: str) -> str | bytes:
    """The image of an answer, as an argument of `decode`. Raises BucketError."""
    return (storage.read(path) or b"") if storage.is_url(path) else path


def thumbnail(index: Index, path: str) -> UInt8[np.ndarray, "side side 3"]:
    """An indexed image as a small picture; gray if it cannot be read."""
    try:
        data = index.config.data
        return decode(image_of(path), size=max(data.image_size, THUMBNAIL), max_pixels=data.max_pixels)
    except (ImageError, storage.BucketError):
        return np.full((THUMBNAIL, THUMBNAIL, 3), 128, np.uint8)


def draw(
    index: Index, queries: UInt8[np.ndarray, "Q H W 3"], answers: Sequence[Sequence[Hit]], out: str | Path
) -> None:
    """Writes a picture of queries and hits; missing images are gray. Raises IndexFileError."""
    captions = [[f"{h.score:.3g} {Path(h.path).name[-10:]}" for h in hits] for hits in answers]
    try:
        plots.gallery(
            out, list(queries), [[thumbnail(index, h.path) for h in hits] for hits in answers], captions=captions
        )
    except (OSError, ValueError) as error:
        raise IndexFileError(f"--gallery {str(out)!r} cannot be written: {error}") from None
