"""Datasets prepared from small files in the published layouts, and refused for other files."""

import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest

import small
import upstream
from tcq import config as configs
from tcq.data import images, sources
from tcq.data.datasets import archives, cifar10, mirflickr25k, prepare, reader


def source(dataset, home, protocol="folder", size=16):
    flags = [f"data.source=tfds:{dataset}", f"data.tfds_dir={home}", f"data.image_size={size}", "eval.k=0"]
    return sources.open_source(configs.load("configs/cifar10.py", [*flags, f"data.protocol={protocol}"]).data)


def make(dataset, files, home):
    return prepare.prepare(dataset, files=files, data_dir=home, verify=False)


class TestCifar10:
    def test_pixels_labels_and_official_order(self, tmp_path):
        rows = upstream.write_cifar10(tmp_path / "files")
        prepared = make("cifar10", tmp_path / "files", tmp_path / "tfds")
        assert prepared == tmp_path / "tfds" / "cifar10" / "3.0.2"
        result = source("cifar10", tmp_path / "tfds", size=32)
        assert result.names == [f"train/train_{i:05d}" for i in range(20)] + [f"test/test_{i:05d}" for i in range(4)]
        np.testing.assert_array_equal(result.labels, rows[:, 0])
        np.testing.assert_array_equal(result.images, rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        assert result.classes[:2] == ["airplane", "automobile"]
        assert result.notes == ("cifar10 was prepared from files that were not verified",)

    def test_tensorflow_is_not_imported_and_the_command_says_where(self, tmp_path):
        upstream.write_cifar10(tmp_path / "tfds" / "downloads" / "manual")
        arguments = ["prepare", "--dataset=cifar10", f"--data_dir={tmp_path}/tfds", "--unverified"]
        code = f"import sys; from tcq.cli import main; main({arguments}); print('tensorflow' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=small.environment())
        assert done.stdout.splitlines()[-2:] == [f"prepared: {tmp_path}/tfds/cifar10/3.0.2", "False"], done.stderr

    def test_other_files_than_the_published_one(self, tmp_path):
        upstream.write_cifar10(tmp_path)
        path = tmp_path / cifar10.TARBALL
        with pytest.raises(prepare.PrepareError, match=r"bytes, the published file has 170,052,171"):
            prepare.prepare("cifar10", files=tmp_path, data_dir=tmp_path / "tfds")
        path.write_bytes(path.read_bytes()[:-2000])
        with pytest.raises(prepare.PrepareError, match=r"is truncated or not a tar.gz file"):
            make("cifar10", tmp_path, tmp_path / "tfds")
        path.unlink()
        with pytest.raises(prepare.PrepareError, match=r"not found. CIFAR-10, .*\n.*put it into that folder"):
            make("cifar10", tmp_path, tmp_path / "tfds")
        assert not list((tmp_path / "tfds" / "cifar10").glob("*"))

    def test_bad_labels_and_sizes(self):
        with pytest.raises(archives.ArchiveError, match=r"has the label 12, expected 0 to 9"):
            cifar10._check("x", "y", bytes([12]) + bytes(3072), exact=False)
        with pytest.raises(archives.ArchiveError, match=r"has 3,074 bytes, expected images of 3,073 bytes"):
            cifar10._check("x", "y", bytes(3074), exact=False)


class TestMirflickr:
    def test_labels_and_official_order(self, tmp_path):
        upstream.write_mirflickr(tmp_path / "files")
        make("mirflickr25k", tmp_path / "files", tmp_path / "tfds")
        result = source("mirflickr25k", tmp_path / "tfds")
        assert result.names == [f"train/im{i}" for i in range(1, 13)]
        potential, strict = upstream.mirflickr_marks(12)
        np.testing.assert_array_equal(result.labels, np.concatenate([potential, strict], 1))
        assert result.classes[18:25] == ["sky", "structures", "sunset", "transport", "tree", "water", "baby (strict)"]
        for i in range(12):
            np.testing.assert_array_equal(result.images[i], images.decode(upstream.jpeg(i + 1), size=16))

    def test_each_protocol_sees_its_labels(self, tmp_path):
        upstream.write_mirflickr(tmp_path / "files")
        make("mirflickr25k", tmp_path / "files", tmp_path / "tfds")
        assert source("mirflickr25k", tmp_path / "tfds", "flickr25k_mecoq").labels.shape == (12, 24)
        assert source("mirflickr25k", tmp_path / "tfds", "flickr25k_deephash").labels.shape == (12, 38)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"sky.txt": None}, r"sky.txt: not found"),
            ({"sky.txt": "1\n13\n"}, r"sky.txt, line 2: '13' must be an image number from 1 to 12"),
            ({"sky_r1.txt": "x"}, r"sky_r1.txt"),
            ({"sea_r1.txt": "1\nx\n"}, r"sea_r1.txt, line 2: 'x'"),
            ({"sea.txt": "3\n\n3\n"}, r"sea.txt, line 3: image 3 is listed twice"),
            ({"sea.txt": "99999999999999999999"}, r"sea.txt, line 1: '9{20}'"),
        ],
    )
    def test_bad_annotations(self, tmp_path, change, message):
        upstream.write_mirflickr(tmp_path)
        path = tmp_path / mirflickr25k.ANNOTATIONS
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()} | change
        if "sky_r1.txt" in change:
            members["copy/sea.txt"], message = b"1", "sea.txt: is there twice"
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                if data is not None:
                    archive.writestr(name, data)
        with pytest.raises(prepare.PrepareError, match=message):
            make("mirflickr25k", tmp_path, tmp_path / "tfds")

    def test_bad_photos(self, tmp_path):
        upstream.write_mirflickr(tmp_path, photos={7: upstream.jpeg(7)[:200]})
        with pytest.raises(prepare.PrepareError, match=r"member 'mirflickr/im7.jpg': cannot be decoded"):
            make("mirflickr25k", tmp_path, tmp_path / "tfds")
        path = tmp_path / mirflickr25k.IMAGES
        upstream.write_mirflickr(tmp_path)
        whole = path.read_bytes()
        path.write_bytes(whole[:-100])
        with pytest.raises(prepare.PrepareError, match=r"mirflickr25k.zip' is truncated or not a zip file"):
            make("mirflickr25k", tmp_path, tmp_path / "tfds")
        place = whole.index(upstream.jpeg(5)) + 500
        path.write_bytes(whole[:place] + b"\0" * 60 + whole[place + 60 :])
        with pytest.raises(prepare.PrepareError, match=r"im5.jpg': cannot be read: Bad CRC"):
            make("mirflickr25k", tmp_path, tmp_path / "tfds")
        with zipfile.ZipFile(path, "w") as archive:
            for i in (1, 3):
                archive.writestr(f"mirflickr/im{i}.jpg", upstream.jpeg(i))
        with pytest.raises(prepare.PrepareError, match=r"has 2 images .*, but not im2.jpg"):
            make("mirflickr25k", tmp_path, tmp_path / "tfds")
        assert not list((tmp_path / "tfds" / "mirflickr25k").glob("*"))

    def test_counts_and_sizes_are_those_published(self, tmp_path, monkeypatch):
        upstream.write_mirflickr(tmp_path)
        with pytest.raises(prepare.PrepareError, match=r"the published file has 3,069,184,257"):
            prepare.prepare("mirflickr25k", files=tmp_path, data_dir=tmp_path / "tfds")
        monkeypatch.setattr(mirflickr25k, "IMAGES_SIZE", (tmp_path / mirflickr25k.IMAGES).stat().st_size)
        with pytest.raises(prepare.PrepareError, match=r"has md5 \w+, the published file has a23d0a8564ee"):
            prepare.prepare("mirflickr25k", files=tmp_path, data_dir=tmp_path / "tfds")
        monkeypatch.setattr(archives, "verify", lambda *_: None)
        with pytest.raises(prepare.PrepareError, match=r"has 12 images, expected 25,000"):
            prepare.prepare("mirflickr25k", files=tmp_path, data_dir=tmp_path / "tfds")
        monkeypatch.setattr(mirflickr25k, "NUM_IMAGES", 12)
        with pytest.raises(prepare.PrepareError, match=r"animals.txt: lists \d images, expected 3,216"):
            prepare.prepare("mirflickr25k", files=tmp_path, data_dir=tmp_path / "tfds")


class TestNusWide:
    @pytest.mark.parametrize(
        ("layout", "folder"),
        [("all", "Flickr"), ("train_test", "images"), ("three_lists", "Flickr"), ("all", "images/flat"), ("all", "")],
    )
    def test_every_layout_gives_the_same(self, tmp_path, layout, folder):
        labels = upstream.write_nus_wide(tmp_path / "files", layout=layout, images=folder)
        make("nus_wide/concepts81", tmp_path / "files", tmp_path / "tfds")
        result = source("nus_wide/concepts81", tmp_path / "tfds")
        assert result.names[:2] == ["train/actor/0000_1000.jpg", "train/actor/0002_1002.jpg"]
        np.testing.assert_array_equal(result.labels, labels)
        for name, pixels in zip(result.names, result.images, strict=True):
            np.testing.assert_array_equal(pixels, images.decode(upstream.jpeg(int(name[-8:-4]) - 1000), size=16))

    def test_the_21_most_frequent_concepts(self, tmp_path):
        labels = upstream.write_nus_wide(tmp_path / "files")
        make("nus_wide", tmp_path / "files", tmp_path / "tfds")
        result = source("nus_wide", tmp_path / "tfds")
        frequent = sorted(sorted(range(81), key=lambda c: (-labels[:, c].sum(), c))[:21])
        rows_with_concepts = np.flatnonzero(labels[:, frequent].any(1))
        assert 0 < len(rows_with_concepts) < 30
        assert result.classes == [upstream.CONCEPTS[c] for c in frequent]
        np.testing.assert_array_equal(result.labels, labels[rows_with_concepts][:, frequent])

    def test_missing_and_corrupted_photos_are_refused_or_listed(self, tmp_path, monkeypatch):
        upstream.write_nus_wide(tmp_path)
        (tmp_path / "Flickr" / "zebra" / "0007_1007.jpg").write_bytes(b"")
        (tmp_path / "Flickr" / "actor" / "0004_1004.jpg").unlink()
        make("nus_wide/concepts81", tmp_path, tmp_path / "tfds")
        result = source("nus_wide/concepts81", tmp_path / "tfds")
        assert len(result.images) == 28
        assert result.skipped == [
            {"path": "actor/0004_1004.jpg", "reason": "the file is missing"},
            {"path": "zebra/0007_1007.jpg", "reason": "the file is empty"},
        ]
        from tcq.data.datasets import nus_wide

        monkeypatch.setattr(nus_wide, "NUM_IMAGES", 30)
        with pytest.raises(
            prepare.PrepareError, match=r"1 of 30 images are missing, the first is 'actor/0004_1004.jpg'"
        ):
            prepare.prepare("nus_wide/concepts81", files=tmp_path, data_dir=tmp_path / "b")
        (tmp_path / "Flickr" / "actor" / "0004_1004.jpg").write_bytes(upstream.jpeg(4))
        with pytest.raises(prepare.PrepareError, match=r"0007_1007.jpg': the file is empty; the protocols need all"):
            prepare.prepare("nus_wide/concepts81", files=tmp_path, data_dir=tmp_path / "b")
        with pytest.raises(prepare.PrepareError, match=r"24 images have one of the 21 .*expected 195,834"):
            prepare.prepare("nus_wide", files=tmp_path, data_dir=tmp_path / "b")

    @pytest.mark.parametrize(
        ("file", "text", "message"),
        [
            ("Groundtruth/AllLabels/Labels_concept03.txt", None, r"Labels_concept03.txt' cannot be read: No such file"),
            (
                "Groundtruth/AllLabels/Labels_concept03.txt",
                "1\n0\n",
                r"has 2 lines, expected 30, one for each image of",
            ),
            ("Groundtruth/AllLabels/Labels_concept03.txt", "0\n" * 29 + "7\n", r"line 30: '7' must be 0 or 1"),
            ("ImageList/Imagelist.txt", None, r"Imagelist.txt' cannot be read: No such file"),
            ("ImageList/Imagelist.txt", "", r"line 1: '' must be a path|are missing|has 30 lines, expected 0"),
            ("ConceptsList/Concepts81.txt", "sky\nsky\n", r"lists 'sky', must have 81 different names"),
            ("ConceptsList/Concepts81.txt", "../x\n", r"lists '../x', must have 81 different names"),
            ("ImageList/Imagelist.txt", "..\\x.jpg\n" * 30, r"line 1: '../x.jpg' must be a path below"),
            ("ImageList/Imagelist.txt", "a\\x.jpg\n" * 30, r"lists 29 images twice"),
            ("ConceptsList/Concepts81.txt", "sky\n", r"has 1 concepts, expected 81"),
        ],
    )
    def test_bad_lists(self, tmp_path, file, text, message):
        upstream.write_nus_wide(tmp_path)
        (tmp_path / "Groundtruth" / "AllLabels" / "Labels_sky.txt").write_text("1\n" * 30)
        if text is None:
            (tmp_path / file).unlink()
        else:
            (tmp_path / file).write_text(text)
        with pytest.raises(prepare.PrepareError, match=message):
            make("nus_wide/concepts81", tmp_path, tmp_path / "tfds")

    def test_photos_that_are_all_missing_or_shared(self, tmp_path):
        upstream.write_nus_wide(tmp_path)
        (tmp_path / "Flickr").rename(tmp_path / "photos")
        with pytest.raises(
            prepare.PrepareError,
            match=r"none of the 30 images found; the first, .* is in none of the folders Flickr, images",
        ):
            make("nus_wide/concepts81", tmp_path, tmp_path / "tfds")
        (tmp_path / "photos").rename(tmp_path / "Flickr")
        names = (tmp_path / "ImageList" / "Imagelist.txt").read_text().splitlines()
        names[1] = names[1].replace("actor\\", "elsewhere\\")
        names[2] = "more\\" + names[1].split("\\")[1]
        (tmp_path / "ImageList" / "Imagelist.txt").write_text("\n".join(names))
        for name in names[1:3]:
            (tmp_path / "Flickr" / name.split("\\")[1]).write_bytes(upstream.jpeg(1))
        with pytest.raises(
            prepare.PrepareError, match=r"would be the file of two images, one of them 'more/0002_1002.jpg'"
        ):
            make("nus_wide/concepts81", tmp_path, tmp_path / "tfds")

    def test_published_counts(self, tmp_path):
        upstream.write_nus_wide(tmp_path)
        with pytest.raises(prepare.PrepareError, match=r"lists 30 images, expected 269,648"):
            prepare.prepare("nus_wide", files=tmp_path, data_dir=tmp_path / "tfds")


def test_a_prepared_dataset_is_not_overwritten_nor_its_cache_reused(tmp_path):
    upstream.write_mirflickr(tmp_path / "files")
    prepared = make("mirflickr25k", tmp_path / "files", tmp_path / "tfds")
    before = source("mirflickr25k", tmp_path / "tfds")
    for verify in (True, False):
        with pytest.raises(prepare.PrepareError, match=r"mirflickr25k/1.0.0' exists: use it"):
            prepare.prepare("mirflickr25k", files=tmp_path, data_dir=tmp_path / "tfds", verify=verify)
    shutil.rmtree(prepared)
    upstream.write_mirflickr(tmp_path / "files", photos={3: upstream.jpeg(99)})
    make("mirflickr25k", tmp_path / "files", tmp_path / "tfds")
    after = source("mirflickr25k", tmp_path / "tfds")
    assert not np.array_equal(before.images[2], after.images[2])
    np.testing.assert_array_equal(before.images[3], after.images[3])


def test_a_cached_dataset_is_not_read_again(tmp_path, monkeypatch):
    upstream.write_mirflickr(tmp_path / "files")
    make("mirflickr25k", tmp_path / "files", tmp_path / "tfds")
    first = source("mirflickr25k", tmp_path / "tfds", "flickr25k_mecoq")
    monkeypatch.setattr(reader, "_rows", None)  # must not be called
    second = source("mirflickr25k", tmp_path / "tfds", "flickr25k_mecoq")
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("damage", ["cut", "gone", "info"])
def test_a_corrupted_dataset_is_named(tmp_path, damage):
    upstream.write_mirflickr(tmp_path / "files")
    prepared = make("mirflickr25k", tmp_path / "files", tmp_path / "tfds")
    (shard,) = prepared.glob("*array_record*")
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:1000])
    elif damage == "gone":
        shard.unlink()
    else:
        (prepared / "dataset_info.json").write_text("{")
    with pytest.raises(
        sources.SourceError, match=r"mirflickr25k/1.0.0 cannot be read .*: delete that folder and prepare"
    ):
        source("mirflickr25k", tmp_path / "tfds")


def test_a_refusal_leaves_nothing_behind(tmp_path):
    upstream.write_nus_wide(tmp_path / "files")
    with pytest.raises(prepare.PrepareError):
        prepare.prepare("nus_wide", files=tmp_path / "files", data_dir=tmp_path / "tfds")
    assert not [p for p in (tmp_path / "tfds").rglob("*") if p.is_file()], list((tmp_path / "tfds").rglob("*"))


def test_archives_are_read_with_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_MEMBER", 1000)
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", bytes(10_000_000))
    with archives.open_zip(tmp_path / "x.zip") as archive:
        with pytest.raises(archives.ArchiveError, match=r"member 'bomb': above the limit of 1,000 bytes"):
            archives.read_member(archive, "bomb")
    upstream.write_cifar10(tmp_path)
    with pytest.raises(archives.ArchiveError, match=r"data_batch_1.bin': above the limit of 1,000 bytes"):
        archives.read_tar(tmp_path / cifar10.TARBALL, {*cifar10.TRAIN})


def test_unknown_names_and_missing_folders(tmp_path):
    with pytest.raises(prepare.PrepareError, match=r"'coco' is unknown: use one of cifar10, mirflickr25k, nus_wide"):
        make("coco", tmp_path, tmp_path)
    with pytest.raises(prepare.PrepareError, match=r"concepts12"):
        make("nus_wide/concepts12", tmp_path, tmp_path)
    with pytest.raises(prepare.PrepareError, match=r"/none' not found. NUS-WIDE, unpacked"):
        make("nus_wide", tmp_path / "none", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(prepare.PrepareError, match=r"/file' is not a folder. CIFAR-10"):
        make("cifar10", tmp_path / "file", tmp_path)


def test_doctor_lists_the_files_that_are_missing(tmp_path):
    manual = tmp_path / "downloads" / "manual"
    upstream.write_mirflickr(manual)
    (manual / mirflickr25k.ANNOTATIONS).unlink()
    flags = ["--config.data.source=tfds:mirflickr25k", f"--config.data.tfds_dir={tmp_path}"]
    done = small.main("doctor", "--config=configs/cifar10.py", *flags)
    assert done.returncode == 2
    for text in (
        "mirflickr25k.zip: has ",
        "mirflickr25k_annotations_v080.zip: missing",
        f"python -m tcq prepare --dataset=mirflickr25k --data_dir={tmp_path}",
        "press.liacs.nl",
    ):
        assert text in done.stderr, done.stderr
    shutil.rmtree(manual)
