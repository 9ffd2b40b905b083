"""Retrieval metrics as the hashing field computes them. Every convention is an argument. NumPy, float64.

AP@k of a query: rank the database, look at the first k; sum over relevant ranks r of (hits up to r) / r, divided by the
number of relevant items among the first k. A query without a hit scores 0 and counts in the mean. (The formula of the
released SPQ, MeCoQ and DeepHash code; it is not the AP of trec_eval, which divides by all relevant items.)

Codes are few, so scores tie. ``ties="expected"`` is the exact expectation over all orders of the tied items, also where
a group of equals straddles the cut-off; ``ties="index"`` takes equals in database order, as a stable sort would.
"""

from math import lgamma

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, Num

TIES = ("expected", "index")


def mean_average_precision(
    scores: Num[ArrayLike, "Q N"], relevance: Bool[ArrayLike, "Q N"], *, k: int, ties: str = "expected"
) -> float:
    """Mean of `average_precision` over the queries, 0 to 1. Arguments and errors as there."""
    return float(np.mean(average_precision(scores, relevance, k=k, ties=ties)))


def average_precision(
    scores: Num[ArrayLike, "Q N"], relevance: Bool[ArrayLike, "Q N"], *, k: int, ties: str = "expected"
) -> Float[np.ndarray, " Q"]:
    """AP@k of each query, float64, 0 to 1.

    Args:
      scores: higher is closer.
      relevance: whether item n is relevant to query q.
      k: cut-off, 1 or more; cut to N.
      ties: "expected" or "index", see the module's docstring.

    Raises:
      ValueError: the shapes differ, there is no query or item, k is below 1, a score is NaN, or ties is unknown.
    """
    scores, relevance, k = _checked(scores, relevance, k)
    if ties not in TIES:
        raise ValueError(f"ties {ties!r} is unknown: use one of {', '.join(TIES)}")
    one_query = _expected_ap if ties == "expected" else _index_ap
    return np.array([one_query(s, r, k) for s, r in zip(scores, relevance, strict=True)])


def hits(
    scores: Num[ArrayLike, "Q N"], relevance: Bool[ArrayLike, "Q N"], *, ks: Int[ArrayLike, " C"] | list[int]
) -> Float[np.ndarray, "Q C"]:
    """How many relevant items each query finds among its first k, for each k of `ks`; expectations over tied orders.

    Divided by k it is precision@k, divided by the relevant items of the query it is recall@k.
    Raises ValueError as `average_precision`, and for a k above N.
    """
    cuts = np.asarray(ks, np.int64)
    scores, relevance, _ = _checked(scores, relevance, int(cuts.min()))
    if cuts.max() > scores.shape[1]:
        raise ValueError(f"cut-off {cuts.max()} is above the {scores.shape[1]} items")
    found = np.empty((len(scores), len(cuts)))
    for q, (s, r) in enumerate(zip(scores, relevance, strict=True)):
        start, size, relevant = _tie_groups(s, r, int(cuts.max()))
        edges = np.concatenate([start, [start[-1] + size[-1]]])  # expected hits grow linearly within a group of equals
        found[q] = np.interp(cuts, edges, np.concatenate([[0], np.cumsum(relevant)]))
    return found


def _checked(scores: ArrayLike, relevance: ArrayLike, k: int) -> tuple[np.ndarray, np.ndarray, int]:
    scores, relevance = np.asarray(scores), np.asarray(relevance, bool)
    if scores.dtype.kind != "f":
        scores = scores.astype(np.float64)  # negated below, which unsigned numbers do not survive
    if scores.shape != relevance.shape or scores.ndim != 2 or scores.size == 0:
        raise ValueError(
            f"scores {scores.shape} and relevance {relevance.shape} must be one shape (Q, N), none of them 0"
        )
    if k < 1:
        raise ValueError(f"k {k} must be at least 1")
    if np.isnan(scores).any():
        raise ValueError(f"{np.isnan(scores).sum()} of {scores.size} scores are NaN")
    return scores, relevance, min(k, scores.shape[1])


def _index_ap(scores: np.ndarray, relevance: np.ndarray, k: int) -> float:
    hit = relevance[np.argsort(-scores, kind="stable")[:k]]
    if not hit.any():
        return 0.0
    return float(np.sum(np.cumsum(hit)[hit] / (np.flatnonzero(hit) + 1)) / hit.sum())


def _expected_ap(scores: np.ndarray, relevance: np.ndarray, k: int) -> float:
    """Expectation of AP@k over the orders of equal scores.

    Inside a group of n equals of which r are relevant, after `before` items with `hits` relevant ones, position j holds
    a relevant item with probability r/n, and then (j-1)(r-1)/(n-1) of the items in front of it within the group are
    relevant. Of the last group only t < n items may be seen: how many of them are relevant is hypergeometric, and given
    that number the same formula holds with (t, h) in place of (n, r).
    """
    start, size, relevant = _tie_groups(scores, relevance, k)
    hits = np.concatenate([[0], np.cumsum(relevant)])[:-1]
    whole = start + size <= k
    total = _group_sum(start[whole], size[whole], hits[whole], relevant[whole]).sum()
    if whole.all():
        found = relevant.sum()
        return float(total / found) if found else 0.0
    before, n, first, r = (int(x[-1]) for x in (start, size, hits, relevant))
    seen = k - before
    h = np.arange(max(0, seen - (n - r)), min(seen, r) + 1)
    chance = np.exp(_log_choose(r, h) + _log_choose(n - r, seen - h) - _log_choose(n, np.array([seen])))
    value = (total + _group_sum(before, seen, first, h)) / np.maximum(first + h, 1)
    return float(np.sum(chance * value) / np.sum(chance))


def _group_sum(before: int | np.ndarray, n: int | np.ndarray, hits: int | np.ndarray, r: np.ndarray) -> np.ndarray:
    """Sum over the positions of a group of P(relevant) * E[hits up to it] / rank."""
    last = int(np.max(before + n)) if np.size(n) else 0
    harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, last + 1))])
    inverse_ranks = harmonic[before + n] - harmonic[before]  # sum of 1 / rank
    places = n - (before + 1) * inverse_ranks  # sum of (j - 1) / rank
    return r / n * ((hits + 1) * inverse_ranks + (r - 1) / np.maximum(n - 1, 1) * places)


def _tie_groups(scores: np.ndarray, relevance: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start, size and relevant count of each group of equal scores that begins within the first k, best first."""
    kth = np.partition(scores, len(scores) - k)[len(scores) - k]
    reached = np.flatnonzero(scores >= kth)
    order = reached[np.argsort(-scores[reached], kind="stable")]
    ranked = scores[order]
    start = np.concatenate([[0], np.flatnonzero(ranked[1:] != ranked[:-1]) + 1])
    size = np.diff(np.concatenate([start, [len(ranked)]]))
    return start, size, np.add.reduceat(relevance[order].astype(np.int64), start)


def _log_choose(n: int, m: np.ndarray) -> np.ndarray:
    return np.array([lgamma(n + 1) - lgamma(i + 1) - lgamma(n - i + 1) for i in m])
