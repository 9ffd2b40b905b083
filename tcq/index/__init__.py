"""An index of images on disk: build, open, add, update, remove, move, search."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tcq import embed, encode
from tcq.data.rows import take
from tcq.data.source import Source
from tcq.index import changes, columns, contents, items, scan, store
from tcq.index.columns import where
from tcq.index.contents import CorruptedError, Index, IndexFileError
from tcq.index.info import describe, thresholds
from tcq.index.search import (
    Hit,
    build_engine,
    draw,
    features_of_items,
    find,
    hits,
    image_of,
    query_blocks,
    read_features,
    read_queries,
    search,
    search_features,
    search_tables,
    tables,
)
from tcq.index.store import open_index, verify
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
    "compact",
    "describe",
    "draw",
    "features_of_items",
    "find",
    "hits",
    "image_of",
    "move_root",
    "open_index",
    "query_blocks",
    "read_features",
    "read_queries",
    "remove",
    "search",
    "search_features",
    "search_tables",
    "split_root",
    "tables",
    "thresholds",
    "update",
    "verify",
    "where",
]


class Changes(NamedTuple):
    """What a command did to an index."""

    added: int
    edited: int = 0  # images whose contents had changed
    moved: int = 0  # images whose contents were known, at a place that is gone
    removed: int = 0
    skipped: Sequence[dict[str, str]] = ()  # files that are not images, with reasons


def build(
    workdir: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    which: str = "best",
    own_columns: str | Path | None = None,
) -> Changes:
    """Encodes every image below a folder and writes a new index.

    `own_columns` is a CSV or Parquet file with a column "path", whose other columns come back with the answers; without
    it those of the metadata of embeddings do.
    Skipped files are also listed with reasons in skipped.jsonl of the index. The processes of a run share the work.
    Raises IndexFileError if `out` exists or the columns do not fit, and as `encode.load` and `sources.folder`; then
    nothing is left behind.
    """
    processes.on_first(lambda: store.refuse_existing(out))
    own = None if own_columns is None else columns.read(own_columns)
    encoder = encode.load(workdir, which=which)
    source = scan.read_folder(encoder, images)
    processes.require_same("images", source.names)
    root = scan.root_of(images)
    if own is None and scan.is_embeddings(images):
        own = columns.of_metadata(scan.folder_of(images), source.names)
    if own is not None:
        columns.places(own, [root], [items.join(root, name) for name in source.names])
    codes = encode.codes(encoder, _inputs(encoder, source))
    ids = np.arange(len(codes))
    index = changes.with_rows(contents.empty(encoder), root, source, ids.tolist(), ids, codes)
    index = columns.joined(index.replace(rows=ids, next_id=len(ids)), own)

    def write() -> None:
        with store.building(out):
            store.write(out, index, source.skipped)

    processes.on_first(write)
    return Changes(len(codes), skipped=source.skipped)


def _inputs(encoder: encode.Encoder, source: Source) -> Any:
    assert source.digests is not None
    return embed.inputs(encoder, source.images, source.digests)


def add(path: str | Path, images: str | Path, *, own_columns: str | Path | None = None) -> Changes:
    """As `update` for one folder, without removing images."""
    return update(path, images, own_columns=own_columns, keep=True)


def update(
    path: str | Path,
    images: str | Path | None = None,
    *,
    own_columns: str | Path | None = None,
    keep: bool = False,
) -> Changes:
    """Brings an index up to date with one folder, or with all of its own.

    New images get codes, edited ones new codes, moved ones their new place, and unless `keep` those that are gone are
    removed. `own_columns` is as in `build`; its rows replace those of the same images.
    """
    return _change(path, None if images is None else [images], own_columns, remove=not keep)


def _change(
    path: str | Path, folders: Sequence[str | Path] | None, own_columns: str | Path | None, *, remove: bool
) -> Changes:
    """Brings an index up to date with folders, all of its own by default, under its lock."""
    own = None if own_columns is None else columns.read(own_columns)
    with processes.entered_by_first(lambda: store.changing(path)):
        index = open_index(path)
        if folders is None:
            folders = [root for root in dict.fromkeys(index.folders or index.roots) if root]
            if not folders:
                raise IndexFileError(
                    f"index {str(path)!r} holds embeddings, whose folder it does not know: "
                    f"use --images=embeddings:<folder>"
                )
        sources = [(scan.root_of(images), scan.read_folder(index.encoder, images)) for images in folders]
        if own is None and len(folders) == 1 and scan.is_embeddings(folders[0]):
            own = columns.of_metadata(scan.folder_of(folders[0]), sources[0][1].names)
        if own is not None:
            new = [items.join(root, name) for root, source in sources for name in source.names]
            columns.places(own, [*index.roots, *(root for root, _ in sources)], [*index.paths, *new])
        done = []
        for removing in (False, True) if remove else (False,):  # removed last: a file may have moved to a later folder
            for root, source in sources:
                index, one = _with_folder(index, root, source, remove=removing)
                done.append(one)
        processes.require_same("images", list(index.paths))
        final = _settled(columns.joined(index, own))
        skipped = [row for _, source in sources for row in source.skipped]
        processes.on_first(lambda: store.write(path, final, skipped))
    added, edited, moved = (sum(column) for column in zip(*(one[:3] for one in done), strict=True))
    return Changes(added, edited, moved, sum(one.removed for one in done), skipped)


def _settled(index: Index) -> Index:
    return contents.compacted(index) if contents.is_scattered(index) else index


def _with_folder(index: Index, root: str, source: Source, *, remove: bool) -> tuple[Index, Changes]:
    plan = changes.plan(index, root, source)
    rows = np.array([*plan.edited.values(), *plan.new], np.int64)
    assert source.digests is not None
    some = source._replace(images=take(source.images, rows), digests=[source.digests[row] for row in rows])
    codes = encode.codes(index.encoder, _inputs(index.encoder, some))
    changed = changes.apply(index, root, source, plan, codes, remove=remove)
    removed = len(plan.gone) if remove else 0
    return changed, Changes(len(plan.new), len(plan.edited), len(plan.moved), removed)


def remove(path: str | Path, names: Sequence[str] = (), *, condition: str | None = None) -> int:
    """Removes images by path, or all below a folder, or that meet a condition (see `where`).

    Returns their number. Raises IndexFileError if there is none.
    """
    with processes.entered_by_first(lambda: store.changing(path)):
        index = open_index(path)
        places_of = {name: changes.matches(index, name) for name in names}
        missing = [name for name, places in places_of.items() if not places]
        if missing:
            raise IndexFileError(
                f"{', '.join(missing)} not found in index {str(path)!r}: give paths as tcq search prints them"
            )
        keep = np.ones(len(index.rows), bool)
        keep[[i for places in places_of.values() for i in places]] = False
        if condition is not None:
            keep &= ~where(index, condition)
            if keep.all():
                raise IndexFileError(f"--filter {condition!r}: no image of index {str(path)!r} meets it")
        left = _settled(index.replace(rows=index.rows[keep]))
        processes.require_same("images", list(index.paths))  # all have opened it before it changes
        processes.on_first(lambda: store.write(path, left, None))
    return len(index.rows) - len(left.rows)


def compact(path: str | Path) -> tuple[int, int]:
    """Writes the rows of an index to one file, without removed ones.

    Returns the numbers of rows before and after.
    """
    with processes.entered_by_first(lambda: store.changing(path)):
        index = open_index(path)
        processes.require_same("images", list(index.paths))
        processes.on_first(lambda: store.write(path, contents.compacted(index), None))
    return len(index.table), len(index.rows)


def split_root(path: str | Path, text: str) -> tuple[str | None, str]:
    """The old folder, None if it is not given, and the new one of "NEW" or "OLD=NEW".

    Paths may hold "=".
    """
    for root in open_index(path).folders:
        if root and text.startswith(f"{root}="):
            return root, text.removeprefix(f"{root}=")
    return None, text


def move_root(path: str | Path, new: str, *, old: str | None = None) -> int:
    """Tells an index that a folder was moved; `old` is needed if the index has several.

    Returns the number of images of the folder.
    Raises IndexFileError if the index does not know the old folder, or the new one holds none of its images.
    """
    new = scan.root_of(new)
    with processes.entered_by_first(lambda: store.changing(path)):
        index = open_index(path)
        roots = index.folders
        if old is None and len(roots) == 1:
            old = roots[0]
        if old not in roots:
            raise IndexFileError(
                f"--root: index {str(path)!r} has the folders {', '.join(roots)}: write --root=OLD=NEW"
            )
        if new in roots and new != old:
            raise IndexFileError(f"--root={new}: the index has this folder already: use tcq index update")
        own = np.flatnonzero(np.array([root == old for root in index.roots])[index.paths.numbers]).tolist()
        if not storage.is_url(new) and not any(os.path.exists(os.path.join(new, index.paths.name(i))) for i in own):
            raise IndexFileError(f"--root={new}: none of the {len(own):,} images of {old} is there")
        moved = index.replace(roots=tuple(new if root == old else root for root in index.roots))
        processes.require_same("images", list(index.paths))
        processes.on_first(lambda: store.write(path, moved, None))
    return len(own)
