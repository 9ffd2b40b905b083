"""How a user's file is loaded, and which functions could not be known again."""

import sys

import numpy as np
import pytest

import small
from tcq.models import embedder

IMAGES = np.random.RandomState(0).randint(0, 256, (3, 8, 8, 3)).astype(np.uint8)
MEANS = "images.mean(axis=(1, 2))"
FILES = {
    "dataclass": f"""
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Scale:
    factor: float = 1.0

def embed(images):
    return {MEANS} * Scale().factor
""",
    "flax": """
from __future__ import annotations
import flax.linen as nn

class Means(nn.Module):
    axes: tuple[int, int] = (1, 2)

    @nn.compact
    def __call__(self, x):
        return x.mean(axis=self.axes)

def embed(images):
    return Means().apply({}, images.astype("f4"))
""",
    "pool": """
import multiprocessing
import numpy as np

def one(image):
    return image.mean(axis=(0, 1))

def embed(images):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return np.stack(pool.map_async(one, images).get(timeout=60))
""",
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_may_hold_what_a_module_may(tmp_path, kind):
    file = tmp_path / f"mine_{kind}.py"
    file.write_text(FILES[kind])
    np.testing.assert_allclose(embedder.run(f"{file}:embed", IMAGES), IMAGES.mean(axis=(1, 2)), rtol=1e-5)


def test_two_files_of_one_name_and_that_of_a_library(tmp_path):
    for number, name in enumerate(("same.py", "same.py", "json.py"), 2):
        file = tmp_path / str(number) / name
        file.parent.mkdir()
        file.write_text(f"def embed(images):\n    return {MEANS} * {number}\n")
        np.testing.assert_allclose(embedder.run(f"{file}:embed", IMAGES), number * IMAGES.mean(axis=(1, 2)), rtol=1e-6)
    assert hasattr(sys.modules["json"], "loads")


def test_a_file_that_fails_leaves_no_module(tmp_path):
    file = tmp_path / "fails.py"
    file.write_text("1 / 0\n")
    with pytest.raises(embedder.EmbedderError, match="ZeroDivisionError"):
        embedder.load(f"{file}:embed")
    assert not [name for name in sys.modules if "fails" in name]


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_what_gives_all_fixed_images_the_same_is_refused(monkeypatch, value):
    """As one that finds no faces in noise: two such functions could not be told apart."""
    monkeypatch.setattr(embedder, "run", lambda _, images: np.full((len(images), 5), value, np.float32))
    with pytest.raises(embedder.EmbedderError, match="gives four different images .* one embedding"):
        embedder.signature("faces.py:embed", small.config().data.image_size)
