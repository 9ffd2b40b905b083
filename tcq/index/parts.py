"""Many processes encode a large collection in Parquet parts.

The processes know nothing of each other.

The files of a folder are cut into parts of a fixed number, and a part is named by a hash of the encoder and of the
names, sizes and dates of its files. A process writes the parts of its share that do not exist, so that any number of
processes, on any machines that share the folder, may be killed and started again. `join` makes an index of all parts.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet

from tcq import config as configs
from tcq import embed, encode
from tcq.data import cache, folders
from tcq.data.source import Source, SourceError
from tcq.index import changes, columns, contents, items, store
from tcq.index.contents import IndexFileError
from tcq.index.scan import is_embeddings, root_of
from tcq.models import retriever
from tcq.runtime import log, storage

MANIFEST = "manifest.json"
IMAGES = 4096  # files of a part
KEY = b"tcq"  # of the metadata of a part

logger = logging.getLogger(__name__)


class Written(NamedTuple):
    """What one process did."""

    parts: int  # of its share
    new: int
    images: int  # in the new parts
    skipped: int  # files in them that are not images


def write(
    workdir: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    which: str = "best",
    share: tuple[int, int] = (0, 1),
    size: int = IMAGES,
) -> Written:
    """Writes the parts of a folder of images that do not exist yet.

    With share (i, n) it writes only every n-th, from the i-th.
    Raises SourceError if the folder holds no files, and as `encode.load`.
    """
    encoder, root = encode.load(workdir, which=which), Path(root_of(images))
    if (
        storage.is_url(images)
        or is_embeddings(images)
        or (retriever.takes_embeddings(encoder.model) and not encoder.config.model.embedder)
    ):
        raise SourceError(f"{images}: must be a folder of images on a shared file system")
    listing = folders.walk(root, encoder.config.data.exclude)
    names = listing.files
    if not names:
        raise SourceError(f"image folder {str(root)!r} holds no files")
    identity = encoder_hash(encoder)
    chunks = [names[first : first + size] for first in range(0, len(names), size)]
    files = [f"part-{_hash(identity, root, chunk)}.parquet" for chunk in chunks]
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    manifest = {
        "root": str(root),
        "encoder": identity,
        "step": encoder.step,
        "parts": files,
        "skipped": listing.skipped,
    }
    text = json.dumps(manifest, indent=1) + "\n"
    if storage.read(out / MANIFEST) != text.encode():  # all processes write the same
        storage.write_text(out / MANIFEST, text)
    own = list(zip(files, chunks, strict=True))[share[0] :: share[1]]
    missing = [(file, chunk) for file, chunk in own if not (out / file).is_file()]
    progress, counts = log.Progress(logger, "encoding parts", len(missing), unit="parts"), np.zeros(2, np.int64)
    for done, (file, chunk) in enumerate(missing, 1):
        counts += _write_part(encoder, root, chunk, out / file, identity)
        progress.update(done)
    return Written(len(own), len(missing), int(counts[0]), int(counts[1]))


def encoder_hash(encoder: encode.Encoder) -> str:
    """A hash of the config and variables of an encoder."""
    digest = hashlib.sha256(configs.to_json(encoder.config).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(dict(encoder.variables)):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(np.asarray(leaf)).tobytes())
    return digest.hexdigest()


def _hash(identity: str, root: Path, names: Sequence[str]) -> str:
    digest = hashlib.sha256(f"{identity} {root}".encode("utf-8", "surrogateescape"))
    for name in names:
        try:
            state = os.stat(root / name)
            text = f"{name}\0{state.st_size}\0{state.st_mtime_ns}\n"
        except OSError:
            text = f"{name}\0unreadable\n"
        digest.update(text.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:24]


def _write_part(encoder: encode.Encoder, root: Path, names: Sequence[str], file: Path, identity: str) -> np.ndarray:
    """Decodes and encodes the files of a part.

    Returns the numbers of images and of skipped files.
    """
    entry = cache.decode([cache.Item(name, root / name) for name in names], cache.rule_of(encoder.config.data))
    codes = encode.codes(encoder, embed.inputs(encoder, entry.images, entry.digests))
    of = items.files(str(root), entry.names, entry.digests)
    table = pa.table(
        {
            "path": pa.array([os.fsencode(items.join(str(root), name)) for name in entry.names], pa.binary()),
            "hash": pa.array(entry.digests, pa.binary(cache.DIGEST_BYTES)),
            "size": pa.array(of.sizes, pa.int64()),
            "modified": pa.array(of.modified, pa.timestamp("us", "UTC")),
            **{f"code{m}": pa.array(codes[:, m]) for m in range(codes.shape[1])},
        }
    )
    with contextlib.suppress(pa.ArrowInvalid):  # a name that is not UTF-8: all stay bytes
        table = table.set_column(0, "path", table["path"].cast(pa.string()))
    about = {"encoder": identity, "root": str(root), "skipped": entry.skipped}
    table = table.replace_schema_metadata({KEY: json.dumps(about).encode()})
    with storage.atomic(file) as temporary:
        pyarrow.parquet.write_table(table, temporary, compression="zstd")
    return np.array([len(entry.names), len(entry.skipped)])


def join(
    workdir: str | Path,
    folder: str | Path,
    out: str | Path,
    *,
    which: str = "best",
    own_columns: str | Path | None = None,
) -> tuple[int, int]:
    """Makes an index of all parts of a folder.

    Returns the numbers of images and of skipped files.
    Raises IndexFileError if `out` exists, parts are missing, or they were written with another encoder.
    """
    store.refuse_existing(out)
    own = None if own_columns is None else columns.read(own_columns)
    encoder = encode.load(workdir, which=which)
    try:
        manifest: dict[str, Any] = json.loads(Path(folder, MANIFEST).read_text())
    except (OSError, ValueError):
        raise IndexFileError(f"{str(folder)!r} holds no parts: tcq encode writes them") from None
    if manifest["encoder"] != encoder_hash(encoder):
        raise IndexFileError(f"the parts in {str(folder)!r} were not written with {workdir} at step {encoder.step}")
    missing = [name for name in manifest["parts"] if not Path(folder, name).is_file()]
    if missing:
        raise IndexFileError(
            f"{len(missing):,} of {len(manifest['parts']):,} parts in {str(folder)!r} are missing: run tcq encode "
            f"again, which writes only these"
        )
    names: list[str] = []
    skipped: list[dict[str, str]] = list(manifest["skipped"])
    codes, files = [], []
    for name in manifest["parts"]:
        table = _read_part(Path(folder, name))
        start = manifest["root"].rstrip("/") + "/"
        names += [os.fsdecode(path).removeprefix(start) for path in table["path"].to_pylist()]
        files.append(table.select(["hash", "size", "modified"]))
        codes.append(_codes(table, encoder))
        skipped += json.loads(table.schema.metadata[KEY])["skipped"]
    stored = pa.concat_tables(files)
    digests, sizes, dates = (stored[c].to_pylist() for c in ("hash", "size", "modified"))
    source, ids = Source(None, None, names, [], skipped, digests=digests), np.arange(len(names))
    index = changes.with_rows(
        contents.empty(encoder),
        manifest["root"],
        source,
        ids.tolist(),
        ids,
        np.concatenate(codes),
        files=items.Files(names, digests, sizes, dates),
    )
    index = columns.joined(index.replace(rows=ids, next_id=len(ids)), own)
    with store.building(out):
        store.write(out, index, skipped)
    return len(names), len(skipped)


def _read_part(file: Path) -> pa.Table:
    try:
        return pyarrow.parquet.read_table(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise IndexFileError(f"{str(file)!r} is corrupted ({error}): delete it, and run tcq encode again") from None


def _codes(table: pa.Table, encoder: encode.Encoder) -> np.ndarray:
    q = encoder.config.quantizer
    return np.stack([table[f"code{m}"].to_numpy() for m in range(q.num_codebooks)], axis=1)
