import os

import numpy as np
import pytest

from tcq import config as configs
from tcq.data import cache, images, sources
from tcq.data.source import SourceError
from write_images import png, write_images


def test_labels_are_sub_folders_and_bad_files_are_listed(tmp_path):
    write_images(tmp_path, ["cat/b.png", "cat/deep/a.png", "dog/c.png", ".hidden/x.png", "dog/.y.png"])
    (tmp_path / "dog" / "notes.txt").write_text("not an image")
    (tmp_path / "cat" / "empty.png").write_bytes(b"")
    source = sources.folder(tmp_path, cache.Rule(8))
    assert source.names == ["cat/b.png", "cat/deep/a.png", "dog/c.png"]
    assert source.classes == ["cat", "dog"]
    np.testing.assert_array_equal(source.labels, [0, 0, 1])
    assert {s["path"]: s["reason"].split(":")[0] for s in source.skipped} == {
        "cat/empty.png": "the file is empty",
        "dog/notes.txt": "not an image of a known format (JPEG, PNG, GIF, BMP, WEBP, TIFF, PPM, AVIF, JPEG2000, HEIC)",
    }
    for name, pixels in zip(source.names, source.images, strict=True):
        np.testing.assert_array_equal(pixels, images.decode(tmp_path / name, size=8))


def test_classes_below_one_common_folder_and_behind_links(tmp_path):
    write_images(tmp_path / "elsewhere", ["c.png"])
    write_images(tmp_path / "images", ["train/cat/b.png", "train/dog/c.png"])
    (tmp_path / "images" / "train" / "fox").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images" / "train" / "loop").symlink_to(tmp_path / "images")
    source = sources.folder(tmp_path / "images", cache.Rule(8))
    assert source.classes == ["cat", "dog", "fox"]
    assert source.names == ["train/cat/b.png", "train/dog/c.png", "train/fox/c.png"]


def test_without_sub_folders_there_are_no_labels(tmp_path):
    write_images(tmp_path, ["a.png", "cat/b.png", "dog/c.png"])
    assert sources.folder(tmp_path, cache.Rule(8)).labels is None


def test_odd_names(tmp_path):
    write_images(tmp_path, ["sp ace/ü\n.png", "sp ace/'quote\".png"])
    (tmp_path / os.fsdecode(b"sp ace/\xff.png")).write_bytes(png(np.zeros((4, 4, 3), np.uint8)))
    assert len(sources.folder(tmp_path, cache.Rule(8)).names) == 3
    assert len(sources.folder(tmp_path, cache.Rule(8)).names) == 3  # again, from the cache


def test_errors(tmp_path):
    with pytest.raises(SourceError, match="not found"):
        sources.folder(tmp_path / "none", cache.Rule(8))
    with pytest.raises(SourceError, match="holds no files"):
        sources.folder(tmp_path, cache.Rule(8))
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(SourceError, match=r"holds no image among its 1 files; the first is x.txt"):
        sources.folder(tmp_path, cache.Rule(8))
    with pytest.raises(SourceError, match="is not a folder"):
        sources.folder(tmp_path / "x.txt", cache.Rule(8))


def test_digits_are_the_real_scans():
    from sklearn.datasets import load_digits

    source = sources.open_source(configs.load("configs/digits.py").data)
    assert source.images.shape == (1797, 8, 8, 3) and source.images.dtype == np.uint8
    np.testing.assert_allclose(source.images[..., 1] / 255 * 16, load_digits().images, atol=0.04)
    np.testing.assert_array_equal(source.labels, load_digits().target)
