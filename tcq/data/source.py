"""A source of images or embeddings: arrays and names, the same for every kind of source."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64


class SourceError(ValueError):
    """The images of `config.data.source` cannot be read; the message says why and what to do."""


class Source(NamedTuple):
    """N images in their official order, all of one size; or N embeddings."""

    images: Any  # uint8 (N, S, S, 3), or embeddings float (N, F): an array, or `Rows` of arrays mapped from files
    labels: Int64[np.ndarray, " N"] | Bool[np.ndarray, "N L"] | None
    names: list[str]  # paths relative to the folder, or ids
    classes: list[str]
    skipped: list[dict[str, str]]  # {"path", "reason"} of files that are not used
    notes: tuple[str, ...] = ()  # what a reader of the results should know
    views: Any = None  # embeddings (N, V, F) of views of each item
    pictures: Any = None  # the images of embeddings, if they are known
    digests: list[bytes] | None = None  # of the contents of the files, where they have a path
    unreadable: tuple[str, ...] = ()  # files and folders that may be images, but could not be read
    repaired: list[dict[str, str]] | None = None  # {"path", "reason"} of files that are damaged, and used
