"""Small random images as files."""

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def encoded(pixels: np.ndarray, format: str, **options) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format, **options)
    return out.getvalue()


def png(pixels: np.ndarray, **options) -> bytes:
    return encoded(pixels, "PNG", **options)


def write_images(root: Path, names: Iterable[str], seed: int = 0) -> None:
    """A PNG file of 11 x 9 random pixels for each name."""
    random = np.random.RandomState(seed)
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(random.randint(0, 256, (9, 11, 3)).astype(np.uint8)))
