"""A collection that tests may change, and an index of it."""

import shutil

import pytest

from tcq import index as indexes


@pytest.fixture
def photos(images, tmp_path):
    """The folder of one class, with a file that is no image."""
    return shutil.copytree(images / "class 3", tmp_path / "photos")


@pytest.fixture
def built(run, photos, tmp_path):
    """An index of `photos`."""
    indexes.build(run, photos, tmp_path / "index")
    return tmp_path / "index"
