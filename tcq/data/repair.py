"""What can still be decoded of a file, without its metadata or with the end it lacks."""

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from io import BufferedIOBase

import numpy as np

MAX_BYTES = 64 * 2**20  # of a file that is repaired, in memory
MISSING = 0.05  # the most pixels, as a share, that a file may lack
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
JPEG, PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
RAW = (b"BM", b"P5", b"P6")  # rows of pixels without compression: BMP, PPM
NO_END = "lacks its end marker"
_END = b"\xff\xd9"
_NOISE = bytes(range(1, 250, 7)) * 64  # decodes to other pixels than the end of a file does

Decode = Callable[[bytes], np.ndarray]


def attempts(file: BufferedIOBase, decode: Decode) -> Iterator[tuple[bytes, str]]:
    """Contents to try in place of a file that cannot be decoded, and what was wrong with it.

    `decode` gives all pixels of a file, (H, W, 3) at any scale. The missing ones of a JPEG are counted with it.
    """
    file.seek(0)
    data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        return
    plain = without_metadata(data)
    if plain != data:
        yield plain, ""
    if data.startswith(JPEG):
        yield from _complete_jpeg(plain, decode)
    elif data.startswith(PNG):
        yield from _complete_png(plain)
    elif data.startswith(RAW):
        yield data + bytes(int(len(data) * MISSING)), f"lacks up to {MISSING:.0%} of its pixels"


def without_metadata(data: bytes) -> bytes:
    """A JPEG or PNG with only what its pixels and their orientation need.

    An AVIF lacks only its EXIF, and others are as they were.
    """
    if data.startswith(PNG):
        needed = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"eXIf", b"IEND")
        return PNG + b"".join(_chunk(kind, body) for kind, body in _chunks(data) if kind in needed)
    if data.startswith(JPEG):
        return _jpeg_without_metadata(data)
    if data[4:8] == b"ftyp":
        return re.sub(rb"(MM\0\*\0\0\0\x08|II\*\0\x08\0\0\0)..", rb"\1\0\0", data, flags=re.DOTALL)  # no entries
    return data


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and contents of the chunks of a PNG; the last one may be cut.

    It stops at a corrupted chunk of pixels.
    """
    place = len(PNG)
    while place + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        body, check = data[place + 8 : place + 8 + length], data[place + 8 + length : place + 12 + length]
        if len(check) == 4 and kind == b"IDAT" and struct.unpack(">I", check)[0] != zlib.crc32(kind + body):
            return
        yield kind, body
        place += 12 + length


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", len(body), kind) + body + struct.pack(">I", zlib.crc32(kind + body))


def _complete_png(data: bytes) -> Iterator[tuple[bytes, str]]:
    """The PNG with its missing rows as copies of the last one."""
    parts = list(_chunks(data))
    if not parts or parts[0][0] != b"IHDR" or len(parts[0][1]) != 13:
        return
    width, height, depth, color, _, _, interlaced = struct.unpack(">IIBBBBB", parts[0][1])
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(color, 0)
    row = (width * bits + 7) // 8 + 1
    stream = zlib.decompressobj()
    try:
        rows = stream.decompress(b"".join(body for kind, body in parts if kind == b"IDAT"), row * height)
    except zlib.error:
        return
    missing = row * height - len(rows)
    if not bits or (interlaced and missing) or not 0 <= missing <= MISSING * row * height:
        return
    rows = rows[: len(rows) // row * row]
    rows += (b"\x02" + bytes(row - 1)) * (height - len(rows) // row)  # filter 2, "up": the row above
    head = [(kind, body) for kind, body in parts if kind not in (b"IDAT", b"IEND")]
    chunks = [*head, (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b"")]
    yield PNG + b"".join(_chunk(kind, body) for kind, body in chunks), _note(missing / (row * height))


def _jpeg_without_metadata(data: bytes) -> bytes:
    """A JPEG without comments and applications' segments.

    JFIF, Exif and Adobe's color transform stay.
    """
    parts, place = [JPEG], 2
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] != 0xDA:
        marker, length = data[place + 1], struct.unpack(">H", data[place + 2 : place + 4])[0]
        segment = data[place : place + 2 + length]
        metadata = marker == 0xFE or 0xE1 <= marker <= 0xEF
        if not metadata or marker == 0xEE or segment[4:8] == b"Exif":
            parts.append(segment)
        place += 2 + length
    return b"".join([*parts, data[place:]])


def _complete_jpeg(data: bytes, decode: Decode) -> Iterator[tuple[bytes, str]]:
    """The JPEG with an end marker.

    Pixels that depend on what stands before the marker are the missing ones.
    """
    if not _scans_are_complete(data):
        return
    data = data.rstrip(b"\xff")
    try:
        ended, other = decode(data + _END), decode(data + _NOISE + _END)
    except Exception:
        return
    missing = float(np.mean((ended != other).any(axis=2)))
    if missing <= MISSING:
        yield data + _END, _note(missing)


def _scans_are_complete(data: bytes) -> bool:
    """Whether the last scan of a progressive JPEG brings the last bit.

    A baseline JPEG has only such a scan.
    """
    place = data.rfind(b"\xff\xda")
    if place < 0 or place + 5 > len(data):
        return False
    end = place + 2 + struct.unpack(">H", data[place + 2 : place + 4])[0]
    return len(data) > end and data[end - 1] & 15 == 0


def _note(missing: float) -> str:
    return f"lacks {missing:.1%} of its pixels" if missing else NO_END
