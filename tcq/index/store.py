"""The files of an index, and replacing them while others read.

An index is a folder with meta.json, encoder.npz (the variables of the encoder), config.json, skipped.jsonl, and the
columns of its items: codes (N, M), hashes (N, 20) of the contents, roots (N,) as numbers of `meta["roots"]`, and the
names below these as UTF-8 with their offsets (N + 1,). It needs neither the images nor the workdir.

A column is a file named by its own hash, and meta.json names the columns. A change writes new columns and then replaces
meta.json, so that a reader finds the old or the new index. The version before the last change is kept.
"""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util
from jaxtyping import Float, UInt

from tcq import config as configs
from tcq import encode, ranking
from tcq import workdir as workdirs
from tcq.models import retriever
from tcq.runtime import devices, locks, storage

FORMAT = 3
ENCODER, CONFIG, SKIPPED, META, PREVIOUS = (
    "encoder.npz",
    "config.json",
    "skipped.jsonl",
    "meta.json",
    "meta.previous.json",
)
COLUMNS = ("codes", "hashes", "roots", "names", "offsets")
ATTEMPTS = 100  # to read an index that is being replaced

logger = logging.getLogger(__name__)


class IndexFileError(ValueError):
    """The index cannot be built, opened or changed; the message says why."""


class CorruptedError(IndexFileError):
    """The files of the index are not what was written."""


class Paths(Sequence[str]):
    """The paths of N images, each a root and a name below it."""

    def __init__(self, roots: Sequence[str], numbers: np.ndarray, names: np.ndarray, offsets: np.ndarray) -> None:
        self.roots, self.numbers = list(roots), numbers
        self._names, self._offsets = names, offsets

    @classmethod
    def of(cls, roots: Sequence[str], numbers: Sequence[int] | np.ndarray, names: Sequence[str]) -> "Paths":
        """From roots, the number of the root of each image, and its name. Roots without images are left out."""
        used, numbers = np.unique(np.asarray(numbers, np.int64), return_inverse=True)
        roots = [roots[i] for i in used.tolist()] or roots
        raw = [os.fsencode(name) for name in names]
        offsets = np.concatenate([[0], np.cumsum([len(r) for r in raw])]).astype(np.int64)
        return cls(roots, np.asarray(numbers, np.uint16), np.frombuffer(b"".join(raw), np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        root, name = self.roots[self.numbers[i]], self.name(int(i))
        return str(storage.join(root, name)) if root else name

    def name(self, i: int) -> str:
        """The name of an image below its root."""
        i = range(len(self))[i]
        return os.fsdecode(self._names[self._offsets[i] : self._offsets[i + 1]].tobytes())

    def with_roots(self, roots: Sequence[str]) -> "Paths":
        """The same images below other roots, in the order of these."""
        return Paths(roots, self.numbers, self._names, self._offsets)

    def columns(self) -> dict[str, np.ndarray]:
        """The arrays that are stored."""
        return {"roots": self.numbers, "names": self._names, "offsets": self._offsets}


class Index(NamedTuple):
    """N indexed images."""

    encoder: encode.Encoder
    codes: UInt[np.ndarray, "N M"]
    paths: Paths
    hashes: UInt[np.ndarray, "N 20"]  # of the contents of the files; 0 for embeddings
    norms: Float[np.ndarray, " N"] | None  # only for eval.score "cosine"


def open_index(path: str | Path) -> Index:
    """Opens and verifies an index.

    If it is corrupted, the version before its last change is opened, with a warning, if it is still there.
    Raises IndexFileError if it is missing, incomplete, corrupted, or of another format.
    """
    path = storage.download(str(path)) if storage.is_url(path) else Path(path)
    try:
        return _open_current(path)
    except CorruptedError as error:
        try:
            index = _open(path, _read_meta(path, PREVIOUS))
        except IndexFileError:
            raise error from None
        logger.warning(f"corrupted: {error}")
        logger.warning(f"falling back to the index before its last change, with {len(index.paths):,} images")
        return index


def _open_current(path: Path) -> Index:
    """The index of meta.json, which another process may replace meanwhile."""
    meta = _read_meta(path, META)
    for _ in range(ATTEMPTS):
        try:
            return _open(path, meta)
        except CorruptedError:
            now = _read_meta(path, META)
            if now == meta:
                raise
            meta = now
    raise IndexFileError(f"index {str(path)!r} is replaced faster than it can be read")


def _open(path: Path, meta: dict[str, Any]) -> Index:
    for name, digest in meta["sha256"].items():
        file = path / name
        try:
            corrupted = None if _sha256(file) == digest else "corrupted"
        except FileNotFoundError:
            corrupted = "missing"
        if corrupted:
            raise CorruptedError(f"{str(file)!r} is {corrupted}: build the index again")
    config = configs.from_json((path / CONFIG).read_text())
    try:
        columns = {name: np.load(path / meta["columns"][name], allow_pickle=False) for name in COLUMNS}
    except FileNotFoundError as error:
        raise CorruptedError(f"{error.filename!r} is missing: build the index again") from None
    with np.load(path / ENCODER, allow_pickle=False) as saved:
        variables = traverse_util.unflatten_dict({tuple(k.split("/")): saved[k] for k in saved.files})
    model = retriever.from_config(config)
    _check_variables(retriever.shapes(model, config.data.image_size), variables, path)
    encoder = encode.Encoder(config, model, devices.place(variables), meta["step"])
    codes = columns["codes"]
    norms = np.asarray(ranking.code_norms(codes, encoder.codebooks)) if config.eval.score == "cosine" else None
    paths = Paths(meta["roots"], columns["roots"], columns["names"], columns["offsets"])
    return Index(encoder, codes, paths, columns["hashes"], norms)


def _read_meta(path: Path, name: str) -> dict[str, Any]:
    if not path.is_dir():
        raise CorruptedError(f"index {str(path)!r} {'is not a folder' if path.exists() else 'not found'}")
    try:
        meta: dict[str, Any] = json.loads((path / name).read_text())
        version = meta["format"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CorruptedError(f"{str(path)!r} is not an index: it has no readable {name}") from None
    if version != FORMAT:
        raise IndexFileError(
            f"index {str(path)!r} has format {version}, this version of tcq reads {FORMAT}: build it again"
        )
    if not {"columns", "roots", "step", "sha256"} <= meta.keys() or set(meta["columns"]) != set(COLUMNS):
        raise CorruptedError(f"{str(path)!r} is not an index: {name} is incomplete")
    return meta


def _check_variables(like: Mapping[str, Any], variables: Mapping[str, Any], path: Path) -> None:
    want, have = (
        {k: tuple(np.shape(v)) for k, v in traverse_util.flatten_dict(dict(tree), sep="/").items()}
        for tree in (like, variables)
    )
    if want != have:
        different = sorted(k for k in want.keys() | have.keys() if want.get(k) != have.get(k))
        raise IndexFileError(
            f"the encoder in {str(path)!r} does not fit its config: {', '.join(different)} differ; build it again"
        )


def refuse_existing(out: str | Path) -> None:
    """Raises IndexFileError if there is something at the path of a new index but what a killed run has left."""
    if storage.is_url(out):
        exists = storage.read(storage.join(out, META)) is not None
    else:
        folder = Path(out)
        files = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
        unfinished = META not in files and all(_is_own(name) for name in files)
        exists = folder.exists() and not (folder.is_dir() and unfinished)
    if exists:
        raise IndexFileError(f"{str(out)!r} exists: choose another --out, or delete it first")


@contextlib.contextmanager
def building(path: str | Path) -> Iterator[None]:
    """Holds the lock of a new index; a bucket has none. Raises IndexFileError as `refuse_existing`."""
    lock = contextlib.nullcontext() if storage.is_url(path) else locks.lock(path, wait=True)
    with lock:
        refuse_existing(path)
        yield


@contextlib.contextmanager
def changing(path: str | Path) -> Iterator[None]:
    """Holds the lock of an index; a second writer waits. Raises IndexFileError if there is none, or in a bucket."""
    if storage.is_url(path):
        raise IndexFileError(
            f"an index in a bucket cannot be changed, because its files cannot be replaced together: build it again, "
            f"or download {path}, change it, and upload it under another name"
        )
    if not (Path(path) / PREVIOUS).is_file():  # by which a corrupted one is opened
        _read_meta(Path(path), META)
    with locks.lock(path, wait=True):
        yield


def write(out: str | Path, index: Index, skipped: Sequence[dict[str, str]]) -> None:
    """Writes an index, or replaces one; in a bucket meta.json is the last file. Raises IndexFileError."""
    if storage.is_url(out):
        with tempfile.TemporaryDirectory(prefix="tcq-") as temporary:
            write(Path(temporary, "index"), index, skipped)
            storage.upload(Path(temporary, "index"), str(out), last=META)
        return
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write_files(out, index, skipped)
        _delete_unused(out)
    except OSError as error:
        for file in out.iterdir() if out.is_dir() and not (out / META).exists() else ():
            if _is_own(file.name) and file.name != locks.NAME:
                file.unlink(missing_ok=True)
        raise IndexFileError(f"{str(out)!r} cannot be written: {error.strerror or error}") from None


def _write_files(folder: Path, index: Index, skipped: Sequence[dict[str, str]]) -> None:
    encoder = index.encoder
    if not (folder / META).exists():
        storage.write_text(folder / CONFIG, configs.to_json(encoder.config))
        flat = traverse_util.flatten_dict(jax.tree.map(np.asarray, dict(encoder.variables)), sep="/")
        with storage.atomic(folder / ENCODER) as temporary, open(temporary, "wb") as file:
            np.savez(file, **flat)
    columns = {"codes": index.codes, "hashes": index.hashes, **index.paths.columns()}
    names = {name: _write_column(folder, name, column) for name, column in columns.items()}
    storage.write_text(folder / SKIPPED, workdirs.json_lines(skipped))
    meta = {
        "format": FORMAT,
        "count": len(index.paths),
        "bits": configs.bits(encoder.config),
        "step": encoder.step,
        "roots": index.paths.roots,
        "columns": names,
        "sha256": {name: _sha256(folder / name) for name in (*names.values(), CONFIG, ENCODER)},
    }
    before = storage.read(folder / META)
    if before is not None:
        storage.write_text(folder / PREVIOUS, before.decode())
    storage.write_text(folder / META, json.dumps(meta, indent=2) + "\n")


def _write_column(folder: Path, name: str, column: np.ndarray) -> str:
    """Writes a column to a file named by its contents, and returns the name."""
    with tempfile.NamedTemporaryFile(prefix=storage.TEMPORARY, dir=folder, delete=False) as file:
        np.save(file, np.ascontiguousarray(column))
        file.flush()
        os.fsync(file.fileno())
    temporary = Path(file.name)
    temporary.chmod(0o644)
    target = folder / f"{name}-{_sha256(temporary)[:16]}.npy"
    temporary.replace(target)
    return target.name


def _delete_unused(folder: Path) -> None:
    """Deletes what neither this version nor the one before needs: older columns, and what killed writers have left."""
    used: set[str] = set()
    for name in (META, PREVIOUS):
        with contextlib.suppress(IndexFileError):
            used |= set(_read_meta(folder, name)["columns"].values())
    for file in folder.iterdir():
        if file.name not in used and (file.name.startswith(storage.TEMPORARY) or _is_column(file.name)):
            file.unlink(missing_ok=True)


def _is_column(name: str) -> bool:
    return name.endswith(".npy") and name.partition("-")[0] in COLUMNS


def _is_own(name: str) -> bool:
    """Whether a file of this name is written by tcq into the folder of an index."""
    fixed = (ENCODER, CONFIG, SKIPPED, META, PREVIOUS, locks.NAME)
    return name in fixed or _is_column(name) or name.startswith(storage.TEMPORARY)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
