"""What an index holds, and which scores random pairs of its images reach."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from tcq import config as configs
from tcq import encode, nearest
from tcq.data.images import ImageError, decode, resize_of
from tcq.index.contents import Index
from tcq.index.search import build_engine, features_of_items, image_of, tables
from tcq.index.store import open_index, verify
from tcq.runtime import storage

SHARES = (1e-3, 1e-6)  # of random pairs
QUERIES = 256
FEW_IMAGES = 32  # fewer than this that can be read are no sample: the codes are the queries then
BEYOND = 1000  # pairs above a threshold, where there are as many images
LEAST = 10  # pairs above a threshold; one that fewer reach is not known


class Threshold(NamedTuple):
    """The score that a share of random pairs reaches."""

    share: float
    score: float | None  # None: there are too few images to know


def describe(path: str | Path) -> dict[str, Any]:
    """Counts, sizes, folders, own columns, and how the index is searched. Raises as `verify`."""
    sizes, index = verify(path), open_index(path, verify=False)
    q, config = index.config.quantizer, index.config
    numbers, counts = np.unique(index.paths.numbers, return_counts=True)
    folders: dict[str, int] = {}
    for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
        folders[index.roots[number]] = folders.get(index.roots[number], 0) + count
    own = index.columns.schema if index.columns is not None else []
    return {
        "images": len(index.rows),
        "bits": configs.bits(config),
        "codebooks": q.num_codebooks,
        "codewords": q.num_codewords,
        "score": config.eval.score,
        "step": index.step,
        "folders": folders,
        "columns": {field.name: str(field.type) for field in own if field.name != "id"},
        "segments": len(index.segments),
        "rows_out_of_date": len(index.table) - len(index.rows),
        "bytes": sum(sizes.values()),
        "search": nearest.name(build_engine(index)),
    }


def thresholds(index: Index, *, seed: int = 0) -> tuple[list[Threshold], bool]:
    """The scores that 1 in 10^3 and 1 in 10^6 pairs of a query and a random other image reach.

    The queries are images of the index, drawn at random. The second value is whether they could be read; where most
    are gone, their codes are the queries, and scores are a little higher than those of real queries.
    """
    random = np.random.RandomState(seed)
    chosen = np.sort(random.permutation(len(index.rows))[:QUERIES])
    queries, features = _read_features(index, chosen)
    readable = features is not None
    if features is None:
        queries, features = chosen, features_of_items(index, chosen.tolist())
    return [Threshold(share, _quantile(index, queries, features, share, random)) for share in SHARES], readable


def _read_features(index: Index, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Those of the images that can be read, and their features; None if they are few."""
    data = index.config.data
    places, pixels = [], []
    for i in chosen.tolist():
        path = index.paths[i]
        if not index.roots[index.paths.numbers[i]]:  # an embedding
            continue
        try:
            pixels.append(
                decode(image_of(path), size=data.image_size, resize=resize_of(data), max_pixels=data.max_pixels)
            )
        except (ImageError, storage.BucketError):
            continue
        places.append(i)
    if not places or len(places) < min(FEW_IMAGES, len(chosen)):
        return chosen, None
    return np.array(places), encode.encode(index.encoder, np.stack(pixels)).features


def _quantile(
    index: Index, queries: np.ndarray, features: Float[np.ndarray, "Q D"], share: float, random: np.random.RandomState
) -> float | None:
    """The score that a share of the pairs of queries and random images reaches."""
    count = len(index.rows)
    if not count:
        return None
    size = min(count, int(np.ceil(BEYOND / share / len(queries))))
    others = np.arange(count) if size == count else np.sort(random.choice(count, size, replace=False))
    beyond = round(share * len(queries) * (size - 1))
    if beyond < LEAST:
        return None
    norms = None if index.norms is None else index.norms[others]
    engine = nearest.build(index.codes[others], index.config.quantizer.num_codewords, norms=norms)
    scores, places = nearest.top_k(engine, tables(index, features), beyond + 1)
    pairs = scores[others[places] != queries[:, None]]  # not with itself
    return float(np.partition(pairs, -beyond)[-beyond])
