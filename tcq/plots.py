"""Writes a gallery of neighbours, precision and recall curves, and the plot of a sweep.

These are the pictures that tcq writes. They are drawn by matplotlib's object interface, so no display and no global
backend is touched.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from tcq.runtime import storage

# Right and wrong differ in line style, symbol and lightness, not only in hue (colours of Okabe & Ito).
RIGHT = {"color": "#0072B2", "linestyle": "solid", "symbol": "\N{HEAVY CHECK MARK}"}
WRONG = {"color": "#E69F00", "linestyle": (0, (2, 2)), "symbol": "\N{MULTIPLICATION X}"}
KEPT = {"color": "#0072B2", "linestyle": "solid", "symbol": ""}
CLIPPED = {"color": "#E69F00", "linestyle": (0, (2, 2)), "symbol": "\N{BLACK SCISSORS}"}
CELL, IMAGE, TITLE = (1.1, 1.25), 0.98, 0.35  # inches of a gallery: width and height of a cell, longer side of an image
LINE_STYLES = ("solid", "dashed", "dotted", "dashdot", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))


def gallery(
    path: str | Path,
    queries: Sequence[UInt8[np.ndarray, "_ _ 3"]],
    neighbours: Sequence[Sequence[UInt8[np.ndarray, "_ _ 3"]]],
    *,
    captions: Sequence[Sequence[str]] | None = None,
    right: Bool[np.ndarray, "Q k"] | None = None,
    marks: tuple[Mapping[str, Any], Mapping[str, Any]] = (RIGHT, WRONG),
    title: str = "",
    name: str | Sequence[str] = "query",
) -> None:
    """Writes a picture with a row per query: the query, then its neighbours, best first.

    The query has the caption `name`, or the one of its row. Where `right` is given, each neighbour has the first of the
    marks if it is right (solid frame, check mark), else the second one (dashed frame, cross).
    Raises OSError if the file cannot be written, ValueError for an unknown file format.
    """
    rows, columns = len(queries), 1 + max(len(n) for n in neighbours)
    figure = _figure(columns * CELL[0], rows * CELL[1] + TITLE)
    axis = figure.add_axes((0, 0, 1, 1))  # one for all: an axis for each image would take most of the time
    axis.axis("off")
    for r in range(rows):
        _image(axis, queries[r], (r, 0), name if isinstance(name, str) else name[r], None)
        for c, pixels in enumerate(neighbours[r]):
            caption = captions[r][c] if captions is not None else ""
            mark = None if right is None else marks[0] if right[r][c] else marks[1]
            _image(axis, pixels, (r, c + 1), caption, mark)
    axis.set(xlim=(0, columns * CELL[0]), ylim=(rows * CELL[1], -TITLE), aspect="equal")
    if title:
        figure.suptitle(_printable(title), fontsize=10, parse_math=False, y=1 - 0.1 / figure.get_figheight())
    _save(figure, path)


def _image(axis: Any, pixels: np.ndarray, place: tuple[int, int], caption: str, mark: Mapping[str, Any] | None) -> None:
    """Draws an image with a frame and a caption in the cell of a row and a column."""
    from matplotlib.patches import Rectangle

    height, width = (side / max(pixels.shape[:2]) * IMAGE for side in pixels.shape[:2])
    x, y = (place[1] + 0.5) * CELL[0], (place[0] + 1) * CELL[1] - IMAGE / 2 - 0.05  # of the centre, y downwards
    left, top = x - width / 2, y - height / 2
    axis.imshow(pixels, interpolation="nearest", extent=(left, left + width, top + height, top))
    frame = {"edgecolor": mark["color"], "linestyle": mark["linestyle"], "linewidth": 3} if mark else {"linewidth": 1}
    axis.add_patch(Rectangle((left, top), width, height, **{"fill": False, "edgecolor": "black", **frame}))
    text = f"{mark['symbol']} {caption}".strip() if mark else caption
    above = {"ha": "center", "va": "bottom", "fontsize": 8, "parse_math": False}
    axis.text(x, y - IMAGE / 2 - 0.03, _printable(text), **above)


def curves(path: str | Path, results: Mapping[str, Mapping[str, Any]], *, ks: Sequence[int], title: str = "") -> None:
    """Writes precision-recall and precision@k curves.

    `results` maps a name to {"precision", "recall"} at `ks`.
    """
    figure = _figure(10, 4)
    left, right = figure.subplots(1, 2)
    for i, (name, result) in enumerate(results.items()):
        precision, style = np.asarray(result["precision"]), LINE_STYLES[i % len(LINE_STYLES)]
        left.plot(result["recall"], precision, label=name, linestyle=style)
        right.plot(ks, precision, label=name, linestyle=style)
    left.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    right.set(xlabel="images returned", ylabel="precision", xscale="log", ylim=(0, 1.02))
    left.legend(fontsize=8)
    figure.suptitle(_printable(title), fontsize=10, parse_math=False)
    figure.tight_layout()
    _save(figure, path)


def sweep(
    path: str | Path, groups: Sequence[Mapping[str, Any]], *, x: str, lines: Sequence[str], panels: Sequence[str] = ()
) -> None:
    """Writes mAP on validation and on test queries over the values of the key `x`.

    There is a line for each setting of the keys `lines`, and a row of panels for each setting of the keys `panels`;
    error bars are one standard deviation over the seeds. `groups` are those of `sweep.summary`.
    """
    values = list(dict.fromkeys(group[x] for group in groups))
    rows = list(dict.fromkeys(tuple(group[k] for k in panels) for group in groups))
    figure = _figure(11, 4.5 * len(rows))
    axes = figure.subplots(len(rows), 2, sharey=True, squeeze=False)
    for row, setting in zip(axes, rows, strict=True):
        own = [group for group in groups if tuple(group[k] for k in panels) == setting]
        for axis, name in zip(row, ("validation", "test"), strict=True):
            _lines(axis, own, f"{name}_mAP", values=values, x=x, lines=lines)
            axis.set_xticks(range(len(values)), [_printable(v) for v in values])
            axis.set(xlabel=x, title=_printable(", ".join([f"{name} queries", _label(panels, setting)]).rstrip(", ")))
            axis.grid(alpha=0.3)
        row[0].set_ylabel("mAP, mean over the seeds")
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    _save(figure, path)


def _lines(
    axis: Any,
    groups: Sequence[Mapping[str, Any]],
    measured: str,
    *,
    values: Sequence[str],
    x: str,
    lines: Sequence[str],
) -> None:
    """Draws what was measured over the values of `x`, a line per setting of the keys `lines`."""
    settings = list(dict.fromkeys(tuple(group[k] for k in lines) for group in groups))
    for i, setting in enumerate(settings):
        own = [g for g in groups if tuple(g[k] for k in lines) == setting and g[measured] is not None]
        axis.errorbar(
            [values.index(g[x]) for g in own],
            [g[measured][0] for g in own],
            yerr=[g[measured][1] for g in own],
            label=_printable(_label(lines, setting) or x),
            linestyle=LINE_STYLES[i % len(LINE_STYLES)],
            marker="osD^v*"[i % 6],
            capsize=3,
        )


def _label(keys: Sequence[str], setting: Sequence[str]) -> str:
    return ", ".join(f"{k.rpartition('.')[2]} {v}" for k, v in zip(keys, setting, strict=True))


def _printable(text: str) -> str:
    """Text without bytes that cannot be drawn, which file names may hold."""
    return text.encode("utf-8", "replace").decode()


def _save(figure: Any, path: str | Path) -> None:
    """Writes a figure; a PNG says that tcq has drawn it.

    So the PNG is never read as an image of a collection.
    """
    suffix = Path(path).suffix.lower()
    metadata = {"Software": "tcq"} if suffix == ".png" else None
    with storage.atomic(path) as temporary:
        figure.savefig(temporary, dpi=120, metadata=metadata, format=suffix[1:] or "png")


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))
