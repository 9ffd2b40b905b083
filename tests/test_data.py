import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tcq import config as configs
from tcq.data import cache, images, loader, sources


def encoded(pixels, format, **options):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format, **options)
    return out.getvalue()


def png(pixels, **options):
    return encoded(pixels, "PNG", **options)


@pytest.fixture
def pixels():
    return np.random.RandomState(0).randint(0, 256, (12, 12, 3)).astype(np.uint8)


class TestDecode:
    def test_lossless_at_its_own_size(self, pixels):
        np.testing.assert_array_equal(images.decode(png(pixels), size=12), pixels)

    def test_modes(self):
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

    def test_exif_orientation(self):
        wide = np.zeros((12, 12, 3), np.uint8)
        wide[:, :6] = 255
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees
        upright = images.decode(png(wide, exif=exif), size=12)
        assert upright[0].min() == 255 and upright[-1].max() == 0

    @pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
    def test_a_damaged_exif_tag_does_not_cost_the_image(self, pixels, format):
        for damaged in (b"Exif\0\0garbagegarbage", b"Exif\0\0II*\0", b"Exif\0\0MM\0*\xff\xff\xff\xff"):
            out = io.BytesIO()
            Image.fromarray(pixels).save(out, format, exif=damaged)
            assert images.decode(out.getvalue(), size=12).shape == (12, 12, 3)

    def test_crop_keeps_the_middle_and_squash_keeps_all(self):
        wide = np.zeros((10, 30, 3), np.uint8)
        wide[:, 10:20] = 255
        assert images.decode(png(wide), size=10).min() > 200
        assert images.decode(png(wide), size=10, resize=images.Resize("squash")).min() < 50

    def test_a_share_of_the_shorter_side_is_kept_of_png_and_jpeg_alike(self):
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
        soft, sharp = (
            images.decode(png(fine), size=80, resize=images.Resize("crop", i)) for i in images.INTERPOLATIONS
        )
        assert 2 < np.abs(soft.astype(int) - sharp).mean() < 40

    def test_extreme_shapes(self):
        assert images.decode(png(np.zeros((1, 20_000, 3), np.uint8)), size=32).shape == (32, 32, 3)
        assert images.decode(png(np.zeros((1, 1, 3), np.uint8)), size=32).shape == (32, 32, 3)

    @pytest.mark.parametrize("side", [11_000, 60_000])  # above our limit only, and above Pillow's own
    def test_a_bomb_is_refused_before_it_is_decoded(self, side):
        def chunk(kind, data):
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
        with pytest.raises(images.ImageError, match=f"{side} x {side} pixels is above|bomb"):
            images.decode(bomb, size=8)

    @pytest.mark.parametrize("cut", [30, 60, 200, 400])
    def test_truncated(self, pixels, cut):
        with pytest.raises(images.ImageError):
            images.decode(png(pixels)[:-cut], size=8)

    def test_what_is_no_image(self, tmp_path):
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

    def test_random_damage_never_raises_anything_else(self, pixels):
        random = np.random.RandomState(0)
        jpeg = io.BytesIO()
        Image.fromarray(pixels).save(jpeg, "JPEG")
        for data in (png(pixels), jpeg.getvalue()):
            for _ in range(200):
                damaged = bytearray(data)
                for place in random.randint(0, len(data), 5):
                    damaged[place] = random.randint(256)
                try:
                    assert images.decode(bytes(damaged), size=8).shape == (8, 8, 3)
                except images.ImageError:
                    pass


def write_images(root: Path, names, seed=0):
    random = np.random.RandomState(seed)
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(random.randint(0, 256, (9, 11, 3)).astype(np.uint8)))


class TestFolder:
    def test_labels_are_sub_folders_and_bad_files_are_listed(self, tmp_path):
        write_images(tmp_path, ["cat/b.png", "cat/deep/a.png", "dog/c.png", ".hidden/x.png", "dog/.y.png"])
        (tmp_path / "dog" / "notes.txt").write_text("not an image")
        (tmp_path / "cat" / "empty.png").write_bytes(b"")
        found = sources.folder(tmp_path, size=8)
        assert found.names == ["cat/b.png", "cat/deep/a.png", "dog/c.png"]
        assert found.classes == ["cat", "dog"]
        np.testing.assert_array_equal(found.labels, [0, 0, 1])
        assert {s["path"]: s["reason"].split(":")[0] for s in found.skipped} == {
            "cat/empty.png": "the file is empty",
            "dog/notes.txt": "not an image of a known format (JPEG, PNG, GIF, BMP, WEBP, TIFF, PPM)",
        }
        for name, pixels in zip(found.names, found.images, strict=True):
            np.testing.assert_array_equal(pixels, images.decode(tmp_path / name, size=8))

    def test_classes_below_one_common_folder_and_behind_links(self, tmp_path):
        write_images(tmp_path / "elsewhere", ["c.png"])
        write_images(tmp_path / "images", ["train/cat/b.png", "train/dog/c.png"])
        (tmp_path / "images" / "train" / "fox").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "images" / "train" / "loop").symlink_to(tmp_path / "images")
        found = sources.folder(tmp_path / "images", size=8)
        assert found.classes == ["cat", "dog", "fox"]
        assert found.names == ["train/cat/b.png", "train/dog/c.png", "train/fox/c.png"]

    def test_without_sub_folders_there_are_no_labels(self, tmp_path):
        write_images(tmp_path, ["a.png", "cat/b.png", "dog/c.png"])
        assert sources.folder(tmp_path, size=8).labels is None

    def test_the_cache_is_used_and_notices_changes(self, tmp_path, monkeypatch):
        write_images(tmp_path, ["a.png", "b.png"])
        first = sources.folder(tmp_path, size=8)
        with monkeypatch.context() as patch:
            patch.setattr(cache, "decode", None)  # must not be called
            np.testing.assert_array_equal(sources.folder(tmp_path, size=8).images, first.images)
        write_images(tmp_path, ["b.png"], seed=5)
        os.utime(tmp_path / "b.png", ns=(1, 1))
        assert not np.array_equal(sources.folder(tmp_path, size=8).images, first.images)

    @pytest.mark.parametrize("file", ["images.u8", "names.json", "arrays.npz"])
    def test_a_damaged_entry_is_made_anew(self, tmp_path, file):
        write_images(tmp_path / "images", ["a.png", "b.png"])
        options = {"size": 8, "cache_dir": str(tmp_path / "cache")}
        first = np.array(sources.folder(tmp_path / "images", **options).images)
        (entry,) = (tmp_path / "cache").iterdir()
        (entry / file).write_bytes(b"{")
        np.testing.assert_array_equal(sources.folder(tmp_path / "images", **options).images, first)

    def test_a_killed_decoding_leaves_no_entry(self, tmp_path, monkeypatch):
        write_images(tmp_path / "images", ["a.png", "b.png"])
        home = tmp_path / "cache"

        def broken(*arguments, **options):
            raise MemoryError

        monkeypatch.setattr(cache, "decode", broken)
        with pytest.raises(MemoryError):
            sources.folder(tmp_path / "images", size=8, cache_dir=str(home))
        assert list(home.iterdir()) == []

    def test_odd_names(self, tmp_path):
        write_images(tmp_path, ["sp ace/ü\n.png", "sp ace/'quote\".png"])
        (tmp_path / os.fsdecode(b"sp ace/\xff.png")).write_bytes(png(np.zeros((4, 4, 3), np.uint8)))
        assert len(sources.folder(tmp_path, size=8).names) == 3
        assert len(sources.folder(tmp_path, size=8).names) == 3  # again, from the cache

    def test_errors(self, tmp_path):
        with pytest.raises(sources.SourceError, match="does not exist"):
            sources.folder(tmp_path / "none", size=8)
        with pytest.raises(sources.SourceError, match="no files below"):
            sources.folder(tmp_path, size=8)
        (tmp_path / "x.txt").write_text("x")
        with pytest.raises(sources.SourceError, match=r"none of the 1 files .* is an image, the first: x.txt"):
            sources.folder(tmp_path, size=8)
        with pytest.raises(sources.SourceError, match="is not a folder"):
            sources.folder(tmp_path / "x.txt", size=8)


def test_digits_are_the_real_scans():
    from sklearn.datasets import load_digits

    found = sources.open_source(configs.load("configs/digits.py").data)
    assert found.images.shape == (1797, 8, 8, 3) and found.images.dtype == np.uint8
    np.testing.assert_allclose(found.images[..., 1] / 255 * 16, load_digits().images, atol=0.04)
    np.testing.assert_array_equal(found.labels, load_digits().target)


class TestTfds:
    @pytest.fixture(scope="class")
    @classmethod
    def prepared(cls, tmp_path_factory):
        """A real TFDS dataset, prepared without TensorFlow."""
        import fake_tfds

        return fake_tfds.prepare(tmp_path_factory.mktemp("tfds"))

    def config(self, prepared, name):
        return configs.load(
            "configs/cifar10.py", [f"data.source=tfds:{name}", f"data.tfds_dir={prepared}", "data.image_size=8"]
        ).data

    def test_official_order_labels_and_pixels(self, prepared):
        import fake_tfds

        found = sources.open_source(self.config(prepared, "tiny_shapes"))
        assert found.names == [f"train/train_{i:05d}" for i in range(20)] + [f"test/test_{i:05d}" for i in range(6)]
        np.testing.assert_array_equal(found.labels, [i % 3 for i in range(20)] + [i % 3 for i in range(6)])
        assert found.classes == ["circle", "square", "star"]
        np.testing.assert_array_equal(found.images[7], fake_tfds.pixels(7))

    def test_in_a_bucket(self, prepared):
        import fsspec

        fsspec.filesystem("memory").put(f"{prepared}/tiny_shapes/", "/data/tiny_shapes", recursive=True)
        here, there = (sources.open_source(self.config(p, "tiny_shapes")) for p in (prepared, "memory://data"))
        assert here.names == there.names
        np.testing.assert_array_equal(here.images, there.images)

    def test_tensorflow_is_not_imported(self, prepared):
        import subprocess
        import sys

        code = (
            "import sys\n"
            "from tcq import config; from tcq.data import sources\n"
            f"c = config.load('configs/cifar10.py', ['data.source=tfds:tiny_shapes', 'data.tfds_dir={prepared}', 'data.image_size=8'])\n"
            "print(sources.open_source(c.data).images.shape, 'tensorflow' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.stdout.strip() == "(26, 8, 8, 3) False", done.stderr

    def test_another_file_format_is_refused_with_the_command(self, prepared, tmp_path):
        import shutil

        shutil.copytree(prepared, tmp_path / "tfds")
        (info,) = (tmp_path / "tfds").rglob("dataset_info.json")
        info.write_text(info.read_text().replace("array_record", "tfrecord"))
        with pytest.raises(
            sources.SourceError,
            match=r"stored as tfrecord, not as array_record; prepare it once(.|\n)*tfds build tiny_shapes",
        ):
            sources.open_source(self.config(tmp_path / "tfds", "tiny_shapes"))

    def test_what_is_not_prepared_names_the_command(self, prepared):
        with pytest.raises(
            sources.SourceError, match=r"not prepared.*\n  tfds build cars196 --file_format=array_record --data_dir"
        ):
            sources.open_source(self.config(prepared, "cars196"))
        with pytest.raises(
            sources.SourceError, match=r"not prepared.*\n  python -m tcq prepare --dataset=cifar10 --data_dir"
        ):
            sources.open_source(self.config(prepared, "cifar10"))


class TestLoader:
    IMAGES = np.arange(50, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)

    def ids(self, count, **options):
        indices = np.arange(3, 48)
        stream = loader.batches(self.IMAGES, indices, batch_size=8, seed=1, **options)
        found = [next(stream) for _ in range(count)]
        for batch in found:
            np.testing.assert_array_equal(batch["index"], batch["image"][..., 0, 0, 0])
        return [batch["index"] for batch in found]

    def test_each_epoch_shows_every_training_image_once_in_another_order(self):
        flat = np.concatenate([b.ravel() for b in self.ids(90)])[: 45 * 16].reshape(16, 45)
        np.testing.assert_array_equal(np.sort(flat, axis=1), np.tile(np.arange(3, 48), (16, 1)))
        assert len({tuple(row) for row in flat}) == 16

    def test_resuming_gives_the_same_batches(self):
        whole = self.ids(12)
        for start in (0, 1, 7):
            for expected, got in zip(whole[start:], self.ids(12 - start, first_step=start), strict=True):
                np.testing.assert_array_equal(expected, got)

    @pytest.mark.parametrize(("devices", "processes"), [(1, 2), (2, 1), (2, 2), (4, 2), (8, 1)])
    def test_the_global_batch_does_not_depend_on_devices_and_processes(self, devices, processes):
        whole = self.ids(4)
        parts = [self.ids(4, num_devices=devices, process=p, num_processes=processes) for p in range(processes)]
        for step in range(4):
            assert parts[0][step].shape == (devices, 8 // devices // processes)
            np.testing.assert_array_equal(np.concatenate([p[step].ravel() for p in parts]), whole[step].ravel())

    def test_uneven_batches_are_refused(self):
        with pytest.raises(ValueError, match="8 cannot be divided by 1 processes x 3 devices"):
            self.ids(1, num_devices=3)
