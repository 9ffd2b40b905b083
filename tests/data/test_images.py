import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tcq.data import images
from write_images import encoded, png


@pytest.fixture
def pixels():
    return np.random.RandomState(0).randint(0, 256, (12, 12, 3)).astype(np.uint8)


def test_lossless_at_its_own_size(pixels):
    np.testing.assert_array_equal(images.decode(png(pixels), size=12), pixels)


@pytest.mark.parametrize("shape", [(8, 8), (16, 20), (50, 7)])
@pytest.mark.parametrize("size", [1, 2, 4, 8, 9, 32])
def test_a_gray_array_is_as_its_file(shape, size):
    gray = np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)
    np.testing.assert_array_equal(images.square(gray, size=size), images.decode(png(gray), size=size))


def test_modes():
    gray = np.arange(144, dtype=np.uint8).reshape(12, 12)
    np.testing.assert_array_equal(images.decode(png(gray), size=12), np.repeat(gray[..., None], 3, 2))
    deep = gray.astype(np.uint16) * 257
    np.testing.assert_allclose(images.decode(png(deep), size=12)[..., 0].astype(int), gray.astype(int), atol=1)
    clear = np.zeros((12, 12, 4), np.uint8)
    assert (images.decode(png(clear), size=12) == 255).all()  # transparent is white
    cmyk = io.BytesIO()
    Image.new("CMYK", (12, 12), (0, 0, 0, 0)).save(cmyk, "JPEG")
    assert (images.decode(cmyk.getvalue(), size=12) > 250).all()
    moving = io.BytesIO()
    frames = [Image.new("RGB", (12, 12), c) for c in ("red", "blue")]
    frames[0].save(moving, "GIF", save_all=True, append_images=frames[1:])
    assert tuple(images.decode(moving.getvalue(), size=12)[0, 0]) == (255, 0, 0)
    floats = io.BytesIO()
    Image.fromarray(np.full((12, 12), 0.5, np.float32)).save(floats, "TIFF")
    assert abs(int(images.decode(floats.getvalue(), size=12)[0, 0, 0]) - 127) <= 1


def test_exif_orientation():
    wide = np.zeros((12, 12, 3), np.uint8)
    wide[:, :6] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees
    upright = images.decode(png(wide, exif=exif), size=12)
    assert upright[0].min() == 255 and upright[-1].max() == 0


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_corrupted_exif_tag_does_not_cost_the_image(pixels, format):
    for corrupted in (b"Exif\0\0garbagegarbage", b"Exif\0\0II*\0", b"Exif\0\0MM\0*\xff\xff\xff\xff"):
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, format, exif=corrupted)
        assert images.decode(out.getvalue(), size=12).shape == (12, 12, 3)


def test_crop_keeps_the_middle_and_squash_keeps_all():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    assert images.decode(png(wide), size=10).min() > 200
    assert images.decode(png(wide), size=10, resize=images.Resize("squash")).min() < 50


def test_a_share_of_the_shorter_side_is_kept_of_png_and_jpeg_alike():
    ramp = np.tile(np.linspace(0, 255, 1600), (1200, 1)).astype(np.uint8)  # columns 200 to 1400 are the square
    picture = np.stack([ramp] * 3, axis=-1)
    for share in (1.0, 0.5, 0.1):
        half = 600 * share
        want = np.interp(800 + (np.arange(20) + 0.5) / 20 * 2 * half - half, np.arange(1600), ramp[0])
        for data in (encoded(picture, "PNG"), encoded(picture, "JPEG")):
            got = images.decode(data, size=20, resize=images.Resize("crop", "bicubic", share))
            assert np.abs(got[10, :, 0] - want).max() < 4
    blocks = np.random.RandomState(0).randint(0, 256, (100, 100, 1)).astype(np.uint8)
    picture = np.kron(blocks, np.ones((12, 12, 3), np.uint8))  # a draft of a JPEG must not be coarser than the crop
    crops = [images.decode(encoded(picture, f), size=20, resize=images.Resize(share=0.1)) for f in ("PNG", "JPEG")]
    assert np.abs(crops[0].astype(int) - crops[1]).mean() < 12
    fine = np.random.RandomState(0).randint(0, 256, (40, 40, 3)).astype(np.uint8)
    soft, sharp = (images.decode(png(fine), size=80, resize=images.Resize("crop", i)) for i in images.INTERPOLATIONS)
    assert 2 < np.abs(soft.astype(int) - sharp).mean() < 40


def test_extreme_shapes():
    assert images.decode(png(np.zeros((1, 20_000, 3), np.uint8)), size=32).shape == (32, 32, 3)
    assert images.decode(png(np.zeros((1, 1, 3), np.uint8)), size=32).shape == (32, 32, 3)


@pytest.mark.parametrize("side", [11_000, 60_000])  # above the limit of tcq, and also above that of Pillow
def test_a_bomb_is_refused_before_it_is_decoded(side):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(images.ImageError, match=f"{side} x {side} pixels is above|bomb"):
        images.decode(bomb, size=8)


@pytest.mark.parametrize("cut", [60, 200, 400])
def test_truncated(pixels, cut):
    with pytest.raises(images.ImageError):
        images.decode(png(pixels)[:-cut], size=8)


def test_other_files(tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "vector.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    for name, reason in {
        "empty.jpg": "empty",
        "text.jpg": "not an image of a known format",
        "vector.eps": "not an image of a known format",
        "pipe.jpg": "not a regular file",
        "dangling.jpg": "cannot be read: No such file",
        ".": "not a regular file",
    }.items():
        with pytest.raises(images.ImageError, match=reason):
            images.decode(tmp_path / name, size=8)


def test_random_corruption_raises_nothing_else(pixels):
    random = np.random.RandomState(0)
    jpeg = io.BytesIO()
    Image.fromarray(pixels).save(jpeg, "JPEG")
    for data in (png(pixels), jpeg.getvalue()):
        for _ in range(200):
            corrupted = bytearray(data)
            for place in random.randint(0, len(data), 5):
                corrupted[place] = random.randint(256)
            try:
                assert images.decode(bytes(corrupted), size=8).shape == (8, 8, 3)
            except images.ImageError:
                pass
