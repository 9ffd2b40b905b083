"""NUS-WIDE as a TFDS dataset: Flickr photos with 81 concepts.

It has also the subset with the 21 most frequent ones.
"""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from tcq.data.datasets import archives
from tcq.data.images import ImageError, decode
from tcq.runtime import signals

NUM_IMAGES = 269_648
NUM_TRAIN = 161_789  # in the published training list; the others are in the test list
NUM_IMAGES_21 = 195_834  # with at least one of the 21 most frequent concepts
IMAGE_FOLDERS = ("Flickr", "images", "Images", ".")
FILES = {"Groundtruth": 0, "ConceptsList": 0, "ImageList": 0, "Flickr": 0}
INSTRUCTIONS = """NUS-WIDE, unpacked, with the names of its archives:
  Groundtruth/AllLabels/Labels_<concept>.txt   81 files with a line of 0 or 1 for each image
  ConceptsList/Concepts81.txt
  ImageList/Imagelist.txt                      the images in the order of those lines, as actor\\0001_2124494179.jpg
  Flickr/<folder>/<name>.jpg                   the photos (images/, Images/ or the folder itself may replace Flickr/;
                                               <folder>/ may be missing)
or, instead of AllLabels, Groundtruth/TrainTestLabels/Labels_<concept>_{Train,Test}.txt with
ImageList/TrainImagelist.txt and ImageList/TestImagelist.txt; without Imagelist.txt the images are then in the order of
their paths.
Labels and lists: https://lms.comp.nus.edu.sg/wp-content/uploads/2019/research/nuswide/NUS-WIDE.html. The National
University of Singapore gives the photos to those who sign its agreement and disclaimer form."""


@dataclass(eq=False, kw_only=True)
class NusWideConfig(tfds.core.BuilderConfig):
    """The number of concepts that are labels; 21 leaves out images without any of them."""

    num_concepts: int = 81


class NusWide(tfds.core.GeneratorBasedBuilder):
    """One split, "train", of all images in the order of the image list (feature `index`).

    The protocols split it.

    verify: whether to refuse other numbers of images, concepts and lines than published, and missing or corrupted
      photos.
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = INSTRUCTIONS
    BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = [
        NusWideConfig(name="concepts21", num_concepts=21, description="the 195,834 images with a frequent concept"),
        NusWideConfig(name="concepts81", num_concepts=81, description="all images"),
    ]

    def __init__(self, *, verify: bool = True, **options: Any) -> None:
        self.verify = verify
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Flickr photos with 81 concepts by hand.",
            features=tfds.features.FeaturesDict(
                {
                    "index": tfds.features.Scalar(
                        np.int64, doc="position among the images of the dataset, in the order of the list"
                    ),
                    "row": tfds.features.Scalar(np.int64, doc="line in AllLabels, from 0"),
                    "id": tfds.features.Text(),
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "labels": tfds.features.Sequence(
                        tfds.features.ClassLabel(num_classes=self.builder_config.num_concepts)
                    ),
                }
            ),
            homepage="https://lms.comp.nus.edu.sg/wp-content/uploads/2019/research/nuswide/NUS-WIDE.html",
            citation="Chua et al., NUS-WIDE: A Real-World Web Image Database, CIVR 2009",
            metadata=tfds.core.MetadataDict({"verified": self.verify, "excluded": []}),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        root = Path(dl_manager.manual_dir)
        concepts = [line.strip() for line in archives.read_lines(root / "ConceptsList" / "Concepts81.txt")]
        bad = [c for c in concepts if not re.fullmatch(r"\w[\w .-]*", c)] or [
            c for c in concepts if concepts.count(c) > 1
        ]
        if bad:
            raise archives.ArchiveError(
                f"{str(root)!r}, Concepts81.txt: lists {bad[0]!r}, must have 81 different names of concepts"
            )
        if self.verify and len(concepts) != 81:
            raise archives.ArchiveError(f"{str(root)!r}, Concepts81.txt: lists {len(concepts)} concepts, expected 81")
        names, labels = _ground_truth(root, concepts, verify=self.verify)
        places = np.arange(len(names))
        if self.builder_config.num_concepts == 21:
            by_count = sorted(range(len(concepts)), key=lambda c: (-int(labels[:, c].sum()), concepts[c]))
            frequent = sorted(by_count[:21], key=lambda c: concepts[c])
            concepts, labels = [concepts[c] for c in frequent], labels[:, frequent]
            places = np.flatnonzero(labels.any(axis=1))
            if self.verify and len(places) != NUM_IMAGES_21:
                raise archives.ArchiveError(
                    f"{str(root)!r}: {len(places):,} images have one of the 21 most frequent concepts, expected "
                    f"{NUM_IMAGES_21:,}"
                )
        if len(concepts) != self.builder_config.num_concepts:
            raise archives.ArchiveError(
                f"{str(root)!r} has {len(concepts)} concepts, expected {self.builder_config.num_concepts}"
            )
        self.info.features["labels"].feature.names = concepts
        files = _locate(root, [names[row] for row in places])
        missing = [names[row] for row, file in zip(places, files, strict=True) if file is None]
        if missing and self.verify:
            raise archives.ArchiveError(
                f"{str(root)!r}: {len(missing):,} of {len(places):,} images are missing, the first is {missing[0]!r}; "
                f"the protocols need all of them"
            )
        if len(missing) == len(places):
            raise archives.ArchiveError(
                f"{str(root)!r}: none of the {len(places):,} images found; the first, "
                f"{names[places[0]] if len(places) else 'of an empty list'!r}, is in none of the folders "
                f"{', '.join(IMAGE_FOLDERS)}"
            )
        self.info.metadata["excluded"] += [{"id": name, "reason": "the file is missing"} for name in missing]
        return {"train": self._generate_examples(names, labels, places, files)}

    def _generate_examples(
        self, names: list[str], labels: np.ndarray, places: np.ndarray, files: list[Path | None]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        index = 0
        for row, file in zip(places.tolist(), files, strict=True):
            if file is None:
                continue
            signals.poll()
            try:
                decode(file, size=16)
            except ImageError as error:
                if self.verify:
                    raise archives.ArchiveError(f"{str(file)!r}: {error}; the protocols need all images") from None
                self.info.metadata["excluded"].append({"id": names[row], "reason": str(error)})
                continue
            yield (
                row,
                {
                    "index": index,
                    "row": row,
                    "id": names[row],
                    "image": io.BytesIO(file.read_bytes()),
                    "labels": np.flatnonzero(labels[row]).tolist(),
                },
            )
            index += 1


def _ground_truth(root: Path, concepts: list[str], *, verify: bool) -> tuple[list[str], np.ndarray]:
    """Names and labels (N, concepts) of the images, from either of the two layouts."""
    lists, truth = root / "ImageList", root / "Groundtruth"
    whole = lists / "Imagelist.txt"
    if (truth / "AllLabels").is_dir():
        names = _list(whole, NUM_IMAGES if verify else None)
        labels = _labels(truth / "AllLabels", "", concepts, len(names), whole)
        return _check_distinct(names, lists), labels
    if not (truth / "TrainTestLabels").is_dir():
        raise archives.ArchiveError(f"{str(truth)!r} has neither AllLabels nor TrainTestLabels")
    names, blocks = [], []
    for part, count in (("Train", NUM_TRAIN), ("Test", NUM_IMAGES - NUM_TRAIN)):
        path = lists / f"{part}Imagelist.txt"
        rows = _list(path, count if verify else None)
        names += rows
        blocks.append(_labels(truth / "TrainTestLabels", f"_{part}", concepts, len(rows), path))
    official = _list(whole, NUM_IMAGES if verify else None) if whole.is_file() else sorted(names)
    position = {name: i for i, name in enumerate(_check_distinct(names, lists))}
    if set(official) != set(names):
        raise archives.ArchiveError(
            f"{str(whole)!r} does not list the images of TrainImagelist.txt and TestImagelist.txt"
        )
    return official, np.concatenate(blocks)[[position[name] for name in official]]


def _list(path: Path, expected: int | None) -> list[str]:
    """The images of a list, as paths below the folder of images."""
    rows = [line.strip().replace("\\", "/") for line in archives.read_lines(path)]
    if expected is not None and len(rows) != expected:
        raise archives.ArchiveError(f"{str(path)!r} lists {len(rows):,} images, expected {expected:,}")
    for row, name in enumerate(rows, 1):
        if not name or name.startswith("/") or ".." in name.split("/") or len(name) > 250:
            raise archives.ArchiveError(
                f"{str(path)!r}, line {row}: {name[:80]!r} must be a path below the folder of images"
            )
    return rows


def _check_distinct(names: list[str], lists: Path) -> list[str]:
    if len(set(names)) != len(names):
        raise archives.ArchiveError(f"{str(lists)!r} lists {len(names) - len(set(names)):,} images twice")
    return names


def _labels(folder: Path, end: str, concepts: list[str], expected: int, listed_in: Path) -> np.ndarray:
    """Labels (images, concepts), from one file for each concept."""
    columns = [_column(folder / f"Labels_{concept}{end}.txt", expected, str(listed_in)) for concept in concepts]
    return np.stack(columns, axis=1) if columns else np.zeros((expected, 0), bool)


def _column(path: Path, expected: int, listed_in: str) -> np.ndarray:
    lines = [line.strip() for line in archives.read_lines(path)]
    if len(lines) != expected:
        raise archives.ArchiveError(
            f"{str(path)!r} has {len(lines):,} lines, expected {expected:,}, one for each image of {listed_in}"
        )
    for row, text in enumerate(lines, 1):
        if text not in ("0", "1"):
            raise archives.ArchiveError(f"{str(path)!r}, line {row}: {text[:40]!r} must be 0 or 1")
    return np.array([text == "1" for text in lines], bool)


def _locate(root: Path, names: list[str]) -> list[Path | None]:
    """The file of each image, with or without its sub-folder in any folder; None without one."""
    bases = [(root / folder, flat) for folder in IMAGE_FOLDERS for flat in (False, True) if (root / folder).is_dir()]
    taken: set[Path] = set()
    files: list[Path | None] = []
    for name in names:
        flat_name = name.rsplit("/", 1)[-1]
        file = next((p for base, flat in bases if (p := base / (flat_name if flat else name)).is_file()), None)
        if file is not None:
            real = file.resolve()
            if real in taken:
                raise archives.ArchiveError(f"{str(file)!r} would be the file of two images, one of them {name!r}")
            taken.add(real)
        files.append(file)
    return files
