"""Rows of several arrays as one array; an index reads only the rows that it names."""

import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np

KEPT = 2**26  # bytes that are mapped before pages are given back
AROUND = 2**21  # bytes that the operating system maps where a read begins, at most


class Rows:
    """An array (N, ...) whose rows lie in other arrays, such as files mapped from disk.

    An index reads only the rows it needs; `take` reads none.
    """

    def __init__(self, arrays: Sequence[np.ndarray], places: tuple[np.ndarray, np.ndarray] | None = None) -> None:
        """Takes for each row its array's number and its row there; by default all rows in order."""
        self._arrays = list(arrays)
        if places is None:
            lengths = [len(a) for a in arrays]
            numbers = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
            places = numbers, np.concatenate([np.arange(n, dtype=np.int64) for n in lengths])
        self._mapped = 0  # bytes since pages were given back, at most
        self._numbers: np.ndarray = places[0]
        self._rows: np.ndarray = places[1]
        self.shape: tuple[int, ...] = (len(self._rows), *self._arrays[0].shape[1:])
        self.ndim, self.dtype = len(self.shape), self._arrays[0].dtype

    @property
    def lengths(self) -> list[int]:
        """The lengths of the arrays."""
        return [len(a) for a in self._arrays]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        """The rows of a slice, an array of numbers, a mask, or one number. Raises IndexError."""
        one = np.ndim(self._rows[rows]) == 0
        numbers, places = np.atleast_1d(self._numbers[rows]), np.atleast_1d(self._rows[rows])
        out = np.empty((len(places), *self.shape[1:]), self.dtype)
        for number in np.unique(numbers):
            here = numbers == number
            out[here] = self._arrays[number][places[here]]
        self._forget(out.nbytes + AROUND * (1 + int(np.count_nonzero(np.diff(places) != 1))))
        return out[0] if one else out

    def _forget(self, size: int) -> None:
        """Gives mapped pages back after every `KEPT` bytes.

        The operating system keeps the files in its own cache.
        """
        self._mapped += size
        if self._mapped < KEPT:
            return
        self._mapped = 0
        for array in self._arrays:
            mapped = getattr(array, "_mmap", None)
            if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype)

    def take(self, rows: Any) -> "Rows":
        """These rows, without reading them."""
        return Rows(self._arrays, (self._numbers[rows], self._rows[rows]))

    def with_axis(self) -> "Rows":
        """The same rows with a second axis of length 1."""
        return Rows([a[:, None] for a in self._arrays], (self._numbers, self._rows))


def take(images: Any, rows: Any) -> Rows:
    """Some rows of an array or of `Rows`, without reading them."""
    return images.take(rows) if isinstance(images, Rows) else Rows([images]).take(rows)
