"""Reading what TFDS has prepared."""

import shutil
import subprocess
import sys

import fsspec
import numpy as np
import pytest

import fake_tfds
from tcq import config as configs
from tcq.data import sources
from tcq.data.source import SourceError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A real TFDS dataset, prepared without TensorFlow."""
    return fake_tfds.prepare(tmp_path_factory.mktemp("tfds"))


def config(prepared, name):
    return configs.load(
        "configs/cifar10.py", [f"data.source=tfds:{name}", f"data.tfds_dir={prepared}", "data.image_size=8"]
    ).data


def test_official_order_labels_and_pixels(prepared):
    source = sources.open_source(config(prepared, "tiny_shapes"))
    assert source.names == [f"train/train_{i:05d}" for i in range(20)] + [f"test/test_{i:05d}" for i in range(6)]
    np.testing.assert_array_equal(source.labels, [i % 3 for i in range(20)] + [i % 3 for i in range(6)])
    assert source.classes == ["circle", "square", "star"]
    np.testing.assert_array_equal(source.images[7], fake_tfds.pixels(7))


def test_in_a_bucket(prepared):
    fsspec.filesystem("memory").put(f"{prepared}/tiny_shapes/", "/data/tiny_shapes", recursive=True)
    local, remote = (sources.open_source(config(p, "tiny_shapes")) for p in (prepared, "memory://data"))
    assert local.names == remote.names
    np.testing.assert_array_equal(local.images, remote.images)


def test_tensorflow_is_not_imported(prepared):
    code = (
        "import sys\n"
        "from tcq import config; from tcq.data import sources\n"
        f"keys = ['data.source=tfds:tiny_shapes', 'data.tfds_dir={prepared}', 'data.image_size=8']\n"
        "c = config.load('configs/cifar10.py', keys)\n"
        "print(sources.open_source(c.data).images.shape, 'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(26, 8, 8, 3) False", done.stderr


def test_a_cache_that_cannot_be_written_is_no_broken_dataset(prepared, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "images").write_text("a file")
    data = config(prepared, "tiny_shapes")
    data.cache_dir = str(tmp_path / "cache")
    with pytest.raises(OSError, match=str(tmp_path / "cache")):  # and no SourceError
        sources.open_source(data)


def test_another_file_format_is_refused_with_the_command(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "tfds")
    (info,) = (tmp_path / "tfds").rglob("dataset_info.json")
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(
        SourceError,
        match=r"stored as tfrecord, not as array_record; prepare it once(.|\n)*tfds build tiny_shapes",
    ):
        sources.open_source(config(tmp_path / "tfds", "tiny_shapes"))


def test_what_is_not_prepared_names_the_command(prepared):
    with pytest.raises(SourceError, match=r"not found.*\n  tfds build cars196 --file_format=array_record --data_dir"):
        sources.open_source(config(prepared, "cars196"))
    with pytest.raises(SourceError, match=r"not found.*\n  python -m tcq prepare --dataset=cifar10 --data_dir"):
        sources.open_source(config(prepared, "cifar10"))
