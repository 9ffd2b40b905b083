"""The split of a run: by the protocol that its config names, the same for as long as its workdir is used."""

import hashlib
import json
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from tcq.data import protocols
from tcq.data.protocols import ProtocolError, Split
from tcq.data.sources import Source


def of_source(source: Source, data: ConfigDict, *, validation: float | None = None) -> Split:
    """The split that `config.data` asks for, or with another share of validation images.

    Images without labels have nothing to be scored by, so none is a query.

    Raises ProtocolError as `protocols.split`.
    """
    labels = source.labels
    return protocols.split(
        data.protocol,
        np.zeros(len(source.images), np.int64) if labels is None else labels,
        seed=None if data.split_seed < 0 else data.split_seed,
        query=0.0 if labels is None else data.query,
        validation=data.validation if validation is None else validation,
    )


def claim(workdir: Path, source: Source, split: Split) -> None:
    """Remembers in data.json of the workdir which images were split how. Raises ProtocolError if they were others before.

    Without this, an image added to a folder would silently turn training images into queries.
    """
    path = workdir / "data.json"
    now = {"images": len(source.names), "names_sha256": names_digest(source), "split_sha256": protocols.digest(split)}
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


def names_digest(source: Source) -> str:
    """SHA-256 over the names of the images in their order, to tell whether two results used the same images."""
    return hashlib.sha256(json.dumps(source.names).encode()).hexdigest()
