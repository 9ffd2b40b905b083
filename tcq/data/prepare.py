"""Preparing a dataset once, from its published files on this disk: no network, no TensorFlow."""

from importlib import import_module
from pathlib import Path

from tcq.data import archives

# name of the dataset -> (module, builder, config unless named)
DATASETS = {
    "cifar10": ("tcq.data.cifar10", "Cifar10", None),
    "mirflickr25k": ("tcq.data.mirflickr25k", "Mirflickr25k", None),
    "nus_wide": ("tcq.data.nus_wide", "NusWide", "concepts21"),
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
        raise PrepareError(f"{str(folder)!r} does not exist. {instructions(name)}")
    try:
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=folder))
    except archives.ArchiveError as error:
        raise PrepareError(f"{error}. {instructions(name)}") from None
    return Path(builder.data_dir)


def manual_dir(data_dir: str | Path) -> Path:
    """Where TFDS expects files that a person has downloaded."""
    return Path(data_dir).expanduser() / "downloads" / "manual"


def instructions(name: str) -> str:
    """What to get for a dataset of `DATASETS`, where, and under which terms."""
    return str(import_module(DATASETS[name][0]).INSTRUCTIONS)


def found(name: str, files: str | Path) -> dict[str, bool]:
    """Which of the files (or folders) that the dataset is made of lie in the folder."""
    return {file: (Path(files) / file).exists() for file in import_module(DATASETS[name][0]).FILES}
