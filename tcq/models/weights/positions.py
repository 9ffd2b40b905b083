"""Learned positions for another image size, by the rule of the authors of the checkpoint."""

import numpy as np
from jaxtyping import Float

RULES = ("linear", "bicubic", "bicubic_antialias")


def resample(
    positions: Float[np.ndarray, "1 old W"], grid: tuple[int, int], *, rule: str
) -> Float[np.ndarray, "1 new W"]:
    """Positions of a square grid of patches, resampled to another (rows, columns); float32.

    Rules: "linear" is `scipy.ndimage.zoom` of order 1, which keeps the corners in place (Google's ViT code); "bicubic"
    is PyTorch's `interpolate(mode="bicubic", align_corners=False)` (Hugging Face), "bicubic_antialias" the same with
    antialias=True (timm). Raises ValueError for an unknown rule, or if the old grid is not square.
    """
    old = round(positions.shape[1] ** 0.5)
    if old * old != positions.shape[1]:
        raise ValueError(f"{positions.shape[1]} positions do not form a square grid")
    if rule not in RULES:
        raise ValueError(f"rule {rule!r} is unknown: use one of {', '.join(RULES)}")
    plane = positions.reshape(old, old, -1).astype(np.float64)
    rows, columns = (_matrix(old, new, rule) for new in grid)
    out = np.einsum("ri,cj,ijw->rcw", rows, columns, plane)
    return out.reshape(1, grid[0] * grid[1], -1).astype(np.float32)


def _matrix(old: int, new: int, rule: str) -> Float[np.ndarray, "new old"]:
    """The weight of each old position for each new one."""
    weights: np.ndarray = np.zeros((new, old))
    if rule == "linear":
        where: np.ndarray = np.linspace(0, old - 1, new)
        low = np.minimum(where.astype(int), max(old - 2, 0))
        for i in range(new):
            weights[i, low[i]] += 1 - (where[i] - low[i])
            weights[i, min(low[i] + 1, old - 1)] += where[i] - low[i]
        return weights
    scale = old / new
    where = np.asarray((np.arange(new) + 0.5) * scale - 0.5, np.float64)
    if rule == "bicubic":  # four neighbours; edges are repeated
        for i in range(new):
            for j in range(int(np.floor(where[i])) - 1, int(np.floor(where[i])) + 3):
                weights[i, min(max(j, 0), old - 1)] += _cubic(where[i] - j, -0.75)
        return weights
    width = max(scale, 1.0)  # the kernel is wider where the grid shrinks; at the edges it is cut and normalized
    for i in range(new):
        weights[i] = [_cubic((where[i] - j) / width, -0.5) for j in range(old)]
    total: np.ndarray = weights.sum(axis=1, keepdims=True)
    return weights / total


def _cubic(x: float, a: float) -> float:
    """The cubic convolution kernel of Keys (1981)."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0
