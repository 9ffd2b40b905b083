"""A source of images: the arrays and names that every kind of source is read into."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, UInt8


class SourceError(ValueError):
    """The images of `config.data.source` cannot be read; the message says why and what to do."""


class Source(NamedTuple):
    """N images in their official order, all of one size."""

    images: UInt8[np.ndarray, "N S S 3"]  # in memory, or mapped from the cache
    labels: Int64[np.ndarray, " N"] | Bool[np.ndarray, "N L"] | None
    names: list[str]  # paths relative to the folder, or ids
    classes: list[str]
    skipped: list[dict[str, str]]  # {"path", "reason"} of files that are not used
    notes: tuple[str, ...] = ()  # what a reader of the results should know
