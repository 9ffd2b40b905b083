"""The closeness of codes: which codes of an index are the nearest of each."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt

from tcq import nearest
from tcq.index.contents import Index
from tcq.runtime import log, signals

BLOCK = 256  # codes that are searched together

logger = logging.getLogger(__name__)


class Codes(NamedTuple):
    """The U different codes of an index, with what compares them."""

    codes: UInt[np.ndarray, "U M"]
    items: list[np.ndarray]  # the positions of the images of each code
    products: Float[np.ndarray, "M K K"]  # inner products of the codewords of each codebook
    metric: str  # "l2": minus the squared distance; "cosine"


def different_codes(index: Index) -> Codes:
    """The different codes of an index."""
    codes, inverse = np.unique(index.codes, axis=0, return_inverse=True)
    order = np.argsort(inverse.ravel(), kind="stable")
    items = np.split(order, np.cumsum(np.bincount(inverse.ravel(), minlength=len(codes)))[:-1]) if len(codes) else []
    words = index.encoder.codebooks.astype(np.float64)
    metric = "l2" if index.config.eval.score == "l2" else "cosine"
    return Codes(codes, items, np.einsum("mkd,mld->mkl", words, words), metric)


def close_codes(
    codes: Codes, by_code: Sequence[Sequence[int]], nearest_others: int, reference: np.ndarray
) -> Iterator[tuple[int, int]]:
    """The numbers of each code and its nearest others, each pair once.

    Each code of several images is also in a pair with itself.

    Args:
      codes: the different codes.
      by_code: the images of each that are compared; none for codes that are left out.
      nearest_others: how many others of each code.
      reference: whether each image is a reference; codes of references alone are not compared with each other.
    """
    yield from ((code, code) for code, items in enumerate(by_code) if len(items) > 1)
    used = np.array([code for code, items in enumerate(by_code) if items], np.int64)
    if nearest_others < 1 or len(used) < 2:
        return
    queries = np.array([place for place, code in enumerate(used) if not reference[by_code[code]].all()], np.int64)
    words = codes.codes[used].astype(np.int64)
    engine, tables = _engine(codes._replace(codes=codes.codes[used]))
    progress = log.Progress(logger, "comparing codes", len(queries), unit="codes")
    seen: set[tuple[int, int]] = set()
    for first in range(0, len(queries), BLOCK):
        block = queries[first : first + BLOCK]
        signals.poll()
        _, neighbours = nearest.top_k(engine, tables(words[block]), nearest_others + 1)
        for query, others in zip(block.tolist(), neighbours.tolist(), strict=True):
            for other in [o for o in others if o != query][:nearest_others]:
                pair = int(used[min(query, other)]), int(used[max(query, other)])
                if pair not in seen:
                    seen.add(pair)
                    yield pair
        progress.update(first + len(block))


def _engine(codes: Codes) -> tuple[nearest.Engine, Any]:
    """The codes ready to be searched, and a function from codes to tables of their closeness."""
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
