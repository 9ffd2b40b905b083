"""Where images come from: "digits", "tfds:<name>" or "folder:<path>". Decoded once to uint8 and kept in a cache."""

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, UInt8
from ml_collections import ConfigDict

from tcq.data import prepare, protocols
from tcq.data.images import ImageError, decode

CACHE_VERSION = 1
LABEL_FEATURES = ("label", "labels", "strict_labels")


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
        return folder(rest, size=data.image_size, resize=data.resize, cache_dir=data.cache_dir)
    if kind == "tfds" and rest:
        return _tfds(rest, data)
    raise SourceError(f"data.source {data.source!r} is unknown: use digits, tfds:<name> or folder:<path>")


def folder(path: str | Path, *, size: int, resize: str = "crop", cache_dir: str = "") -> Source:
    """Every image below a folder, in the order of their paths; what cannot be decoded is listed in `skipped`.

    Where every image lies in a sub-folder and there are at least two, the names of those sub-folders are the labels (below
    the first folder that holds more than one). Hidden files and folders are left out, linked folders are followed. The
    decoded images are cached under a key made of paths, sizes, times and the decoding rule.
    Raises SourceError if the path is no folder or holds no image.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise SourceError(f"image folder {str(root)!r} {what}")
    files, skipped = _walk(root)
    if not files:
        raise SourceError(f"no files below {str(root.resolve())!r}")
    key = hashlib.sha256(json.dumps([CACHE_VERSION, size, resize, str(root.resolve())]).encode())
    for name in files:
        found = os.stat(root / name, follow_symlinks=True) if os.path.exists(root / name) else None
        key.update(json.dumps([name, found and [found.st_size, found.st_mtime_ns, found.st_mode]]).encode())
    items = ((name, root / name) for name in files)
    images, kept, bad = _decode_once(items, len(files), key.hexdigest(), size=size, resize=resize, cache_dir=cache_dir)
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


def _tfds(name: str, data: ConfigDict) -> Source:
    import tensorflow_datasets as tfds

    home = os.path.expanduser(data.tfds_dir) if data.tfds_dir else str(tfds.core.constants.DATA_DIR)
    try:
        builder = tfds.builder_from_directory(_prepared(name, home))
    except FileNotFoundError:
        raise SourceError(
            f"TFDS dataset {name!r} is not prepared in {home}; {_advice(name, home, data.tfds_dir)}"
        ) from None
    if builder.info.file_format is None or builder.info.file_format.value != "array_record":
        stored = builder.info.file_format and builder.info.file_format.value
        raise SourceError(
            f"TFDS dataset {name!r} in {builder.data_dir} is stored as {stored}, not as array_record; "
            f"{_advice(name, home, data.tfds_dir)}"
        )
    features = builder.info.features
    if "image" not in features:
        raise SourceError(f"TFDS dataset {name!r} has no feature 'image', only {', '.join(features)}")
    splits = [s for s in ("train", "validation", "test") if s in builder.info.splits]
    splits += sorted(set(builder.info.splits) - set(splits))
    rows = [(s, i) for s in splits for i in range(builder.info.splits[s].num_examples)]
    encoded = {"image": tfds.decode.SkipDecoding()}  # bytes, which `decode` reads as safely as a file
    stores = {s: builder.as_data_source(split=s, decoders=encoded) for s in splits}

    order, ids, labels = [], [], []
    for split, i in rows:
        row = stores[split][i]
        ids.append(_text(row["id"]) if "id" in row else f"{i:09d}")
        order.append((splits.index(split), int(row["index"]) if "index" in row else 0, ids[-1]))
        labels.append({key: row[key] for key in LABEL_FEATURES if key in row})
    ranked = sorted(range(len(rows)), key=lambda r: order[r])  # TFDS shuffles on writing: back to the official order
    names = [f"{rows[r][0]}/{ids[r]}" for r in ranked]
    items = ((name, bytes(stores[rows[r][0]][rows[r][1]]["image"])) for name, r in zip(names, ranked, strict=True))
    key = hashlib.sha256(
        json.dumps([CACHE_VERSION, data.image_size, data.resize, builder.info.full_name, names]).encode()
    )
    key.update(str(builder.data_dir).encode())
    images, kept, bad = _decode_once(
        items, len(rows), key.hexdigest(), size=data.image_size, resize=data.resize, cache_dir=data.cache_dir
    )
    if bad:
        raise SourceError(f"{len(bad)} of {len(rows)} images of {name!r} cannot be decoded, the first: {bad[0]}")
    array, classes = _tfds_labels([labels[r] for r in ranked], features)
    facts = builder.info.metadata or {}
    notes = () if facts.get("verified", True) else (f"{name} was prepared from files that were not verified",)
    excluded = [{"path": row["id"], "reason": row["reason"]} for row in facts.get("excluded", [])]
    return Source(images, array, kept, classes, excluded, notes)


def _advice(name: str, home: str, tfds_dir: str) -> str:
    """The command that prepares a dataset, and for those of `prepare.DATASETS` the files that it needs."""
    short = name.partition("/")[0]
    if short not in prepare.DATASETS:
        where = f" --data_dir={tfds_dir}" if tfds_dir else ""
        return (
            f"prepare it once, where TensorFlow is installed (pip install tensorflow-cpu):\n"
            f"  tfds build {name} --file_format=array_record{where}"
        )
    where = f" --data_dir={tfds_dir}" if tfds_dir else ""
    manual = prepare.manual_dir(home)
    files = [f"  {file}: {'found' if there else 'missing'}" for file, there in prepare.found(short, manual).items()]
    return "\n".join(
        [
            f"prepare it once:\n  python -m tcq prepare --dataset={name}{where}",
            f"which reads from {manual} (or --files=<another folder>):",
            *files,
            prepare.instructions(short),
        ]
    )


def _prepared(name: str, data_dir: str) -> str:
    """The newest version folder below <data_dir>/<name>[/<config>]. Raises FileNotFoundError."""
    default = prepare.DATASETS.get(name, ("", "", None))[2]
    root = Path(data_dir).expanduser() / name / (default or "")
    found = [
        p.parent
        for p in [
            *root.glob("dataset_info.json"),
            *root.glob("*/dataset_info.json"),
            *root.glob("*/*/dataset_info.json"),
        ]
    ]
    if not found:
        raise FileNotFoundError(root)
    return str(max(found, key=lambda p: [int(n) if n.isdigit() else -1 for n in p.name.split(".")]))


def _tfds_labels(rows: list[dict[str, Any]], features: Any) -> tuple[np.ndarray | None, list[str]]:
    """Class numbers of a feature `label`, or multi-hot columns of `labels` and then of `strict_labels`; their names."""
    keys = [key for key in LABEL_FEATURES if rows and key in rows[0]]
    if not keys:
        return None, []
    names = {k: list(getattr(getattr(features[k], "feature", features[k]), "names", None) or []) for k in keys}
    if "label" in keys:
        return np.array([row["label"] for row in rows], np.int64), names["label"]
    hot = {key: np.zeros((len(rows), len(names[key])), bool) for key in keys}
    for key in keys:
        for i, row in enumerate(rows):
            hot[key][i, np.asarray(row[key], np.int64)] = True
    classes = [f"{name} (strict)" if key == "strict_labels" else name for key in keys for name in names[key]]
    return np.concatenate([hot[key] for key in keys], axis=1), classes


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _png(pixels: np.ndarray) -> bytes:
    import io

    from PIL import Image

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


def _decode_once(
    items: Iterable[tuple[str, Path | bytes]], total: int, key: str, *, size: int, resize: str, cache_dir: str
) -> tuple[np.ndarray, list[str], list[dict[str, str]]]:
    """Decoded images from the cache, or decoded now and put there; names of the kept; the skipped with reasons."""
    home = Path(cache_dir or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "tcq")).expanduser()
    place = home / key[:32]
    if not (place / "names.json").is_file():
        home.mkdir(parents=True, exist_ok=True)
        for left in home.glob("half-*"):  # of a killed run
            if time.time() - left.stat().st_mtime > 86_400:
                shutil.rmtree(left, ignore_errors=True)
        half = Path(tempfile.mkdtemp(prefix="half-", dir=home))
        try:
            names, skipped = [], []
            with open(half / "images.u8", "wb") as out:
                for name, result in _progress(_decode_all(items, size, resize), total):
                    if isinstance(result, ImageError):
                        skipped.append({"path": name, "reason": str(result)})
                    else:
                        names.append(name)
                        out.write(result.tobytes())
            (half / "names.json").write_text(json.dumps({"names": names, "skipped": skipped}))
            try:
                half.rename(place)  # the whole entry appears at once
            except OSError:
                if not (place / "names.json").is_file():
                    raise
        finally:
            shutil.rmtree(half, ignore_errors=True)
    entry = json.loads((place / "names.json").read_text())
    shape = (len(entry["names"]), size, size, 3)
    if (place / "images.u8").stat().st_size != np.prod(shape):
        raise SourceError(f"the cache entry {place} is damaged: delete it and start again")
    images = np.memmap(place / "images.u8", np.uint8, "r", shape=shape) if entry["names"] else np.zeros(shape, np.uint8)
    return images, entry["names"], entry["skipped"]


def _decode_all(
    items: Iterable[tuple[str, Path | bytes]], size: int, resize: str
) -> Iterator[tuple[str, np.ndarray | ImageError]]:
    def one(item: tuple[str, Path | bytes]) -> tuple[str, np.ndarray | ImageError]:
        try:
            return item[0], decode(item[1], size=size, resize=resize)
        except ImageError as error:
            return item[0], error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(one, items)


def _progress(results: Iterator[Any], total: int) -> Iterator[Any]:
    """Passes results on; every few seconds a line with count and rate on standard error."""
    start = last = time.monotonic()
    for done, result in enumerate(results, 1):
        yield result
        now = time.monotonic()
        if now - last > 5:
            print(f"decoding images: {done:,} of {total:,}, {done / (now - start):,.0f} images/s", file=sys.stderr)
            last = now
