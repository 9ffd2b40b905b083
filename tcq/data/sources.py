"""The kinds of sources: digits, tfds:<name>, folder:<path> and embeddings:<folder>.

Images are decoded once to uint8 and cached. Embeddings are mapped from their files.
"""

import logging
import os
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from tcq.data import cache, embeddings, folders, protocols
from tcq.data.images import square
from tcq.data.source import Source, SourceError
from tcq.runtime import storage

logger = logging.getLogger(__name__)


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
        return folder(rest, cache.rule_of(data), labels=data.labels, exclude=data.exclude)
    if kind == "tfds" and rest:
        from tcq.data.datasets import reader  # only here: importing tensorflow_datasets takes a second

        return reader.read(rest, data)
    if kind == "embeddings" and rest:
        return embeddings.open_folder(rest)
    raise SourceError(
        f"data.source {data.source!r} is unknown: use digits, tfds:<name>, folder:<path> or embeddings:<folder>"
    )


def folder(path: str | Path, rule: cache.Rule, *, labels: str = "auto", exclude: str = "") -> Source:
    """Every image below a folder, local or in a bucket, sorted by path.

    Files that are not images are skipped.

    Decoded images are cached by contents, so that a file which was moved, or has a copy, is decoded once.
    `labels` and `exclude` are as `data.labels` and `data.exclude`.
    Raises SourceError if the path is not a folder or has no image, or if the labels do not fit.
    """
    root = storage.download(str(path)) if storage.is_url(path) else Path(os.path.abspath(Path(path).expanduser()))
    if not root.is_dir():
        raise SourceError(f"image folder {str(root)!r} {'is not a folder' if root.exists() else 'not found'}")
    if labels not in folders.LABELS and not Path(labels).is_file():
        raise SourceError(
            f"data.labels {labels!r} not found: use {', '.join(folders.LABELS)}, or a .csv or .jsonl file"
        )
    listing = folders.walk(root, exclude)
    if not listing.files:
        left_out = f" but {_first(listing.excluded)}, which are left out (data.exclude)" if listing.excluded else ""
        raise SourceError(f"image folder {str(root.resolve())!r} holds no files{left_out}")
    entry = cache.decode([cache.Item(name, root / name) for name in listing.files], rule)
    if not entry.names:
        first = entry.skipped[0]
        raise SourceError(
            f"image folder {str(root)!r} holds no image among its {len(listing.files)} files; the first is "
            f"{first['path']}: {first['reason']}"
        )
    labelling = folders.labels(entry.names, labels, root)
    if listing.excluded:
        logger.info(f"{path}: left out {_first(listing.excluded)} (data.exclude)")
    if labels != "none":
        logger.info(f"{path}: {labelling.note}")
    return Source(
        entry.images,
        labelling.labels,
        entry.names,
        labelling.classes,
        listing.skipped + entry.skipped,
        digests=entry.digests,
        unreadable=(*(s["path"] for s in listing.skipped), *entry.unreadable),
        repaired=entry.repaired,
    )


def _first(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


def _digits(size: int) -> Source:
    from sklearn.datasets import load_digits

    scans = load_digits()
    images = np.round(scans.images / 16 * 255).astype(np.uint8)  # (1797, 8, 8), 0..16 -> 0..255
    rgb = [square(image, size=size) for image in images]
    names = [f"digit_{i:04d}" for i in range(len(images))]
    return Source(np.stack(rgb), scans.target.astype(np.int64), names, [str(i) for i in range(10)], [])
