"""An index of images on disk: build, open, add, update, remove, move, search."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tcq import encode
from tcq.data.rows import take
from tcq.data.source import Source
from tcq.index import changes, scan, store
from tcq.index.search import Hit, build_engine, draw, image_of, read_queries, search, search_features
from tcq.index.store import CorruptedError, Index, IndexFileError, Paths, open_index
from tcq.runtime import processes, storage

__all__ = [
    "Changes",
    "CorruptedError",
    "Hit",
    "Index",
    "IndexFileError",
    "add",
    "build",
    "build_engine",
    "draw",
    "image_of",
    "move_root",
    "open_index",
    "read_queries",
    "remove",
    "search",
    "search_features",
    "split_root",
    "update",
]


class Changes(NamedTuple):
    """What a command did to an index."""

    added: int
    edited: int = 0  # images whose contents had changed
    moved: int = 0  # images whose contents were known, at a place that is gone
    removed: int = 0
    skipped: Sequence[dict[str, str]] = ()  # files that are not images, with reasons


def build(workdir: str | Path, images: str | Path, out: str | Path, *, which: str = "best") -> Changes:
    """Encodes every image below a folder and writes a new index.

    Skipped files are also listed with reasons in skipped.jsonl of the index. The processes of a run share the work.
    Raises IndexFileError if `out` exists, and as `encode.load` and `sources.folder`; then nothing is left behind.
    """
    processes.on_first(lambda: store.refuse_existing(out))
    encoder = encode.load(workdir, which=which)
    source = scan.read_folder(encoder, images)
    processes.require_same("images", source.names)
    codes = encode.codes(encoder, source.images)
    rows = range(len(source.names))
    paths = Paths.of([scan.root_of(images)], [0] * len(rows), source.names)
    index = Index(encoder, codes, paths, changes.hash_rows(source, rows), None)

    def write() -> None:
        with store.building(out):
            store.write(out, index, source.skipped)

    processes.on_first(write)
    return Changes(len(codes), skipped=source.skipped)


def add(path: str | Path, images: str | Path) -> Changes:
    """Adds the images below a folder that the index lacks. Edited ones get new codes, moved ones their new place."""
    return _change(path, [images], remove=False)


def update(path: str | Path, images: str | Path | None = None) -> Changes:
    """As `add` for the folders of the index, or for one; and removes the images that are gone."""
    return _change(path, None if images is None else [images], remove=True)


def _change(path: str | Path, folders: Sequence[str | Path] | None, *, remove: bool) -> Changes:
    """Brings an index up to date with folders, all of its own by default, under its lock."""
    with processes.entered_by_first(lambda: store.changing(path)):
        index = open_index(path)
        if folders is None:
            folders = [root for root in index.paths.roots if root]
            if not folders:
                raise IndexFileError(
                    f"index {str(path)!r} holds embeddings, whose folder it does not know: use --images"
                )
        sources = [(scan.root_of(images), scan.read_folder(index.encoder, images)) for images in folders]
        done = []
        for removing in (False, True) if remove else (False,):  # removed last: a file may have moved to a later folder
            for root, source in sources:
                index, one = _with_folder(index, root, source, remove=removing)
                done.append(one)
        processes.require_same("images", list(index.paths))
        final = index
        skipped = [row for _, source in sources for row in source.skipped]
        processes.on_first(lambda: store.write(path, final, skipped))
    added, edited, moved = (sum(column) for column in zip(*(one[:3] for one in done), strict=True))
    return Changes(added, edited, moved, sum(one.removed for one in done), skipped)


def _with_folder(index: Index, root: str, source: Source, *, remove: bool) -> tuple[Index, Changes]:
    plan = changes.plan(index, root, source)
    rows = np.array([*plan.edited.values(), *plan.new], np.int64)
    codes = encode.codes(index.encoder, take(source.images, rows))
    changed = changes.apply(index, root, source, plan, codes, remove=remove)
    removed = len(plan.gone) if remove else 0
    return changed, Changes(len(plan.new), len(plan.edited), len(plan.moved), removed)


def remove(path: str | Path, names: list[str]) -> int:
    """Removes images by path, or all below a folder; returns their number. Raises IndexFileError if there is none."""
    with processes.entered_by_first(lambda: store.changing(path)):
        index = open_index(path)
        found = {name: changes.matches(index, name) for name in names}
        missing = [name for name, items in found.items() if not items]
        if missing:
            raise IndexFileError(
                f"{', '.join(missing)} not found in index {str(path)!r}: give paths as tcq search prints them"
            )
        keep = np.ones(len(index.paths), bool)
        keep[[i for items in found.values() for i in items]] = False
        kept = np.flatnonzero(keep)
        paths = Paths.of(index.paths.roots, index.paths.numbers[kept], [index.paths.name(int(i)) for i in kept])
        left = index._replace(codes=index.codes[kept], hashes=index.hashes[kept], paths=paths)
        processes.on_first(lambda: store.write(path, left, []))
    return len(index.paths) - len(kept)


def split_root(path: str | Path, text: str) -> tuple[str | None, str]:
    """The old folder, None if it is not given, and the new one of "NEW" or "OLD=NEW"; paths may hold "="."""
    for root in open_index(path).paths.roots:
        if root and text.startswith(f"{root}="):
            return root, text.removeprefix(f"{root}=")
    return None, text


def move_root(path: str | Path, new: str, *, old: str | None = None) -> int:
    """Tells an index that a folder was moved; `old` is needed if it has several. Returns the number of its images.

    Raises IndexFileError if the index does not know the old folder, or the new one holds none of its images.
    """
    new = scan.root_of(new)
    with processes.entered_by_first(lambda: store.changing(path)):
        index = open_index(path)
        roots = index.paths.roots
        if old is None and len(roots) == 1:
            old = roots[0]
        if old not in roots:
            raise IndexFileError(
                f"--root: index {str(path)!r} has the folders {', '.join(roots)}: write --root=OLD=NEW"
            )
        own = np.flatnonzero(index.paths.numbers == roots.index(old)).tolist()
        if not storage.is_url(new) and not any(os.path.exists(os.path.join(new, index.paths.name(i))) for i in own):
            raise IndexFileError(f"--root={new}: none of the {len(own):,} images of {old} is there")
        moved = index.paths.with_roots([new if root == old else root for root in roots])
        processes.on_first(lambda: store.write(path, index._replace(paths=moved), []))
    return len(own)
