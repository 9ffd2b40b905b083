"""Groups of images of an index that are copies: same bytes, same pixels, or near.

Images are near if small pictures of them correlate. Only images whose codes are equal, or among the nearest, are
compared: codes say what an image shows, and not that two images are one picture.

Any two images of a group are at least as alike as the threshold, so that groups do not chain (complete linkage). The
most alike pairs are joined first, equally alike ones in the order of contents and paths: groups do not depend on the
order in which images were indexed.
"""

import itertools
import json
import logging
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from tcq import plots
from tcq.data.images import ImageError, Resize, decode, pixel_digest
from tcq.index import changes
from tcq.index.closeness import Codes, close_codes, different_codes
from tcq.index.contents import Index, IndexFileError
from tcq.index.search import find as find_item
from tcq.index.search import image_of, thumbnail
from tcq.runtime import log, signals, storage

LIKENESS = 0.97  # least correlation of the small pictures of near images
OTHERS = 20  # nearest codes whose images an image is compared with
SIDE = 16  # pixels of a small picture
BLOCK = 256  # images that are read between two looks at signals
DRAWN = 10  # images of a group in a picture
KINDS = ("same bytes", "same pixels", "near")

logger = logging.getLogger(__name__)
Verdicts = Collection[frozenset[bytes]]


class Copy(NamedTuple):
    """An image of a group."""

    id: int
    path: str
    size: int | None
    modified: str | None
    keep: bool  # the one to keep: every reference, else the largest file, else the oldest
    reference: bool


class Group(NamedTuple):
    """Images that are copies of each other."""

    kind: str  # one of KINDS
    likeness: float  # of the least alike pair
    copies: list[Copy]


def find(
    index: Index,
    *,
    kind: str = "near",
    likeness: float = LIKENESS,
    others: int = OTHERS,
    references: Sequence[str] = (),
    verdicts: Verdicts = (),
) -> list[Group]:
    """The groups of an index: same bytes, then same pixels, then near; the most alike first.

    One image stands for its copies in the groups of the next kind, so that no pair is listed twice.

    Args:
      index: whose images are compared.
      kind: the last of KINDS that is looked for. "same bytes" reads no file.
      likeness: least correlation of the small pictures of two near images.
      others: number of nearest other codes; an image is compared with those of its own code and of these.
      references: images or folders that are kept. They are not compared with each other.
      verdicts: pairs of hashes of images that are not copies, as `read_verdicts` returns them.

    Raises:
      IndexFileError: a reference is not in the index, or it holds embeddings, whose contents are not known.
    """
    is_image = np.array([bool(root) for root in index.roots], bool)[index.paths.numbers]
    if len(is_image) and not is_image.any():
        raise IndexFileError("this index holds embeddings: duplicates are found among images")
    reference = np.zeros(len(index.rows), bool)
    for name in references:
        places = changes.matches(index, name)
        if not places:
            raise IndexFileError(f"--reference={name} not found in the index: give paths as tcq search prints them")
        reference[places] = True
    keys = [(row.tobytes(), path) for row, path in zip(index.hashes, index.paths, strict=True)]
    items = sorted(np.flatnonzero(is_image).tolist(), key=keys.__getitem__)
    sets = [list(same) for _, same in itertools.groupby(items, key=lambda i: keys[i][0])]
    groups = [_group(index, KINDS[0], 1.0, same, reference) for same in sets if len(same) > 1]
    left = [_first(index, same, reference) for same in sets]
    if kind != KINDS[0]:
        codes = different_codes(index)
        by_code = _of_codes(codes, left)
        same_pixels = _same_pixels(index, by_code, verdicts)
        groups += [_group(index, KINDS[1], 1.0, same, reference) for same in same_pixels]
        dropped = {i for same in same_pixels for i in same} - {_first(index, same, reference) for same in same_pixels}
        if kind == KINDS[2]:
            by_code = _of_codes(codes, [i for i in left if i not in dropped])
            pairs = list(close_codes(codes, by_code, others, reference))
            groups += [
                _group(index, KINDS[2], value, same, reference)
                for value, same in _linked(index, by_code, pairs, likeness, verdicts, reference)
            ]
    groups = [group for group in groups if not all(copy.reference for copy in group.copies)]
    return sorted(groups, key=lambda g: (KINDS.index(g.kind), -round(g.likeness, 6), [c.path for c in g.copies]))


def _of_codes(codes: Codes, items: Sequence[int]) -> list[list[int]]:
    """The items of each code, in their order."""
    number = {i: code for code, members in enumerate(codes.items) for i in members.tolist()}
    by_code: list[list[int]] = [[] for _ in codes.items]
    for i in items:
        by_code[number[i]].append(i)
    return by_code


def _same_pixels(index: Index, by_code: Sequence[Sequence[int]], verdicts: Verdicts) -> list[list[int]]:
    """The sets of images with different bytes that show exactly the same.

    Only images of one code can show the same.
    """
    items = [i for members in by_code if len(members) > 1 for i in members]
    digests = dict(zip(items, _read_all(index, items, _pixels, "comparing pixels"), strict=True))
    sets: dict[bytes, list[int]] = {}
    for i, digest in digests.items():
        if digest is not None and not any(_judged(index, i, j, verdicts) for j in sets.get(digest, ())):
            sets.setdefault(digest, []).append(i)
    return [same for same in sets.values() if len(same) > 1]


def _linked(
    index: Index,
    by_code: Sequence[Sequence[int]],
    pairs: Sequence[tuple[int, int]],
    likeness: float,
    verdicts: Verdicts,
    reference: np.ndarray,
) -> list[tuple[float, list[int]]]:
    """Groups of near images with the likeness of their least alike pair, by complete linkage."""
    compared = {code for pair in pairs for code in pair if pair[0] != pair[1] or len(by_code[code]) > 1}
    items = [i for code in sorted(compared) for i in by_code[code]]
    pictures = {}
    for i, picture in zip(items, _read_all(index, items, small_picture, "reading small pictures"), strict=True):
        if picture is not None:
            pictures[i] = picture
    edges = []
    for a, b in pairs:
        left, right = ([i for i in by_code[code] if i in pictures] for code in (a, b))
        if not left or not right:
            continue
        values = _likeness(pictures, left, right)
        for x, y in zip(*np.nonzero(values >= likeness), strict=True):
            one, other = left[x], right[y]
            if (a != b or x < y) and not (reference[one] and reference[other]):
                edges.append(
                    (-round(float(values[x, y]), 6), *sorted((_key(index, one), _key(index, other))), one, other)
                )
    group_of = {i: i for edge in edges for i in edge[3:]}
    groups = {i: [i] for i in group_of}
    for *_, x, y in sorted(edges):
        a, b = group_of[x], group_of[y]
        alike = a != b and _likeness(pictures, groups[a], groups[b]).min() >= likeness
        if alike and not any(_judged(index, i, j, verdicts) for i in groups[a] for j in groups[b]):
            for i in groups[b]:
                group_of[i] = a
            groups[a] += groups.pop(b)
    return [(float(_likeness(pictures, g, g).min()), g) for g in groups.values() if len(g) > 1]


def _key(index: Index, i: int) -> tuple[bytes, str]:
    """What orders images, wherever they stand in the index."""
    return index.hashes[i].tobytes(), index.paths[i]


def _likeness(pictures: dict[int, np.ndarray], left: Sequence[int], right: Sequence[int]) -> Float[np.ndarray, "a b"]:
    """The correlations of small pictures."""
    return np.stack([pictures[i] for i in left]) @ np.stack([pictures[i] for i in right]).T


def _judged(index: Index, i: int, j: int, verdicts: Verdicts) -> bool:
    return bool(verdicts) and frozenset((index.hashes[i].tobytes(), index.hashes[j].tobytes())) in verdicts


def _read_all(index: Index, items: Sequence[int], read: Callable[[Index, int], Any], task: str) -> list[Any]:
    """What a function reads of the files of some images, None where it fails."""
    results: list[Any] = []
    progress = log.Progress(logger, task, len(items))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, len(items), BLOCK):
            results += pool.map(lambda i: read(index, i), items[first : first + BLOCK])
            signals.poll()
            progress.update(len(results))
    missing = sum(result is None for result in results)
    if missing:
        logger.warning(
            f"{task}: {missing:,} of {len(items):,} images cannot be read, or show one colour only: left out"
        )
    return results


def _pixels(index: Index, i: int) -> bytes | None:
    try:
        return pixel_digest(image_of(index.paths[i]), max_pixels=index.config.data.max_pixels)
    except (ImageError, storage.BucketError):
        return None


def small_picture(index: Index, i: int) -> Float[np.ndarray, " values"] | None:
    """A small picture of an image, with mean 0 and length 1; None without contrast."""
    try:
        pixels = decode(
            image_of(index.paths[i]),
            size=SIDE,
            resize=Resize("squash"),
            max_pixels=index.config.data.max_pixels,
        )
    except (ImageError, storage.BucketError):
        return None
    values = pixels.astype(np.float32).ravel()
    values -= values.mean()
    length = np.linalg.norm(values)
    return values / length if length > len(values) ** 0.5 else None


def _first(index: Index, items: Sequence[int], reference: np.ndarray) -> int:
    """The image to keep.

    It is a reference, else the largest file, else the oldest, else the first by path.
    """
    rows = index.table.select(["size", "modified"]).take(pa.array(index.rows[list(items)])).to_pylist()

    def rank(place: int) -> tuple[Any, ...]:
        row, i = rows[place], items[place]
        return not reference[i], -(row["size"] or 0), str(row["modified"]), index.paths[i]

    return items[min(range(len(items)), key=rank)]


def _group(index: Index, kind: str, likeness: float, items: Sequence[int], reference: np.ndarray) -> Group:
    rows = index.table.select(["size", "modified"]).take(pa.array(index.rows[list(items)])).to_pylist()
    first = _first(index, items, reference)
    copies = [
        Copy(
            int(index.ids[i]),
            index.paths[i],
            row["size"],
            row["modified"].isoformat() if row["modified"] else None,
            bool(i == first or reference[i]),
            bool(reference[i]),
        )
        for i, row in zip(items, rows, strict=True)
    ]
    return Group(kind, min(likeness, 1.0), sorted(copies, key=lambda c: (not c.keep, c.path)))


def read_verdicts(file: str | Path) -> set[frozenset[bytes]]:
    """Pairs of hashes of images that are not copies; none if the file does not exist.

    Raises IndexFileError.
    """
    contents = storage.read(file)
    if contents is None:
        return set()
    try:
        rows = [json.loads(line) for line in contents.decode().splitlines() if line]
        return {frozenset(bytes.fromhex(digest) for digest in row["not_copies"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IndexFileError(f"{str(file)!r} is not a file of verdicts: {error}") from None


def add_verdicts(file: str | Path, index: Index, names: Sequence[str]) -> int:
    """Adds that no two of some images, by id or path, are copies.

    Returns the number of new pairs. Images are known by contents.
    Raises IndexFileError if one is not in the index, or all have the same bytes.
    """
    digests = sorted({index.hashes[find_item(index, name)].tobytes() for name in names})
    known = read_verdicts(file)
    pairs = [frozenset(pair) for pair in itertools.combinations(digests, 2)]
    if not pairs:
        raise IndexFileError(f"{', '.join(names)}: two images with different bytes are needed")
    new = [pair for pair in pairs if pair not in known]
    rows = sorted(sorted(d.hex() for d in pair) for pair in {*known, *new})
    storage.write_text(Path(file), "".join(json.dumps({"not_copies": row}) + "\n" for row in rows))
    return len(new)


def draw(index: Index, groups: Sequence[Group], out: str | Path) -> None:
    """Writes a picture with a row for each group; missing images are gray.

    Raises IndexFileError.
    """
    pictures = [[thumbnail(index, copy.path) for copy in group.copies[:DRAWN]] for group in groups]
    captions = [[Path(copy.path).name[-14:] for copy in group.copies[1:DRAWN]] for group in groups]
    try:
        plots.gallery(out, [row[0] for row in pictures], [row[1:] for row in pictures], captions=captions, name="keep")
    except (OSError, ValueError) as error:
        raise IndexFileError(f"--gallery {str(out)!r} cannot be written: {error}") from None
