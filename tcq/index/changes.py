"""What differs between an index and the folder that it was made of: by name and contents."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tcq.data.cache import DIGEST_BYTES
from tcq.data.source import Source
from tcq.index.store import Index, Paths
from tcq.runtime import storage


class Plan(NamedTuple):
    """What to do with the images of a folder. Numbers of items are those of the index, rows those of the source."""

    new: list[int]  # rows
    edited: dict[int, int]  # items, and their rows
    moved: dict[int, int]  # items, and their rows
    gone: list[int]  # items below the folder that it does not hold any more


def plan(index: Index, root: str, source: Source) -> Plan:
    """Compares the items of an index with the images of a folder, of which they may be a part.

    An item with the same name and contents stays. One with the same contents whose own file is gone was moved. Items in
    folders that cannot be read now, and unreadable files, are not gone.
    """
    hashes = source.digests or [b""] * len(source.names)
    items = _items_below(index, root)
    rows = {name: row for row, name in enumerate(source.names)}
    both = items.keys() & rows.keys() if source.digests else set()  # embeddings are known by their names alone
    edited = {items[name]: rows[name] for name in both if _hash(index, items[name]) != hashes[rows[name]]}
    added = [row for name, row in rows.items() if name not in items]
    gone = [i for name, i in items.items() if name not in rows and not _unreadable(name, source)]
    own = set(items.values())
    others = [i for i in range(len(index.paths)) if i not in own]
    moved = _moved(index, gone, others, added, hashes) if source.digests else {}
    rest = set(moved.values())
    return Plan([row for row in added if row not in rest], edited, moved, [i for i in gone if i not in moved])


def _items_below(index: Index, root: str) -> dict[str, int]:
    """The items whose files are below a folder, by their names there; their own roots may be above or below it."""
    start = "" if not root else root.rstrip("/") + "/"
    near = [
        r == root or (bool(r and root) and (r.startswith(start) or root.startswith(r + "/"))) for r in index.paths.roots
    ]
    chosen = np.flatnonzero(np.array(near, bool)[index.paths.numbers]).tolist()
    paths = {i: index.paths[i] for i in chosen}
    return {path.removeprefix(start): i for i, path in paths.items() if path.startswith(start)}


def _moved(
    index: Index, gone: Sequence[int], others: Sequence[int], added: Sequence[int], hashes: Sequence[bytes]
) -> dict[int, int]:
    """Items whose file is gone, with the new image of the same contents."""
    wanted = {hashes[row] for row in added}
    elsewhere = [i for i in others if _hash(index, i) in wanted]
    free: dict[bytes, list[int]] = {}
    for i in [*gone, *(i for i in elsewhere if _is_dead(index.paths[i]))]:
        free.setdefault(_hash(index, i), []).append(i)
    moved = {}
    for row in added:
        if free.get(hashes[row]):
            moved[free[hashes[row]].pop(0)] = row
    return moved


def _hash(index: Index, i: int) -> bytes:
    return index.hashes[i].tobytes()


def _is_dead(path: str) -> bool:
    return not storage.is_url(path) and not os.path.exists(path)


def _unreadable(name: str, source: Source) -> bool:
    places = [p for p in source.unreadable if p]
    return any(name == p or name.startswith(p.rstrip("/") + "/") for p in places)


def apply(index: Index, root: str, source: Source, plan: Plan, codes: np.ndarray, *, remove: bool) -> Index:
    """The index after a plan; `codes` are those of the edited and then of the new images."""
    roots = index.paths.roots if root in index.paths.roots else [*index.paths.roots, root]
    number, hashes = roots.index(root), source.digests
    names = [index.paths.name(i) for i in range(len(index.paths))]
    numbers, all_codes, all_hashes = index.paths.numbers.tolist(), index.codes.copy(), index.hashes.copy()
    for place, (item, row) in enumerate(plan.edited.items()):
        all_codes[item] = codes[place]
        if hashes:
            all_hashes[item] = np.frombuffer(hashes[row], np.uint8)
    for item, row in plan.moved.items():
        names[item], numbers[item] = source.names[row], number
    names += [source.names[row] for row in plan.new]
    numbers += [number] * len(plan.new)
    added = codes[len(plan.edited) :]
    new_hashes = hash_rows(source, plan.new)
    keep = np.ones(len(names), bool)
    keep[plan.gone if remove else []] = False
    kept = np.flatnonzero(keep).tolist()
    return index._replace(
        codes=np.concatenate([all_codes, added])[keep],
        hashes=np.concatenate([all_hashes, new_hashes])[keep],
        paths=Paths.of(roots, [numbers[i] for i in kept], [names[i] for i in kept]),
    )


def hash_rows(source: Source, rows: Sequence[int]) -> np.ndarray:
    """The hashes of images of a source, uint8 (N, 20); zeros if it has none."""
    if not source.digests:
        return np.zeros((len(rows), DIGEST_BYTES), np.uint8)
    joined = b"".join(source.digests[row] for row in rows)
    return np.frombuffer(joined, np.uint8).reshape(len(rows), DIGEST_BYTES).copy()


def matches(index: Index, path: str) -> list[int]:
    """The items that a path, a URL or the name of an embedding names, or that are below it.

    Links are not followed below the root of an item.
    """
    wanted = {number: _below(path, root) for number, root in enumerate(index.paths.roots)}
    found = []
    for i, number in enumerate(index.paths.numbers.tolist()):
        name = wanted[number]
        if name is None:
            continue
        own = index.paths.name(i)
        if name == "." or own == name or (index.paths.roots[number] and own.startswith(name + "/")):
            found.append(i)
    return found


def _below(path: str, root: str) -> str | None:
    """The name of a path below a root, "." for the root itself or a folder above it; None if it is elsewhere."""
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
