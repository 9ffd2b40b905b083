"""The split of a run, by the protocol of its config."""

import hashlib
import json

import numpy as np
from ml_collections import ConfigDict

from tcq.data import protocols
from tcq.data.protocols import Split
from tcq.data.source import Source


def of_source(source: Source, data: ConfigDict, *, validation: float | None = None) -> Split:
    """The split of `config.data`, or one with another share of validation images.

    Without labels there are no queries, because nothing could be scored. Raises ProtocolError as `protocols.split`.
    """
    labels = source.labels
    return protocols.split(
        data.protocol,
        np.zeros(len(source.images), np.int64) if labels is None else labels,
        seed=None if data.split_seed < 0 else data.split_seed,
        query=0.0 if labels is None else data.query,
        validation=data.validation if validation is None else validation,
    )


def names_digest(source: Source) -> str:
    """SHA-256 of the names of images in their order; equal if two results used the same ones."""
    return hashlib.sha256(json.dumps(source.names).encode()).hexdigest()
