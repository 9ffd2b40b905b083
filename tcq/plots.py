"""The pictures that tcq leaves behind: a gallery of neighbours, and precision-recall curves. matplotlib, no display."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

# Right and wrong differ in line style, symbol and lightness, not only in hue (colours of Okabe & Ito).
RIGHT = {"color": "#0072B2", "linestyle": "solid", "symbol": "\N{HEAVY CHECK MARK}"}
WRONG = {"color": "#E69F00", "linestyle": (0, (2, 2)), "symbol": "\N{MULTIPLICATION X}"}


def gallery(
    path: str | Path,
    queries: Sequence[UInt8[np.ndarray, "H W 3"]],
    neighbours: Sequence[Sequence[UInt8[np.ndarray, "H W 3"]]],
    *,
    captions: Sequence[Sequence[str]] | None = None,
    right: Bool[np.ndarray, "Q k"] | None = None,
    title: str = "",
) -> None:
    """Writes a picture with a row per query: the query, then its neighbours, best first, marked where `right` is given."""
    plt = _pyplot()
    rows, columns = len(queries), 1 + max(len(n) for n in neighbours)
    figure, axes = plt.subplots(rows, columns, figsize=(columns * 1.1, rows * 1.25 + 0.6), squeeze=False)
    for r in range(rows):
        for c in range(columns):
            axis = axes[r, c]
            axis.set_xticks([])
            axis.set_yticks([])
            if c > len(neighbours[r]):
                axis.axis("off")
                continue
            axis.imshow(queries[r] if c == 0 else neighbours[r][c - 1], interpolation="nearest")
            mark = None if right is None or c == 0 else (RIGHT if right[r][c - 1] else WRONG)
            for spine in axis.spines.values():
                spine.set(linewidth=3 if mark else 1, color=mark["color"] if mark else "black")
                if mark:
                    spine.set_linestyle(mark["linestyle"])
            text = captions[r][c - 1] if captions is not None and c else ""
            if mark:
                text = f"{mark['symbol']} {text}".strip()
            axis.set_title("query" if c == 0 else _plain(text), fontsize=8, pad=3, parse_math=False)
    if title:
        figure.suptitle(_plain(title), fontsize=10, parse_math=False)
    figure.tight_layout(rect=(0, 0, 1, 0.99))
    _save(figure, path)


def curves(path: str | Path, results: Mapping[str, Mapping[str, Any]], *, ks: Sequence[int], title: str = "") -> None:
    """Writes precision-recall and precision@k curves; `results` maps a name to {"precision", "recall"} at `ks`."""
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    styles = ["solid", "dashed", "dotted", "dashdot", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3))]
    for (name, result), style in zip(results.items(), styles * 2, strict=False):
        precision = np.asarray(result["precision"])
        left.plot(result["recall"], precision, label=name, linestyle=style)
        right.plot(ks, precision, label=name, linestyle=style)
    left.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    right.set(xlabel="images returned", ylabel="precision", xscale="log", ylim=(0, 1.02))
    left.legend(fontsize=8)
    figure.suptitle(_plain(title), fontsize=10, parse_math=False)
    figure.tight_layout()
    _save(figure, path)


def sweep(path: str | Path, groups: Sequence[Mapping[str, Any]], *, x: str, lines: Sequence[str]) -> None:
    """Writes mAP on validation and on test queries over the values of the key `x`, a line for each setting of the keys
    `lines`; bars are one standard deviation. `groups` are of `sweep.summary`."""
    plt = _pyplot()
    values = list(dict.fromkeys(group[x] for group in groups))
    settings = list(dict.fromkeys(tuple(group[k] for k in lines) for group in groups))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    styles = ["solid", "dashed", "dotted", "dashdot", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3))]
    panels = ("validation_mAP", "validation queries"), ("test_mAP", "test queries")
    for axis, (name, title) in zip(axes, panels, strict=True):
        for i, setting in enumerate(settings):
            own = [g for g in groups if tuple(g[k] for k in lines) == setting and g[name] is not None]
            label = ", ".join(f"{k.rpartition('.')[2]} {v}" for k, v in zip(lines, setting, strict=True)) or x
            axis.errorbar(
                [values.index(g[x]) for g in own],
                [g[name][0] for g in own],
                yerr=[g[name][1] for g in own],
                label=_plain(label),
                linestyle=styles[i % len(styles)],
                marker="osD^v*"[i % 6],
                capsize=3,
            )
        axis.set_xticks(range(len(values)), [_plain(v) for v in values])
        axis.set(xlabel=x, title=title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mAP, mean over the seeds")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    _save(figure, path)


def _plain(text: str) -> str:
    """Without what cannot be drawn: file names may hold any bytes."""
    return text.encode("utf-8", "replace").decode()


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: str | Path) -> None:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=120)
    plt.close(figure)
