"""Images as cameras, phones, instruments and broken transfers leave them."""

import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tcq.data import images
from write_images import encoded, png

# Entries of EXIF directories that Pillow cannot write back: tag, type, count, value.
GPS = {
    "negative altitude": (6, 10, 1, struct.pack(">ii", -5, 1)),
    "negative latitude": (2, 10, 3, struct.pack(">iiiiii", -1, 1, 2, 1, 3, 1)),
    "altitude reference as text": (5, 2, 2, b"0\0"),
    "version as text": (0, 2, 4, b"2.2\0"),
}
MAIN = {
    "resolution is not a number": (0x011A, 5, 1, struct.pack(">II", 0, 0)),
    "negative resolution": (0x011A, 10, 1, struct.pack(">ii", -72, 1)),
    "flash above 16 bits": (0x9209, 4, 1, struct.pack(">I", 0x10000)),
    "text of another type": (0x010E, 12, 1, struct.pack(">d", float("nan"))),
}


def exif(tag, type_, count, value, *, gps, orientation=6):
    """The bytes of an EXIF segment with an orientation and one more entry, in the main or the GPS directory."""
    entries = [(0x0112, 3, 1, struct.pack(">HH", orientation, 0))]
    first = 8 + 2 + 12 * 2 + 4  # of what follows the main directory
    if gps:
        entries.append((0x8825, 4, 1, struct.pack(">I", first)))
        tail = struct.pack(">HHHI", 1, tag, type_, count)
        tail += value.ljust(4, b"\0") if len(value) <= 4 else struct.pack(">I", first + 18)
        tail += bytes(4) + (b"" if len(value) <= 4 else value)
    else:
        entries.append((tag, type_, count, value.ljust(4, b"\0") if len(value) <= 4 else struct.pack(">I", first)))
        tail = b"" if len(value) <= 4 else value
    main = struct.pack(">H", 2) + b"".join(struct.pack(">HHI", t, k, c) + v for t, k, c, v in sorted(entries))
    return b"Exif\0\0MM\0*\0\0\0\x08" + main + bytes(4) + tail


@pytest.fixture(scope="module")
def picture():
    ramp = np.arange(48 * 64, dtype=np.float64).reshape(48, 64) / 12
    return np.stack([ramp, ramp[::-1], ramp[:, ::-1]], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "PNG"])
@pytest.mark.parametrize("name", [*GPS, *MAIN])
def test_an_image_is_turned_whatever_its_other_tags_are(picture, format, name):
    tags = exif(*(GPS | MAIN)[name], gps=name in GPS)
    lossless = {"WEBP": {"lossless": True}}.get(format, {})
    sideways, plain = io.BytesIO(), io.BytesIO()
    Image.fromarray(picture).save(sideways, format, exif=tags, **lossless)
    Image.fromarray(picture).save(plain, format, **lossless)
    upright = Image.open(plain).convert("RGB").transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(
        images.decode(sideways.getvalue(), size=48), images.decode(png(np.asarray(upright)), size=48)
    )


def test_an_avif_is_turned_whatever_its_other_tags_are(picture):
    for entry, value in (((6, 5, 1), (5, 1)), ((6, 10, 1), (-5, 1))):
        good = Image.Exif()
        good[0x0112] = 6
        good[0x8825] = {6: 5.0}  # altitude, 5 over 1
        out = io.BytesIO()
        Image.fromarray(picture).save(out, "AVIF", exif=good)
        data, packed = out.getvalue(), [struct.pack(e + "HHI", 6, 5, 1) for e in "<>"]
        (order,) = [e for e, p in zip("<>", packed, strict=True) if p in data]
        data = data.replace(struct.pack(order + "HHI", 6, 5, 1), struct.pack(order + "HHI", *entry))
        data = data.replace(struct.pack(order + "II", 5, 1), struct.pack(order + "ii", *value))
        plain = io.BytesIO()
        Image.fromarray(picture).save(plain, "AVIF")
        upright = np.asarray(Image.open(plain).convert("RGB").transpose(Image.Transpose.ROTATE_270))
        np.testing.assert_array_equal(images.decode(data, size=48), images.decode(png(upright), size=48))


def test_a_tiff_is_turned_once(picture):
    tags = Image.Exif()
    tags[0x0112] = 6
    tags[0x9209] = 1
    turned = images.decode(encoded(picture, "TIFF", exif=tags), size=48)
    upright = np.asarray(Image.fromarray(picture).transpose(Image.Transpose.ROTATE_270))
    np.testing.assert_array_equal(turned, images.decode(png(np.asarray(upright)), size=48))


def test_metadata_never_costs_an_image(picture):
    plain = encoded(picture, "PNG")
    want = images.decode(plain, size=48)

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    large = zlib.compress(bytes(3 * 2**20))
    for added in (
        chunk(b"zTXt", b"comment\0\0" + large),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + large),
        chunk(b"iCCP", b"profile\0\0" + large),
        chunk(b"iCCP", b"profile\0\0" + b"not compressed"),
        chunk(b"tEXt", b"comment\0" + b"x" * 100)[:-1] + b"\0",  # its checksum is wrong
    ):
        np.testing.assert_array_equal(images.decode(plain[:33] + added + plain[33:], size=48), want)
    jpeg = encoded(picture, "JPEG")
    for marker in range(0xE1, 0xF0):
        for body in (b"", b"\0" * 9, b"Photoshop 3.0\0" + b"8BIM" + b"\xff" * 9, b"MPF\0" + b"\xff" * 20):
            segment = bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body
            assert images.decode(jpeg[:2] + segment + jpeg[2:], size=48).shape == (48, 48, 3)


def test_gray_values_are_scaled_by_the_bits_that_they_use():
    ramp = np.linspace(0, 1, 64 * 64).reshape(64, 64)
    want = images.decode(png((ramp * 255).astype(np.uint8)), size=16).astype(int)
    for bits in (10, 12, 14, 16):
        values = (ramp * (2**bits - 1)).astype(np.uint16)
        for data in (encoded(values, "TIFF"), encoded(values, "PNG")):
            assert np.abs(images.decode(data, size=16) - want).max() <= 2, bits
    for scale in (1.0, 255.0, 4095.0):
        assert np.abs(images.decode(encoded((ramp * scale).astype(np.float32), "TIFF"), size=16) - want).max() <= 2


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak memory is read from /proc")
def test_a_large_jpeg_is_decoded_at_the_scale_that_is_needed(tmp_path):
    path = tmp_path / "panorama.jpg"
    Image.new("RGB", (21_694, 10_847), (10, 200, 30)).save(path, quality=50)
    pixels, peak = _decode_in_a_process(path, 224)
    assert np.abs(pixels - [10, 200, 30]).max() <= 3
    assert peak < 250
    with pytest.raises(images.ImageError, match=r"x \d+ pixels is above data.max_pixels 1,000,000"):
        images.decode(path, size=224, max_pixels=1_000_000)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak memory is read from /proc")
@pytest.mark.parametrize(("mode", "most"), [("I;16", 420), ("RGBA", 800), ("P", 300), ("F", 800)])
def test_memory_is_a_few_times_that_of_the_pixels(tmp_path, mode, most):
    path = tmp_path / ("large.tif" if mode == "F" else "large.png")
    side = 8000
    if mode == "P":
        Image.new("P", (side, side), 3).save(path, compress_level=1)
    elif mode == "RGBA":
        Image.new("RGBA", (side, side), (1, 2, 3, 128)).save(path, compress_level=1)
    elif mode == "F":
        Image.new("F", (side, side), 0.5).save(path, compression="packbits")
    else:
        Image.fromarray(np.full((side, side), 4000, np.uint16)).save(path, compress_level=1)
    _, peak = _decode_in_a_process(path, 64)
    assert peak < most


def _decode_in_a_process(path, size):
    """The pixels, and the MiB by which the peak memory of a process grows."""
    code = f"""
import sys
import numpy as np
from tcq.data import images
def peak():  # getrusage would tell that of the parent, if it is higher
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
images.decode({_small()!r}, size=8)
before = peak()
pixels = images.decode({str(path)!r}, size={size})
sys.stdout.buffer.write(pixels.tobytes() + (peak() - before).to_bytes(8, "little"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=120)
    peak = int.from_bytes(done.stdout[-8:], "little") / 2**10
    return np.frombuffer(done.stdout[:-8], np.uint8).reshape(size, size, 3).astype(int), peak


def _small():
    return png(np.zeros((8, 8, 3), np.uint8))


@pytest.mark.parametrize("format", ["AVIF", "JPEG2000"])
def test_formats_of_phones_and_archives(picture, format):
    got = images.decode(encoded(picture, format), size=48).astype(int)
    assert np.abs(got - images.decode(png(picture), size=48)).mean() < 6


def test_heic_by_the_extra(picture, monkeypatch):
    pillow_heif = pytest.importorskip("pillow_heif")
    out = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(picture)).save(out, quality=95)
    got = images.decode(out.getvalue(), size=48).astype(int)
    assert np.abs(got - images.decode(png(picture), size=48)).mean() < 6
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    images._factories.cache_clear()
    with pytest.raises(images.ImageError, match=r"pip install pillow-heif"):
        images.decode(out.getvalue(), size=48)
    images._factories.cache_clear()


@pytest.mark.parametrize("format", ["JPEG", "progressive", "PNG", "BMP", "PPM"])
def test_a_file_that_lacks_little_is_repaired_and_one_that_lacks_more_is_not(format):
    photo = np.random.RandomState(0).randint(0, 256, (200, 300, 3)).astype(np.uint8)
    options = {"progressive": True} if format == "progressive" else {}
    data = encoded(photo, {"progressive": "JPEG"}.get(format, format), **options)
    assert images.read(data, size=64).repaired == ""
    want = images.decode(data, size=64).astype(int)
    for lost in (1, 2, 12) if format in ("JPEG", "progressive") else (40,):
        repaired = images.read(data[:-lost], size=64)
        assert "lacks" in repaired.repaired, lost
        assert np.abs(repaired.pixels - want).mean() < 6, lost
    few = images.read(data[: int(len(data) * 0.97)], size=64) if format != "progressive" else None
    assert few is None or ("pixels" in few.repaired and np.abs(few.pixels - want)[4:-4].mean() < 3)
    with pytest.raises(images.ImageError, match="cannot be decoded"):
        images.read(data[: int(len(data) * 0.8)], size=64)


def test_what_a_file_cannot_tell_now_is_another_error_than_what_it_holds(tmp_path):
    with pytest.raises(images.UnreadableError):
        images.read(tmp_path / "missing.jpg", size=8)
    (tmp_path / "text.jpg").write_text("text")
    with pytest.raises(images.ImageError) as error:
        images.read(tmp_path / "text.jpg", size=8)
    assert not isinstance(error.value, images.UnreadableError)


def test_threads_hold_a_bounded_number_of_pixels(monkeypatch):
    import threading

    held, most, release = [0], [0], threading.Event()
    monkeypatch.setattr(images, "AT_ONCE", 100)

    def hold(pixels):
        with images._room(pixels):
            held[0] += pixels
            most[0] = max(most[0], held[0])
            release.wait(0.05)
            held[0] -= pixels

    threads = [threading.Thread(target=hold, args=(40,)) for _ in range(6)] + [
        threading.Thread(target=hold, args=(500,))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    assert most[0] in (80, 500)


def test_damaged_files_of_all_formats_are_decoded_repaired_or_refused():
    script = Path(__file__).parents[2] / "benchmarks" / "fuzz_images.py"
    done = subprocess.run([sys.executable, script, "--count=800", "--seed=7"], capture_output=True, text=True)
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["error"] == counts["crash"] == counts["hang"] == 0, done.stdout
    assert min(counts["decoded"], counts["repaired"], counts["refused"]) > 10
