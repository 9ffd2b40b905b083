"""TFDS's own test case on our builders. It needs TensorFlow: `make test-tensorflow`."""

import tempfile
from pathlib import Path

import numpy as np
import pytest

import upstream

pytestmark = [pytest.mark.tensorflow, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("tensorflow", reason="an extra: make test-tensorflow")

import tensorflow_datasets as tfds

from tcq.data.datasets import cifar10, mirflickr25k, nus_wide


def unverified(builder):
    """The builder without the checks that small files cannot pass."""

    def __init__(self, **options):
        builder.__init__(self, verify=False, **options)

    body = {"__init__": __init__, "__module__": builder.__module__}
    return type(builder.__name__, (builder,), body, skip_registration=True)


class Case(tfds.testing.DatasetBuilderTestCase):
    @classmethod
    def setUpClass(cls):
        cls.EXAMPLE_DIR = tempfile.mkdtemp()
        cls.write(Path(cls.EXAMPLE_DIR))
        super().setUpClass()

    def test_registered(self):
        assert self.builder.name == self.DATASET_CLASS.__mro__[1].name


class Cifar10Test(Case):
    DATASET_CLASS = unverified(cifar10.Cifar10)
    SPLITS = {"train": 20, "test": 4}
    write = staticmethod(upstream.write_cifar10)


class MirflickrTest(Case):
    DATASET_CLASS = unverified(mirflickr25k.Mirflickr25k)
    SPLITS = {"train": 12}
    write = staticmethod(upstream.write_mirflickr)


class NusWideTest(Case):
    DATASET_CLASS = unverified(nus_wide.NusWide)
    BUILDER_CONFIG_NAMES_TO_TEST = ["concepts81"]
    SPLITS = {"train": 30}
    write = staticmethod(upstream.write_nus_wide)


class NusWide21Test(NusWideTest):
    BUILDER_CONFIG_NAMES_TO_TEST = ["concepts21"]
    SPLITS = {"train": 24}


del Case


def test_cifar10_is_what_tfds_own_builder_makes(tmp_path):
    """The same tarball through TFDS's reader: every example has the same id, pixels and label."""
    import tarfile

    rows = upstream.write_cifar10(tmp_path)
    with tarfile.open(tmp_path / cifar10.TARBALL) as archive:
        archive.extractall(tmp_path / "extracted", filter="data")

    class Downloads:
        def download_and_extract(self, url):
            return str(tmp_path / "extracted")

    theirs = tfds.image_classification.Cifar10(data_dir=tmp_path / "a")
    examples = {
        split: {e["id"]: e for _, e in stream} for split, stream in theirs._split_generators(Downloads()).items()
    }
    ours = unverified(cifar10.Cifar10)(data_dir=tmp_path / "b", file_format="array_record")
    ours.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=tmp_path))
    assert ours.info.full_name == theirs.info.full_name
    assert ours.info.features["label"].names == theirs.info.features["label"].names
    count = 0
    for split, rows_by_id in examples.items():
        for row in ours.as_data_source(split=split):
            example = rows_by_id[row["id"].decode()]
            np.testing.assert_array_equal(row["image"], example["image"])
            assert row["label"] == example["label"]
            count += 1
    assert count == len(rows)
