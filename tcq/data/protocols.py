"""Which images are queries, which the database, which train the model, which validate it. Pure functions of their arguments."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64
from ml_collections import ConfigDict

from tcq.data.sources import Source


class ProtocolError(ValueError):
    """The images do not fit the protocol; the message says what was expected."""


class Split(NamedTuple):
    """Indices into the images in official order. Validation is carved from the training images and is disjoint from them."""

    query: Int64[np.ndarray, " Q"]
    database: Int64[np.ndarray, " N"]
    train: Int64[np.ndarray, " T"]
    validation: Int64[np.ndarray, " V"]


PROTOCOLS = ("seeded", "cifar10_spq")


def split(name: str, num_images: int, *, query: float, validation: float, seed: int) -> Split:
    """The named split of `num_images` images.

    * "seeded": `query` of the images, drawn by `seed`, are queries; all others are the database and the training set.
    * "cifar10_spq": SPQ's: the 10,000 test images are queries, the 50,000 training images database and training set
      (official order, training images first); `query` is not used.

    From the training set, `validation` of its images are drawn by `seed` and held out for validation; they stay in the
    database. All arrays are sorted. Raises ProtocolError for an unknown name, a share not in [0, 1), or another number of
    images than the protocol's.
    """
    if not (0 <= query < 1 and 0 <= validation < 1):
        raise ProtocolError(f"shares must be in [0, 1): query {query}, validation {validation}")
    random = np.random.RandomState(seed)  # the legacy generator's stream is frozen: the same split with every NumPy
    if name == "seeded":
        order = random.permutation(num_images)
        cut = round(query * num_images)
        queries, rest = order[:cut], order[cut:]
    elif name == "cifar10_spq":
        if num_images != 60_000:
            raise ProtocolError(
                f"protocol cifar10_spq is for CIFAR-10's 60,000 images in official order, found {num_images:,}"
            )
        queries, rest = np.arange(50_000, 60_000), random.permutation(50_000)
    else:
        raise ProtocolError(f"protocol {name!r} is unknown: use one of {', '.join(PROTOCOLS)}")
    held_out = round(validation * len(rest))
    parts = (queries, rest, rest[held_out:], rest[:held_out])
    return Split(*(np.sort(p).astype(np.int64) for p in parts))


def of_source(source: Source, data: ConfigDict) -> Split:
    """The split that `config.data` asks for. Images without labels have nothing to be scored by, so none is a query.

    Raises ProtocolError as `split`.
    """
    query = 0.0 if source.labels is None else data.query
    return split(data.protocol, len(source.images), query=query, validation=data.validation, seed=data.split_seed)


def claim(workdir: Path, source: Source, split: Split) -> None:
    """Remembers in data.json of the workdir which images were split how. Raises ProtocolError if they were others before.

    Without this, an image added to a folder would silently turn training images into queries.
    """
    path = workdir / "data.json"
    names = hashlib.sha256(json.dumps(source.names).encode()).hexdigest()
    now = {"images": len(source.names), "names_sha256": names, "split_sha256": digest(split)}
    if path.is_file():
        before = json.loads(path.read_text())
        if before != now:
            raise ProtocolError(
                f"the images have changed since this run began: {before['images']:,} then, {now['images']:,} now, so the "
                f"split would be another; bring the images back, or train in a new --workdir"
            )
        return
    half = path.with_suffix(".half")
    half.write_text(json.dumps(now, indent=2) + "\n")
    half.replace(path)


def digest(parts: Split) -> str:
    """SHA-256 over the four index arrays, to tell whether two results used the same split."""
    sha = hashlib.sha256()
    for array in parts:
        sha.update(len(array).to_bytes(8, "little") + array.astype("<i8").tobytes())
    return sha.hexdigest()
