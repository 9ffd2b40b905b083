"""Retrieval metrics under the conventions of the published code. NumPy, float64.

Each convention is an argument.

AP@k of a query: rank the database and sum (hits up to r) / r over the relevant ranks r <= k, then divide by a
denominator.

* ``denominator="hits"`` divides by the relevant items among the first k: the formula of the released SPQ, MeCoQ and
  DeepHash code, and our default. ``"min"`` divides by min(relevant items, k), ``"all"`` by all relevant items, as
  trec_eval.
* ``empty="zero"``: a query without a hit scores 0 and counts in the mean (all three). ``"skip"``: queries with no
  relevant item in the database are left out of the mean.
* Codes are few, so scores tie. ``ties="expected"`` is the exact expectation over all orders of the tied items, also
  where a group of ties straddles the cut-off; ``"index"`` ranks ties in database order, as a stable sort does;
  ``"best"`` ranks the relevant items of a group of ties first, ``"worst"`` last. (With "min" and "all" no order of the
  ties scores higher, or lower; with "hits" a relevant item late in the list can lower the score.)
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, Num

TIES = ("expected", "index", "best", "worst")
DENOMINATORS = ("hits", "min", "all")
EMPTY = ("zero", "skip")
INTERVALS = 4096  # of the histogram of a row
MANY = 10_000  # items of a row from which on it is worth its time
BLOCK = 2**19  # scores that are counted together


class Scores(NamedTuple):
    """AP, hits and relevant items of Q queries."""

    average_precision: Float[np.ndarray, " Q"]
    hits: Float[np.ndarray, "Q C"]  # relevant items among the first c, for each of C cut-offs c
    relevant: Int[np.ndarray, " Q"]  # in the whole database


def mean_average_precision(
    scores: Num[ArrayLike, "Q N"],
    relevance: Bool[ArrayLike, "Q N"],
    *,
    k: int,
    ties: str = "expected",
    denominator: str = "hits",
    empty: str = "zero",
) -> float:
    """Mean of `average_precision` over the queries, 0 to 1.

    Takes the arguments of `average_precision`, and `empty`: "zero" or "skip" (see the module's docstring). Raises
    ValueError as `average_precision` and `mean` do.
    """
    result = search(scores, relevance, k=k, cuts=[], ties=ties, denominator=denominator)
    return mean(result.average_precision, result.relevant, empty=empty)


def average_precision(
    scores: Num[ArrayLike, "Q N"],
    relevance: Bool[ArrayLike, "Q N"],
    *,
    k: int,
    ties: str = "expected",
    denominator: str = "hits",
) -> Float[np.ndarray, " Q"]:
    """AP@k of each query, float64, 0 to 1.

    Args:
      scores: higher is closer.
      relevance: whether item n is relevant to query q.
      k: cut-off, 1 or more; cut to N.
      ties: "expected", "index", "best" or "worst", see the module's docstring.
      denominator: "hits", "min" or "all", see there.

    Raises:
      ValueError: the shapes differ, there is no query or item, k is below 1, a score is NaN, or a convention is
        unknown.
    """
    return search(scores, relevance, k=k, cuts=[], ties=ties, denominator=denominator).average_precision


def hits(
    scores: Num[ArrayLike, "Q N"],
    relevance: Bool[ArrayLike, "Q N"],
    *,
    ks: Int[ArrayLike, " C"] | list[int],
    ties: str = "expected",
) -> Float[np.ndarray, "Q C"]:
    """Relevant items among the first k of each query, for each k of `ks`, float64.

    The number is an expectation over ties. Divided by k it is precision@k, divided by all relevant items of the query
    recall@k.
    Raises ValueError as `average_precision`, and for a k above N.
    """
    return search(scores, relevance, k=1, cuts=ks, ties=ties).hits


def search(
    scores: Num[ArrayLike, "Q N"],
    relevance: Bool[ArrayLike, "Q N"],
    *,
    k: int,
    cuts: Int[ArrayLike, " C"] | list[int],
    ties: str = "expected",
    denominator: str = "hits",
) -> Scores:
    """`average_precision` at k and `hits` at `cuts` from one pass over each row.

    Takes their arguments, and raises their errors.
    """
    scores, relevance, k = _check_inputs(scores, relevance, k)
    cut = np.asarray(cuts, np.int64)
    for name, value, known in (("ties", ties, TIES), ("denominator", denominator, DENOMINATORS)):
        if value not in known:
            raise ValueError(f"{name} {value!r} is unknown: use one of {', '.join(known)}")
    if cut.size and not 1 <= cut.min() <= cut.max() <= scores.shape[1]:
        raise ValueError(
            f"cut-off {cut.max() if cut.min() > 0 else cut.min()} must be from 1 to the number of items, "
            f"{scores.shape[1]}"
        )
    precision, hits_at = np.empty(len(scores)), np.empty((len(scores), cut.size))
    relevant = np.array([np.count_nonzero(row) for row in relevance])
    if ties == "index":
        for q, (row, right) in enumerate(zip(scores, relevance, strict=True)):
            hit = right[_stable_order(row, max(k, int(cut.max(initial=0))))]
            hits_at[q] = np.cumsum(hit)[cut - 1]
            precision[q] = _ap_of_ranks(np.flatnonzero(hit[:k]), int(relevant[q]), k, denominator)
        return Scores(precision, hits_at, relevant)
    for q, (hits_at[q], groups) in enumerate(_tie_groups(scores, relevance, k, cut, ties)):
        if ties == "expected":
            precision[q] = _expected_ap(groups, int(relevant[q]), k, denominator)
        else:
            precision[q] = _ap_of_ranks(_extreme_ranks(groups, k, ties), int(relevant[q]), k, denominator)
    return Scores(precision, hits_at, relevant)


def mean(average_precision: Float[np.ndarray, " Q"], relevant: Int[np.ndarray, " Q"], *, empty: str = "zero") -> float:
    """Mean AP; with empty="skip" over the queries that have a relevant item.

    Raises ValueError if there is none.
    """
    if empty not in EMPTY:
        raise ValueError(f"empty {empty!r} is unknown: use one of {', '.join(EMPTY)}")
    counted = np.ones(len(relevant), bool) if empty == "zero" else relevant > 0
    if not counted.any():
        raise ValueError(f"no item of the database is relevant to any of the {len(relevant)} queries")
    return float(average_precision[counted].mean())


def best_possible(relevant: Int[ArrayLike, " Q"], *, k: int, denominator: str = "hits") -> Float[np.ndarray, " Q"]:
    """AP@k of the best possible ranking, all relevant items first.

    It is 1, or 0 without any relevant item. It is less where "all" exceeds k.
    """
    relevant = np.asarray(relevant, np.int64)
    seen = np.minimum(relevant, k)
    divisor = {"hits": seen, "min": seen, "all": relevant}[denominator]
    return np.where(relevant > 0, seen / np.maximum(divisor, 1), 0.0)


def random_order(
    relevant: Int[ArrayLike, " Q"], num_items: int, *, k: int, cuts: Int[ArrayLike, " C"] | list[int], denominator: str
) -> Scores:
    """The exact expectation over all orders of `num_items` items.

    Of these, `relevant` are relevant to each query.
    """
    relevant, cut = np.asarray(relevant, np.int64), np.asarray(cuts, np.int64)
    counts, which = np.unique(relevant, return_inverse=True)
    row = np.zeros((1, num_items), np.float32)
    each = [
        search(row, np.arange(num_items)[None] < count, k=k, cuts=[], denominator=denominator).average_precision[0]
        for count in counts
    ]
    return Scores(np.array(each)[which], relevant[:, None] * cut / num_items, relevant)


def _check_inputs(scores: ArrayLike, relevance: ArrayLike, k: int) -> tuple[np.ndarray, np.ndarray, int]:
    scores, relevance = np.asarray(scores), np.asarray(relevance, bool)
    if scores.dtype not in (np.float32, np.float64):
        # Scores are negated, which unsigned numbers do not allow, and binned, for which float16 is too coarse.
        scores = scores.astype(np.float32 if scores.dtype.kind == "f" and scores.dtype.itemsize < 4 else np.float64)
    if scores.shape != relevance.shape or scores.ndim != 2 or scores.size == 0:
        raise ValueError(
            f"scores {scores.shape} and relevance {relevance.shape} must have one shape (Q, N), with Q and N at least 1"
        )
    if k < 1:
        raise ValueError(f"k {k} must be at least 1")
    if np.isnan(scores.min()):  # the minimum of scores with NaN is NaN
        raise ValueError(f"{np.isnan(scores).sum()} of {scores.size} scores are NaN: all must be numbers")
    return scores, relevance, min(k, scores.shape[1])


class _Groups(NamedTuple):
    """The groups of tied scores that begin within the first k, best first."""

    start: np.ndarray
    size: np.ndarray
    relevant: np.ndarray


class _Scratch(NamedTuple):
    """Arrays (R, N) that are used again for each block of rows.

    New ones would cost more time than the work in them.
    """

    below: np.ndarray  # floats
    keys: np.ndarray  # integers
    wanted: np.ndarray  # bool


class _Block(NamedTuple):
    """The items of R rows that have to be sorted.

    They are those of the intervals of the cut-offs, and all above the k-th.
    """

    values: list[np.ndarray]  # negated scores of each row, ascending: best first
    relevant: list[np.ndarray]  # those of relevant items, ascending
    before: list[np.ndarray]  # for each cut-off, items of better intervals that are not in `values`
    relevant_before: list[np.ndarray]


def _tie_groups(
    scores: np.ndarray, relevance: np.ndarray, k: int, cuts: np.ndarray, ties: str
) -> Iterator[tuple[np.ndarray, _Groups]]:
    """For each row hits at the cut-offs, and the groups of ties among the first k.

    Not all scores are sorted. Rows are counted together: few long calls of NumPy let threads run side by side, many
    short ones do not.
    """
    size = max(1, BLOCK // scores.shape[1])
    scratch = _Scratch(*(np.empty((size, scores.shape[1]), dtype) for dtype in (scores.dtype, np.intp, bool)))
    for first in range(0, len(scores), size):
        block = _sort_near_cuts(scores[first : first + size], relevance[first : first + size], k, cuts, scratch)
        for ordered, relevant, before, relevant_before in zip(*block, strict=True):
            value = ordered[cuts - 1 - before]
            start = np.searchsorted(ordered, value, "left") + before
            size_of_group = np.searchsorted(ordered, value, "right") + before - start
            better = np.searchsorted(relevant, value, "left")
            inside = np.searchsorted(relevant, value, "right") - better
            within, better = cuts - start, better + relevant_before
            hits = {
                "best": better + np.minimum(within, inside),
                "worst": better + np.maximum(within - (size_of_group - inside), 0),
                "expected": better + inside * (within / size_of_group),  # linear within a group of ties
            }[ties]
            yield hits, _groups(ordered, relevant, k)


def _sort_near_cuts(scores: np.ndarray, relevance: np.ndarray, k: int, cuts: np.ndarray, scratch: _Scratch) -> _Block:
    """Sorts only the items near the cut-offs and above the k-th.

    A histogram of the scores tells which these are.
    """
    number, scratch = INTERVALS if scores.shape[1] >= MANY else 1, _Scratch(*(x[: len(scores)] for x in scratch))
    keys = scratch.keys
    _intervals(scores, number, scratch)
    keys += number * np.arange(len(scores))[:, None]
    keys *= 2
    keys += relevance
    counted = np.bincount(keys.ravel(), minlength=2 * keys.shape[0] * number).reshape(len(scores), number, 2)
    relevant_in, all_in = counted[:, :, 1], counted[:, :, 0] + counted[:, :, 1]
    ends = [np.searchsorted(_before(row), np.append(cuts, k)) - 1 for row in all_in]
    wanted = np.zeros(all_in.shape, bool)
    for row, end in zip(wanted, ends, strict=True):
        row[end], row[: end[-1]] = True, True
    np.repeat(wanted, 2).take(keys, out=scratch.wanted, mode="clip")  # the mode, as "raise" would copy
    places = np.flatnonzero(scratch.wanted)
    values, hit = -scores.ravel().take(places), relevance.ravel().take(places)
    edges = np.cumsum(np.where(wanted, all_in, 0).sum(axis=1))[:-1]
    parts = list(zip(np.split(values, edges), np.split(hit, edges), strict=True))
    return _Block(
        [np.sort(part) for part, _ in parts],
        [np.sort(part[right]) for part, right in parts],
        *(
            [_before(row)[end[:-1]] for row, end in zip(np.where(wanted, 0, x), ends, strict=True)]
            for x in (all_in, relevant_in)
        ),
    )


def _before(counts: np.ndarray) -> np.ndarray:
    """The sums of the numbers before each, and of all."""
    return np.concatenate([[0], np.cumsum(counts)])


def _intervals(scores: np.ndarray, number: int, scratch: _Scratch) -> None:
    """Sets `keys` to the interval of each score in its row, from 0 for the highest.

    Lower scores have no lower interval.
    """
    low, high = scores.min(axis=1, keepdims=True), scores.max(axis=1, keepdims=True)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        finite = np.isfinite(scores)
        low = np.where(finite, scores, np.inf).min(axis=1, keepdims=True)
        high = np.where(finite, scores, -np.inf).max(axis=1, keepdims=True)
        scores = np.clip(scores, low, high)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        step = (number - 1) / (high - low)
        usable = (high > low) & (step > 0) & (step < np.inf)
        below = np.subtract(high, scores, out=scratch.below)
        below *= np.where(usable, step, 0)
        below[~usable[:, 0]] = 0
        np.copyto(scratch.keys, below, casting="unsafe")


def _groups(ordered: np.ndarray, relevant: np.ndarray, k: int) -> _Groups:
    """The tie groups, from ascending negated scores of the first items and the relevant ones."""
    last = ordered[k - 1]
    reached = ordered[: np.searchsorted(ordered, last, "right")]
    start = np.concatenate([[0], np.flatnonzero(reached[1:] != reached[:-1]) + 1])
    edges = np.searchsorted(relevant, np.append(reached[start], last), "left")
    edges[-1] = np.searchsorted(relevant, last, "right")
    return _Groups(start, np.diff(np.append(start, len(reached))), np.diff(edges))


def _stable_order(scores: np.ndarray, k: int) -> np.ndarray:
    """The first k places of a stable sort, best first.

    Only scores that reach the k-th are sorted.
    """
    kth = np.partition(scores, len(scores) - k)[len(scores) - k]
    reached = np.flatnonzero(scores >= kth)
    return reached[np.argsort(-scores[reached], kind="stable")[:k]]


def _extreme_ranks(groups: _Groups, k: int, ties: str) -> np.ndarray:
    """The ranks below k, from 0, of relevant items ranked first or last in their groups."""
    first = groups.start if ties == "best" else groups.start + groups.size - groups.relevant
    within = np.arange(groups.relevant.sum()) - np.repeat(np.cumsum(groups.relevant) - groups.relevant, groups.relevant)
    ranks = np.repeat(first, groups.relevant) + within
    return ranks[ranks < k]


def _ap_of_ranks(ranks: np.ndarray, relevant: int, k: int, denominator: str) -> float:
    """AP from the ranks, from 0 and ascending, of the relevant items among the first k."""
    if not len(ranks):
        return 0.0
    divisor = {"hits": len(ranks), "min": min(relevant, k), "all": relevant}[denominator]
    return float(np.sum(np.arange(1, len(ranks) + 1) / (ranks + 1)) / divisor)


def _expected_ap(groups: _Groups, all_relevant: int, k: int, denominator: str) -> float:
    """Expectation of AP@k over the orders of tied scores.

    In a group of n ties of which r are relevant, after `before` items with `hits` relevant ones, position j holds a
    relevant item with probability r/n; then (j-1)(r-1)/(n-1) of the items before it in the group are relevant. Only
    t <= n items of the last group may be within the cut-off: the number h of relevant ones among them is
    hypergeometric, and given h the same formula holds with (t, h) in place of (n, r).
    """
    start, size, relevant = groups
    before_hits = np.cumsum(relevant) - relevant
    seen = k - int(start[-1])
    whole = slice(None) if seen == size[-1] else slice(-1)
    total = _group_sum(start[whole], size[whole], before_hits[whole], relevant[whole], k).sum()
    if seen == size[-1]:
        divisor = {"hits": relevant.sum(), "min": min(all_relevant, k), "all": all_relevant}[denominator]
        return float(total / divisor) if divisor else 0.0
    before, n, first, r = (int(x[-1]) for x in (start, size, before_hits, relevant))
    h = np.arange(max(0, seen - (n - r)), min(seen, r) + 1)
    chance = np.exp(_log_choose(r, h) + _log_choose(n - r, seen - h) - _log_choose(n, np.array([seen])))
    divisor = {"hits": first + h, "min": np.array(min(all_relevant, k)), "all": np.array(all_relevant)}[denominator]
    value = (total + _group_sum(before, seen, first, h, k)) / np.maximum(divisor, 1)
    return float(np.sum(chance * value) / np.sum(chance))


def _group_sum(
    before: int | np.ndarray, n: int | np.ndarray, hits: int | np.ndarray, r: np.ndarray, k: int
) -> np.ndarray:
    """Sum over the positions of a group of P(relevant) * E[hits up to the position] / rank."""
    harmonic = _harmonic(k)
    inverse_ranks = harmonic[before + n] - harmonic[before]  # sum of 1 / rank
    earlier = n - (before + 1) * inverse_ranks  # sum of (j - 1) / rank
    return r / n * ((hits + 1) * inverse_ranks + (r - 1) / np.maximum(n - 1, 1) * earlier)


@lru_cache(maxsize=8)
def _harmonic(k: int) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, k + 1))])


def _log_choose(n: int, m: np.ndarray) -> np.ndarray:
    table = _log_factorials(1 << n.bit_length())
    return table[n] - table[m] - table[n - m]


@lru_cache(maxsize=32)
def _log_factorials(n: int) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
