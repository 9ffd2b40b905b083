"""Embeddings that earlier runs left in the cache, known by the contents of their images."""

import logging
import zipfile
from collections.abc import Container, Sequence
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
    places: list[Path]  # of the folders
    numbers: Int32[np.ndarray, " N"]  # of the folders; -1 for an image that is in none
    rows: Int64[np.ndarray, " N"]  # of the image there


def write(folder: Path, digests: Sequence[bytes], has_views: Bool[np.ndarray, " N"]) -> None:
    """Records which images the embeddings of a folder are of."""
    with storage.atomic(folder / IMAGES) as temporary, open(temporary, "wb") as file:
        np.savez(file, digests=_array(digests), has_views=has_views)


def find(
    places: Sequence[Path], digests: Sequence[bytes], needs_views: Bool[np.ndarray, " N"], *, drawn_as: str
) -> Known:
    """Looks for the embeddings of images in folders of the cache, one after the other.

    An image that needs views is known where it has views, in a folder whose name has the part `drawn_as`. Folders that
    cannot be read are left out.
    """
    known = Known([], [], np.full(len(digests), -1, np.int32), np.zeros(len(digests), np.int64))
    wanted: dict[bytes, list[int]] = {}
    for i, digest in enumerate(digests):
        wanted.setdefault(digest, []).append(i)
    for place in places:
        signals.poll()
        if not wanted:
            break
        drawn = drawn_as in place.name.split("-")
        try:
            rows, has_views = _rows(place, wanted)
            own = {d: [i for i in wanted[d] if not needs_views[i] or (drawn and has_views[rows[d]])] for d in rows}
            if not any(own.values()):
                continue
            known.folders.append(_open(place, len(has_views), views=drawn and bool(has_views.any())))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, SourceError) as error:
            logger.warning(f"{place} cannot be read ({error}): its embeddings are not used")
            continue
        known.places.append(place)
        for digest, images in own.items():
            known.numbers[images], known.rows[images] = len(known.folders) - 1, rows[digest]
            wanted[digest] = [i for i in wanted[digest] if known.numbers[i] < 0]
            if not wanted[digest]:
                del wanted[digest]
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


def _rows(place: Path, wanted: Container[bytes]) -> tuple[dict[bytes, int], np.ndarray]:
    """The row of each wanted digest in a folder, and which rows have views.

    Of rows of one digest it is one with views, if there is one.
    """
    with open(place / IMAGES, "rb") as file, np.load(file, allow_pickle=False) as saved:
        digests, has_views = [row.tobytes() for row in saved["digests"]], saved["has_views"]
    if len(digests) != len(has_views):
        raise ValueError(f"{len(digests)} digests of {len(has_views)} images")
    rows: dict[bytes, int] = {}
    for row, digest in enumerate(digests):
        if digest in wanted and (digest not in rows or (has_views[row] and not has_views[rows[digest]])):
            rows[digest] = row
    return rows, has_views


def _open(place: Path, count: int, *, views: bool) -> Folder:
    items = embeddings.read_shards(place, embeddings.ITEMS)
    drawn = embeddings.read_shards(place, embeddings.VIEWS) if views else None
    if not count == len(items) == len(items if drawn is None else drawn):
        raise ValueError(f"embeddings of {len(items)} images, not of {count}")
    return Folder(items, drawn)


def _array(digests: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), -1)
