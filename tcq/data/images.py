"""Safe decoding: a file or its bytes to one uint8 RGB square, or an `ImageError` that says why not."""

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
    """How an image becomes a square: "crop" keeps a central square, "squash" scales both sides."""

    rule: str = "crop"
    interpolation: str = "bicubic"
    share: float = 1.0  # of the shorter side that "crop" keeps


WHOLE = Resize()


def resize_of(data: ConfigDict) -> Resize:
    """The rule that `config.data` describes."""
    return Resize(data.resize, data.interpolation, data.crop_share)


class ImageError(ValueError):
    """This file cannot be used as an image; the message is the reason."""


def decode(source: str | Path | bytes, *, size: int, resize: Resize = WHOLE) -> UInt8[np.ndarray, "size size 3"]:
    """The first frame of an image as uint8 RGB (size, size, 3), rotated as its EXIF tag says.

    The size in the header is checked before anything is decoded. Transparent pixels are blended with white, 16 bits are
    reduced to 8.

    Raises:
      ImageError: not a regular file, empty, larger than 256 MiB or 100 million pixels, of another format than JPEG,
        PNG, GIF, BMP, WebP, TIFF and PPM, or corrupted.
    """
    data = source if isinstance(source, bytes) else _read(Path(source))
    if not data:
        raise ImageError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about metadata; pixels that cannot be decoded raise
            return _decode(data, size, resize)
    except (ImageError, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(f"not an image of a known format ({', '.join(FORMATS)})") from None
    except Exception as error:  # decoders raise errors of any kind for corrupted input
        raise ImageError(f"cannot be decoded: {type(error).__name__}: {error}") from None


def _read(path: Path) -> bytes:
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):  # opening a pipe would block forever
            raise ImageError("not a regular file")
        if info.st_size > MAX_BYTES:
            raise ImageError(f"{info.st_size:,} bytes is above the limit of {MAX_BYTES:,}")
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}") from None


def _decode(data: bytes, size: int, resize: Resize) -> np.ndarray:
    image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} pixels is above the limit of {MAX_PIXELS:,}")
    least = int(2 * size / resize.share)
    image.draft("RGB", (least, least))  # decodes a large JPEG at a fraction of its size
    image.load()
    with contextlib.suppress(Exception):  # the pixels are fine even if the EXIF tag is corrupted
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
            raise ImageError("has pixels that are not finite")
        top = 1.0 if image.mode == "F" and values.max() <= 1 else 255.0 if values.max() <= 255 else 65_535.0
        return Image.fromarray(np.clip(values / top * 255, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
