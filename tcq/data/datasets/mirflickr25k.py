"""MIRFLICKR-25K as a TFDS dataset of 25,000 Flickr photos.

It has 24 potential labels and 14 stricter ones.
"""

import io
import re
from collections.abc import Iterator
from typing import Any
from zipfile import ZipFile

import numpy as np
import tensorflow_datasets as tfds

from tcq.data.datasets import archives
from tcq.data.images import ImageError, decode
from tcq.runtime import signals

IMAGES = "mirflickr25k.zip"
IMAGES_SIZE = 3_069_184_257
IMAGES_MD5 = "a23d0a8564ee84cda5622a6c2f947785"
ANNOTATIONS = "mirflickr25k_annotations_v080.zip"
FILES = {IMAGES: IMAGES_SIZE, ANNOTATIONS: 0}  # bytes; 0: not checked
NUM_IMAGES = 25_000
# The number of images with each label, by which the archive of annotations is checked: no checksum of it is published.
LABELS = {
    "animals": 3216,
    "baby": 259,
    "bird": 742,
    "car": 1177,
    "clouds": 3700,
    "dog": 684,
    "female": 6184,
    "flower": 1823,
    "food": 990,
    "indoor": 8313,
    "lake": 791,
    "male": 6081,
    "night": 2711,
    "people": 10_373,
    "plant_life": 8763,
    "portrait": 3931,
    "river": 894,
    "sea": 1322,
    "sky": 7912,
    "structures": 9992,
    "sunset": 2135,
    "transport": 2895,
    "tree": 4683,
    "water": 3331,
}
STRICT_LABELS = {
    "baby": 116,
    "bird": 484,
    "car": 380,
    "clouds": 1350,
    "dog": 590,
    "female": 3982,
    "flower": 1077,
    "male": 3647,
    "night": 669,
    "people": 7849,
    "portrait": 3829,
    "river": 149,
    "sea": 214,
    "tree": 668,
}
INSTRUCTIONS = f"""MIRFLICKR-25K: put these two files into that folder:
  {IMAGES} ({IMAGES_SIZE:,} bytes), http://press.liacs.nl/mirflickr/mirflickr25k.v3b/{IMAGES}
  {ANNOTATIONS}, http://press.liacs.nl/mirflickr/mirflickr25k.v3b/{ANNOTATIONS}
The photos are under Creative Commons licences with attribution; licence and creator of each are in the archive."""


class Mirflickr25k(tfds.core.GeneratorBasedBuilder):
    """One split, "train", of all images in official order (feature `index`).

    The protocols make the splits.

    verify: whether to refuse any files but the published ones.
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = INSTRUCTIONS

    def __init__(self, *, verify: bool = True, **options: Any) -> None:
        self.verify = verify
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="25,000 Flickr photos with 24 potential labels and 14 stricter, relevant ones.",
            features=tfds.features.FeaturesDict(
                {
                    "index": tfds.features.Scalar(np.int64, doc="0 for im1.jpg, and so on: the official order"),
                    "id": tfds.features.Text(),
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "labels": tfds.features.Sequence(tfds.features.ClassLabel(names=list(LABELS))),
                    "strict_labels": tfds.features.Sequence(tfds.features.ClassLabel(names=list(STRICT_LABELS))),
                }
            ),
            homepage="https://press.liacs.nl/mirflickr/",
            citation="Huiskes and Lew, The MIR Flickr Retrieval Evaluation, ACM MIR 2008",
            metadata=tfds.core.MetadataDict({"verified": self.verify}),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        path = archives.find(dl_manager.manual_dir, IMAGES, size=IMAGES_SIZE if self.verify else None)
        annotations = archives.open_zip(archives.find(dl_manager.manual_dir, ANNOTATIONS))
        if self.verify:
            archives.verify(path, "md5", IMAGES_MD5)
        photos = archives.open_zip(path)
        members = _photos(photos)
        if self.verify and len(members) != NUM_IMAGES:
            raise archives.ArchiveError(f"{str(path)!r} has {len(members):,} images, expected {NUM_IMAGES:,}")
        labelled = [
            {label: _numbers(annotations, f"{label}{end}.txt", len(members)) for label in names}
            for names, end in ((LABELS, ""), (STRICT_LABELS, "_r1"))
        ]
        if self.verify:
            for images, counts, end in zip(labelled, (LABELS, STRICT_LABELS), ("", "_r1"), strict=True):
                for label, count in counts.items():
                    if len(images[label]) != count:
                        raise archives.ArchiveError(
                            f"{str(annotations.filename)!r}, {label}{end}.txt: lists {len(images[label]):,} images, "
                            f"expected {count:,}"
                        )
        return {"train": self._generate_examples(photos, members, *labelled)}

    def _generate_examples(
        self, archive: ZipFile, members: list[str], labels: dict[str, set[int]], strict_labels: dict[str, set[int]]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, member in enumerate(members):
            signals.poll()
            data = archives.read_member(archive, member)
            try:
                decode(data, size=16)
            except ImageError as error:
                raise archives.ArchiveError(f"{str(archive.filename)!r}, member {member!r}: {error}") from None
            yield (
                index,
                {
                    "index": index,
                    "id": f"im{index + 1}",
                    "image": io.BytesIO(data),
                    "labels": [label for label in LABELS if index + 1 in labels[label]],
                    "strict_labels": [label for label in STRICT_LABELS if index + 1 in strict_labels[label]],
                },
            )


def _photos(archive: ZipFile) -> list[str]:
    """Members im1.jpg, im2.jpg, ... in this order.

    Raises ArchiveError if one is missing or is there twice.
    """
    numbered: dict[int, str] = {}
    for name in archive.namelist():
        match = re.fullmatch(r"(?i:(?:.*/)?im([1-9]\d{0,6})\.jpe?g)", name.replace("\\", "/"))
        if match and not name.startswith("__MACOSX/"):
            number = int(match[1])
            if number in numbered:
                raise archives.ArchiveError(f"{str(archive.filename)!r} has im{number}.jpg twice")
            numbered[number] = name
    if not numbered:
        raise archives.ArchiveError(f"{str(archive.filename)!r} has no image im<number>.jpg")
    gaps = [n for n in range(1, max(numbered) + 1) if n not in numbered]
    if gaps:
        raise archives.ArchiveError(
            f"{str(archive.filename)!r} has {len(numbered):,} images im<number>.jpg, but not im{gaps[0]}.jpg"
        )
    return [numbered[n] for n in sorted(numbered)]


def _numbers(archive: ZipFile, name: str, num_images: int) -> set[int]:
    """The image numbers, from 1, that an annotation file lists, one per line."""
    matching = [
        m
        for m in archive.namelist()
        if m.replace("\\", "/").rsplit("/", 1)[-1] == name and not m.startswith("__MACOSX/")
    ]
    where = f"{str(archive.filename)!r}, {name}"
    if len(matching) != 1:
        raise archives.ArchiveError(f"{where}: {'is there twice' if matching else 'not found'}")
    numbers: set[int] = set()
    for row, line in enumerate(archives.read_member(archive, matching[0]).decode("ascii", "replace").splitlines(), 1):
        text = line.strip()
        if not text:
            continue
        if not (text.isascii() and text.isdecimal() and 1 <= int(text[:9]) <= num_images and len(text) < 9):
            raise archives.ArchiveError(
                f"{where}, line {row}: {text[:40]!r} must be an image number from 1 to {num_images:,}"
            )
        if int(text) in numbers:
            raise archives.ArchiveError(f"{where}, line {row}: image {text} is listed twice")
        numbers.add(int(text))
    return numbers
