"""CIFAR-10 of TFDS, prepared from the published tarball without network or TensorFlow."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from tcq.data.datasets import archives
from tcq.runtime import signals

TARBALL = "cifar-10-binary.tar.gz"
SIZE = 170_052_171
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
FILES = {TARBALL: SIZE}  # bytes
FOLDER = "cifar-10-batches-bin"
TRAIN = tuple(f"{FOLDER}/data_batch_{i}.bin" for i in range(1, 6))
TEST = (f"{FOLDER}/test_batch.bin",)
NAMES = f"{FOLDER}/batches.meta.txt"
ROW = 1 + 3 * 32 * 32  # a label, then the red, green and blue planes
INSTRUCTIONS = f"""CIFAR-10, {SIZE:,} bytes. Get https://www.cs.toronto.edu/~kriz/{TARBALL}
and put it into that folder. Its page asks to cite the technical report (Krizhevsky 2009) and names no licence."""


class Cifar10(tfds.image_classification.Cifar10, skip_registration=True):  # type: ignore[call-arg]
    """The builder of TFDS; only the reading is ours.

    Name, version, features, ids and order are the same.

    verify: whether to refuse any file but the published one.
    """

    name = "cifar10"
    MANUAL_DOWNLOAD_INSTRUCTIONS = INSTRUCTIONS

    def __init__(self, *, verify: bool = True, **options: Any) -> None:
        self.verify = verify
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        info = super()._info()
        info._metadata = tfds.core.MetadataDict({"verified": self.verify})
        return info

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        path = archives.find(dl_manager.manual_dir, TARBALL, size=SIZE if self.verify else None)
        if self.verify:
            archives.verify(path, "sha256", SHA256)
        members = archives.read_tar(path, {*TRAIN, *TEST, NAMES})
        names = [line for line in members[NAMES].decode("ascii", "replace").splitlines() if line.strip()]
        if len(set(names)) != 10:
            raise archives.ArchiveError(
                f"{str(path)!r}, member {NAMES!r}: lists {len(set(names))} classes, expected 10"
            )
        self.info.features["label"].names = names
        for name in (*TRAIN, *TEST):
            _check(str(path), name, members[name], exact=self.verify)
        return {
            "train": _examples("train_", [members[name] for name in TRAIN]),
            "test": _examples("test_", [members[name] for name in TEST]),
        }


def _check(path: str, name: str, data: bytes, *, exact: bool) -> None:
    rows, rest = divmod(len(data), ROW)
    if rest or not rows or (exact and rows != 10_000):
        raise archives.ArchiveError(
            f"{path!r}, member {name!r}: has {len(data):,} bytes, expected {'10,000 ' if exact else ''}images of "
            f"{ROW:,} bytes"
        )
    top = max(data[::ROW], default=0)
    if top > 9:
        raise archives.ArchiveError(f"{path!r}, member {name!r}: has the label {top}, expected 0 to 9")


def _examples(prefix: str, parts: list[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    index = 0
    for data in parts:
        for row in np.frombuffer(data, np.uint8).reshape(-1, ROW):
            signals.poll()
            png = io.BytesIO()
            Image.fromarray(row[1:].reshape(3, 32, 32).transpose(1, 2, 0)).save(png, "PNG")
            png.seek(0)
            yield index, {"id": f"{prefix}{index:05d}", "image": png, "label": int(row[0])}
            index += 1
