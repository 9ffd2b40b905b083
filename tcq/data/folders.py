"""Which files below a folder are images of a collection, and what their labels are."""

import csv
import fnmatch
import io
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from tcq.data.source import SourceError
from tcq.runtime import signals

LABELS = ("auto", "folders", "none")
FILES = (".csv", ".jsonl", ".json")  # of labels
# Folders of servers, systems and programs, in lower case: thumbnails, deleted files, snapshots.
JUNK = (
    "@eadir",
    "@recycle",
    "@recently-snapshot",
    "@tmp",
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "recycler",
    "system volume information",
    "__macosx",
    "lost+found",
    "found.000",
    "*.lrdata",
)
SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation")
TIMES = re.compile(r"(19|20)\d\d(\D.*)?|\d{3}[A-Z0-9_]{5}")  # "2019", "2019-07 Rome", and "100CANON" of cameras


class Listing(NamedTuple):
    """The files below a folder, by relative path, sorted."""

    files: list[str]
    skipped: list[dict[str, str]]  # folders that cannot be read
    excluded: list[str]  # folders and files that were left out


class Labels(NamedTuple):
    """Labels of N images."""

    classes: list[str]
    labels: Int64[np.ndarray, " N"] | Bool[np.ndarray, "N L"] | None
    note: str  # how they were found, and the key that changes it


def walk(root: Path, exclude: str = "") -> Listing:
    """The files below a folder. Linked folders are followed, each folder once.

    Hidden files and folders, `JUNK`, what tcq itself has written, and what matches one of the patterns of `exclude`,
    separated by commas, are left out. A pattern fits a name, or a relative path.
    """
    patterns = [p.strip() for p in exclude.split(",") if p.strip()]
    skipped: list[dict[str, str]] = []
    excluded: list[str] = []

    def unreadable(error: OSError) -> None:
        skipped.append({"path": os.path.relpath(error.filename, root), "reason": f"cannot be read: {error.strerror}"})

    files, visited = [], set()
    for folder, subfolders, names in os.walk(root, onerror=unreadable, followlinks=True):
        signals.poll()
        here = os.path.relpath(folder, root)
        real = os.path.realpath(folder)
        if real in visited:  # a link to a folder that is already listed, or to one above it
            subfolders.clear()
            continue
        visited.add(real)
        if here != "." and _is_output(names, subfolders):
            excluded.append(here)
            subfolders.clear()
            continue
        paths = {name: os.path.normpath(os.path.join(here, name)) for name in (*subfolders, *names)}
        out = {n for n in paths if _matches(paths[n], patterns)}
        out |= {n for n in subfolders if any(fnmatch.fnmatchcase(n.lower(), junk) for junk in JUNK)}
        excluded += [paths[n] for n in sorted(out)]
        subfolders[:] = sorted(f for f in subfolders if not f.startswith(".") and f not in out)
        files += [paths[n] for n in names if not n.startswith(".") and n not in out]
    return Listing(sorted(files), skipped, excluded)


def _is_output(names: Sequence[str], subfolders: Sequence[str]) -> bool:
    """Whether a folder is a workdir, an index, parts of one, a sweep, or embeddings."""
    run = "config.json" in names and ("data.json" in names or "checkpoints" in subfolders)
    index = {"meta.json", "encoder.npz"} <= set(names)
    parts = "manifest.json" in names and any(n.startswith("part-") and n.endswith(".parquet") for n in names)
    return run or index or parts or ("table.csv" in names and "cells" in subfolders) or "img_emb" in subfolders


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, p) or fnmatch.fnmatchcase(os.path.basename(path), p) for p in patterns)


def labels(names: Sequence[str], rule: str, root: Path) -> Labels:
    """The labels of images by their relative paths.

    `data.labels` says which: "auto", "folders", "none" or a file.

    Raises SourceError if the file cannot be read, or lacks an image.
    """
    if rule == "none":
        return Labels([], None, "labels are off (data.labels)")
    return _of_folders(names, years=rule == "folders") if rule in LABELS else _of_file(names, Path(rule), root)


def _of_folders(names: Sequence[str], *, years: bool) -> Labels:
    """Classes by sub-folder; none where an image is in no sub-folder, or all are in the same."""
    below = _below_common(names)
    classes = {name.split(os.sep)[0] for name in below if os.sep in name}
    note = "the sub-folders are classes (data.labels)"
    if classes and all(os.sep in n for n in below) and {c.lower() for c in classes} <= set(SPLITS):
        note = f"the folders {', '.join(sorted(classes))} are parts, the folders below them classes (data.labels)"
        below = [name.partition(os.sep)[2] for name in below]
        classes = {name.split(os.sep)[0] for name in below if os.sep in name}
    if len(classes) < 2 or not all(os.sep in name for name in below):
        return Labels([], None, "no labels: the images are not in the folders of two or more classes (data.labels)")
    if not years and all(TIMES.fullmatch(c) for c in classes):
        return Labels(
            [], None, "no labels: the sub-folders are times or cameras (data.labels=folders makes them classes)"
        )
    ordered = sorted(classes)
    number = {c: i for i, c in enumerate(ordered)}
    return Labels(ordered, np.array([number[name.split(os.sep)[0]] for name in below], np.int64), note)


def _below_common(names: Sequence[str]) -> list[str]:
    """Relative paths below the deepest folder that holds all images."""
    common = os.path.commonpath([os.path.dirname(name) for name in names])
    return [os.path.relpath(name, common or ".") for name in names]


def _of_file(names: Sequence[str], path: Path, root: Path) -> Labels:
    """Labels of a CSV or JSON lines file.

    They are class numbers if each image has one label, else multi-hot rows.
    """
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise SourceError(
            f"data.labels {str(path)!r} cannot be read: {error.strerror}: use auto, folders, none, or a .csv or "
            f".jsonl file"
        ) from None
    rows = _csv_rows(text, path) if path.suffix == ".csv" else _json_rows(text, path)
    known = {os.path.relpath(os.path.join(root, p), root): [x for x in labels if x] for p, labels in rows}
    missing = [n for n in names if not known.get(n)]
    if missing:
        raise SourceError(
            f"data.labels {str(path)!r} has no label for {len(missing):,} of {len(names):,} images, the first is "
            f"{missing[0]!r}: paths must be relative to {root}; data.exclude leaves images out"
        )
    classes = sorted({label for name in names for label in known[name]})
    number = {c: i for i, c in enumerate(classes)}
    note = f"labels of {path.name}: {len(classes)} classes (data.labels)"
    if all(len(known[n]) == 1 for n in names):
        return Labels(classes, np.array([number[known[n][0]] for n in names], np.int64), note)
    hot = np.zeros((len(names), len(classes)), bool)
    for row, name in enumerate(names):
        hot[row, [number[label] for label in known[name]]] = True
    return Labels(classes, hot, note)


def _csv_rows(text: str, path: Path) -> Iterable[tuple[str, list[str]]]:
    """Rows of path,label[,label...]; a first row "path,label" is a heading."""
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        for i, row in enumerate(reader):
            if row and not (i == 0 and row[0].strip().lower() in ("path", "image", "file", "filename")):
                yield row[0].strip(), [label.strip() for label in row[1:]]
    except csv.Error as error:
        raise SourceError(f"{path}, line {reader.line_num}: {error}: rows must be path,label[,label ...]") from None


def _json_rows(text: str, path: Path) -> Iterable[tuple[str, list[str]]]:
    """Rows of {"path": ..., "label": ...} or {"path": ..., "labels": [...]}."""
    for number, line in enumerate(text.split("\n"), 1):  # a string of JSON may hold other ends of lines
        if line.strip():
            try:
                row = json.loads(line)
                labels = row["labels"] if "labels" in row else [row["label"]]
                if not isinstance(row["path"], str) or not isinstance(labels, list):
                    raise TypeError(f"path {row['path']!r}, labels {labels!r}")
                yield row["path"], [str(label) for label in labels]
            except (ValueError, KeyError, TypeError) as error:
                raise SourceError(
                    f"{path}, line {number}: {type(error).__name__}: {error}: it must be "
                    f'{{"path": ..., "label": ...}} or {{"path": ..., "labels": [...]}}'
                ) from None
