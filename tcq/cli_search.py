"""The commands that search an index and serve its page."""

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from tcq import flags
from tcq.cli_index import FILTER_HELP

BLOCK = 256  # queries that are read and encoded together
BESTS = 5  # scores in a message

logger = logging.getLogger(__name__)


def add_search(commands: flags.Commands) -> None:
    """Adds the parser of `tcq search`."""
    help = "show the indexed images nearest to a query: an image, a folder of images, an indexed image, or features"
    parser = flags.add_command(commands, "search", help, _search, compiles=True)
    parser.add_argument(
        "--index", type=flags.path, required=True, help="a folder that tcq index build wrote, or where tcq push put it"
    )
    parser.add_argument(
        "--encoder", type=flags.path, metavar="INDEX", help="with a database: the folder of the index that was pushed"
    )
    parser.add_argument(
        "--query",
        type=flags.path,
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="images, folders of images, or .npy files of embeddings",
    )
    parser.add_argument(
        "--item", nargs="+", default=[], metavar="ID", help="indexed images, by id or path; their codes are the queries"
    )
    parser.add_argument(
        "--features", type=flags.path, nargs="+", default=[], metavar="NPY", help="files of features of the encoder"
    )
    parser.add_argument("--together", action="store_true", help="rank by the mean score of all queries")
    parser.add_argument(
        "--filter",
        metavar="SQL",
        help=f"search only images that meet a {FILTER_HELP}; with Qdrant, its own filter as JSON",
    )
    parser.add_argument(
        "--min_score",
        type=flags.number(),
        default=float("-inf"),
        help="least score of a hit: tcq index info says what is rare",
    )
    parser.add_argument("--k", type=flags.positive, default=10, help="number of hits (default: 10)")
    parser.add_argument("--gallery", type=flags.path, metavar="PNG", help="write a picture of the hits")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a line of JSON for each query")
    form.add_argument("-0", "--null", action="store_true", help="print only the paths, each ended by a null byte")


class _Answers(NamedTuple):
    """Hits of a block of queries."""

    names: list[str]
    pictures: Any  # uint8 (Q, H, W, 3), or None
    hits: list[list[Any]]


def _search(arguments: argparse.Namespace, _: list[str]) -> int:
    import numpy as np

    from tcq import index

    a = arguments
    if not a.query + a.item + a.features:
        raise index.IndexFileError("--query, --item or --features is missing: what to search for")
    if a.gallery and (a.item or a.features or a.together):
        raise index.IndexFileError("--gallery needs query images, each with its own hits")
    several = len(a.query + a.item + a.features) > 1 or any(os.path.isdir(path) for path in a.query)
    drawn: list[_Answers] = []
    for answers in _verified(a):
        drawn += [answers] if a.gallery else []
        for name, hits in zip(answers.names, answers.hits, strict=True):
            _print_answer(a, name if several or len(answers.hits) > 1 else "", name, hits)
        sys.stdout.flush()
    if a.gallery:
        pictures = [block.pictures for block in drawn if block.pictures is not None]
        if len(pictures) < len(drawn) or a.together:
            raise index.IndexFileError("--gallery needs query images, each with its own hits")
        hits = [row for block in drawn for row in block.hits]
        index.draw(index.open_index(a.encoder or a.index, verify=False), np.concatenate(pictures), hits, a.gallery)
        print(f"gallery: {a.gallery}", file=sys.stderr)
    return 0


def _verified(arguments: argparse.Namespace) -> Iterator[_Answers]:
    """The answers, once the files of the index are verified.

    Meanwhile the first queries are encoded.
    """
    from tcq import index
    from tcq.index import engines

    if engines.of(arguments.index) and not arguments.encoder:
        raise engines.EngineError("--encoder is missing: the folder of the index that was pushed")
    path = arguments.encoder or arguments.index
    with ThreadPoolExecutor(1) as pool:
        opened = index.open_index(path, verify=False)
        verified = pool.submit(index.verify, path)
        answers = _answers(opened, arguments)
        try:
            try:
                first = next(answers, None)
            finally:  # a corrupted file explains any other error
                verified.result()
        except index.CorruptedError:
            answers = _answers(index.open_index(path), arguments)  # falls back, or raises
            first = next(answers, None)
    if first is None:
        raise index.IndexFileError("--query: no image of these folders can be read")
    yield first
    yield from answers


def _answers(opened: Any, arguments: argparse.Namespace) -> Iterator[_Answers]:
    import numpy as np

    from tcq import index

    a = arguments
    all_names, sums = [], []
    with _searcher(opened, a) as search:
        for names, pictures, features in _queries(opened, a):
            tables = index.tables(opened, features)
            if a.together:
                all_names += names
                sums.append(tables.sum(axis=0, dtype=np.float64))
            else:
                yield _Answers(names, pictures, search(tables))
        if a.together and all_names:
            mean = (np.sum(sums, axis=0) / len(all_names)).astype(np.float32)
            yield _Answers([", ".join(all_names)], None, search(mean[None]))


@contextlib.contextmanager
def _searcher(opened: Any, arguments: argparse.Namespace) -> Iterator[Callable[[Any], list[list[Any]]]]:
    """A function from lookup tables to hits, from the index or a database."""
    from tcq import index
    from tcq.index import engines

    a = arguments
    database = engines.of(a.index)
    if database is None:
        allowed, engine = None if a.filter is None else index.where(opened, a.filter), None

        def search(tables: Any) -> list[list[Any]]:
            nonlocal engine
            engine = engine or (index.build_engine(opened) if len(tables) == BLOCK else None)
            scores, items = index.search_tables(opened, tables, k=a.k, allowed=allowed, engine=engine)
            _warn_of_scores(scores, a.min_score)
            return index.hits(opened, scores, items, min_score=a.min_score)

        yield search
        return
    connection = database.connect(a.index)
    try:
        yield lambda tables: database.search(
            connection, opened, tables, k=a.k, condition=a.filter, min_score=a.min_score
        )
    finally:
        database.close(connection)


def _warn_of_scores(scores: Any, least: float) -> None:
    """Warns of queries (Q, k) without a hit, because the least score is too high."""
    bests = scores[scores[:, 0] < least, 0] if scores.size else ()
    if len(bests):
        listed = ", ".join(f"{best:.6f}" for best in bests[:BESTS])
        logger.warning(f"{len(bests):,} of {len(scores):,} queries have no hit of --min_score {least}: best {listed}")


def _queries(opened: Any, arguments: argparse.Namespace) -> Iterator[tuple[list[str], Any, Any]]:
    """Names, pictures and features of the queries, in blocks."""
    from tcq import encode, index

    a = arguments
    if a.item:
        yield a.item, None, index.features_of_items(opened, [index.find(opened, text) for text in a.item])
    for file in a.features:
        features = index.read_features(opened, file)
        yield [f"{file} row {i}" for i in range(len(features))], None, features
    for names, pictures in index.query_blocks(opened, a.query, size=BLOCK):
        features = encode.encode(opened.encoder, pictures).features
        yield names, pictures if pictures.ndim == 4 else None, features


def _print_answer(arguments: argparse.Namespace, title: str, name: str, hits: Sequence[Any]) -> None:
    if arguments.json:
        from tcq.index import columns

        listed = [columns.plain({"path": hit.path, "score": hit.score, "id": hit.id, **hit.columns}) for hit in hits]
        print(json.dumps({"query": name, "hits": listed}))
    elif arguments.null:
        sys.stdout.buffer.write(b"".join(os.fsencode(hit.path) + b"\0" for hit in hits))
    else:
        _print_hits(title, hits)


def _print_hits(query: str, hits: Sequence[Any]) -> None:
    """Prints rank, score and path, then own columns.

    A tab or the end of a line in one of them is printed as an escape.
    """
    if query:
        print(f"# {flags.one_line(query)}")
    for rank, hit in enumerate(hits, 1):
        known = {name: value for name, value in hit.columns.items() if value is not None}
        own = "".join(f"\t{flags.one_line(f'{name}={value}')}" for name, value in known.items())
        print(f"{rank}\t{hit.score:.6f}\t{flags.one_line(hit.path)}{own}")


def add_serve(commands: flags.Commands) -> None:
    """Adds the parser of `tcq serve`."""
    parser = flags.add_command(
        commands, "serve", "serve a search page and a JSON API for an index", _serve, compiles=True
    )
    parser.add_argument("--index", type=flags.path, required=True, help="a folder that tcq index build wrote")
    flags.add_address(parser, port=8000)
    parser.add_argument("--k", type=flags.positive, default=20, help="number of answers (default: 20)")


def _serve(arguments: argparse.Namespace, _: list[str]) -> int:
    from tcq.index import serve

    serve.serve(arguments.index, host=arguments.host, port=arguments.port, proxy=arguments.proxy, k=arguments.k)
    return 0
