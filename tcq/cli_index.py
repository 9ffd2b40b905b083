"""The commands that build, change, search, serve and export an index."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from tcq import flags


def add_index(commands: flags.Commands) -> None:
    """Adds the parser of `tcq index`."""
    help = "encode a folder of images into an index; or bring one up to date, or remove images from it"
    parser = flags.add_command(commands, "index", help, _index, compiles=True)
    parser.add_argument("--workdir", type=flags.path, help="workdir of the training run whose model encodes the images")
    parser.add_argument("--checkpoint", help="best (by validation), latest, or a step (default: best)")
    parser.add_argument(
        "--images", type=flags.path, help="folder of images, with all folders below it; or embeddings:<folder>"
    )
    parser.add_argument("--out", type=flags.path, required=True, help="folder of the index")
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument("--add", action="store_true", help="add --images to the existing index --out")
    actions.add_argument(
        "--update",
        action="store_true",
        help="as --add, by default of all folders of the index; images that are gone go",
    )
    actions.add_argument("--remove", nargs="+", metavar="PATH", help="remove images or folders from the index --out")
    actions.add_argument("--root", metavar="[OLD=]NEW", help="tell the index --out that a folder was moved")
    flags.add_distributed(parser)


def _index(arguments: argparse.Namespace, _: list[str]) -> int:
    from tcq import index

    a = arguments
    action = next((name for name in ("add", "update", "remove", "root") if getattr(a, name)), "")
    needed = {"": ("images", "workdir"), "add": ("images",)}.get(action, ())
    unused = {"": (), "remove": ("images", "workdir", "checkpoint"), "root": ("images", "workdir", "checkpoint")}
    for name in unused.get(action, ("workdir", "checkpoint")):
        if getattr(a, name):
            raise index.IndexFileError(f"--{action} and --{name} do not go together: the index has its own model")
    for name in needed:
        if not getattr(a, name):
            what = "the folder of the images to index" if name == "images" else "the training run whose model encodes"
            raise index.IndexFileError(f"--{name} is missing: {what}")
    if action == "remove":
        print(f"removed {index.remove(a.out, a.remove):,} images from {a.out}")
        return 0
    if action == "root":
        old, new = index.split_root(a.out, a.root)
        print(f"{index.move_root(a.out, new, old=old):,} images of {a.out} are below {new}")
        return 0
    if action == "add":
        done = index.add(a.out, a.images)
        print(f"added {done.added:,} images to {a.out}{_others(done)}")
    elif action == "update":
        done = index.update(a.out, a.images)
        print(f"updated {a.out}: {done.added:,} images added{_others(done)}")
    else:
        done = index.build(a.workdir, a.images, a.out, which=a.checkpoint or "best")
        print(f"indexed {done.added:,} images: {a.out}")
    if done.skipped:
        print(f"{len(done.skipped):,} files skipped, listed with reasons in {a.out}/skipped.jsonl")
    return 0


def _others(done: Any) -> str:
    counts = {"edited": done.edited, "moved": done.moved, "removed": done.removed}
    return "".join(f", {count:,} {name}" for name, count in counts.items() if count)


def add_search(commands: flags.Commands) -> None:
    """Adds the parser of `tcq search`."""
    parser = flags.add_command(
        commands, "search", "show the indexed images nearest to a query image", _search, compiles=True
    )
    parser.add_argument("--index", type=flags.path, required=True, help="a folder that tcq index wrote")
    parser.add_argument(
        "--query",
        type=flags.path,
        required=True,
        nargs="+",
        metavar="IMAGE",
        help="images, or .npy files of embeddings",
    )
    parser.add_argument("--k", type=flags.positive, default=10, help="number of hits (default: 10)")
    parser.add_argument("--gallery", type=flags.path, metavar="PNG", help="write a picture of the hits")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a line of JSON for each query")
    form.add_argument("-0", "--null", action="store_true", help="print only the paths, each ended by a null byte")


def _search(arguments: argparse.Namespace, _: list[str]) -> int:
    from tcq import index

    indexed = index.open_index(arguments.index)
    queries = index.read_queries(indexed, arguments.query)
    hits_of_queries = index.search(indexed, queries, k=arguments.k)
    is_image = queries.ndim == 4
    names = arguments.query if is_image else [f"row {i}" for i in range(len(queries))]
    for query, hits in zip(names, hits_of_queries, strict=True):
        if arguments.json:
            listed = [{"path": hit.path, "score": hit.score} for hit in hits]
            print(json.dumps({"query": query, "hits": listed}))
        elif arguments.null:
            sys.stdout.buffer.write(b"".join(os.fsencode(hit.path) + b"\0" for hit in hits))
        else:
            _print_hits(query if len(hits_of_queries) > 1 else "", hits)
    sys.stdout.flush()
    if arguments.gallery:
        if not is_image:
            raise index.IndexFileError("--gallery needs query images, and the queries are embeddings")
        index.draw(indexed, queries, hits_of_queries, arguments.gallery)
        print(f"gallery: {arguments.gallery}", file=sys.stderr)
    return 0


def _print_hits(query: str, hits: Sequence[Any]) -> None:
    """Prints rank, score and path; a tab or the end of a line in a path as an escape."""
    if query:
        print(f"# {_one_line(query)}")
    for rank, hit in enumerate(hits, 1):
        print(f"{rank}\t{hit.score:.6f}\t{_one_line(hit.path)}")


def _one_line(text: str) -> str:
    return "".join(repr(c)[1:-1] if c in "\t\r\n\v\f\x1c\x1d\x1e\x85\u2028\u2029" else c for c in text)


def add_serve(commands: flags.Commands) -> None:
    """Adds the parser of `tcq serve`."""
    parser = flags.add_command(
        commands, "serve", "serve a search page for an index, on this machine only", _serve, compiles=True
    )
    parser.add_argument("--index", type=flags.path, required=True, help="a folder that tcq index wrote")
    parser.add_argument("--port", type=flags.port, default=8000, help="of the page (default: 8000)")
    parser.add_argument("--k", type=flags.positive, default=10, help="number of answers (default: 10)")


def _serve(arguments: argparse.Namespace, _: list[str]) -> int:
    from tcq.index import serve

    serve.serve(arguments.index, port=arguments.port, k=arguments.k)
    return 0


def add_export(commands: flags.Commands) -> None:
    """Adds the parser of `tcq export`."""
    parser = flags.add_command(commands, "export", "export an index to FAISS, or as NumPy arrays", _export)
    parser.add_argument("--index", type=flags.path, required=True, help="a folder that tcq index wrote")
    parser.add_argument("--out", type=flags.path, required=True, help="a file that does not exist yet")
    parser.add_argument("--format", choices=("faiss", "npz"), default="faiss", help="of the file (default: faiss)")


def _export(arguments: argparse.Namespace, _: list[str]) -> int:
    from tcq.index import export

    print(export.export(arguments.index, arguments.out, format=arguments.format))
    return 0
