"""Preparing a dataset once, from its published files on this disk: no network, no TensorFlow."""

import contextlib
import shutil
from importlib import import_module
from pathlib import Path

from tcq.data.datasets import archives

# name of the dataset -> (module, builder, config unless named)
DATASETS = {
    "cifar10": ("tcq.data.datasets.cifar10", "Cifar10", None),
    "mirflickr25k": ("tcq.data.datasets.mirflickr25k", "Mirflickr25k", None),
    "nus_wide": ("tcq.data.datasets.nus_wide", "NusWide", "concepts21"),
}


class PrepareError(ValueError):
    """The dataset cannot be prepared; the message says what is missing, and where to get it and put it."""


def prepare(dataset: str, *, files: str | Path = "", data_dir: str | Path = "", verify: bool = True) -> Path:
    """Writes the dataset as TFDS stores it (array_record) and returns its folder; nothing is left behind where it fails.

    Args:
      dataset: cifar10, mirflickr25k, nus_wide (of 21 concepts) or nus_wide/concepts81.
      files: the folder with the published files; "" is `manual_dir(data_dir)`.
      data_dir: where TFDS keeps datasets; "" is its own choice.
      verify: refuse files that are not the published ones, and images that are missing or damaged. Without it other
        files of the same layout are taken, damaged photos of NUS-WIDE left out and listed in the dataset's metadata.

    Raises:
      PrepareError: the dataset is unknown, or a file is missing, damaged or not the published one.
    """
    name, _, config = dataset.partition("/")
    if name not in DATASETS:
        raise PrepareError(
            f"dataset {dataset!r} is unknown: use one of {', '.join(DATASETS)}; for those of TFDS use `tfds build`"
        )
    import tensorflow_datasets as tfds

    home = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    folder = Path(files).expanduser() if files else manual_dir(home)
    module, builder_name, default = DATASETS[name]
    try:
        make = getattr(import_module(module), builder_name)
        builder = make(data_dir=home, config=config or default, file_format="array_record", verify=verify)
    except ValueError as error:
        raise PrepareError(f"{dataset!r}: {error}") from None
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise PrepareError(f"{str(folder)!r} {what}. {instructions(name)}")
    place = Path(builder.data_dir)
    if place.exists():
        raise PrepareError(f"{str(place)!r} is there already: it is ready to use, or delete it to prepare it again")
    try:
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=folder))
    except archives.ArchiveError as error:
        raise PrepareError(f"{error}. {instructions(name)}") from None
    finally:
        for left in (home / "downloads" / "extracted", home / "downloads", place.parent, home / name):
            with contextlib.suppress(OSError):  # TFDS makes them; those that are empty go
                left.rmdir()
        if [p.name for p in (home / name).glob("*")] == [".config"]:  # a list of configs of which there is none
            shutil.rmtree(home / name)
    return place


def manual_dir(data_dir: str | Path) -> Path:
    """Where TFDS expects files that a person has downloaded."""
    return Path(data_dir).expanduser() / "downloads" / "manual"


def instructions(name: str) -> str:
    """What to get for a dataset of `DATASETS`, where, and under which terms."""
    return str(import_module(DATASETS[name][0]).INSTRUCTIONS)


def found(name: str, files: str | Path) -> dict[str, str]:
    """For each of the files (or folders) that the dataset is made of: "found", "missing", or that its size is another."""
    states = {}
    for file, size in import_module(DATASETS[name][0]).FILES.items():
        path = Path(files) / file
        states[file] = "found" if path.exists() else "missing"
        if size and path.is_file() and path.stat().st_size != size:
            states[file] = f"has {path.stat().st_size:,} bytes, the published file has {size:,}"
    return states
