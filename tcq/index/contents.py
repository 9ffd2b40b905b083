"""What an index holds, in memory: the encoder, the rows of its images, and own columns."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int64, UInt
from ml_collections import ConfigDict

from tcq import encode, ranking
from tcq.index import items

SEGMENTS = 64  # with which an index is compacted by itself


class IndexFileError(ValueError):
    """The index cannot be built, opened or changed; the message says why."""


class CorruptedError(IndexFileError):
    """The files of the index are not what was written."""


class Segment(NamedTuple):
    """A file of rows."""

    file: str
    rows: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Index:
    """N indexed images, in the order of their ids; the arrays are read when first used."""

    config: ConfigDict
    load_encoder: Callable[[], encode.Encoder]
    table: pa.Table  # all rows that were written, as `items.schema` describes them
    rows: Int64[np.ndarray, " N"]  # the row of each image
    roots: tuple[str, ...]  # absolute paths or URLs of folders; "" for embeddings
    next_id: int
    step: int  # of the training
    sha256: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of config and encoder, once they are written
    segments: tuple[Segment, ...] = ()  # the files of the first rows of the table; others are not written yet
    columns: pa.Table | None = None  # own columns of some images, by "id"
    columns_segment: Segment | None = None  # its file, once it is written
    version: str = ""  # meta.json as it was read; "" for an index that was not

    @cached_property
    def encoder(self) -> encode.Encoder:
        """The model of the index. Raises CorruptedError."""
        return self.load_encoder()

    @cached_property
    def codes(self) -> UInt[np.ndarray, "N M"]:
        """The code of each image."""
        q = self.config.quantizer
        return self._live(items.unpack(items.bytes_of(self.table["code"]), q.num_codebooks, q.num_codewords))

    @cached_property
    def ids(self) -> Int64[np.ndarray, " N"]:
        """The id of each image, ascending."""
        return self._live(self.table["id"].to_numpy())

    @cached_property
    def hashes(self) -> UInt[np.ndarray, "N 20"]:
        """The hash of the contents of each file, or of the numbers of each embedding."""
        return self._live(items.bytes_of(self.table["hash"]))

    @cached_property
    def paths(self) -> items.Paths:
        """The path of each image, or the name of each embedding."""
        return items.Paths(self.roots, self._live(self.table["root"].to_numpy()), self.table["name"], self.rows)

    @cached_property
    def folders(self) -> tuple[str, ...]:
        """The roots that have images."""
        return tuple(dict.fromkeys(self.roots[i] for i in np.unique(self.paths.numbers).tolist()))

    @cached_property
    def norms(self) -> Float[np.ndarray, " N"] | None:
        """The length of each decoded item, only for eval.score "cosine"."""
        if self.config.eval.score != "cosine":
            return None
        return np.asarray(ranking.code_norms(self.codes, self.encoder.codebooks))

    def replace(self, **fields: Any) -> "Index":
        """A copy with other fields."""
        return dataclasses.replace(self, **fields)

    def _live(self, column: np.ndarray) -> np.ndarray:
        whole = len(self.rows) == len(column) and not (np.diff(self.rows) != 1).any()
        return column if whole else column[self.rows]


def empty(encoder: encode.Encoder) -> Index:
    """An index without images, which is not written yet."""
    q = encoder.config.quantizer
    table = items.schema(q.num_codebooks, q.num_codewords).empty_table()
    return Index(encoder.config, lambda: encoder, table, np.zeros(0, np.int64), (), 0, encoder.step)


def compacted(index: Index) -> Index:
    """The same images in one segment, without rows that are out of date."""
    table = index.table.take(pa.array(index.rows)).combine_chunks()
    index = index.replace(table=table, rows=np.arange(len(table)), segments=())
    if index.columns is None:
        return index
    columns = index.columns.filter(pc.is_in(index.columns["id"], table["id"].combine_chunks()))
    return index.replace(columns=columns.combine_chunks(), columns_segment=None)


def is_scattered(index: Index) -> bool:
    """Whether an index should be compacted.

    It should if it has SEGMENTS segments, or most of its rows are out of date.
    """
    return len(index.segments) >= SEGMENTS or 2 * len(index.rows) < len(index.table)
