"""The files of an index, and replacing them as a whole.

An index is a folder with codes.npy (N, M), paths.json, encoder.npz (the variables of the encoder), config.json,
skipped.jsonl and meta.json (format, count and a SHA-256 of every other file). It needs neither the images nor the
workdir. A change writes a new folder and renames it; the previous version is kept beside it, hidden, until the next
change.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
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
from tcq.runtime import devices, storage

FORMAT = 2
CODES, PATHS, ENCODER, CONFIG, SKIPPED, META = (
    "codes.npy",
    "paths.json",
    "encoder.npz",
    "config.json",
    "skipped.jsonl",
    "meta.json",
)
FILES = (CODES, PATHS, ENCODER, CONFIG, SKIPPED)

logger = logging.getLogger(__name__)


class IndexFileError(ValueError):
    """The index cannot be built, opened or changed; the message says why."""


class CorruptedError(IndexFileError):
    """The files of the index are not what was written."""


class Index(NamedTuple):
    """N indexed images."""

    encoder: encode.Encoder
    codes: UInt[np.ndarray, "N M"]
    paths: list[str]
    norms: Float[np.ndarray, " N"] | None  # only for eval.score "cosine"


def open_index(path: str | Path) -> Index:
    """Opens and verifies an index.

    If it is corrupted, the version before its last change is opened, with a warning, if it is still there.
    Raises IndexFileError if it is missing, incomplete, corrupted, or of another format.
    """
    if storage.is_url(path):
        return _open(storage.download(str(path)))
    path = Path(path)
    try:
        return _open(path)
    except CorruptedError as error:
        try:
            index = _open(_previous(path))
        except IndexFileError:
            raise error from None
        logger.warning(f"corrupted: {error}")
        logger.warning(f"falling back to the index before its last change, with {len(index.paths):,} images")
        return index


def _previous(path: Path) -> Path:
    """The folder of the version before the last change."""
    return path.resolve().with_name(f".{path.resolve().name}.previous")


def _open(path: Path) -> Index:
    meta = _read_meta(path)
    for name, digest in meta["sha256"].items():
        file = path / name
        if not file.is_file() or _sha256(file) != digest:
            raise CorruptedError(
                f"{str(file)!r} is {'corrupted' if file.is_file() else 'missing'}: build the index again"
            )
    config = configs.from_json((path / CONFIG).read_text())
    codes = np.load(path / CODES, allow_pickle=False)
    with np.load(path / ENCODER, allow_pickle=False) as saved:
        variables = traverse_util.unflatten_dict({tuple(k.split("/")): saved[k] for k in saved.files})
    model = retriever.from_config(config)
    _check_variables(retriever.shapes(model, config.data.image_size), variables, path)
    encoder = encode.Encoder(config, model, devices.place(variables), meta["step"])
    norms = np.asarray(ranking.code_norms(codes, encoder.codebooks)) if config.eval.score == "cosine" else None
    return Index(encoder, codes, json.loads((path / PATHS).read_text()), norms)


def _read_meta(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise CorruptedError(f"index {str(path)!r} {'is not a folder' if path.exists() else 'not found'}")
    try:
        meta = json.loads((path / META).read_text())
        version = meta["format"]
        missing = set(FILES) - meta["sha256"].keys()
    except (OSError, ValueError, KeyError, TypeError):
        raise CorruptedError(f"{str(path)!r} is not an index: it has no readable {META}") from None
    if version != FORMAT or missing:
        raise IndexFileError(
            f"index {str(path)!r} has format {version}, this version of tcq reads {FORMAT}: build it again"
        )
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
    """Raises IndexFileError if there is something at the path of a new index."""
    exists = Path(out).exists()
    if storage.is_url(out):
        exists = storage.read(storage.join(out, META)) is not None
    if exists:
        raise IndexFileError(f"{str(out)!r} exists: choose another --out, or delete it first")


def refuse_bucket(path: str | Path) -> None:
    """Raises IndexFileError if an index that is to be changed is in a bucket."""
    if storage.is_url(path):
        raise IndexFileError(
            f"an index in a bucket cannot be changed, because its files cannot be replaced together: build it again, "
            f"or download {path}, change it, and upload it under another name"
        )


def write(
    out: str | Path, encoder: encode.Encoder, codes: np.ndarray, paths: list[str], skipped: list[dict[str, str]]
) -> None:
    """Writes an index, or replaces one as a whole; in a bucket meta.json is the last file. Raises IndexFileError."""
    if storage.is_url(out):
        with tempfile.TemporaryDirectory(prefix="tcq-") as temporary:
            write(Path(temporary, "index"), encoder, codes, paths, skipped)
            storage.upload(Path(temporary, "index"), str(out), last=META)
        return
    out = Path(out).resolve()
    try:
        with storage.temporary_folder(out) as folder:
            _write_files(folder, encoder, codes, paths, skipped)
            _replace(folder, out)
    except OSError as error:
        raise IndexFileError(f"{str(out)!r} cannot be written: {error.strerror or error}") from None


def _write_files(
    folder: Path, encoder: encode.Encoder, codes: np.ndarray, paths: list[str], skipped: list[dict[str, str]]
) -> None:
    np.save(folder / CODES, codes)
    (folder / PATHS).write_text(json.dumps(paths))
    (folder / CONFIG).write_text(configs.to_json(encoder.config))
    (folder / SKIPPED).write_text(workdirs.json_lines(skipped))
    flat = traverse_util.flatten_dict(jax.tree.map(np.asarray, dict(encoder.variables)), sep="/")
    np.savez(folder / ENCODER, **flat)
    meta = {
        "format": FORMAT,
        "count": len(paths),
        "bits": configs.bits(encoder.config),
        "step": encoder.step,
        "sha256": {name: _sha256(folder / name) for name in FILES},
    }
    (folder / META).write_text(json.dumps(meta, indent=2) + "\n")


def _replace(folder: Path, out: Path) -> None:
    """Renames a complete folder to `out`, and what is there to its previous version."""
    previous = _previous(out)
    shutil.rmtree(previous, ignore_errors=True)
    if not out.exists():
        folder.rename(out)
        return
    out.rename(previous)
    try:
        folder.rename(out)
    except OSError:
        previous.rename(out)
        raise


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
