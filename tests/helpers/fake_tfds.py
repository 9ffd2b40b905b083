"""A small TFDS dataset in TFDS's own format, prepared as array_record without TensorFlow."""

import io
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


def pixels(i: int) -> np.ndarray:
    return np.random.RandomState(i).randint(0, 256, (8, 8, 3)).astype(np.uint8)


class TinyShapes(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "image": tfds.features.Image(shape=(8, 8, 3)),
                    "label": tfds.features.ClassLabel(names=["circle", "square", "star"]),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples("train", 20), "test": self._generate_examples("test", 6)}

    def _generate_examples(self, split, count):
        for i in range(count):
            key = f"{split}_{i:05d}"
            encoded = io.BytesIO()
            Image.fromarray(pixels(i if split == "train" else 100 + i)).save(encoded, "PNG")
            encoded.seek(0)
            yield key, {"id": key, "image": encoded, "label": i % 3}


def prepare(data_dir: Path) -> Path:
    TinyShapes(data_dir=data_dir, file_format="array_record").download_and_prepare()
    return data_dir
