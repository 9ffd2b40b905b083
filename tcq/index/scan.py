"""Reading the folder of images that is to be indexed, and naming its images."""

from collections.abc import Sequence
from pathlib import Path

from tcq import encode
from tcq.data import sources
from tcq.data.images import resize_of
from tcq.data.source import Source
from tcq.runtime import storage


def read_folder(encoder: encode.Encoder, images: str | Path) -> Source:
    """Every image below a folder, decoded as the encoder needs it. Raises as `sources.folder`."""
    data = encoder.config.data
    return sources.folder(images, size=data.image_size, resize=resize_of(data), cache_dir=data.cache_dir)


def full_paths(images: str | Path, names: Sequence[str]) -> list[str]:
    """The absolute paths, or URLs, of images by their names below a folder."""
    if storage.is_url(images):
        return [str(storage.join(images, name)) for name in names]
    root = Path(images).expanduser().resolve()
    return [str(root / name) for name in names]
