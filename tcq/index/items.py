"""The items of an index as rows of an Arrow table.

The columns are ids, places, hashes, sizes, dates, and codes packed to their bits.

Every row is written once. A row whose item was removed, or has a newer row, stays until the index is compacted.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Int, UInt

from tcq import quantizer
from tcq.data.cache import DIGEST_BYTES
from tcq.runtime import storage

BLOCK = 2**16  # rows


def schema(num_codebooks: int, num_codewords: int) -> pa.Schema:
    """The columns of the items of an index."""
    return pa.schema(
        [
            ("id", pa.int64()),  # given once, in ascending order
            ("root", pa.uint16()),  # number of the folder, "" for embeddings
            ("name", pa.large_binary()),  # below the root; the bytes of the file name
            ("hash", pa.binary(DIGEST_BYTES)),  # of the contents
            ("size", pa.int64()),  # bytes of the file; null if not known
            ("modified", pa.timestamp("us", "UTC")),  # of the file when it was encoded; null if not known
            ("code", pa.binary(packed_bytes(num_codebooks, num_codewords))),
        ]
    )


class Files(NamedTuple):
    """What is stored of some images beside ids and codes."""

    names: Sequence[str]
    hashes: Sequence[bytes]
    sizes: Sequence[int | None]
    modified: Sequence[Any]  # datetime, microseconds since 1970, or None


def files(root: str, names: Sequence[str], hashes: Sequence[bytes]) -> Files:
    """Sizes and dates of the files below a folder on this machine; unknown elsewhere."""
    sizes: list[int | None] = []
    modified: list[int | None] = []
    for name in names:
        try:
            if not root or storage.is_url(root):
                raise OSError
            state = os.stat(os.path.join(root, name))
        except OSError:
            sizes.append(None)
            modified.append(None)
        else:
            sizes.append(state.st_size)
            modified.append(state.st_mtime_ns // 1000)
    return Files(names, hashes, sizes, modified)


def rows(
    ids: Int[np.ndarray, " n"], root: int, of: Files, codes: UInt[np.ndarray, "n M"], num_codewords: int
) -> pa.Table:
    """New rows of the table of items."""
    columns = [
        pa.array(ids, pa.int64()),
        pa.array(np.full(len(ids), root, np.uint16)),
        pa.array([os.fsencode(name) for name in of.names], pa.large_binary()),
        pa.array(of.hashes, pa.binary(DIGEST_BYTES)),
        pa.array(of.sizes, pa.int64()),
        pa.array(of.modified, pa.timestamp("us", "UTC")),
        fixed(pack(codes, num_codewords)),
    ]
    return pa.table(columns, schema=schema(codes.shape[1], num_codewords))


def fixed(rows: np.ndarray) -> pa.Array:
    """An array of byte strings of one length."""
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(rows.shape[1]), len(rows), [None, pa.py_buffer(np.ascontiguousarray(rows))]
    )


def bytes_of(column: pa.ChunkedArray) -> UInt[np.ndarray, "n width"]:
    """A column of byte strings of one length as bytes; a view if it is one chunk."""
    width = column.type.byte_width
    chunks = [
        np.frombuffer(c.buffers()[1], np.uint8)[c.offset * width : (c.offset + len(c)) * width].reshape(-1, width)
        for c in column.chunks
    ] or [np.zeros((0, width), np.uint8)]
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)


def packed_bytes(num_codebooks: int, num_codewords: int) -> int:
    """The bytes of one packed code."""
    return -(-num_codebooks * quantizer.code_bits(num_codewords) // 8)


def pack(codes: UInt[np.ndarray, "n M"], num_codewords: int) -> UInt[np.ndarray, "n bytes"]:
    """Codes as strings of bits, as FAISS stores them.

    The first codeword is in the lowest bits of the first byte.
    """
    bits, (count, num_codebooks) = quantizer.code_bits(num_codewords), codes.shape
    if bits == 8:
        return codes.astype(np.uint8)
    packed = np.empty((count, packed_bytes(num_codebooks, num_codewords)), np.uint8)
    for first in range(0, count, BLOCK):
        block = codes[first : first + BLOCK].astype("<u2").view(np.uint8).reshape(-1, num_codebooks, 2)
        each = np.unpackbits(block, axis=2, bitorder="little")[:, :, :bits].reshape(len(block), -1)
        packed[first : first + BLOCK] = np.packbits(each, axis=1, bitorder="little")
    return packed


def unpack(packed: UInt[np.ndarray, "n bytes"], num_codebooks: int, num_codewords: int) -> UInt[np.ndarray, "n M"]:
    """The codes that `pack` packed; a view if a codeword has 8 bits."""
    bits = quantizer.code_bits(num_codewords)
    if bits == 8:
        return packed
    codes = np.empty((len(packed), num_codebooks), quantizer.code_dtype(num_codewords))
    for first in range(0, len(packed), BLOCK):
        block = packed[first : first + BLOCK]
        each = np.unpackbits(block, axis=1, count=num_codebooks * bits, bitorder="little")
        wide = np.zeros((len(block), num_codebooks, 8 * codes.itemsize), np.uint8)
        wide[:, :, :bits] = each.reshape(len(block), num_codebooks, bits)
        joined = np.packbits(wide, axis=2, bitorder="little")
        codes[first : first + BLOCK] = joined.view(f"<u{codes.itemsize}")[:, :, 0]
    return codes


class Paths(Sequence[str]):
    """The paths of N images, each a root and a name below it."""

    def __init__(self, roots: Sequence[str], numbers: np.ndarray, names: pa.ChunkedArray, rows: np.ndarray) -> None:
        self.roots, self.numbers = list(roots), numbers
        self._names, self._rows = names, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        return join(self.roots[self.numbers[i]], self.name(int(i)))

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), BLOCK):
            numbers = self.numbers[first : first + BLOCK].tolist()
            for number, name in zip(numbers, self.names(range(first, first + len(numbers))), strict=True):
                yield join(self.roots[number], name)

    def name(self, i: int) -> str:
        """The name of an image below its root."""
        return os.fsdecode(self._names[int(self._rows[i])].as_py())

    def names(self, which: Sequence[int] | np.ndarray) -> list[str]:
        """The names of some images below their roots."""
        rows = self._rows[np.asarray(which, np.int64)]
        return [os.fsdecode(name) for name in self._names.take(pa.array(rows)).to_pylist()]


def join(root: str, name: str) -> str:
    """The path of a name below a root; the name itself without a root."""
    return str(storage.join(root, name)) if root else name
