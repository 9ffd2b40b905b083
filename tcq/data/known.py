"""Embeddings that earlier runs left in the cache, known by the contents of their images."""

import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int32, Int64

from tcq.data import embeddings
from tcq.data.rows import Rows
from tcq.data.source import SourceError
from tcq.runtime import signals, storage

IMAGES = "images.npz"  # of a folder of the cache: the digests of its images, and which of them have views

logger = logging.getLogger(__name__)


class Folder(NamedTuple):
    """The embeddings of a folder of the cache, mapped from its files."""

    items: Rows
    views: Rows | None  # None if they were drawn in another way


class Known(NamedTuple):
    """Where the embeddings of N images are, if they are known."""

    folders: list[Folder]
    numbers: Int32[np.ndarray, " N"]  # of the folders; -1 for an image that is in none
    rows: Int64[np.ndarray, " N"]  # of the image there


def write(folder: Path, digests: Sequence[bytes], has_views: Bool[np.ndarray, " N"]) -> None:
    """Records which images the embeddings of a folder are of."""
    with storage.atomic(folder / IMAGES) as temporary, open(temporary, "wb") as file:
        np.savez(file, digests=_array(digests), has_views=has_views)


def find(
    places: Sequence[Path], digests: Sequence[bytes], needs_views: Bool[np.ndarray, " N"], *, drawn_as: str
) -> Known:
    """Looks for the embeddings of images in folders of the cache.

    An image that needs views is known where it has views, in a folder whose name has the part `drawn_as`. Folders that
    cannot be read are left out.
    """
    known = Known([], np.full(len(digests), -1, np.int32), np.zeros(len(digests), np.int64))
    wanted: dict[bytes, list[int]] = {}
    for i, digest in enumerate(digests):
        wanted.setdefault(digest, []).append(i)
    for place in places:
        signals.poll()
        opened = _open(place, views=drawn_as in place.name.split("-"))
        if opened is None:
            continue
        folder, theirs, has_views = opened
        for row, digest in enumerate(theirs):
            for i in wanted.get(digest, ()):
                if known.numbers[i] < 0 and (not needs_views[i] or (folder.views is not None and has_views[row])):
                    known.numbers[i], known.rows[i] = len(known.folders), row
        known.folders.append(folder)
    return known


def items(known: Known, images: Int64[np.ndarray, " n"]) -> Float[np.ndarray, "n F"]:
    """The embeddings of images that are known."""
    return _gathered(known, images, [folder.items for folder in known.folders])


def views(known: Known, images: Int64[np.ndarray, " n"]) -> Float[np.ndarray, "n V F"]:
    """The embeddings of the views of images that are known, with views."""
    return _gathered(known, images, [folder.views for folder in known.folders])


def _gathered(known: Known, images: np.ndarray, arrays: Sequence[Rows | None]) -> np.ndarray:
    numbers = known.numbers[images]
    parts = {number: np.flatnonzero(numbers == number) for number in np.unique(numbers)}
    read = {number: arrays[number][known.rows[images[at]]] for number, at in parts.items()}
    out = np.empty((len(images), *next(iter(read.values())).shape[1:]), np.float32)
    for number, at in parts.items():
        out[at] = read[number]
    return out


def _open(place: Path, *, views: bool) -> tuple[Folder, list[bytes], np.ndarray] | None:
    try:
        with open(place / IMAGES, "rb") as file, np.load(file, allow_pickle=False) as saved:
            digests, has_views = [row.tobytes() for row in saved["digests"]], saved["has_views"]
        items = embeddings.read_shards(place, embeddings.ITEMS)
        drawn = embeddings.read_shards(place, embeddings.VIEWS) if views and has_views.any() else None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, SourceError) as error:
        logger.warning(f"{place} cannot be read ({error}): its embeddings are not used")
        return None
    if not len(items) == len(digests) == len(has_views) == len(items if drawn is None else drawn):
        logger.warning(f"{place} is not complete: its embeddings are not used")
        return None
    return Folder(items, drawn), digests, has_views


def _array(digests: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), -1)
