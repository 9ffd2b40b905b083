"""Reading datasets that TFDS has prepared as array_record, without TensorFlow."""

import hashlib
import io
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from tcq.data import cache, shards
from tcq.data.datasets import prepare
from tcq.data.source import Source, SourceError
from tcq.runtime import signals, storage

LABEL_FEATURES = ("label", "labels", "strict_labels")


def read(name: str, data: ConfigDict) -> Source:
    """All images of a dataset that TFDS has prepared, in official order.

    Raises SourceError, with the command that prepares it, if it is not prepared or is stored in another format; also if
    it has no images or is corrupted.
    """
    import tensorflow_datasets as tfds

    home = os.path.expanduser(data.tfds_dir) if data.tfds_dir else str(tfds.core.constants.DATA_DIR)
    try:
        folder = _newest_version(name, home)
    except FileNotFoundError:
        raise SourceError(f"TFDS dataset {name!r} not found in {home}; {_advice(name, home, data.tfds_dir)}") from None
    try:
        return _read(name, folder, home, data)
    except (SourceError, MemoryError):
        raise
    except Exception as error:  # TFDS, array_record and protobuf raise errors of many kinds
        if isinstance(error, OSError) and str(error.filename).startswith(str(cache.rule_of(data).folder)):
            raise  # the cache cannot be written
        raise SourceError(
            f"TFDS dataset {name!r} in {folder} cannot be read ({type(error).__name__}: {str(error)[:300]}): delete "
            f"that folder and prepare it again"
        ) from error


def _read(name: str, folder: str, home: str, data: ConfigDict) -> Source:
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    if builder.info.file_format is None or builder.info.file_format.value != "array_record":
        stored = builder.info.file_format and builder.info.file_format.value
        raise SourceError(
            f"TFDS dataset {name!r} in {folder} is stored as {stored}, not as array_record; "
            f"{_advice(name, home, data.tfds_dir)}"
        )
    features = builder.info.features
    if "image" not in features:
        raise SourceError(f"TFDS dataset {name!r} has no feature 'image', only {', '.join(features)}")

    files = sorted(p for p in Path(folder).iterdir() if p.is_file())
    stats = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    rule = cache.rule_of(data)
    key = hashlib.sha256(json.dumps([shards.VERSION, folder, stats]).encode()).hexdigest()
    decoded, arrays = cache.recall(key, rule) or _decode(key, builder, rule)
    if decoded.skipped:
        total = len(decoded.names) + len(decoded.skipped)
        raise SourceError(
            f"{len(decoded.skipped)} of {total} images of {name!r} cannot be decoded, the first: {decoded.skipped[0]}"
        )
    labels, classes = _labels(_from_bytes(arrays), features)
    metadata = builder.info.metadata or {}
    notes = () if metadata.get("verified", True) else (f"{name} was prepared from files that were not verified",)
    excluded = [{"path": row["id"], "reason": row["reason"]} for row in metadata.get("excluded", [])]
    return Source(decoded.images, labels, decoded.names, classes, excluded, notes)


def _decode(key: str, builder: Any, rule: cache.Rule) -> tuple[cache.Entry, bytes]:
    """The images of a dataset and its label features.

    They are remembered if all images can be decoded.
    """
    items, columns = _rows(builder)
    entry, arrays = cache.decode(items, rule), _to_bytes(columns)
    if not entry.skipped:
        cache.remember(key, entry.names, entry.digests, arrays, rule)
    return entry, arrays


def _to_bytes(columns: dict[str, np.ndarray]) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, **columns)  # type: ignore[arg-type]  # the stub takes the names for allow_pickle
    return out.getvalue()


def _from_bytes(data: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(data), allow_pickle=False) as saved:
        return {name: saved[name] for name in saved.files}


def _rows(builder: Any) -> tuple[Sequence[cache.Item], dict[str, np.ndarray]]:
    """Encoded images, and label features (numbers, or multi-hot columns), in official order."""
    import tensorflow_datasets as tfds

    features, splits = builder.info.features, [s for s in ("train", "validation", "test") if s in builder.info.splits]
    splits += sorted(set(builder.info.splits) - set(splits))
    encoded = {"image": tfds.decode.SkipDecoding()}  # bytes, for `decode` to check and decode
    stores = {s: builder.as_data_source(split=s, decoders=encoded) for s in splits}
    rows = [(s, i) for s in splits for i in range(builder.info.splits[s].num_examples)]
    keys = [k for k in LABEL_FEATURES if k in features]
    order, ids, labels = [], [], []
    for split, i in rows:
        signals.poll()
        row = stores[split][i]
        ids.append(_text(row["id"]) if "id" in row else f"{i:09d}")
        order.append((splits.index(split), int(row["index"]) if "index" in row else 0, ids[-1]))
        labels.append({k: row[k] for k in keys})
    ranked = sorted(range(len(rows)), key=lambda r: order[r])  # TFDS shuffles when writing
    columns: dict[str, np.ndarray] = {}
    for key in keys:
        if key == "label":
            columns[key] = np.array([labels[r][key] for r in ranked], np.int64)
            continue
        columns[key] = np.zeros((len(ranked), len(_names(features[key]))), bool)
        for row_number, r in enumerate(ranked):
            columns[key][row_number, np.asarray(labels[r][key], np.int64)] = True
    items = [cache.Item(f"{rows[r][0]}/{ids[r]}", partial(_image, stores[rows[r][0]], rows[r][1])) for r in ranked]
    return items, columns


def _image(store: Any, row: int) -> bytes:
    return bytes(store[row]["image"])


def _advice(name: str, home: str, tfds_dir: str) -> str:
    """The command that prepares a dataset; for `prepare.DATASETS` also the files it needs."""
    short = name.partition("/")[0]
    if short not in prepare.DATASETS:
        where = f" --data_dir={tfds_dir}" if tfds_dir else ""
        return (
            f"prepare it once, with TensorFlow (pip install tensorflow-cpu):\n"
            f"  tfds build {name} --file_format=array_record{where}"
        )
    where = f" --data_dir={tfds_dir}" if tfds_dir else ""
    manual = prepare.manual_dir(home)
    files = [f"  {file}: {state}" for file, state in prepare.file_states(short, manual).items()]
    return "\n".join(
        [
            f"prepare it once:\n  python -m tcq prepare --dataset={name}{where}",
            f"which reads these files from {manual} (or --files=<another folder>):",
            *files,
            prepare.instructions(short),
        ]
    )


def _newest_version(name: str, data_dir: str) -> str:
    """The newest version folder below <data_dir>/<name>[/<config>]. Raises FileNotFoundError."""
    default = prepare.DATASETS.get(name, ("", "", None))[2]
    dataset = Path(data_dir).expanduser() / name
    if storage.is_url(data_dir):
        dataset = storage.download(f"{data_dir}/{name}")
    root = dataset / (default or "")
    versions = [info.parent for depth in ("", "*/", "*/*/") for info in root.glob(f"{depth}dataset_info.json")]
    if not versions:
        raise FileNotFoundError(root)
    return str(max(versions, key=lambda p: [int(n) if n.isdigit() else -1 for n in p.name.split(".")]))


def _labels(columns: dict[str, np.ndarray], features: Any) -> tuple[np.ndarray | None, list[str]]:
    """Class numbers of the feature `label`, or columns of `labels` and `strict_labels`.

    The names of the classes come with them.
    """
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
