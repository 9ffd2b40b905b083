"""The files of an index, and replacing them while others read.

An index is a folder with meta.json, encoder.npz (the variables of the encoder), config.json, skipped.jsonl, and the
rows of its items (see items.py) in segments. It needs neither the images nor the workdir.

A segment is a file that is named by its own hash and never changed. A change writes one segment with the rows that are
new, and the numbers of all rows that are out of date; it then replaces meta.json, so that a reader finds the old or the
new index. The version before the last change is kept.
"""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
from flax import traverse_util
from ml_collections import ConfigDict

from tcq import config as configs
from tcq import encode
from tcq import workdir as workdirs
from tcq.index import items
from tcq.index.contents import CorruptedError, Index, IndexFileError, Segment
from tcq.models import retriever
from tcq.runtime import devices, locks, storage

FORMAT = 4
ENCODER, CONFIG, SKIPPED, META, PREVIOUS, VERDICTS = (
    "encoder.npz",
    "config.json",
    "skipped.jsonl",
    "meta.json",
    "meta.previous.json",
    "not_copies.jsonl",
)
KINDS = ("items", "removed", "columns")  # of the files that a change writes
NEEDED = {"segments", "removed", "columns", "roots", "next_id", "step", "sha256"}  # of meta.json
TEXT = "text"  # key of meta.json as text, beside its values
ATTEMPTS = 100  # to read an index that is being replaced

logger = logging.getLogger(__name__)


def open_index(path: str | Path, *, verify: bool = True) -> Index:
    """Opens an index; its files are mapped.

    With `verify` their hashes are compared, as `verify` does.
    If the index is corrupted, the version before its last change is opened, with a warning, if it is still there.
    Raises IndexFileError if it is missing, incomplete, corrupted, or of another format.
    """
    path = storage.download(str(path)) if storage.is_url(path) else Path(path)
    try:
        return _open_current(path, verify)
    except CorruptedError as error:
        try:
            index = _open(path, _read_meta(path, PREVIOUS), verify)
        except IndexFileError:
            raise error from None
        logger.warning(f"corrupted: {error}")
        logger.warning(f"falling back to the index before its last change, with {len(index.paths):,} images")
        return index


def verify(path: str | Path) -> dict[str, int]:
    """Compares every file of an index with the hash that was written.

    Returns sizes in bytes by name.
    Raises IndexFileError as `open_index`, and CorruptedError at the first file that is missing or different.
    """
    path = storage.download(str(path)) if storage.is_url(path) else Path(path)
    for _ in range(ATTEMPTS):
        meta = _read_meta(path, META)
        try:
            for name, digest in meta["sha256"].items():
                _compare(path / name, digest)
            _open(path, meta, False)
            return {name: (path / name).stat().st_size for name in meta["sha256"]}
        except CorruptedError:
            if _read_meta(path, META) == meta:
                raise
    raise IndexFileError(f"index {str(path)!r} is replaced faster than it can be read")


def _open_current(path: Path, verify: bool) -> Index:
    """The index of meta.json, which another process may replace meanwhile."""
    meta = _read_meta(path, META)
    for _ in range(ATTEMPTS):
        try:
            return _open(path, meta, verify)
        except CorruptedError:
            now = _read_meta(path, META)
            if now == meta:
                raise
            meta = now
    raise IndexFileError(f"index {str(path)!r} is replaced faster than it can be read")


def _open(path: Path, meta: dict[str, Any], verify: bool) -> Index:
    for name, digest in meta["sha256"].items() if verify else ():
        _compare(path / name, digest)
    _compare(path / CONFIG, meta["sha256"][CONFIG])
    if not (path / ENCODER).is_file():
        raise CorruptedError(f"{str(path / ENCODER)!r} is missing: build the index again")
    config = configs.from_json((path / CONFIG).read_text())
    schema = items.schema(config.quantizer.num_codebooks, config.quantizer.num_codewords)
    segments = tuple(Segment(file, rows, meta["sha256"][file]) for file, rows in meta["segments"])
    parts = [_map_table(path / segment.file, segment.rows) for segment in segments]
    if any(part.schema != schema for part in parts):
        raise CorruptedError(f"{str(path)!r} has rows that do not fit its config: build the index again")
    table = pa.concat_tables(parts) if parts else schema.empty_table()
    own = None
    if meta["columns"]:
        file, rows = meta["columns"]
        own = Segment(file, rows, meta["sha256"][file])
    return Index(
        config,
        lambda: _load_encoder(path, config, meta),
        table,
        _live_rows(path, meta, table),
        tuple(meta["roots"]),
        meta["next_id"],
        meta["step"],
        {name: meta["sha256"][name] for name in (CONFIG, ENCODER)},
        segments,
        _map_table(path / own.file, own.rows) if own else None,
        own,
        meta[TEXT],
    )


def _live_rows(path: Path, meta: dict[str, Any], table: pa.Table) -> np.ndarray:
    """The rows that are not out of date, in the order of their ids."""
    if meta["removed"] is None:
        rows = np.arange(len(table))
    else:
        try:
            removed = np.load(path / meta["removed"], allow_pickle=False)
        except (OSError, ValueError, EOFError):
            raise CorruptedError(f"{str(path / meta['removed'])!r} is missing or corrupted") from None
        live = np.ones(len(table), bool)
        live[removed] = False
        rows = np.flatnonzero(live)
    ids = table["id"].to_numpy()[rows]
    return rows if (np.diff(ids) > 0).all() else rows[np.argsort(ids, kind="stable")]


def _map_table(file: Path, count: int) -> pa.Table:
    try:
        with pa.memory_map(str(file)) as source:
            table = pa.ipc.open_file(source).read_all()
    except FileNotFoundError:
        raise CorruptedError(f"{str(file)!r} is missing: build the index again") from None
    except (OSError, pa.ArrowInvalid) as error:
        raise CorruptedError(f"{str(file)!r} is corrupted ({str(error)[:100]}): build the index again") from None
    if len(table) != count:
        raise CorruptedError(f"{str(file)!r} is corrupted: it has {len(table):,} rows of {count:,}")
    return table


def _compare(file: Path, digest: str) -> None:
    try:
        what = None if _sha256(file) == digest else "corrupted"
    except FileNotFoundError:
        what = "missing"
    if what:
        raise CorruptedError(f"{str(file)!r} is {what}: build the index again")


def _load_encoder(path: Path, config: ConfigDict, meta: dict[str, Any]) -> encode.Encoder:
    _compare(path / ENCODER, meta["sha256"][ENCODER])
    with np.load(path / ENCODER, allow_pickle=False) as saved:
        variables = traverse_util.unflatten_dict({tuple(k.split("/")): saved[k] for k in saved.files})
    model = retriever.from_config(config)
    _check_variables(retriever.shapes(model, config.data.image_size), variables, path)
    return encode.Encoder(config, model, devices.place(variables), meta["step"])


def _read_meta(path: Path, name: str) -> dict[str, Any]:
    if not path.is_dir():
        raise CorruptedError(f"index {str(path)!r} {'is not a folder' if path.exists() else 'not found'}")
    try:
        text = (path / name).read_text()
        meta: dict[str, Any] = json.loads(text)
        version = meta["format"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CorruptedError(f"{str(path)!r} is not an index: it has no readable {name}") from None
    if version != FORMAT:
        raise IndexFileError(
            f"index {str(path)!r} has format {version}, this version of tcq reads {FORMAT}: build it again"
        )
    if not meta.keys() >= NEEDED:
        raise CorruptedError(f"{str(path)!r} is not an index: {name} is incomplete")
    return meta | {TEXT: text}


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
    """Raises IndexFileError if there is something at the path of a new index.

    What a killed run has left does not count.
    """
    if storage.is_url(out):
        exists = storage.read(storage.join(out, META)) is not None
    else:
        folder = Path(out)
        files = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
        marked = locks.NAME in files or not files & {CONFIG, ENCODER, SKIPPED, VERDICTS}
        unfinished = META not in files and marked and all(_is_own(name) for name in files)
        exists = folder.exists() and not (folder.is_dir() and unfinished)
    if exists:
        raise IndexFileError(f"{str(out)!r} exists: choose another --out, or delete it first")


@contextlib.contextmanager
def building(path: str | Path) -> Iterator[None]:
    """Holds the lock of a new index; a bucket has none.

    Raises IndexFileError as `refuse_existing`.
    """
    lock = contextlib.nullcontext() if storage.is_url(path) else locks.lock(path, wait=True)
    with lock:
        refuse_existing(path)
        yield


@contextlib.contextmanager
def changing(path: str | Path) -> Iterator[None]:
    """Holds the lock of an index; a second writer waits.

    Raises IndexFileError if there is no index, or it is in a bucket.
    """
    if storage.is_url(path):
        raise IndexFileError(
            f"an index in a bucket cannot be changed, because its files cannot be replaced together: build it again, "
            f"or download {path}, change it, and upload it under another name"
        )
    if not (Path(path) / PREVIOUS).is_file():  # by which a corrupted one is opened
        _read_meta(Path(path), META)
    with locks.lock(path, wait=True):
        yield


def write(out: str | Path, index: Index, skipped: Sequence[dict[str, str]] | None) -> None:
    """Writes an index, or what is new in it; in a bucket meta.json is the last file.

    `skipped` replaces skipped.jsonl, unless it is None. Raises IndexFileError.
    """
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


def _write_files(folder: Path, index: Index, skipped: Sequence[dict[str, str]] | None) -> None:
    sha256 = dict(index.sha256) or _write_encoder(folder, index.encoder)
    done = sum(segment.rows for segment in index.segments)
    new = index.table.slice(done)
    segments = [*index.segments, *([_write_table(folder, "items", new)] if len(new) else [])]
    own = index.columns_segment
    if own is None and index.columns is not None:
        own = _write_table(folder, "columns", index.columns)
    out_of_date = np.setdiff1d(np.arange(len(index.table)), index.rows, assume_unique=True)
    removed = _write_file(folder, "removed.npy", lambda file: np.save(file, out_of_date)) if len(out_of_date) else None
    named = {segment.file: segment.sha256 for segment in (*segments, own, removed) if segment}
    for name in named:
        if not (folder / name).is_file():
            raise IndexFileError(f"{str(folder / name)!r} is missing: the index was changed without its lock")
    if skipped is not None:
        storage.write_text(folder / SKIPPED, workdirs.json_lines(skipped))
    meta = {
        "format": FORMAT,
        "count": len(index.rows),
        "bits": configs.bits(index.config),
        "step": index.step,
        "roots": index.roots,
        "next_id": index.next_id,
        "segments": [[segment.file, segment.rows] for segment in segments],
        "removed": removed.file if removed else None,
        "columns": [own.file, own.rows] if own else None,
        "sha256": named | sha256,
    }
    if index.version:  # of META, or of PREVIOUS if META is corrupted
        storage.write_text(folder / PREVIOUS, index.version)
    storage.write_text(folder / META, json.dumps(meta, indent=2) + "\n")


def _write_encoder(folder: Path, encoder: encode.Encoder) -> dict[str, str]:
    storage.write_text(folder / CONFIG, configs.to_json(encoder.config))
    flat = traverse_util.flatten_dict(jax.tree.map(np.asarray, dict(encoder.variables)), sep="/")
    with storage.atomic(folder / ENCODER) as temporary, open(temporary, "wb") as file:
        np.savez(file, **flat)
    return {name: _sha256(folder / name) for name in (CONFIG, ENCODER)}


def _write_table(folder: Path, kind: str, table: pa.Table) -> Segment:
    def save(file: Any) -> None:
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table.combine_chunks())

    return _write_file(folder, f"{kind}.arrow", save)._replace(rows=len(table))


def _write_file(folder: Path, name: str, save: Callable[[Any], None]) -> Segment:
    """Writes a file that is named by its contents."""
    kind, _, suffix = name.partition(".")
    with tempfile.NamedTemporaryFile(prefix=storage.TEMPORARY, dir=folder, delete=False) as file:
        temporary = Path(file.name)
        try:
            save(file)
            file.flush()
            os.fsync(file.fileno())
            temporary.chmod(0o644)
            digest = _sha256(temporary)
            target = folder / f"{kind}-{digest[:16]}.{suffix}"
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    return Segment(target.name, 0, digest)


def _delete_unused(folder: Path) -> None:
    """Deletes what neither this version nor the one before needs.

    These are older files, and what killed writers have left.
    """
    used: set[str] = set()
    for name in (META, PREVIOUS):
        with contextlib.suppress(IndexFileError):
            used |= set(_read_meta(folder, name)["sha256"])
    for file in folder.iterdir():
        if file.name not in used and (file.name.startswith(storage.TEMPORARY) or _is_rows(file.name)):
            file.unlink(missing_ok=True)


def _is_rows(name: str) -> bool:
    return name.endswith((".arrow", ".npy")) and name.partition("-")[0] in KINDS


def _is_own(name: str) -> bool:
    """Whether a file of this name is written by tcq into the folder of an index."""
    fixed = (ENCODER, CONFIG, SKIPPED, META, PREVIOUS, VERDICTS, locks.NAME)
    return name in fixed or _is_rows(name) or name.startswith(storage.TEMPORARY)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
