"""Searches of many clients: queries that wait are encoded together, in one thread; the others wait, or are refused."""

import asyncio
import dataclasses
import logging
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc

from tcq import encode, nearest
from tcq.index import columns, duplicates
from tcq.index.search import Hit, build_engine, features_of_items, hits, search_tables, tables
from tcq.index.store import META, Index, IndexFileError, open_index, verify

TOGETHER = 16  # images that are encoded together
WAITING = 128  # searches that wait
FILTERS = 8  # conditions whose items are remembered
FURTHER = 8  # times as many hits are looked at to replace hidden ones
RELOAD_SECONDS = 2.0

logger = logging.getLogger(__name__)


class BusyError(RuntimeError):
    """Too many searches wait."""


class Query(NamedTuple):
    """One search: of a picture uint8 (S, S, 3), an embedding, the position of an item, or features."""

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
                if not future.done():
                    future.set_result(answer)

    async def watch(self) -> None:
        """Verifies the index, and opens it again whenever it has changed, for ever."""
        seen = None
        while True:
            try:
                now = await asyncio.to_thread(lambda: Path(self.path, META).read_bytes())
                if now != seen:
                    if seen is not None:
                        self.opened = await asyncio.to_thread(self._open_again)
                        logger.info(f"opened {self.path} again: {len(self.index.rows):,} images")
                    seen = now
                    await asyncio.to_thread(verify, self.path)
                    self.problem = ""
            except (OSError, IndexFileError) as error:
                if str(error) != self.problem:
                    logger.error(f"{error}")
                self.problem = str(error)
            await asyncio.sleep(RELOAD_SECONDS)

    def _open_again(self) -> Opened:
        return open_for_search(open_index(self.path, verify=False))

    def _answer(self, queries: list[Query]) -> list[Answer]:
        opened = self.opened
        index = opened.index
        pictures = [query.picture for query in queries if query.picture is not None]
        encoded = iter(encode_padded(index, np.stack(pictures)) if pictures else ())
        answers = []
        for query in queries:
            if query.picture is not None:
                features = next(encoded)
            elif query.item is not None:
                features = features_of_items(index, [query.item])[0]
            else:
                assert query.features is not None
                features = query.features
            answers.append(_search(opened, query, features))
        return answers


def _search(opened: Opened, query: Query, features: np.ndarray) -> Answer:
    index, allowed = opened.index, _where(opened, query.path)
    table = tables(index, features[None])
    wanted = query.offset + query.k
    reach = wanted
    while True:
        scores, items = search_tables(index, table, k=reach, allowed=allowed, engine=opened.engine)
        found = hits(index, scores, items, min_score=query.min_score)[0]
        shown = without_copies(index, found) if query.hide_copies else found
        if len(shown) >= wanted or len(found) < reach or reach >= FURTHER * wanted:
            break
        reach *= 2
    total = len(index.rows) if allowed is None else int(allowed.sum())
    more = len(shown) > wanted or (len(found) == reach < total)
    return Answer(shown[query.offset : wanted], features, len(found) - len(shown), more)


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


def encode_padded(index: Index, pictures: np.ndarray) -> np.ndarray:
    """The features of queries, padded to a power of two: a program is compiled for each number of images."""
    count = len(pictures)
    padded = np.concatenate([pictures, np.repeat(pictures[-1:], (1 << (count - 1).bit_length()) - count, axis=0)])
    return encode.encode(index.encoder, padded).features[:count]


_pictures: OrderedDict[bytes, np.ndarray | None] = OrderedDict()
_lock = threading.Lock()


def without_copies(index: Index, found: list[Hit]) -> list[Hit]:
    """The hits without those that are copies of a better one."""
    kept: list[Hit] = []
    seen: list[np.ndarray] = []
    digests: set[bytes] = set()
    for hit in found:
        place = int(np.searchsorted(index.ids, hit.id))
        digest = index.hashes[place].tobytes()
        picture = _small_picture(index, place, digest)
        alike = picture is not None and bool(seen) and float((np.stack(seen) @ picture).max()) >= duplicates.LIKENESS
        if alike or (digest in digests and any(digest)):
            continue
        kept.append(hit)
        digests.add(digest)
        if picture is not None:
            seen.append(picture)
    return kept


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
