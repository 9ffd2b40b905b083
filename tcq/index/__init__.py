"""An index on disk: codes, paths and the encoder that made them; build, open, add, remove, search.

A folder with codes.npy (N, M), paths.json, encoder.npz (its variables), config.json and meta.json (format, count and a
SHA-256 of every other file). It needs nothing else: the workdir it came from may be gone. Writing happens in a new folder
beside it, which takes its place at once; the one before the last change stays beside it, hidden, until the next.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util
from jaxtyping import Float, Int, UInt, UInt8

from tcq import config as configs
from tcq import encode, ranking
from tcq.data import sources
from tcq.data.images import ImageError, decode, resize_of
from tcq.evaluate import held_out as validation
from tcq.models import retriever
from tcq.runtime import processes
from tcq.runtime import storage as buckets
from tcq.runtime.log import say

FORMAT = 2
FILES = ("codes.npy", "paths.json", "encoder.npz", "config.json", "skipped.jsonl")


class IndexFileError(ValueError):
    """The index cannot be built, opened or changed; the message says why."""


class DamagedError(IndexFileError):
    """Its files are not what was written."""


class Index(NamedTuple):
    """N indexed images."""

    encoder: encode.Encoder
    codes: UInt[np.ndarray, "N M"]
    paths: list[str]
    norms: Float[np.ndarray, " N"] | None  # only for eval.score "cosine"


class Hit(NamedTuple):
    """One answer; higher scores are closer."""

    path: str
    score: float


def build(
    workdir: str | Path, images: str | Path, out: str | Path, *, which: str = "best"
) -> tuple[int, list[dict[str, str]]]:
    """Encodes every image below the folder `images` and writes the index `out`: how many, and what was skipped and why.

    The skipped files are also listed in skipped.jsonl of the index. Raises IndexFileError if `out` exists, and as
    `encode.load` and `sources.folder`; then nothing is left behind. Several processes share the work; the first one writes.
    """
    processes.on_first(lambda: _refuse_existing(out))
    encoder = encode.load(workdir, which=which)
    source = _read_folder(encoder, images)
    processes.same("images", source.names)
    codes = encode.codes(encoder, source.images)
    names = _paths(images, source.names)
    processes.on_first(lambda: _write(out, encoder, codes, names, source.skipped))
    return len(codes), source.skipped


def open_index(path: str | Path) -> Index:
    """Opens and verifies an index.

    Where it is damaged the one before its last change is opened, if it is still there, and that is said loudly.
    Raises IndexFileError if it is missing, incomplete, damaged, or of another format.
    """
    if buckets.is_url(path):
        return _open(buckets.brought(str(path)))
    path = Path(path)
    try:
        return _open(path)
    except DamagedError as error:
        try:
            index = _open(_previous(path))
        except IndexFileError:
            raise error from None
        say(f"DAMAGED: {error}")
        say(f"GOING BACK to the index before its last change, with {len(index.paths):,} images")
        return index


def _previous(path: Path) -> Path:
    """Where the index stays that a change replaced."""
    return path.resolve().with_name(f".{path.resolve().name}.previous")


def _open(path: Path) -> Index:
    meta = _meta(path)
    for name, digest in meta["sha256"].items():
        file = path / name
        if not file.is_file() or _sha256(file) != digest:
            raise DamagedError(f"{str(file)!r} is {'damaged' if file.is_file() else 'missing'}: build the index again")
    config = configs.from_json((path / "config.json").read_text())
    codes = np.load(path / "codes.npy", allow_pickle=False)
    with np.load(path / "encoder.npz", allow_pickle=False) as saved:
        variables = traverse_util.unflatten_dict({tuple(k.split("/")): saved[k] for k in saved.files})
    model = retriever.from_config(config)
    _check_variables(retriever.shapes(model, config.data.image_size), variables, path)
    encoder = encode.Encoder(config, model, variables, meta["step"])
    norms = np.asarray(ranking.code_norms(codes, encoder.codebooks)) if config.eval.score == "cosine" else None
    return Index(encoder, codes, json.loads((path / "paths.json").read_text()), norms)


def search(index: Index, images: UInt8[np.ndarray, "Q H W 3"], *, k: int = 10) -> list[list[Hit]]:
    """The k nearest indexed images of each query image, best first. Raises ValueError as `ranking.top_k`."""
    features = encode.encode(index.encoder, images).features
    scores, ids = search_features(index, features, k=k)
    return [[Hit(index.paths[i], float(s)) for i, s in zip(*row, strict=True)] for row in zip(ids, scores, strict=True)]


def search_features(
    index: Index, features: Float[np.ndarray, "Q D"], *, k: int
) -> tuple[Float[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
    """Scores and positions of the k nearest items of float features, best first."""
    config = index.encoder.config
    tables = ranking.lookup_table(
        features,
        index.encoder.codebooks,
        metric=config.eval.score,
        squared=config.eval.squared,
        normalize=validation.query_norm(config),
    )
    return ranking.top_k(tables, index.codes, k, norms=index.norms)


def read_queries(index: Index, paths: Sequence[str | Path]) -> UInt8[np.ndarray, "Q H W 3"]:
    """Query images as the encoder wants them. Raises IndexFileError naming the file and the reason."""
    data, pictures = index.encoder.config.data, []
    for path in paths:
        try:
            pictures.append(decode(path, size=data.image_size, resize=resize_of(data)))
        except ImageError as error:
            raise IndexFileError(f"query {str(path)!r}: {error}") from None
    return np.stack(pictures)


def picture_of(hit: Hit) -> str | bytes:
    """What `decode` takes for the image of an answer. Raises BucketError."""
    return (buckets.read(hit.path) or b"") if buckets.is_url(hit.path) else hit.path


def draw(
    index: Index, queries: UInt8[np.ndarray, "Q H W 3"], answers: Sequence[Sequence[Hit]], out: str | Path
) -> None:
    """A picture of queries and answers; an image that is gone since is drawn gray. Raises IndexFileError if unwritable."""
    from tcq import plots as pictures

    def picture(hit: Hit) -> np.ndarray:
        try:
            return decode(picture_of(hit), size=max(index.encoder.config.data.image_size, 96))
        except (ImageError, buckets.BucketError):
            return np.full((96, 96, 3), 128, np.uint8)

    captions = [[f"{h.score:.3g} {Path(h.path).name[-14:]}" for h in hits] for hits in answers]
    try:
        pictures.gallery(out, list(queries), [[picture(h) for h in hits] for hits in answers], captions=captions)
    except (OSError, ValueError) as error:
        raise IndexFileError(f"--gallery {str(out)!r} cannot be written: {error}") from None


def add(path: str | Path, images: str | Path) -> tuple[int, list[dict[str, str]]]:
    """Adds every image below a folder that is not in the index yet; returns how many, and what was skipped and why."""
    _refuse_bucket(path)
    index = open_index(path)
    source = _read_folder(index.encoder, images)
    named, known = _paths(images, source.names), set(index.paths)
    new = [i for i, name in enumerate(named) if name not in known]
    codes = encode.codes(index.encoder, source.images[np.array(new, np.int64)])
    paths = index.paths + [named[i] for i in new]
    processes.same("images", paths)
    both = np.concatenate([index.codes, codes])
    processes.on_first(lambda: _write(path, index.encoder, both, paths, source.skipped))
    return len(new), source.skipped


def remove(path: str | Path, names: list[str]) -> int:
    """Removes images by their path, or all below a folder; returns how many. Raises IndexFileError if none is found."""
    _refuse_bucket(path)
    index = open_index(path)
    gone = [n.rstrip("/") if buckets.is_url(n) else str(Path(n).expanduser().resolve()) for n in names]
    keep = [i for i, p in enumerate(index.paths) if not any(p == g or p.startswith(g + "/") for g in gone)]
    if len(keep) == len(index.paths):
        raise IndexFileError(f"none of {', '.join(names)} is in {str(path)!r}")
    paths = [index.paths[i] for i in keep]
    processes.on_first(lambda: _write(path, index.encoder, index.codes[keep], paths, []))
    return len(index.paths) - len(keep)


def _paths(images: str | Path, names: Sequence[str]) -> list[str]:
    """The whole names of images below a folder."""
    if buckets.is_url(images):
        return [str(buckets.join(images, name)) for name in names]
    root = Path(images).expanduser().resolve()
    return [str(root / name) for name in names]


def _refuse_bucket(path: str | Path) -> None:
    if buckets.is_url(path):
        raise IndexFileError(
            f"an index in a bucket cannot be changed, because its files could not be replaced at once: build it again, or "
            f"bring {path} here, change it, and send it to another place"
        )


def _read_folder(encoder: encode.Encoder, images: str | Path) -> sources.Source:
    data = encoder.config.data
    return sources.folder(images, size=data.image_size, resize=resize_of(data), cache_dir=data.cache_dir)


def _write(
    out: str | Path, encoder: encode.Encoder, codes: np.ndarray, paths: list[str], skipped: list[dict[str, str]]
) -> None:
    """Writes a whole index beside `out` and then puts it in its place; to a bucket, with meta.json as the last file."""
    if buckets.is_url(out):
        with tempfile.TemporaryDirectory(prefix="tcq-") as here:
            _write(Path(here, "index"), encoder, codes, paths, skipped)
            buckets.send(Path(here, "index"), str(out), last="meta.json")
        return
    out = Path(out).resolve()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        half = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise IndexFileError(f"{str(out)!r} cannot be written: {error.strerror}") from None
    try:
        half.chmod(0o755)
        np.save(half / "codes.npy", codes)
        (half / "paths.json").write_text(json.dumps(paths))
        (half / "config.json").write_text(configs.to_json(encoder.config))
        (half / "skipped.jsonl").write_text("".join(json.dumps(s) + "\n" for s in skipped))
        flat = traverse_util.flatten_dict(jax.tree.map(np.asarray, dict(encoder.variables)), sep="/")
        np.savez(half / "encoder.npz", **flat)
        meta = {
            "format": FORMAT,
            "count": len(paths),
            "bits": configs.bits(encoder.config),
            "step": encoder.step,
            "sha256": {name: _sha256(half / name) for name in FILES},
        }
        (half / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        if out.exists():
            old = _previous(out)
            shutil.rmtree(old, ignore_errors=True)
            out.rename(old)
            try:
                half.rename(out)
            except OSError:
                old.rename(out)
                raise
        else:
            shutil.rmtree(_previous(out), ignore_errors=True)  # of another index that was here
            half.rename(out)
    finally:
        shutil.rmtree(half, ignore_errors=True)


def _meta(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise DamagedError(f"index {str(path)!r} {'is not a folder' if path.exists() else 'does not exist'}")
    try:
        meta = json.loads((path / "meta.json").read_text())
        found = meta["format"]
        missing = set(FILES) - meta["sha256"].keys()
    except (OSError, ValueError, KeyError, TypeError):
        raise DamagedError(f"{str(path)!r} is not an index: it holds no readable meta.json") from None
    if found != FORMAT or missing:
        raise IndexFileError(
            f"index {str(path)!r} has format {found}, this version of tcq reads {FORMAT}: build it again"
        )
    return meta


def _check_variables(want: Mapping[str, Any], got: Mapping[str, Any], path: Path) -> None:
    shapes = [
        {k: tuple(np.shape(v)) for k, v in traverse_util.flatten_dict(dict(tree), sep="/").items()}
        for tree in (want, got)
    ]
    if shapes[0] != shapes[1]:
        odd = sorted(k for k in shapes[0].keys() | shapes[1].keys() if shapes[0].get(k) != shapes[1].get(k))
        raise IndexFileError(
            f"the encoder in {str(path)!r} does not fit its config; these variables differ: {', '.join(odd)}"
        )


def _refuse_existing(out: str | Path) -> None:
    if buckets.read(buckets.join(out, "meta.json")) is not None if buckets.is_url(out) else Path(out).exists():
        raise IndexFileError(f"{str(out)!r} exists: choose another --out, or delete it first")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
