"""Searches of many clients: queries that wait are encoded together, in one thread.

The others wait, or are refused.
"""

import asyncio
import dataclasses
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc

from tcq import encode, nearest
from tcq.index import columns, duplicates
from tcq.index.contents import Index, IndexFileError
from tcq.index.search import Hit, build_engine, features_of_items, hits, search_tables, tables
from tcq.index.store import META, open_index, verify
from tcq.runtime import storage

TOGETHER = 16  # images that are encoded together
WAITING = 128  # searches that wait
FILTERS = 8  # conditions whose items are remembered
FURTHER, FURTHEST = 8, 500  # times as many hits, and at most how many, are looked at to replace hidden ones
RELOAD_SECONDS = 2.0

logger = logging.getLogger(__name__)


class BusyError(RuntimeError):
    """Too many searches wait."""


class QueryError(ValueError):
    """A query that cannot be answered; `status` is that of HTTP."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Query(NamedTuple):
    """One search: of a picture uint8 (S, S, 3), an image of the index by its id, or features."""

    picture: np.ndarray | None = None
    item: int | None = None
    features: np.ndarray | None = None
    k: int = 20
    offset: int = 0
    path: str = ""  # a part of the paths of the hits
    min_score: float = -np.inf
    hide_copies: bool = False


class Answer(NamedTuple):
    """Hits of a search."""

    hits: list[Hit]
    features: np.ndarray
    hidden: int  # copies of better hits
    more: bool  # whether there may be further hits


@dataclasses.dataclass(frozen=True)
class Opened:
    """An index that is ready for searches."""

    index: Index
    engine: nearest.Engine
    allowed: OrderedDict[str, np.ndarray]  # of the last conditions
    paths: list[Any]  # the column of paths, once it is needed


def open_for_search(index: Index) -> Opened:
    """Builds the engine of an index."""
    return Opened(index, build_engine(index), OrderedDict(), [])


class Searcher:
    """An index that is open for searches, and opened again when it changes."""

    def __init__(self, path: str | Path, index: Index) -> None:
        self.path = path
        self.problem = ""  # why the files of the index are not trusted
        self.opened = open_for_search(index)
        self._queue: asyncio.Queue[tuple[Query, asyncio.Future[Answer]]] = asyncio.Queue(WAITING)

    @property
    def index(self) -> Index:
        """The index as it is now."""
        return self.opened.index

    async def search(self, query: Query) -> Answer:
        """The answer to a query. Raises BusyError if too many wait."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        try:
            self._queue.put_nowait((query, future))
        except asyncio.QueueFull:
            raise BusyError from None
        return await future

    async def work(self) -> None:
        """Answers queries for ever."""
        while True:
            waiting = [await self._queue.get()]
            while len(waiting) < TOGETHER and not self._queue.empty():
                waiting.append(self._queue.get_nowait())
            waiting = [(query, future) for query, future in waiting if not future.done()]  # others have gone
            if not waiting:
                continue
            try:
                answers = await asyncio.to_thread(self._answer, [query for query, _ in waiting])
            except Exception as error:
                for _, future in waiting:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), answer in zip(waiting, answers, strict=True):
                if future.done():
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)

    async def watch(self) -> None:
        """Verifies the index, and opens it again whenever it has changed, for ever."""
        opened, verified = self.index.version, ""
        while True:
            try:
                now = await asyncio.to_thread(self._read_meta)
                if now != opened:
                    self.opened = await asyncio.to_thread(self._open_again)
                    logger.info(f"opened {self.path} again: {len(self.index.rows):,} images")
                    opened = now
                if now != verified:
                    await asyncio.to_thread(verify, self.path)
                    verified = now
                self.problem = ""
            except Exception as error:  # such as a file system that is away: looked at again
                if str(error) != self.problem:
                    logger.error(f"{error}")
                self.problem, verified = str(error), ""
            await asyncio.sleep(self._pause())

    def _pause(self) -> float:
        return RELOAD_SECONDS * (30 if storage.is_url(self.path) else 1)

    def _read_meta(self) -> str:
        text = storage.read(storage.join(self.path, META))
        if text is None:
            raise IndexFileError(f"index {str(self.path)!r} has no {META}")
        return text.decode()

    def _open_again(self) -> Opened:
        return open_for_search(open_index(self.path, verify=False))

    def _answer(self, queries: list[Query]) -> list[Answer | Exception]:
        opened = self.opened
        index = opened.index
        pictures = [query.picture for query in queries if query.picture is not None]
        encoded: Iterator[Any] = iter(_encode_each(index, pictures))
        answers: list[Answer | Exception] = []
        for query in queries:
            try:
                features = next(encoded) if query.picture is not None else _features(index, query)
                if isinstance(features, Exception):
                    raise features
                answers.append(_search(opened, query, features))
            except Exception as error:  # of this query alone
                answers.append(error)
        return answers


def place_of(index: Index, number: int) -> int | None:
    """The position of the image with an id."""
    place = int(np.searchsorted(index.ids, number))
    return place if place < len(index.ids) and index.ids[place] == number else None


def _features(index: Index, query: Query) -> np.ndarray:
    """The features of a query by id, or its own."""
    if query.features is not None:
        q = index.config.quantizer
        if query.features.shape != (q.num_codebooks * q.codeword_dim,):
            raise QueryError("the features are those of another model", 400)
        return query.features
    assert query.item is not None
    place = place_of(index, query.item)
    if place is None:
        raise QueryError(f"no image of the index has the id {query.item}", 404)
    return features_of_items(index, [place])[0]


def _search(opened: Opened, query: Query, features: np.ndarray) -> Answer:
    index, allowed = opened.index, _where(opened, query.path)
    table = tables(index, features[None])
    wanted = query.offset + query.k
    reach = min(FURTHER * wanted, max(FURTHEST, wanted)) if query.hide_copies else wanted + 1
    scores, items = search_tables(index, table, k=reach, allowed=allowed, engine=opened.engine)
    answers = hits(index, scores, items, min_score=query.min_score)[0]
    if not query.hide_copies:
        return Answer(answers[query.offset : wanted], features, 0, len(answers) > wanted)
    shown, looked = without_copies(index, answers, wanted + 1)
    return Answer(shown[query.offset : wanted], features, looked - len(shown), len(shown) > wanted)


def _where(opened: Opened, text: str) -> np.ndarray | None:
    """Whether the path of each image has a text in it, in any case; None if no text is given."""
    if not text:
        return None
    if text not in opened.allowed:
        if not opened.paths:
            opened.paths.append(columns.table(opened.index)["path"])
        opened.allowed[text] = pc.match_substring(opened.paths[0], text, ignore_case=True).to_numpy()
        while len(opened.allowed) > FILTERS:
            opened.allowed.popitem(last=False)
    return opened.allowed[text]


def _encode_each(index: Index, pictures: list[np.ndarray]) -> list[np.ndarray] | list[Exception]:
    """The features of each picture; the error instead if they cannot be encoded."""
    try:
        return list(encode_padded(index, np.stack(pictures))) if pictures else []
    except Exception as error:
        return [error] * len(pictures)


def encode_padded(index: Index, pictures: np.ndarray) -> np.ndarray:
    """The features of queries, padded to a power of two.

    A program is compiled for each number of images.
    """
    count = len(pictures)
    padded = np.concatenate([pictures, np.repeat(pictures[-1:], (1 << (count - 1).bit_length()) - count, axis=0)])
    return encode.encode(index.encoder, padded).features[:count]


_pictures: OrderedDict[bytes, np.ndarray | None] = OrderedDict()
_lock = threading.Lock()


def without_copies(index: Index, answers: list[Hit], most: int) -> tuple[list[Hit], int]:
    """The first `most` hits that are no copies of a better one, and the number it looked at."""
    originals: list[Hit] = []
    pictures, count = np.zeros((most, 3 * duplicates.SIDE**2), np.float32), 0
    digests: set[bytes] = set()
    for looked, hit in enumerate(answers):
        if len(originals) == most:
            return originals, looked
        place = int(np.searchsorted(index.ids, hit.id))
        digest = index.hashes[place].tobytes()
        picture = _small_picture(index, place, digest)
        alike = picture is not None and count and float((pictures[:count] @ picture).max()) >= duplicates.LIKENESS
        if alike or (digest in digests and any(digest)):
            continue
        originals.append(hit)
        digests.add(digest)
        if picture is not None:
            pictures[count] = picture
            count += 1
    return originals, len(answers)


def _small_picture(index: Index, place: int, digest: bytes) -> np.ndarray | None:
    with _lock:
        if digest in _pictures:
            return _pictures[digest]
    picture = duplicates.small_picture(index, place)
    if any(digest):
        with _lock:
            _pictures[digest] = picture
            while len(_pictures) > 10_000:
                _pictures.popitem(last=False)
    return picture
