"""Galleries, read back as pixels."""

import numpy as np
from matplotlib.colors import to_rgb
from PIL import Image

from tcq import plots

COLOURS = [(200, 10, 10), (10, 200, 10), (10, 10, 200), (200, 200, 10), (10, 200, 200), (200, 10, 200)]


def test_each_image_is_in_its_row_and_column_with_its_mark(tmp_path):
    shapes = [(8, 8), (40, 20), (20, 40), (8, 8), (3, 3), (300, 300)]
    images = [np.full((*shape, 3), colour, np.uint8) for shape, colour in zip(shapes, COLOURS, strict=True)]
    neighbours = [images[1:4], images[5:]]  # the second row has one
    right = np.array([[True, False, True], [False, True, True]])
    plots.gallery(tmp_path / "x.png", [images[0], images[4]], neighbours, right=right, title="$title_", name="q")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.info["Software"] == "tcq"
        pixels = np.asarray(picture.convert("RGB"))
    inches = np.array(pixels.shape[:2]) / 120
    np.testing.assert_allclose(inches, [2 * plots.CELL[1] + plots.TITLE, 4 * plots.CELL[0]], atol=0.01)
    for row, column, colour in [(0, c, COLOURS[c]) for c in range(4)] + [(1, 0, COLOURS[4]), (1, 1, COLOURS[5])]:
        assert tuple(_cell(pixels, row, column)[75, 66]) == colour, (row, column)
    assert (_cell(pixels, 1, 2) == 255).all() and (_cell(pixels, 1, 3) == 255).all()
    for row, column, mark in ((0, 1, plots.RIGHT), (0, 2, plots.WRONG), (0, 3, plots.RIGHT), (1, 1, plots.WRONG)):
        for other in (plots.RIGHT, plots.WRONG):
            near = np.abs(_cell(pixels, row, column) / 255.0 - to_rgb(other["color"])).max(axis=-1) < 0.02
            assert near.any() == (mark is other), (row, column)


def test_each_row_has_its_name(tmp_path):
    images = [np.full((8, 8, 3), colour, np.uint8) for colour in COLOURS[:2]]
    drawn = {}
    for name in ("one", "two", ("one", "two")):
        plots.gallery(tmp_path / "x.png", images, [[], []], name=name)
        with Image.open(tmp_path / "x.png") as picture:
            drawn[name] = np.asarray(picture.convert("RGB"))
    for row, name in enumerate(("one", "two")):
        np.testing.assert_array_equal(_cell(drawn["one", "two"], row, 0), _cell(drawn[name], row, 0))
        assert (_cell(drawn["one"], row, 0) != _cell(drawn["two"], row, 0)).any()


def _cell(pixels, row, column):
    """The pixels of a cell, 150 x 132 at 120 pixels per inch."""
    top, left = (round(120 * x) for x in (plots.TITLE + row * plots.CELL[1], column * plots.CELL[0]))
    return pixels[top : top + 150, left : left + 132]
