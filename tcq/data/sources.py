"""Where images come from: "digits", "tfds:<name>" or "folder:<path>". Decoded once to uint8 and kept in a cache."""

import hashlib
import io
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, UInt8
from ml_collections import ConfigDict
from PIL import Image

from tcq.data import cache, protocols
from tcq.data.images import WHOLE, Resize, decode, resize_of
from tcq.runtime import storage as buckets


class SourceError(ValueError):
    """The images that the config names cannot be had; the message says why and what to do."""


class Source(NamedTuple):
    """N images in their official order, all of one size."""

    images: UInt8[np.ndarray, "N S S 3"]  # in memory, or mapped from the cache
    labels: Int64[np.ndarray, " N"] | Bool[np.ndarray, "N L"] | None
    names: list[str]  # the path below the folder, or an id
    classes: list[str]
    skipped: list[dict[str, str]]  # {"path", "reason"}
    notes: tuple[str, ...] = ()  # what a reader of results has to know


def open_source(data: ConfigDict) -> Source:
    """The images of `config.data.source`, with the labels that `config.data.protocol` looks at.

    Raises SourceError if the source is not of a known kind, is missing, is not prepared, holds no image, or has fewer labels
    than the protocol.
    """
    source, want = _open(data), protocols.PROTOCOLS[data.protocol].num_labels
    if not want or source.labels is None:
        return source
    if source.labels.ndim != 2 or source.labels.shape[1] < want:
        raise SourceError(
            f"protocol {data.protocol} is for {want} labels, {data.source} has {len(source.classes)} classes; "
            f"protocol folder takes any"
        )
    return source._replace(labels=source.labels[:, :want], classes=source.classes[:want])


def _open(data: ConfigDict) -> Source:
    kind, _, rest = data.source.partition(":")
    if data.source == "digits":
        return _digits(data.image_size)
    if kind == "folder" and rest:
        return folder(rest, size=data.image_size, resize=resize_of(data), cache_dir=data.cache_dir)
    if kind == "tfds" and rest:
        from tcq.data.datasets import reader  # it needs the names above

        return reader.read(rest, data)
    raise SourceError(f"data.source {data.source!r} is unknown: use digits, tfds:<name> or folder:<path>")


def folder(path: str | Path, *, size: int, resize: Resize = WHOLE, cache_dir: str = "") -> Source:
    """Every image below a folder, here or in a bucket, in the order of their paths; what cannot be decoded is listed in `skipped`.

    Where every image lies in a sub-folder and there are at least two, the names of those sub-folders are the labels (below
    the first folder that holds more than one). Hidden files and folders are left out, linked folders are followed. The
    decoded images are cached under a key made of paths, sizes, times and the decoding rule.
    Raises SourceError if the path is no folder or holds no image.
    """
    root = buckets.brought(str(path)) if buckets.is_url(path) else Path(path).expanduser()
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise SourceError(f"image folder {str(root)!r} {what}")
    files, skipped = _walk(root)
    if not files:
        raise SourceError(f"no files below {str(root.resolve())!r}")
    key = hashlib.sha256(json.dumps([size, resize, str(root.resolve())]).encode())
    for name in files:
        found = os.stat(root / name, follow_symlinks=True) if os.path.exists(root / name) else None
        key.update(json.dumps([name, found and [found.st_size, found.st_mtime_ns, found.st_mode]]).encode())
    images, kept, bad, _ = cache.decode_once(
        key.hexdigest(),
        lambda: cache.Encoded(((name, root / name) for name in files), len(files), {}),
        size=size,
        resize=resize,
        cache_dir=cache_dir,
    )
    if not kept:
        raise SourceError(
            f"none of the {len(files)} files below {str(root)!r} is an image, the first: {bad[0]['path']}: {bad[0]['reason']}"
        )
    classes, labels = _folder_labels(kept)
    return Source(images, labels, kept, classes, skipped + bad)


def _digits(size: int) -> Source:
    from sklearn.datasets import load_digits

    scans = load_digits()
    images = np.round(scans.images / 16 * 255).astype(np.uint8)  # (1797, 8, 8), 0..16 -> 0..255
    rgb = [decode(_png(image), size=size) for image in images]
    names = [f"digit_{i:04d}" for i in range(len(images))]
    return Source(np.stack(rgb), scans.target.astype(np.int64), names, [str(i) for i in range(10)], [])


def _png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(out, "PNG", compress_level=0)
    return out.getvalue()


def _walk(root: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Paths of all files below root, sorted, relative to it; and the folders that cannot be read. Hidden ones are left out."""
    skipped: list[dict[str, str]] = []

    def unreadable(error: OSError) -> None:
        skipped.append({"path": os.path.relpath(error.filename, root), "reason": f"cannot be read: {error.strerror}"})

    files, seen = [], set()
    for here, folders, names in os.walk(root, onerror=unreadable, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # a link to a folder that is listed already, or to one above it
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        files += [os.path.relpath(os.path.join(here, n), root) for n in names if not n.startswith(".")]
    return sorted(files), skipped


def _folder_labels(names: list[str]) -> tuple[list[str], np.ndarray | None]:
    common = os.path.commonpath([os.path.dirname(name) for name in names])
    below = [os.path.relpath(name, common or ".") for name in names]
    top = [name.split(os.sep)[0] if os.sep in name else None for name in below]
    classes = sorted({t for t in top if t is not None})
    if None in top or len(classes) < 2:
        return [], None
    number = {c: i for i, c in enumerate(classes)}
    return classes, np.array([number[t] for t in top if t is not None], np.int64)
