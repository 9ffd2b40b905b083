"""Safe decoding: a file or bytes become one uint8 RGB square, or an `ImageError` that says why not."""

import contextlib
import io
import os
import stat
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
MAX_BYTES = 256 * 2**20
MAX_PIXELS = 100_000_000
RESIZES = ("crop", "squash")
INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class Resize(NamedTuple):
    """How an image becomes a square: "crop" keeps the middle, `share` of the shorter side; "squash" scales both sides."""

    rule: str = "crop"
    interpolation: str = "bicubic"
    share: float = 1.0


WHOLE = Resize()


def resize_of(data: ConfigDict) -> Resize:
    """What `config.data` asks for."""
    return Resize(data.resize, data.interpolation, data.crop_share)


class ImageError(ValueError):
    """This file is no image that can be used; the message is the reason."""


def decode(source: str | Path | bytes, *, size: int, resize: Resize = WHOLE) -> UInt8[np.ndarray, "size size 3"]:
    """The first frame of an image as uint8 RGB (size, size, 3), upright by its EXIF tag.

    The header is read and measured before anything is decoded. Transparency is laid over white, 16 bits become 8.

    Raises:
      ImageError: not a regular file, empty, above 256 MiB or 100 million pixels, of another format than JPEG, PNG, GIF,
        BMP, WebP, TIFF, PPM, or damaged.
    """
    data = source if isinstance(source, bytes) else _read(Path(source))
    if not data:
        raise ImageError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata; what cannot be decoded raises
            return _decode(data, size, resize)
    except (ImageError, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(f"not an image of a known format ({', '.join(FORMATS)})") from None
    except Exception as error:  # decoders raise anything on damaged input
        raise ImageError(f"cannot be decoded: {type(error).__name__}: {error}") from None


def _read(path: Path) -> bytes:
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait forever
            raise ImageError("not a regular file")
        if found.st_size > MAX_BYTES:
            raise ImageError(f"{found.st_size:,} bytes is above the limit of {MAX_BYTES:,}")
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}") from None


def _decode(data: bytes, size: int, resize: Resize) -> np.ndarray:
    image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} pixels is above the limit of {MAX_PIXELS:,}")
    least = int(2 * size / resize.share)
    image.draft("RGB", (least, least))  # a large JPEG is decoded at a fraction of its size
    image.load()
    with contextlib.suppress(Exception):  # a damaged EXIF tag says nothing about the pixels
        image = ImageOps.exif_transpose(image)
    image = _to_rgb(image)
    width, height = image.size
    box = (0.0, 0.0, float(width), float(height))
    if resize.rule == "crop":
        side = min(width, height) * resize.share
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
    if (width, height) != (size, size) or resize.share < 1:
        image = image.resize((size, size), INTERPOLATIONS[resize.interpolation], box=box, reducing_gap=3.0)
    return np.asarray(image, np.uint8)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float64)
        if not np.isfinite(values).all():
            raise ImageError("holds pixels that are not finite")
        top = 1.0 if image.mode == "F" and values.max() <= 1 else 255.0 if values.max() <= 255 else 65_535.0
        return Image.fromarray(np.clip(values / top * 255, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
