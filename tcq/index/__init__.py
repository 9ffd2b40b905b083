"""An index of images on disk: build, open, add, remove, search."""

from pathlib import Path

import numpy as np

from tcq import encode
from tcq.data.rows import take
from tcq.index import scan, store
from tcq.index.search import Hit, draw, image_of, read_queries, search, search_features
from tcq.index.store import CorruptedError, Index, IndexFileError, open_index
from tcq.runtime import processes, storage

__all__ = [
    "CorruptedError",
    "Hit",
    "Index",
    "IndexFileError",
    "add",
    "build",
    "draw",
    "image_of",
    "open_index",
    "read_queries",
    "remove",
    "search",
    "search_features",
]


def build(
    workdir: str | Path, images: str | Path, out: str | Path, *, which: str = "best"
) -> tuple[int, list[dict[str, str]]]:
    """Encodes every image below a folder and writes a new index; returns their number, and the files that were skipped.

    Skipped files are also listed with reasons in skipped.jsonl of the index. The processes of a run share the work.
    Raises IndexFileError if `out` exists, and as `encode.load` and `sources.folder`; then nothing is left behind.
    """
    processes.on_first(lambda: store.refuse_existing(out))
    encoder = encode.load(workdir, which=which)
    source = scan.read_folder(encoder, images)
    processes.require_same("images", source.names)
    codes = encode.codes(encoder, source.images)
    paths = scan.full_paths(images, source.names)
    processes.on_first(lambda: store.write(out, encoder, codes, paths, source.skipped))
    return len(codes), source.skipped


def add(path: str | Path, images: str | Path) -> tuple[int, list[dict[str, str]]]:
    """Adds the images below a folder that the index lacks; returns their number, and the files that were skipped."""
    store.refuse_bucket(path)
    index = open_index(path)
    source = scan.read_folder(index.encoder, images)
    candidates, known = scan.full_paths(images, source.names), set(index.paths)
    new = [i for i, name in enumerate(candidates) if name not in known]
    codes = encode.codes(index.encoder, take(source.images, np.array(new, np.int64)))
    paths = index.paths + [candidates[i] for i in new]
    processes.require_same("images", paths)
    all_codes = np.concatenate([index.codes, codes])
    processes.on_first(lambda: store.write(path, index.encoder, all_codes, paths, source.skipped))
    return len(new), source.skipped


def remove(path: str | Path, names: list[str]) -> int:
    """Removes images by path, or all below a folder; returns their number. Raises IndexFileError if there is none."""
    store.refuse_bucket(path)
    index = open_index(path)
    removed = [n.rstrip("/") if storage.is_url(n) else str(Path(n).expanduser().resolve()) for n in names]
    keep = [i for i, p in enumerate(index.paths) if not any(p == r or p.startswith(r + "/") for r in removed)]
    if len(keep) == len(index.paths):
        raise IndexFileError(
            f"none of {', '.join(names)} found in index {str(path)!r}: give paths as tcq search prints them"
        )
    paths = [index.paths[i] for i in keep]
    processes.on_first(lambda: store.write(path, index.encoder, index.codes[keep], paths, []))
    return len(index.paths) - len(keep)
