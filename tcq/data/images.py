"""Safe decoding of a file to one uint8 RGB square, or an `ImageError` that says why not."""

import contextlib
import hashlib
import io
import os
import stat
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict
from PIL import Image

from tcq.data import repair

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000")
HEIC = "HEIC"  # by pillow-heif, which is an extra
MAX_PIXELS = 100_000_000  # the default of data.max_pixels
AT_ONCE = 2**27  # pixels that all threads of a process hold decoded at a time; one larger image is decoded alone
STRIP = 2**20  # pixels that are converted to RGB at a time
SOFTWARE = "tcq"  # the "Software" of pictures that tcq draws, which are never input
RESIZES = ("crop", "squash")
INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
TRANSPOSITIONS = {  # by the value of the EXIF tag "Orientation"
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BIT_DEPTHS = (8, 10, 12, 14, 16, 24, 32)  # of gray values above 8 bits: the least one that holds the image's maximum


class Resize(NamedTuple):
    """How an image becomes a square: "crop" keeps the centre, "squash" scales both sides."""

    rule: str = "crop"
    interpolation: str = "bicubic"
    share: float = 1.0  # of the shorter side that "crop" keeps


WHOLE = Resize()
ALL = Resize("squash")
COUNTED = 512  # side of the square on which missing pixels are counted


def resize_of(data: ConfigDict) -> Resize:
    """The rule that `config.data` describes."""
    return Resize(data.resize, data.interpolation, data.crop_share)


class ImageError(ValueError):
    """The contents of this file cannot be used as an image; the message is the reason."""


class UnreadableError(ImageError):
    """The file or its library could not be had, or memory was short; it may succeed later."""


class Decoded(NamedTuple):
    """A decoded image, and what was wrong with a file that was decoded nevertheless, else ""."""

    pixels: UInt8[np.ndarray, "size size 3"]
    repaired: str


def decode(
    source: str | Path | bytes, *, size: int, resize: Resize = WHOLE, max_pixels: int = MAX_PIXELS
) -> UInt8[np.ndarray, "size size 3"]:
    """The pixels of `read`, with the same arguments and errors."""
    return read(source, size=size, resize=resize, max_pixels=max_pixels).pixels


def read(source: str | Path | bytes, *, size: int, resize: Resize = WHOLE, max_pixels: int = MAX_PIXELS) -> Decoded:
    """The first frame of an image as uint8 RGB (size, size, 3), turned as its EXIF says.

    The size in the header is checked before anything is decoded. Transparent pixels are blended with white. Gray values
    above 8 bits are scaled by the least of 8, 10, 12, 14, 16 ... bits that holds the image's maximum. A file that lacks
    its end marker or up to 5 % of its pixels is repaired. Metadata never costs an image.

    Args:
      source: a path, or the bytes of a file.
      size: of the square, in pixels.
      resize: how the image becomes a square.
      max_pixels: most pixels to decode. Those of a baseline JPEG are counted at the scale at which it is decoded.

    Raises:
      ImageError: empty, too many pixels, of an unknown format, or corrupted.
      UnreadableError: not a regular file, cannot be read, needs a library that is missing, or memory is short.
    """
    try:
        with _without_warnings(), opened(source) as file:
            return _read(file, size, resize, max_pixels)
    except ImageError:
        raise
    except MemoryError:
        raise UnreadableError("memory is short") from None
    except OSError as error:
        raise UnreadableError(f"cannot be read: {error.strerror or error}") from None


class _Quiet:
    """The threads that decode now, and the filters from before the first of them."""

    lock = threading.Lock()
    threads = 0
    filters = contextlib.ExitStack()


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Hides what Pillow warns of in metadata; pixels that cannot be decoded raise.

    Filters belong to the process, so the last of several threads restores them.
    """
    with _Quiet.lock:
        _Quiet.threads += 1
        if _Quiet.threads == 1:
            _Quiet.filters.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
    try:
        yield
    finally:
        with _Quiet.lock:
            _Quiet.threads -= 1
            if not _Quiet.threads:
                _Quiet.filters.close()


def square(gray: UInt8[np.ndarray, "H W"], *, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The pixels that `decode` gives for a lossless file of a gray image."""
    image = Image.fromarray(gray)
    return np.asarray(_to_square(_to_rgb(image, _steps(image.size, size, WHOLE), deep=False), size, WHOLE), np.uint8)


def pixel_digest(source: str | Path | bytes, *, max_pixels: int = MAX_PIXELS) -> bytes:
    """A hash of all pixels in 8-bit RGB and of their number.

    It is equal for files that show exactly the same.

    Raises ImageError and UnreadableError as `read`, also for a file that would have to be repaired.
    """
    try:
        with _without_warnings(), opened(source) as file:
            image = _open(file)
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(f"{width} x {height} pixels is above data.max_pixels {max_pixels:,}")
            with _room(width * height):
                rgb = _to_rgb(_turned(image), (1, 1), deep=False)
                return hashlib.blake2b(f"{rgb.size}".encode() + rgb.tobytes(), digest_size=20).digest()
    except ImageError:
        raise
    except Exception as error:  # decoders raise errors of any kind for corrupted input
        raise UnreadableError(f"cannot be decoded: {type(error).__name__}: {error}") from None


@contextlib.contextmanager
def opened(source: str | Path | bytes) -> Iterator[BufferedIOBase]:
    """A file, or the contents of one, for reading.

    Raises UnreadableError if it is not regular or cannot be opened.
    """
    if isinstance(source, bytes):
        yield io.BytesIO(source)
        return
    try:
        if not stat.S_ISREG(os.stat(source).st_mode):  # opening a pipe would block forever
            raise UnreadableError("not a regular file")
        file = open(source, "rb")
    except OSError as error:
        raise UnreadableError(f"cannot be read: {error.strerror or error}") from None
    with file:
        yield file


def _read(file: BufferedIOBase, size: int, resize: Resize, max_pixels: int) -> Decoded:
    """Decodes a file; if that fails, what `repair.attempts` makes of it."""
    if not file.read(1):
        raise ImageError("the file is empty")

    try:
        return Decoded(_decode(file, size, resize, max_pixels), "")
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # decoders raise errors of any kind for corrupted input
        if isinstance(error, OSError) and error.errno is not None:  # of the file system, and not of the contents
            raise
        failure = f"cannot be decoded: {type(error).__name__}: {error}"
    with contextlib.suppress(Exception):  # a file that is damaged in another way
        for data, note in repair.attempts(file, lambda data: _decode(io.BytesIO(data), COUNTED, ALL, max_pixels)):
            with contextlib.suppress(Exception):
                return Decoded(_decode(io.BytesIO(data), size, resize, max_pixels), note)
    raise ImageError(failure)


def _decode(file: BufferedIOBase, size: int, resize: Resize, max_pixels: int) -> np.ndarray:
    image = _open(file)
    if str(image.info.get("Software", "")) == SOFTWARE:
        raise ImageError("a picture that tcq has drawn")
    least = int(2 * size / resize.share)
    whole = image.size
    image.draft("RGB", (least, least))  # decodes a large JPEG at a fraction of its size
    width, height = whole if "progressive" in image.info else image.size  # these are held as a whole
    if width * height > max_pixels:
        raise ImageError(f"{width} x {height} pixels is above data.max_pixels {max_pixels:,}")
    with _room(width * height):
        tiles = getattr(image, "tile", ())
        deep = any(";16" in str(tile[3]) for tile in tiles)  # 16 bits of RGB, of which Pillow keeps the upper 8
        image.load()
        image = _turned(image)
        image = _to_rgb(image, _steps(image.size, size, resize), deep=deep and image.mode in ("RGB", "RGBA"))
    return np.asarray(_to_square(image, size, resize), np.uint8)


def _open(file: BufferedIOBase) -> Image.Image:
    """An image whose header was read.

    `Image.open` would refuse large ones by a limit of the whole process.
    """
    file.seek(0)
    start = file.read(16)
    reasons = []
    for name, (factory, accepts) in _factories().items():
        if accepts(start) is not True:
            continue
        file.seek(0)
        try:
            image = factory(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error) as error:
            reasons.append(f"{name}: {error}")
            continue
        if min(image.size) < 1:
            raise ImageError(f"{image.size[0]} x {image.size[1]} pixels: it is empty")
        return image
    if reasons:
        raise SyntaxError("; ".join(reasons))
    if start[4:8] == b"ftyp" and start[8:12] in repair.HEIC_BRANDS:
        raise UnreadableError("HEIC, which needs pillow-heif: pip install pillow-heif")
    raise ImageError(f"not an image of a known format ({', '.join((*FORMATS, HEIC))})")


@lru_cache(maxsize=1)
def _factories() -> dict[str, tuple[Callable[[BufferedIOBase, str], Any], Callable[[bytes], Any]]]:
    """For each format the function that opens a file, and the test of its first 16 bytes."""
    Image.init()
    factories: dict[str, Any] = {name: Image.OPEN[name] for name in FORMATS if name in Image.OPEN}
    with contextlib.suppress(ImportError):
        import pillow_heif

        factories[HEIC] = pillow_heif.HeifImageFile, lambda b: b[4:8] == b"ftyp" and b[8:12] in repair.HEIC_BRANDS
    return factories


class _Held:
    """The pixels that all threads hold decoded."""

    changed = threading.Condition()
    pixels = 0


@contextlib.contextmanager
def _room(pixels: int) -> Iterator[None]:
    """Waits until all threads together hold at most `AT_ONCE` pixels, or none but these."""
    with _Held.changed:
        _Held.changed.wait_for(lambda: not _Held.pixels or _Held.pixels + pixels <= AT_ONCE)
        _Held.pixels += pixels
    try:
        yield
    finally:
        with _Held.changed:
            _Held.pixels -= pixels
            _Held.changed.notify_all()


def _turned(image: Image.Image) -> Image.Image:
    """The image turned as its orientation tag says.

    The other tags are not looked at, as they may be corrupted.
    """
    try:
        method = TRANSPOSITIONS.get(image.getexif().get(0x0112))  # type: ignore[arg-type]  # unhashable values raise
    except Exception:  # no tag can be read
        return image
    return image if method is None else image.transpose(method)


def _steps(whole: tuple[int, int], size: int, resize: Resize) -> tuple[int, int]:
    """The whole numbers by which both sides may be reduced.

    At least 3 pixels are left for each of the result.
    """
    width, height = whole
    if resize.rule == "crop":
        width = height = min(width, height)
    return max(int(width * resize.share / size / 3), 1), max(int(height * resize.share / size / 3), 1)


def _to_rgb(image: Image.Image, steps: tuple[int, int], *, deep: bool) -> Image.Image:
    """The image in RGB, reduced by whole steps.

    It is made strip by strip, so that a wide type never holds all pixels.
    """
    (width, height), (x, y) = image.size, steps
    convert = _converter(image, deep)
    rows = max(STRIP // max(width, 1) // y, 1) * y
    if rows >= height:
        return convert(image).reduce(steps)
    small = Image.new("RGB", (-(-width // x), -(-height // y)))
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        small.paste(convert(strip).reduce(steps), (0, top // y))
    return small


def _converter(image: Image.Image, deep: bool) -> Callable[[Image.Image], Image.Image]:
    """The function that makes an RGB image of one of the same kind."""
    if image.mode.startswith("I") or image.mode == "F":
        scale = 255 / _full_scale(image)
        return lambda part: Image.fromarray(
            np.clip(np.asarray(part, np.float32) * scale, 0, 255).astype(np.uint8)
        ).convert("RGB")
    if deep:
        most = max(high for _, high in image.getextrema()[:3])  # type: ignore[misc]
        bits = next(b for b in BIT_DEPTHS if most < 2 ** (b - 8)) if most else 16
        image_scale = 2 ** (16 - bits)
        return lambda part: _on_white(part).point(lambda value: value * image_scale)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        return _on_white
    return lambda part: part.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _full_scale(image: Image.Image) -> float:
    """The value that becomes white.

    It is 1 for floats up to 1, else the largest of the least bit depth that holds all.
    """
    width, height = image.size
    rows, most = max(STRIP // width, 1), 0.0
    for top in range(0, height, rows):
        values = np.asarray(image.crop((0, top, width, min(top + rows, height))))
        if image.mode == "F" and not np.isfinite(values).all():
            raise ImageError("has pixels that are not finite")
        most = max(most, float(values.max()))
    if image.mode == "F" and most <= 1:
        return 1.0
    return next((float(2**bits - 1) for bits in BIT_DEPTHS if most < 2**bits), most)


def _to_square(image: Image.Image, size: int, resize: Resize) -> Image.Image:
    width, height = image.size
    box = (0.0, 0.0, float(width), float(height))
    if resize.rule == "crop":
        side = min(width, height) * resize.share
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
    if (width, height) == (size, size) and resize.share == 1:
        return image
    return image.resize((size, size), INTERPOLATIONS[resize.interpolation], box=box)
