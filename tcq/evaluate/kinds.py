"""How many pairs of a collection are of one kind, by answers about some of them.

A question shows an anchor and NEIGHBOURS other images: which are of its kind? The chance that a pair is of one kind
falls with its rank u, the share of pairs that are more similar, as the curve
p(u) = floor + (top - floor) / (1 + (u / half)^slope): our choice. A grid over these four holds its posterior. Pairs are
drawn in proportion to sqrt(p (1 - p)), the allocation of Neyman (1934), which narrows the share of pairs of one kind,
the integral of p, most.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

NEIGHBOURS = 8  # images of a question, beside the anchor
# Our choices, by validation images of three sets (docs/clipping.md):
LEAST = 3  # negatives of each anchor that scope "anchor" clips; below "batch" fits, as with kinds=
SKEW = 0.9  # standard deviation over mean of the number of an image's nearest pairs, from which scope "batch" may fit
GAIN = 0.2  # log likelihood of an answer by ranks of all pairs above that by ranks of the anchor's: then it does fit
TEMPERATURE = 0.2
INTERVAL = (0.05, 0.95)
RESAMPLES = 100  # of the answers
RANKS = np.geomspace(1e-4, 1.0, 41)  # where the chances are known when a question is drawn
_FLOORS, _TOPS = [0.0, 0.01, 0.02, 0.05, 0.1, 0.15], [0.6, 0.75, 0.9, 1.0]
_HALVES = np.geomspace(1e-4, 1.0, 65)
_CELL = (_HALVES[1] / _HALVES[0]) ** np.linspace(-0.5, 0.5, 9)  # a curve stands for those up to the next ones
_CURVES = np.meshgrid(_HALVES, np.geomspace(0.4, 6.0, 10), _FLOORS, _TOPS)
_HALF, _SLOPE, _FLOOR, _TOP = (x.ravel() for x in _CURVES)
_EDGES = np.concatenate([[0.0], np.geomspace(1e-6, 1.0, 240)])  # of the intervals that the integral sums over


class Judgement(NamedTuple):
    """What some answers say."""

    share: float  # of all pairs that are of one kind: the `loss.clip` that fits
    low: float
    high: float  # the share is in between with 90 %
    scope: str  # the `loss.clip_scope` that fits
    precision: float  # of the clipped pairs, if this share is clipped with this scope
    answers: int
    least: float = 0.0  # the share that is one pair of a batch

    @property
    def overrides(self) -> list[str]:
        """The overrides of a config that follow this judgement."""
        values = {
            "clip": f"{min(max(self.share, self.least), 0.99):.3g}",
            "clip_scope": self.scope,
            "temperature": TEMPERATURE,
        }
        return [f"--config.loss.{key}={value}" for key, value in values.items()]


def chance(u: Any) -> Float[np.ndarray, "G ..."]:
    """p(u) for every curve of the grid.

    It is halfway from top to floor at the rank `half`, and steeper with `slope`.
    """
    u = np.asarray(u, np.float64)
    half, slope, floor, top = (x.reshape(-1, *[1] * u.ndim) for x in (_HALF, _SLOPE, _FLOOR, _TOP))
    logits = slope * (np.log(np.maximum(u, 1e-9))[None] - np.log(half))
    return floor + (top - floor) / (1 + np.exp(np.clip(logits, -50, 50)))


_MIDDLES, _WIDTHS = (_EDGES[1:] + _EDGES[:-1]) / 2, np.diff(_EDGES)
_AT_MIDDLES = chance(_MIDDLES).astype(np.float32)
_SHARES = _AT_MIDDLES @ _WIDTHS  # of every curve
_AT_RANKS = chance(RANKS)


def likelihood(ranks: Float[np.ndarray, " m"], same: Bool[np.ndarray, " m"]) -> Float[np.ndarray, " G"]:
    """The log likelihood of every curve by one answer: ranks of pairs, and which are alike."""
    p = chance(ranks)
    return np.log(np.maximum(np.where(same, p, 1 - p), 1e-12)).sum(axis=1)


def posterior(answers: list[Float[np.ndarray, " G"]]) -> Float[np.ndarray, " G"]:
    """The probability of every curve after answers, each a `likelihood`.

    Before any, all are equal. It is the mean of the posteriors of RESAMPLES resamples of the answers (bagged posterior,
    Huggins and Miller 2019). So it is as wide as the answers differ: the pairs of a question share an anchor, and the
    curve is only our choice.
    """
    if not answers:
        return np.full(len(_HALF), 1 / len(_HALF))
    counts = np.random.RandomState(0).multinomial(len(answers), np.full(len(answers), 1 / len(answers)), RESAMPLES)
    log = counts @ np.stack(answers)
    weights = np.exp(log - log.max(axis=1, keepdims=True))
    return (weights / weights.sum(axis=1, keepdims=True)).mean(axis=0)


def draw(
    weights: Float[np.ndarray, " G"],
    ranks: Float[np.ndarray, "B B"],
    is_open: Bool[np.ndarray, "B B"],
    random: np.random.RandomState,
) -> tuple[int, Int[np.ndarray, " m"]] | None:
    """The anchor of the next question, and at most NEIGHBOURS images; None without open pairs.

    Each pair is about as likely as sqrt(p (1 - p)) at its rank. The images come in random order.
    """
    p = weights @ _AT_RANKS
    telling = np.interp(np.log(ranks), np.log(RANKS), np.sqrt(np.maximum(p * (1 - p), 1e-4))) * is_open
    total = telling.sum(axis=1)
    if not total.any():
        return None
    anchor = int(random.choice(len(ranks), p=total / total.sum()))
    order = np.argsort(ranks[anchor], kind="stable")
    order = order[is_open[anchor, order]]
    places = (np.arange(NEIGHBOURS) + random.uniform()) / NEIGHBOURS  # spread evenly over the ranks
    chosen = np.searchsorted(np.cumsum(telling[anchor, order]) / total[anchor], places)
    return anchor, random.permutation(order[np.unique(np.minimum(chosen, len(order) - 1))])


def judgement(
    answers: list[Float[np.ndarray, " G"]],
    by_anchor: list[Float[np.ndarray, " G"]],
    ranks: Float[np.ndarray, "N N"],
    batch_size: int,
) -> Judgement:
    """What answers, each a `likelihood`, say of a collection that is trained on in batches.

    `by_anchor` are the likelihoods of the same answers by `anchor_ranks`. `ranks` are of sampled pairs, with 1 on the
    diagonal.
    """
    weights = posterior(answers)
    shares = np.outer(_SHARES, _CELL).ravel()
    order = np.argsort(shares)
    quantiles = (INTERVAL[0], 0.5, INTERVAL[1])
    total = np.cumsum(np.repeat(weights / len(_CELL), len(_CELL))[order])
    low, share, high = np.interp(quantiles, total, shares[order]).tolist()
    is_skewed = skew(ranks, share / 2) > SKEW and gain(answers, by_anchor) > GAIN  # half, if the share is too high
    scope = "batch" if is_skewed or share * (2 * batch_size - 2) < LEAST else "anchor"
    precision = np.interp(_clipped_ranks(ranks, share, scope), _MIDDLES, weights @ _AT_MIDDLES).mean()
    least = 1.01 / (2 * batch_size * (2 * batch_size - 2))  # by more than what three digits round off
    return Judgement(share, low, high, scope, float(precision), len(answers), least)


def _clipped_ranks(ranks: Float[np.ndarray, "B B"], share: float, scope: str) -> Float[np.ndarray, " n"]:
    """The ranks of the pairs that are clipped, at least one of each anchor or of all."""
    others = np.sort(ranks, axis=1)[:, :-1]  # the last one is the anchor itself
    rows = others if scope == "anchor" else np.sort(others, axis=None)[None]
    return rows[:, : max(1, round(share * rows.shape[1]))].ravel()


def gain(answers: list[Float[np.ndarray, " G"]], by_anchor: list[Float[np.ndarray, " G"]]) -> float:
    """How much better ranks among all pairs explain answers than those among the anchor's.

    It is the log of the ratio of their likelihoods (Bayes factor), over the curves of the grid, for each answer: scope
    "batch" clips by the first, "anchor" by the second. Without answers it is 0.
    """
    if not answers:
        return 0.0
    first, second = (np.logaddexp.reduce(np.sum(logs, axis=0)) for logs in (answers, by_anchor))
    return float(first - second) / len(answers)


def skew(ranks: Float[np.ndarray, "B B"], share: float) -> float:
    """How unevenly the most similar `share` of all pairs is spread over the images.

    It is the deviation of the counts over their mean.
    """
    near = ranks <= share
    np.fill_diagonal(near, False)
    counts = near.sum(axis=1)
    return float(counts.std() / max(counts.mean(), 1e-9))


def pair_ranks(similarity: Float[np.ndarray, "B B"]) -> Float[np.ndarray, "B B"]:
    """The share of pairs at least as similar as each pair, in (0, 1]; 1 on the diagonal."""
    both = np.maximum(similarity, similarity.T)
    first, second = np.triu_indices(len(both), 1)
    values = both[first, second]
    order = np.argsort(-values, kind="stable")
    shares = np.empty(len(values))
    shares[order] = (np.arange(len(values)) + 1) / len(values)
    ranks = np.ones(both.shape)
    ranks[first, second] = ranks[second, first] = shares
    return ranks


def anchor_ranks(ranks: Float[np.ndarray, "B B"]) -> Float[np.ndarray, "B B"]:
    """The share of an image's pairs at least as similar as each, in (0, 1]; 1 on the diagonal."""
    n = len(ranks)
    order = np.argsort(ranks, axis=1, kind="stable")  # the image itself is last, or beside the least similar one
    own = np.empty(ranks.shape)
    np.put_along_axis(own, order, np.broadcast_to(np.arange(1, n + 1) / max(n - 1, 1), own.shape), axis=1)
    return np.minimum(own, 1.0)
