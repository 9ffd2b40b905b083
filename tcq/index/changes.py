"""What differs between an index and the folder that it was made of: by name and contents."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int64

from tcq.data.source import Source
from tcq.index import items
from tcq.index.contents import Index
from tcq.runtime import storage


class Plan(NamedTuple):
    """What to do with the images of a folder.

    Numbers of items are those of the index, rows those of the source.
    """

    new: list[int]  # rows
    edited: dict[int, int]  # items, and their rows
    moved: dict[int, int]  # items, and their rows
    gone: list[int]  # items below the folder that it does not hold any more


def plan(index: Index, root: str, source: Source) -> Plan:
    """Compares the items of an index with the images of a folder, of which they may be a part.

    An item with the same name and contents stays. One with the same contents whose own file is gone was moved. Items in
    folders that cannot be read now, and unreadable files, are not gone.
    """
    assert source.digests is not None
    hashes = source.digests
    below = _items_below(index, root)
    rows = {name: row for row, name in enumerate(source.names)}
    both = below.keys() & rows.keys()
    edited = {below[name]: rows[name] for name in both if _hash(index, below[name]) != hashes[rows[name]]}
    added = [row for name, row in rows.items() if name not in below]
    gone = [i for name, i in below.items() if name not in rows and not _unreadable(name, source)]
    own = set(below.values())
    others = [i for i in range(len(index.paths)) if i not in own]
    moved = _moved(index, gone, others, added, hashes)
    rest = set(moved.values())
    return Plan([row for row in added if row not in rest], edited, moved, [i for i in gone if i not in moved])


def _items_below(index: Index, root: str) -> dict[str, int]:
    """The items whose files are below a folder, by their names there.

    Their own roots may be above or below the folder.
    """
    start = "" if not root else root.rstrip("/") + "/"
    near = [r == root or (bool(r and root) and (r.startswith(start) or root.startswith(r + "/"))) for r in index.roots]
    chosen = np.flatnonzero(np.array(near, bool)[index.paths.numbers]).tolist()
    roots, numbers = index.roots, index.paths.numbers
    names = zip(chosen, index.paths.names(chosen), strict=True)
    paths = {i: items.join(roots[numbers[i]], name) for i, name in names}
    return {path.removeprefix(start): i for i, path in paths.items() if path.startswith(start)}


def _moved(
    index: Index, gone: Sequence[int], others: Sequence[int], added: Sequence[int], hashes: Sequence[bytes]
) -> dict[int, int]:
    """Items whose file is gone, with the new image of the same contents."""
    wanted = {hashes[row] for row in added}
    elsewhere = [i for i in others if _hash(index, i) in wanted]
    absent = _moved_roots(index, elsewhere)
    free: dict[bytes, list[int]] = {}
    for i in [*gone, *(i for i in elsewhere if _is_dead(index, i, absent))]:
        free.setdefault(_hash(index, i), []).append(i)
    moved = {}
    for row in added:
        if free.get(hashes[row]):
            moved[free[hashes[row]].pop(0)] = row
    return moved


def _hash(index: Index, i: int) -> bytes:
    return index.hashes[i].tobytes()


def _moved_roots(index: Index, elsewhere: Sequence[int]) -> set[int]:
    """Numbers of folders that are not there, most of whose images are in the new folder.

    They were moved. Others may be on a disk that is not mounted now.
    """
    counts = np.bincount(index.paths.numbers, minlength=len(index.roots))
    here = np.bincount(index.paths.numbers[np.array(elsewhere, np.int64)], minlength=len(index.roots))
    return {n for n, root in enumerate(index.roots) if root and not _is_there(root) and 2 * here[n] > counts[n]}


def _is_there(root: str) -> bool:
    """Whether a folder is there and holds something: a mount point without its disk is empty."""
    return storage.is_url(root) or (os.path.isdir(root) and bool(os.listdir(root)))


def _is_dead(index: Index, i: int, moved_roots: set[int]) -> bool:
    """Whether a file is gone from a folder that is there, or that was moved."""
    number, path = int(index.paths.numbers[i]), index.paths[i]
    if storage.is_url(path):
        return False
    return number in moved_roots or (_is_there(index.roots[number]) and not os.path.exists(path))


def _unreadable(name: str, source: Source) -> bool:
    places = [p for p in source.unreadable if p]
    return any(name == p or name.startswith(p.rstrip("/") + "/") for p in places)


def apply(index: Index, root: str, source: Source, plan: Plan, codes: np.ndarray, *, remove: bool) -> Index:
    """The index after a plan; `codes` are those of the edited and then of the new images.

    An edited or moved image keeps its id; its new row replaces the old one.
    """
    old = np.array([*plan.edited, *plan.moved], np.int64)
    rows = [*plan.edited.values(), *plan.moved.values(), *plan.new]
    new_ids = index.next_id + np.arange(len(plan.new))
    ids = np.concatenate([index.ids[old], new_ids]).astype(np.int64)
    edited, new = codes[: len(plan.edited)], codes[len(plan.edited) :]
    moved = index.codes[np.array([*plan.moved], np.int64)]
    changed = with_rows(index, root, source, rows, ids, np.concatenate([edited, moved, new]))
    places = index.rows.copy()
    places[old] = len(index.table) + np.arange(len(old))
    keep = np.ones(len(places), bool)
    keep[plan.gone if remove else []] = False
    added = np.arange(len(index.table) + len(old), len(changed.table))
    return changed.replace(rows=np.concatenate([places[keep], added]), next_id=index.next_id + len(plan.new))


def with_rows(
    index: Index,
    root: str,
    source: Source,
    rows: Sequence[int],
    ids: Int64[np.ndarray, " n"],
    codes: np.ndarray,
    *,
    files: items.Files | None = None,
) -> Index:
    """The index with rows of the source at the end of its table; `index.rows` is as before.

    `files` has names, hashes, sizes and dates if these are known already.
    """
    if not len(rows):
        return index
    roots = index.roots if root in index.roots else (*index.roots, root)
    names = [source.names[row] for row in rows]
    assert source.digests is not None
    hashes = [source.digests[row] for row in rows]
    files = files or items.files(root, names, hashes)
    table = items.rows(ids, roots.index(root), files, codes, index.config.quantizer.num_codewords)
    return index.replace(table=pa.concat_tables([index.table, table]), roots=roots)


def matches(index: Index, path: str) -> list[int]:
    """The items that a path, a URL or the name of an embedding names, or that are below it.

    Links are not followed below the root of an item.
    """
    places = []
    for number, root in enumerate(index.roots):
        name = _below(path, root)
        if name is None:
            continue
        near = np.flatnonzero(index.paths.numbers == number)
        if name == ".":
            places += near.tolist()
            continue
        own, wanted = index.table["name"].take(pa.array(index.rows[near])), os.fsencode(name)
        same = pc.equal(own, pa.scalar(wanted, own.type))
        if root:
            same = pc.or_(same, pc.starts_with(own, wanted + b"/"))
        places += near[same.to_numpy()].tolist()
    return sorted(places)


def _below(path: str, root: str) -> str | None:
    """The name of a path below a root, "." for the root itself or a folder above it.

    None if the path is elsewhere.
    """
    if not path:  # such as a variable of a shell that is not set
        return None
    if not root:
        return path  # the name of an embedding
    if storage.is_url(root) or storage.is_url(path):
        start, path = root.rstrip("/") + "/", path.rstrip("/") + "/"
        return path.removeprefix(start).rstrip("/") or "." if path.startswith(start) else _above(path, start)
    place, real = Path(os.path.abspath(os.path.expanduser(path))), os.path.realpath(root)
    for parent in (place, *place.parents):
        if os.path.realpath(parent) == real:
            return os.path.relpath(place, parent)
    return _above(os.path.realpath(place).rstrip("/") + "/", real)


def _above(folder: str, root: str) -> str | None:
    return "." if root.startswith(folder) else None
