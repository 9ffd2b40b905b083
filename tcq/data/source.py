"""A source of images or embeddings: the arrays and names that every kind of source is read into."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int64, UInt8


class SourceError(ValueError):
    """The images of `config.data.source` cannot be read; the message says why and what to do."""


class Source(NamedTuple):
    """N images in their official order, all of one size; or N embeddings."""

    images: UInt8[np.ndarray, "N S S 3"] | Float[np.ndarray, "N F"]  # in memory, or mapped from files
    labels: Int64[np.ndarray, " N"] | Bool[np.ndarray, "N L"] | None
    names: list[str]  # paths relative to the folder, or ids
    classes: list[str]
    skipped: list[dict[str, str]]  # {"path", "reason"} of files that are not used
    notes: tuple[str, ...] = ()  # what a reader of the results should know
    views: Float[np.ndarray, "N V F"] | None = None  # embeddings of views of each item
    pictures: UInt8[np.ndarray, "N S S 3"] | None = None  # the images of embeddings, if they are known
