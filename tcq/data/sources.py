"""Where images come from: "digits", "tfds:<name>" or "folder:<path>". Decoded once to uint8 and kept in a cache."""

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections import deque
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
    images, kept, bad = _decode_once(
        items,
        len(files),
        key.hexdigest(),
        data=ConfigDict({"image_size": size, "resize": resize, "cache_dir": cache_dir}),
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


def _tfds(name: str, data: ConfigDict) -> Source:
    import tensorflow_datasets as tfds

    home = os.path.expanduser(data.tfds_dir) if data.tfds_dir else str(tfds.core.constants.DATA_DIR)
    try:
        folder = _prepared(name, home)
    except FileNotFoundError:
        raise SourceError(
            f"TFDS dataset {name!r} is not prepared in {home}; {_advice(name, home, data.tfds_dir)}"
        ) from None
    try:
        return _read_tfds(name, folder, data)
    except SourceError as error:
        raise SourceError(str(error).replace("{advice}", _advice(name, home, data.tfds_dir))) from None
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # TFDS, array_record and protobuf raise many kinds
        raise SourceError(
            f"TFDS dataset {name!r} in {folder} cannot be read ({type(error).__name__}: {str(error)[:300]}): delete that "
            f"folder and prepare it again"
        ) from error


def _read_tfds(name: str, folder: str, data: ConfigDict) -> Source:
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    if builder.info.file_format is None or builder.info.file_format.value != "array_record":
        stored = builder.info.file_format and builder.info.file_format.value
        raise SourceError(f"TFDS dataset {name!r} in {folder} is stored as {stored}, not as array_record; {{advice}}")
    features = builder.info.features
    if "image" not in features:
        raise SourceError(f"TFDS dataset {name!r} has no feature 'image', only {', '.join(features)}")

    files = sorted(p for p in Path(folder).iterdir() if p.is_file())
    stats = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    key = hashlib.sha256(json.dumps([CACHE_VERSION, data.image_size, data.resize, folder, stats]).encode()).hexdigest()
    labels_file = _cache_home(data.cache_dir) / f"{key[:32]}-labels.npz"
    if labels_file.is_file() and (_cache_home(data.cache_dir) / key[:32]).is_dir():
        images, names, bad = _decode_once(iter(()), 0, key, data=data)  # nothing is read but the cache
        with np.load(labels_file, allow_pickle=False) as saved:
            columns = {k: saved[k] for k in saved.files}
    else:
        items, columns = _tfds_rows(builder)
        images, names, bad = _decode_once(items, builder.info.splits.total_num_examples, key, data=data)
        half = labels_file.with_name(f"half-{os.getpid()}-{labels_file.name}")
        with open(half, "wb") as out:
            np.savez(out, **columns)  # type: ignore[arg-type]
        half.replace(labels_file)
    if bad:
        raise SourceError(f"{len(bad)} of {len(names)} images of {name!r} cannot be decoded, the first: {bad[0]}")
    labels, classes = _tfds_labels(columns, features)
    facts = builder.info.metadata or {}
    notes = () if facts.get("verified", True) else (f"{name} was prepared from files that were not verified",)
    excluded = [{"path": row["id"], "reason": row["reason"]} for row in facts.get("excluded", [])]
    return Source(images, labels, names, classes, excluded, notes)


def _tfds_rows(builder: Any) -> tuple[Iterator[tuple[str, bytes]], dict[str, np.ndarray]]:
    """Names with encoded images, and the label features (numbers, or multi-hot columns), both in official order."""
    import tensorflow_datasets as tfds

    features, splits = builder.info.features, [s for s in ("train", "validation", "test") if s in builder.info.splits]
    splits += sorted(set(builder.info.splits) - set(splits))
    encoded = {"image": tfds.decode.SkipDecoding()}  # bytes, which `decode` reads as safely as a file
    stores = {s: builder.as_data_source(split=s, decoders=encoded) for s in splits}
    places = [(s, i) for s in splits for i in range(builder.info.splits[s].num_examples)]
    keys = [k for k in LABEL_FEATURES if k in features]
    order, ids, labels = [], [], []
    for split, i in places:
        row = stores[split][i]
        ids.append(_text(row["id"]) if "id" in row else f"{i:09d}")
        order.append((splits.index(split), int(row["index"]) if "index" in row else 0, ids[-1]))
        labels.append({k: row[k] for k in keys})
    ranked = sorted(range(len(places)), key=lambda r: order[r])  # TFDS shuffles on writing: back to the official order
    columns: dict[str, np.ndarray] = {}
    for key in keys:
        if key == "label":
            columns[key] = np.array([labels[r][key] for r in ranked], np.int64)
            continue
        columns[key] = np.zeros((len(ranked), len(_names(features[key]))), bool)
        for row_number, r in enumerate(ranked):
            columns[key][row_number, np.asarray(labels[r][key], np.int64)] = True
    items = ((f"{places[r][0]}/{ids[r]}", bytes(stores[places[r][0]][places[r][1]]["image"])) for r in ranked)
    return items, columns


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
    files = [f"  {file}: {state}" for file, state in prepare.found(short, manual).items()]
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


def _tfds_labels(columns: dict[str, np.ndarray], features: Any) -> tuple[np.ndarray | None, list[str]]:
    """Class numbers of a feature `label`, or the columns of `labels` and then of `strict_labels`; their names."""
    if "label" in columns:
        return columns["label"], _names(features["label"])
    hot = [columns[k] for k in LABEL_FEATURES if k in columns]
    classes = [
        f"{name} (strict)" if key == "strict_labels" else name for key in columns for name in _names(features[key])
    ]
    return (np.concatenate(hot, axis=1), classes) if hot else (None, [])


def _names(feature: Any) -> list[str]:
    return list(getattr(getattr(feature, "feature", feature), "names", None) or [])


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
    items: Iterable[tuple[str, Path | bytes]], total: int, key: str, *, data: ConfigDict
) -> tuple[np.ndarray, list[str], list[dict[str, str]]]:
    """Decoded images from the cache, or decoded now and put there; names of the kept; the skipped with reasons."""
    home, size = _cache_home(data.cache_dir), data.image_size
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
                for name, result in _progress(_decode_all(items, size, data.resize), total):
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


def _cache_home(cache_dir: str) -> Path:
    return Path(cache_dir or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "tcq")).expanduser()


def _decode_all(
    items: Iterable[tuple[str, Path | bytes]], size: int, resize: str
) -> Iterator[tuple[str, np.ndarray | ImageError]]:
    def one(item: tuple[str, Path | bytes]) -> tuple[str, np.ndarray | ImageError]:
        try:
            return item[0], decode(item[1], size=size, resize=resize)
        except ImageError as error:
            return item[0], error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        coming: deque[Any] = deque()
        for item in items:  # a bounded number at a time: a dataset does not fit in memory
            coming.append(pool.submit(one, item))
            if len(coming) >= 256:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def _progress(results: Iterator[Any], total: int) -> Iterator[Any]:
    """Passes results on; every few seconds a line with count and rate on standard error."""
    start = last = time.monotonic()
    for done, result in enumerate(results, 1):
        yield result
        now = time.monotonic()
        if now - last > 5:
            print(f"decoding images: {done:,} of {total:,}, {done / (now - start):,.0f} images/s", file=sys.stderr)
            last = now
