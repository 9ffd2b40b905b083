"""Decoded images as uint8 arrays on disk, by a digest of what they were decoded from."""

import json
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from tcq.data.images import ImageError, Resize, decode
from tcq.runtime import log, signals, storage

VERSION = 2  # of the format of an entry; entries of other versions are ignored
AHEAD = 256  # images that are decoded ahead
ABANDONED = 86_400  # seconds after which an entry that is still being written belongs to a killed run

logger = logging.getLogger(__name__)


class EncodedImages(NamedTuple):
    """Images to decode."""

    items: Iterable[tuple[str, Path | bytes]]  # names, and files or their contents
    total: int
    arrays: dict[str, np.ndarray]  # stored with the images, such as labels


class Entry(NamedTuple):
    """An entry of the cache."""

    images: UInt8[np.ndarray, "N S S 3"]  # mapped from disk
    names: list[str]
    skipped: list[dict[str, str]]  # {"path", "reason"} of what could not be decoded
    arrays: dict[str, np.ndarray]


def decode_once(key: str, read: Callable[[], EncodedImages], *, size: int, resize: Resize, cache_dir: str) -> Entry:
    """The entry of a key; if there is none, or a corrupted one, it is made from the images that `read` returns.

    An entry appears as a whole or not at all. `cache_dir` "" is `storage.cache_home()`.
    """
    home = Path(cache_dir).expanduser() if cache_dir else storage.cache_home()
    folder = home / f"{VERSION}-{key[:32]}"
    entry = _open(folder, size)
    if entry is None:
        shutil.rmtree(folder, ignore_errors=True)
        _write(folder, read(), size, resize)
        entry = _open(folder, size)
    assert entry is not None
    return entry


def _open(folder: Path, size: int) -> Entry | None:
    try:
        listing = json.loads((folder / "names.json").read_text())
        shape = (len(listing["names"]), size, size, 3)
        if (folder / "images.u8").stat().st_size != np.prod(shape):
            return None
        with np.load(folder / "arrays.npz", allow_pickle=False) as saved:
            arrays = {name: saved[name] for name in saved.files}
    except (OSError, ValueError, KeyError):
        return None
    empty = np.zeros(shape, np.uint8)  # an empty file cannot be memory-mapped
    images = np.memmap(folder / "images.u8", np.uint8, "r", shape=shape) if listing["names"] else empty
    return Entry(images, listing["names"], listing["skipped"], arrays)


def _write(folder: Path, encoded: EncodedImages, size: int, resize: Resize) -> None:
    for left in folder.parent.glob(f"{storage.TEMPORARY}*"):
        if time.time() - left.stat().st_mtime > ABANDONED:
            shutil.rmtree(left, ignore_errors=True)
    progress = log.Progress(logger, "decoding images", encoded.total)
    with storage.temporary_folder(folder) as temporary:
        names, skipped = [], []
        with open(temporary / "images.u8", "wb") as out:
            for done, (name, result) in enumerate(_decode_all(encoded.items, size, resize), 1):
                signals.poll()
                if isinstance(result, ImageError):
                    skipped.append({"path": name, "reason": str(result)})
                else:
                    names.append(name)
                    out.write(result.tobytes())
                progress.update(done)
        with open(temporary / "arrays.npz", "wb") as out:
            np.savez(out, **encoded.arrays)  # type: ignore[arg-type]  # the stub takes the names for allow_pickle
        (temporary / "names.json").write_text(json.dumps({"names": names, "skipped": skipped}))
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():  # else another process has written it in the meantime
                raise


def _decode_all(
    items: Iterable[tuple[str, Path | bytes]], size: int, resize: Resize
) -> Iterator[tuple[str, np.ndarray | ImageError]]:
    """Names with decoded images, or the reason why an image cannot be decoded, in the given order."""

    def one(item: tuple[str, Path | bytes]) -> tuple[str, np.ndarray | ImageError]:
        try:
            return item[0], decode(item[1], size=size, resize=resize)
        except ImageError as error:
            return item[0], error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ahead: deque[Any] = deque()
        for item in items:
            ahead.append(pool.submit(one, item))
            if len(ahead) >= AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
