"""Images decoded once: uint8 arrays on disk, found again under a key of what they were made from."""

import json
import os
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from tcq.data.images import ImageError, Resize, decode
from tcq.runtime.log import moved

VERSION = 2  # of the layout of an entry; others are not found
AHEAD = 256  # images on their way at a time: a dataset does not fit in memory


class Encoded(NamedTuple):
    """What is to be decoded."""

    items: Iterable[tuple[str, Path | bytes]]  # names with files or their bytes
    total: int
    arrays: dict[str, np.ndarray]  # kept beside the images, such as labels


class Decoded(NamedTuple):
    """What was."""

    images: UInt8[np.ndarray, "N S S 3"]  # mapped from the disk
    names: list[str]
    skipped: list[dict[str, str]]  # {"path", "reason"} of what could not be decoded
    arrays: dict[str, np.ndarray]


def decode_once(key: str, read: Callable[[], Encoded], *, size: int, resize: Resize, cache_dir: str) -> Decoded:
    """The entry of a key; where there is none, or a damaged one, it is made of what `read` gives.

    An entry appears as a whole or not at all. `cache_dir` "" is $XDG_CACHE_HOME/tcq or ~/.cache/tcq.
    """
    home = Path(cache_dir or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "tcq")).expanduser()
    place = home / f"{VERSION}-{key[:32]}"
    found = _open(place, size)
    if found is None:
        shutil.rmtree(place, ignore_errors=True)
        _write(place, read(), size, resize)
        found = _open(place, size)
    assert found is not None
    return found


def _open(place: Path, size: int) -> Decoded | None:
    try:
        entry = json.loads((place / "names.json").read_text())
        shape = (len(entry["names"]), size, size, 3)
        if (place / "images.u8").stat().st_size != np.prod(shape):
            return None
        with np.load(place / "arrays.npz", allow_pickle=False) as saved:
            arrays = {name: saved[name] for name in saved.files}
    except (OSError, ValueError, KeyError):
        return None
    images = np.memmap(place / "images.u8", np.uint8, "r", shape=shape) if entry["names"] else np.zeros(shape, np.uint8)
    return Decoded(images, entry["names"], entry["skipped"], arrays)


def _write(place: Path, encoded: Encoded, size: int, resize: Resize) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    for left in place.parent.glob("half-*"):  # of a killed run
        if time.time() - left.stat().st_mtime > 86_400:
            shutil.rmtree(left, ignore_errors=True)
    half = Path(tempfile.mkdtemp(prefix="half-", dir=place.parent))
    try:
        names, skipped = [], []
        with open(half / "images.u8", "wb") as out:
            for name, result in _progress(_decode_all(encoded.items, size, resize), encoded.total):
                if isinstance(result, ImageError):
                    skipped.append({"path": name, "reason": str(result)})
                else:
                    names.append(name)
                    out.write(result.tobytes())
        with open(half / "arrays.npz", "wb") as out:
            np.savez(out, **encoded.arrays)  # type: ignore[arg-type]  # the stub takes the names for allow_pickle
        (half / "names.json").write_text(json.dumps({"names": names, "skipped": skipped}))
        try:
            half.rename(place)
        except OSError:
            if not place.exists():  # else another process was faster
                raise
    finally:
        shutil.rmtree(half, ignore_errors=True)


def _decode_all(
    items: Iterable[tuple[str, Path | bytes]], size: int, resize: Resize
) -> Iterator[tuple[str, np.ndarray | ImageError]]:
    def one(item: tuple[str, Path | bytes]) -> tuple[str, np.ndarray | ImageError]:
        try:
            return item[0], decode(item[1], size=size, resize=resize)
        except ImageError as error:
            return item[0], error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        coming: deque[Any] = deque()
        for item in items:
            coming.append(pool.submit(one, item))
            if len(coming) >= AHEAD:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def _progress(results: Iterator[Any], total: int) -> Iterator[Any]:
    """Passes results on; every few seconds a line with count and rate on standard error."""
    start = last = time.monotonic()
    for done, result in enumerate(results, 1):
        moved()
        yield result
        now = time.monotonic()
        if now - last > 5:
            print(f"decoding images: {done:,} of {total:,}, {done / (now - start):,.0f} images/s", file=sys.stderr)
            last = now
