"""Preparing a dataset once from its published files, without network or TensorFlow."""

import contextlib
import shutil
from importlib import import_module
from pathlib import Path

from tcq.data.datasets import archives

# name of the dataset: (module, builder, default config)
DATASETS = {
    "cifar10": ("tcq.data.datasets.cifar10", "Cifar10", None),
    "mirflickr25k": ("tcq.data.datasets.mirflickr25k", "Mirflickr25k", None),
    "nus_wide": ("tcq.data.datasets.nus_wide", "NusWide", "concepts21"),
}


class PrepareError(ValueError):
    """The dataset cannot be prepared.

    The message says which file is missing, and where to get it and put it.
    """


def prepare(dataset: str, *, files: str | Path = "", data_dir: str | Path = "", verify: bool = True) -> Path:
    """Writes the dataset in the format of TFDS (array_record), and returns its folder.

    A failure leaves nothing behind.

    Args:
      dataset: cifar10, mirflickr25k, nus_wide (of 21 concepts) or nus_wide/concepts81.
      files: the folder with the published files; "" is `manual_dir(data_dir)`.
      data_dir: where TFDS keeps datasets; "" is its default.
      verify: whether to refuse files that are not the published ones, and missing or corrupted images. With False other
        files of the same layout are accepted; corrupted photos of NUS-WIDE are left out and listed in the metadata.

    Raises:
      PrepareError: the dataset is unknown, or a file is missing, corrupted or not the published one.
    """
    name, _, config = dataset.partition("/")
    if name not in DATASETS:
        raise PrepareError(
            f"dataset {dataset!r} is unknown: use one of {', '.join(DATASETS)}, or `tfds build` for a dataset of TFDS"
        )
    import tensorflow_datasets as tfds

    home = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    folder = Path(files).expanduser() if files else manual_dir(home)
    module, builder_name, default = DATASETS[name]
    try:
        builder_class = getattr(import_module(module), builder_name)
        builder = builder_class(data_dir=home, config=config or default, file_format="array_record", verify=verify)
    except ValueError as error:
        raise PrepareError(f"{dataset!r}: {error}") from None
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "not found"
        raise PrepareError(f"{str(folder)!r} {problem}. {instructions(name)}")
    target = Path(builder.data_dir)
    if target.exists():
        raise PrepareError(f"{str(target)!r} exists: use it, or delete it to prepare the dataset again")
    try:
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=folder))
    except archives.ArchiveError as error:
        raise PrepareError(f"{error}. {instructions(name)}") from None
    finally:
        for left in (home / "downloads" / "extracted", home / "downloads", target.parent, home / name):
            with contextlib.suppress(OSError):  # TFDS creates them; remove those that are empty
                left.rmdir()
        if [p.name for p in (home / name).glob("*")] == [".config"]:  # TFDS's list of configs, when there is none
            shutil.rmtree(home / name)
    return target


def manual_dir(data_dir: str | Path) -> Path:
    """Where TFDS expects files that were downloaded by hand."""
    return Path(data_dir).expanduser() / "downloads" / "manual"


def instructions(name: str) -> str:
    """Which files to get for a dataset of `DATASETS`, where, and under which terms."""
    return str(import_module(DATASETS[name][0]).INSTRUCTIONS)


def file_states(name: str, files: str | Path) -> dict[str, str]:
    """ "found", "missing", or a wrong size, for each published file or folder of a dataset."""
    states = {}
    for file, size in import_module(DATASETS[name][0]).FILES.items():
        path = Path(files) / file
        states[file] = "found" if path.exists() else "missing"
        if size and path.is_file() and path.stat().st_size != size:
            states[file] = f"has {path.stat().st_size:,} bytes, the published file has {size:,}"
    return states
