"""The kinds of sources: "digits", "tfds:<name>", "folder:<path>" and "embeddings:<folder>".

Images are decoded once to uint8 and cached. Embeddings are mapped from their files.
"""

import hashlib
import io
import json
import os
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from tcq.data import cache, embeddings, protocols
from tcq.data.images import WHOLE, Resize, decode, resize_of
from tcq.data.source import Source, SourceError
from tcq.runtime import signals, storage


def open_source(data: ConfigDict) -> Source:
    """The images of `config.data.source`, with the labels that `config.data.protocol` uses.

    Raises SourceError if the source is of an unknown kind, is missing, is not prepared, has no image, or has fewer
    labels than the protocol needs.
    """
    source, num_labels = _open(data), protocols.PROTOCOLS[data.protocol].num_labels
    if not num_labels or source.labels is None:
        return source
    if source.labels.ndim != 2 or source.labels.shape[1] < num_labels:
        raise SourceError(
            f"data.protocol {data.protocol} needs {num_labels} labels, {data.source} has {len(source.classes)} "
            f"classes: data.protocol=folder takes any number"
        )
    return source._replace(labels=source.labels[:, :num_labels], classes=source.classes[:num_labels])


def _open(data: ConfigDict) -> Source:
    kind, _, rest = data.source.partition(":")
    if data.source == "digits":
        return _digits(data.image_size)
    if kind == "folder" and rest:
        return folder(rest, size=data.image_size, resize=resize_of(data), cache_dir=data.cache_dir)
    if kind == "tfds" and rest:
        from tcq.data.datasets import reader  # only here: importing tensorflow_datasets takes a second

        return reader.read(rest, data)
    if kind == "embeddings" and rest:
        return embeddings.open_folder(rest)
    raise SourceError(
        f"data.source {data.source!r} is unknown: use digits, tfds:<name>, folder:<path> or embeddings:<folder>"
    )


def folder(path: str | Path, *, size: int, resize: Resize = WHOLE, cache_dir: str = "") -> Source:
    """Every image below a folder, local or in a bucket, sorted by path; files that are not images are skipped.

    If every image is in a sub-folder and there are at least two, the names of the sub-folders are labels (those below
    the first folder that has more than one). Hidden files and folders are ignored, linked folders are followed. Decoded
    images are cached by paths, sizes, modification times and the decoding rule.
    Raises SourceError if the path is not a folder or has no image.
    """
    root = storage.download(str(path)) if storage.is_url(path) else Path(path).expanduser()
    if not root.is_dir():
        raise SourceError(f"image folder {str(root)!r} {'is not a folder' if root.exists() else 'not found'}")
    files, skipped = _walk(root)
    if not files:
        raise SourceError(f"image folder {str(root.resolve())!r} holds no files")
    decoded = cache.decode_once(
        _listing_digest(root, files, size, resize),
        lambda: cache.EncodedImages(((name, root / name) for name in files), len(files), {}),
        size=size,
        resize=resize,
        cache_dir=cache_dir,
    )
    if not decoded.names:
        first = decoded.skipped[0]
        raise SourceError(
            f"image folder {str(root)!r} holds no image among its {len(files)} files; the first is "
            f"{first['path']}: {first['reason']}"
        )
    classes, labels = _folder_labels(decoded.names)
    return Source(decoded.images, labels, decoded.names, classes, skipped + decoded.skipped)


def _listing_digest(root: Path, files: list[str], size: int, resize: Resize) -> str:
    """A digest of the decoding rule, and of path, size, time and mode of every file."""
    digest = hashlib.sha256(json.dumps([size, resize, str(root.resolve())]).encode())
    for name in files:
        signals.poll()
        stat = os.stat(root / name, follow_symlinks=True) if os.path.exists(root / name) else None
        digest.update(json.dumps([name, stat and [stat.st_size, stat.st_mtime_ns, stat.st_mode]]).encode())
    return digest.hexdigest()


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
    """The relative paths of all files below root, sorted, without hidden ones; and the folders that cannot be read."""
    skipped: list[dict[str, str]] = []

    def unreadable(error: OSError) -> None:
        skipped.append({"path": os.path.relpath(error.filename, root), "reason": f"cannot be read: {error.strerror}"})

    files, visited = [], set()
    for folder, subfolders, names in os.walk(root, onerror=unreadable, followlinks=True):
        signals.poll()
        real = os.path.realpath(folder)
        if real in visited:  # a link to a folder that is already listed, or to one above it
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(f for f in subfolders if not f.startswith("."))
        files += [os.path.relpath(os.path.join(folder, n), root) for n in names if not n.startswith(".")]
    return sorted(files), skipped


def _folder_labels(names: list[str]) -> tuple[list[str], np.ndarray | None]:
    """Classes and labels by sub-folder; none where an image is in no sub-folder, or all are in the same."""
    common = os.path.commonpath([os.path.dirname(name) for name in names])
    below = [os.path.relpath(name, common or ".") for name in names]
    top = [name.split(os.sep)[0] if os.sep in name else None for name in below]
    classes = sorted({t for t in top if t is not None})
    if None in top or len(classes) < 2:
        return [], None
    number = {c: i for i, c in enumerate(classes)}
    return classes, np.array([number[t] for t in top if t is not None], np.int64)
