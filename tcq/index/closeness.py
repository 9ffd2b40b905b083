"""The closeness of codes: which of the codes of an index are near each other, without comparing all pairs."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt

from tcq import nearest
from tcq.index.store import Index
from tcq.runtime import log, signals

BLOCK = 256  # codes that are searched together
SHARE = 1e-6  # of random pairs, as close as which images are near by default
PAIRS = 10_000_000  # that are drawn for it
LEAST = 10  # pairs beyond the threshold; with fewer only equal codes are near
FIRST_K = 8  # neighbours that are searched first
SLACK = 1e-4  # between the rounding of float32 scores and float64 closeness

logger = logging.getLogger(__name__)


class Codes(NamedTuple):
    """The U different codes of an index, with what compares them."""

    codes: UInt[np.ndarray, "U M"]
    items: list[np.ndarray]  # the positions of the images of each code
    products: Float[np.ndarray, "M K K"]  # inner products of the codewords of each codebook
    metric: str  # "l2": minus the squared distance; "cosine"

    @property
    def most(self) -> float:
        """The closeness of equal codes."""
        return 0.0 if self.metric == "l2" else 1.0


def different_codes(index: Index) -> Codes:
    """The different codes of an index."""
    codes, inverse = np.unique(index.codes, axis=0, return_inverse=True)
    order = np.argsort(inverse.ravel(), kind="stable")
    items = np.split(order, np.cumsum(np.bincount(inverse.ravel(), minlength=len(codes)))[:-1]) if len(codes) else []
    words = index.encoder.codebooks.astype(np.float64)
    metric = "l2" if index.config.eval.score == "l2" else "cosine"
    return Codes(codes, items, np.einsum("mkd,mld->mkl", words, words), metric)


def closeness(codes: Codes, a: Int[np.ndarray, "*n"], b: Int[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """The closeness of codes by their numbers, pair by pair, in float64; higher is closer."""
    left, right = codes.codes[a].astype(np.int64), codes.codes[b].astype(np.int64)
    inner, first, second = (np.zeros(np.shape(a)) for _ in range(3))
    for m, products in enumerate(codes.products):
        inner += products[left[..., m], right[..., m]]
        first += products[left[..., m], left[..., m]]
        second += products[right[..., m], right[..., m]]
    if codes.metric == "l2":
        return np.where(a == b, 0.0, np.minimum(2 * inner - first - second, 0.0))
    return np.where(a == b, 1.0, inner / np.sqrt(np.maximum(first * second, 1e-24)))


def rare_closeness(codes: Codes, share: float = SHARE, *, seed: int = 0) -> float:
    """The closeness that a share of random pairs of images reaches; that of equal codes if there are too few."""
    count = sum(map(len, codes.items))
    if count * (count - 1) / 2 * share < LEAST:
        return codes.most
    number = np.empty(count, np.int64)
    for code, items in enumerate(codes.items):
        number[items] = code
    random = np.random.RandomState(seed)
    first = random.randint(0, count, PAIRS)
    second = (first + random.randint(1, count, PAIRS)) % count  # never the same image
    values = closeness(codes, number[first], number[second])
    beyond = max(round(PAIRS * share), 1)
    return float(np.partition(values, -beyond)[-beyond])


def close_codes(
    codes: Codes, by_code: Sequence[Sequence[int]], least: float, reference: np.ndarray
) -> Iterator[tuple[int, int]]:
    """The numbers of all pairs of codes that are close, each code with itself too; no two of references alone."""
    yield from ((code, code) for code, items in enumerate(by_code) if len(items) > 1)
    if least >= codes.most:
        return
    words = codes.codes.astype(np.int64)
    queries = np.array([c for c, items in enumerate(by_code) if items and not reference[items].all()], np.int64)
    queried = np.zeros(len(codes.codes), bool)
    queried[queries] = True
    engine, tables = _engine(codes)
    progress = log.Progress(logger, "comparing codes", len(queries), unit="codes")
    for first in range(0, len(queries), BLOCK):
        block = queries[first : first + BLOCK]
        signals.poll()
        for query, others in zip(block.tolist(), _within(engine, tables(words[block]), least - SLACK), strict=True):
            others = others[(others > query) | ~queried[others]]  # each pair once
            values = closeness(codes, np.full(len(others), query), others)
            yield from ((query, other) for other in others[values >= least].tolist())
        progress.update(first + len(block))


def _engine(codes: Codes) -> tuple[nearest.Engine, Any]:
    """The codes ready to be searched, and a function from codes to the tables of their closeness."""
    norms = None
    places = np.arange(len(codes.products))
    own = codes.products[places, :, :]
    squares = np.einsum("mkk->mk", own)  # (M, K)
    if codes.metric == "cosine":
        norms = np.sqrt(sum(squares[m][codes.codes[:, m]] for m in places)).astype(np.float32)

    def tables(block: np.ndarray) -> np.ndarray:
        inner = own[places, block]  # (Q, M, K)
        if codes.metric == "l2":
            return (2 * inner - squares - squares[places, block][:, :, None]).astype(np.float32)
        length = np.sqrt(squares[places, block].sum(axis=1))
        return (inner / np.maximum(length, 1e-12)[:, None, None]).astype(np.float32)

    return nearest.build(codes.codes, own.shape[1], norms=norms), tables


def _within(engine: nearest.Engine, tables: np.ndarray, least: float) -> list[np.ndarray]:
    """For each query the items whose score is at least `least`."""
    found: list[np.ndarray] = [np.zeros(0, np.int64)] * len(tables)
    left, k = np.arange(len(tables)), FIRST_K
    while len(left):
        scores, items = nearest.top_k(engine, tables[left], k)
        full = (scores >= least).all(axis=1) & (scores.shape[1] == k)
        for row in np.flatnonzero(~full):
            found[left[row]] = items[row][scores[row] >= least]
        left, k = left[full], 4 * k
    return found
