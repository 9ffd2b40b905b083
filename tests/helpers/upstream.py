"""Small datasets in the layout of the published files."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from tcq.data.datasets import cifar10, mirflickr25k


def jpeg(seed: int) -> bytes:
    out = io.BytesIO()
    pixels = np.random.RandomState(seed).randint(0, 256, (20, 24, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def write_cifar10(folder: Path, rows_per_file: int = 4) -> np.ndarray:
    """The tarball; returns its rows, (files * rows, 3073): a label and three planes each."""
    random = np.random.RandomState(0)
    rows = random.randint(0, 256, (6, rows_per_file, cifar10.ROW)).astype(np.uint8)
    rows[:, :, 0] %= 10
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    members = {cifar10.NAMES: ("\n".join(names) + "\n\n").encode()}
    members |= {name: data.tobytes() for name, data in zip((*cifar10.TRAIN, *cifar10.TEST), rows, strict=True)}
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / cifar10.TARBALL, "w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return rows.reshape(-1, cifar10.ROW)


def mirflickr_marks(num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns potential labels (N, 24) and stricter ones (N, 14), a subset of the former."""
    random = np.random.RandomState(1)
    potential = random.rand(num_images, 24) < 0.2
    columns = [list(mirflickr25k.LABELS).index(label) for label in mirflickr25k.STRICT_LABELS]
    return potential, potential[:, columns] & (random.rand(num_images, 14) < 0.5)


def write_mirflickr(folder: Path, num_images: int = 12, photos: dict[int, bytes] | None = None) -> None:
    """The two zip files; `photos` replaces images by their number."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / mirflickr25k.IMAGES, "w") as archive:
        archive.writestr("mirflickr/doc/common_tags.txt", "sky 845\n")
        for i in sorted(range(1, num_images + 1), key=str):  # im1, im10, im11, ...: not the official order
            archive.writestr(f"mirflickr/im{i}.jpg", (photos or {}).get(i, jpeg(i)))
            archive.writestr(f"mirflickr/meta/license/license{i}.txt", "Attribution")
    potential, strict = mirflickr_marks(num_images)
    with zipfile.ZipFile(folder / mirflickr25k.ANNOTATIONS, "w") as archive:
        archive.writestr("README.txt", "...")
        for labels, marks, end in (
            (mirflickr25k.LABELS, potential, ""),
            (mirflickr25k.STRICT_LABELS, strict, "_r1"),
        ):
            for label, column in zip(labels, marks.T, strict=True):
                archive.writestr(f"{label}{end}.txt", "".join(f"{i + 1}\r\n" for i in np.flatnonzero(column)))


CONCEPTS = [f"concept{i:02d}" for i in range(81)]


def write_nus_wide(root: Path, num_images: int = 30, *, layout: str = "all", images: str = "Flickr") -> np.ndarray:
    """Lists, labels and photos; the photo of path ..._<1000 + i> is jpeg(i).

    `layout` is "all", "train_test", or "three_lists" (that and the whole list); `images` the folder, with "/flat"
    without sub-folders. Returns the labels (N, 81) in the order of the list, which is that of the paths. The first 25
    concepts are frequent; every fifth image has only a rare one.
    """
    random = np.random.RandomState(2)
    labels = random.rand(num_images, 81) < np.where(np.arange(81) < 25, 0.6, 0.02)
    labels[::5, :25] = False
    labels[::5, 80] = True
    names = [f"{('actor', 'zebra')[i % 2]}\\{i:04d}_{1000 + i}.jpg" for i in range(num_images)]
    order = sorted(range(num_images), key=lambda i: names[i])
    names, labels = [names[i] for i in order], labels[order]
    parts = {"Imagelist.txt": ("AllLabels", "", slice(None))}
    if layout != "all":  # the two lists interleave
        parts = {
            "TrainImagelist.txt": ("TrainTestLabels", "_Train", slice(0, None, 2)),
            "TestImagelist.txt": ("TrainTestLabels", "_Test", slice(1, None, 2)),
        }
    for file, (folder, end, rows) in parts.items():
        (root / "ImageList").mkdir(parents=True, exist_ok=True)
        (root / "ImageList" / file).write_text("".join(f"{name}\r\n" for name in names[rows]))
        (root / "Groundtruth" / folder).mkdir(parents=True, exist_ok=True)
        for concept, column in zip(CONCEPTS, labels.T, strict=True):
            text = "".join(f"{int(v)}\n" for v in column[rows])
            (root / "Groundtruth" / folder / f"Labels_{concept}{end}.txt").write_text(text)
    if layout == "three_lists":
        (root / "ImageList" / "Imagelist.txt").write_text("".join(f"{name}\r\n" for name in names))
    (root / "ConceptsList").mkdir()
    (root / "ConceptsList" / "Concepts81.txt").write_text("\n".join(CONCEPTS) + "\n")
    for i, name in zip(order, names, strict=True):
        folder, file = name.split("\\")
        path = root / images.removesuffix("/flat") / ("" if images.endswith("/flat") else folder) / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(i))
    return labels
