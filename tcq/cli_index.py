"""The commands that build, change and export an index."""

import argparse
import json
from typing import Any

from tcq import flags

COLUMNS_HELP = 'CSV or Parquet file with a column "path"; its other columns come back with the answers'
FILTER_HELP = 'condition in SQL on path, size, modified, id and own columns, such as "size > 1e6 and year = 2019"'


def add_index(commands: flags.Commands) -> None:
    """Adds the parser of `tcq index`."""
    help = "build an index of a folder of images, change it, or show what it holds"
    parser = flags.add_command(commands, "index", help, _index, compiles=True)
    _add_build_flags(parser)
    _add_actions(parser)
    flags.add_distributed(parser)
    actions = parser.add_subparsers(metavar="ACTION", action=_Action)
    build = _add_action(actions, "build", "encode every image below a folder into a new index", _build)
    _add_build_flags(build)
    build.add_argument("--parts", type=flags.path, help="folder that tcq encode wrote, instead of --images")
    flags.add_distributed(build)
    update = _add_action(actions, "update", "bring an index up to date with its folders", _update)
    _add_index_flag(update)
    update.add_argument("--images", type=flags.path, help="folder of images (default: all folders of the index)")
    update.add_argument("--keep", action="store_true", help="keep images that are gone")
    update.add_argument(
        "--columns", type=flags.path, metavar="FILE", help=f"{COLUMNS_HELP}; its rows replace those of the same images"
    )
    update.add_argument("--root", metavar="[OLD=]NEW", help="only tell the index that a folder was moved")
    flags.add_distributed(update)
    remove = _add_action(actions, "remove", "remove images from an index", _remove)
    _add_index_flag(remove)
    remove.add_argument("paths", nargs="*", metavar="PATH", help="images or folders, as tcq search prints them")
    remove.add_argument("--filter", metavar="SQL", help=f"images that meet a {FILTER_HELP}")
    for name, help, run in (
        ("verify", "compare every file of an index with the hash that was written", _verify),
        ("compact", "write the rows of an index to one file, without removed ones", _compact),
    ):
        _add_index_flag(_add_action(actions, name, help, run))
    info = _add_action(actions, "info", "show what an index holds, and the scores of random pairs", _info)
    _add_index_flag(info)
    info.add_argument("--json", action="store_true", help="print one JSON object")


def _add_action(actions: Any, name: str, help: str, run: flags.Run) -> Any:
    return flags.add_command(actions, name, help, run, compiles=name in ("build", "update", "info"))


def _add_index_flag(parser: Any) -> None:
    parser.add_argument("--index", type=flags.path, required=True, help="a folder that tcq index build wrote")


def _add_build_flags(parser: Any) -> None:
    parser.add_argument("--workdir", type=flags.path, help="workdir of the training run whose model encodes the images")
    flags.add_checkpoint(parser, default=None)
    parser.add_argument(
        "--images", type=flags.path, help="folder of images, with all folders below it; or embeddings:<folder>"
    )
    parser.add_argument("--out", type=flags.path, help="folder of the index")
    parser.add_argument("--columns", type=flags.path, metavar="FILE", help=COLUMNS_HELP)


def _add_actions(parser: Any) -> None:
    """Adds the flags that change an index without an ACTION."""
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument("--add", action="store_true", help="as update --images=... --keep, of the index --out")
    actions.add_argument("--update", action="store_true", help="as update, of the index --out")
    actions.add_argument("--remove", nargs="+", metavar="PATH", help="as remove, of the index --out")
    actions.add_argument("--root", metavar="[OLD=]NEW", help="as update --root=..., of the index --out")


class _Action(argparse._SubParsersAction):
    """An ACTION, which refuses the flags before it: its own parser would not see them."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        given = [
            a.option_strings[0]
            for a in parser._actions
            if a.option_strings and a.dest != "help" and getattr(namespace, a.dest, a.default) != a.default
        ]
        if given:
            parser.error(f"{given[0]} must stand after {values[0]}")
        super().__call__(parser, namespace, values, option_string)


def _index(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Without an ACTION: the one that the flags name, by default build."""
    from tcq import index

    a = arguments
    action = next((name for name in ("add", "update", "remove", "root") if getattr(a, name)), "")
    unused = {
        "": (),
        "remove": ("images", "workdir", "checkpoint", "columns"),
        "root": ("images", "workdir", "checkpoint", "columns"),
    }.get(action, ("workdir", "checkpoint"))
    for name in unused:
        if getattr(a, name):
            why = "the index has its own model" if name in ("workdir", "checkpoint") else f"--{action} needs no {name}"
            raise index.IndexFileError(f"--{action} and --{name} do not go together: {why}")
    if not a.out:
        raise index.IndexFileError("--out is missing: the folder of the index")
    if action == "add" and not a.images:
        raise index.IndexFileError("--images is missing: the folder of the images to add")
    a.index, a.keep, a.paths, a.filter, a.parts = a.out, action == "add", a.remove or [], None, None
    run = {"remove": _remove, "": _build}.get(action, _update)
    return run(arguments, rest)


def _build(arguments: argparse.Namespace, _: list[str]) -> int:
    from tcq import index

    a = arguments
    for name, what in (
        ("parts" if a.parts else "images", "the folder of the images to index"),
        ("workdir", "the training run whose model encodes"),
        ("out", "the folder of the index"),
    ):
        if not getattr(a, name):
            raise index.IndexFileError(f"--{name} is missing: {what}")
    if a.parts:
        return _join(a)
    done = index.build(a.workdir, a.images, a.out, which=a.checkpoint or "best", own_columns=a.columns)
    print(f"indexed {done.added:,} images: {a.out}")
    _print_skipped(done, a.out)
    return 0


def _join(a: argparse.Namespace) -> int:
    from tcq.index import parts

    if a.images:
        raise parts.IndexFileError("--images and --parts do not go together: parts name their images")
    images, skipped = parts.join(a.workdir, a.parts, a.out, which=a.checkpoint or "best", own_columns=a.columns)
    print(f"indexed {images:,} images: {a.out}")
    if skipped:
        print(f"{skipped:,} files skipped, listed with reasons in {a.out}/skipped.jsonl")
    return 0


def add_encode(commands: flags.Commands) -> None:
    """Adds the parser of `tcq encode`."""
    help = (
        "encode a large folder of images by several independent processes, in Parquet files that tcq index build joins"
    )
    parser = flags.add_command(commands, "encode", help, _encode, compiles=True)
    parser.add_argument("--workdir", type=flags.path, required=True, help="workdir of the training run")
    flags.add_checkpoint(parser)
    parser.add_argument("--images", type=flags.path, required=True, help="folder of images, with all folders below it")
    parser.add_argument("--out", type=flags.path, required=True, help="folder of the parts, shared by all processes")
    parser.add_argument(
        "--share",
        type=flags.share,
        default=(0, 1),
        metavar="I/N",
        help="encode the I-th of N shares, from 0 (default: 0/1)",
    )
    parser.add_argument(
        "--size", type=flags.positive, default=4096, help="files of a part, the same for all processes (default: 4096)"
    )


def _encode(arguments: argparse.Namespace, _: list[str]) -> int:
    from tcq.index import parts

    a = arguments
    done = parts.write(a.workdir, a.images, a.out, which=a.checkpoint, share=a.share, size=a.size)
    print(f"wrote {done.new:,} of {done.parts:,} parts of share {a.share[0]}/{a.share[1]} to {a.out}; the others exist")
    print(f"encoded {done.images:,} images, skipped {done.skipped:,} files")
    return 0


def _update(arguments: argparse.Namespace, _: list[str]) -> int:
    from tcq import index

    a = arguments
    if a.root:
        if a.images or a.columns or a.keep:
            raise index.IndexFileError("--root goes with no other flag: it only changes where the images are")
        old, new = index.split_root(a.index, a.root)
        print(f"{index.move_root(a.index, new, old=old):,} images of {a.index} are below {new}")
        return 0
    done = index.update(a.index, a.images, own_columns=a.columns, keep=a.keep)
    counts = {"edited": done.edited, "moved": done.moved, "removed": done.removed}
    others = "".join(f", {count:,} {name}" for name, count in counts.items() if count)
    print(f"updated {a.index}: {done.added:,} images added{others}")
    _print_skipped(done, a.index)
    return 0


def _print_skipped(done: Any, folder: str) -> None:
    if done.skipped:
        print(f"{len(done.skipped):,} files skipped, listed with reasons in {folder}/skipped.jsonl")


def _remove(arguments: argparse.Namespace, _: list[str]) -> int:
    from tcq import index

    a = arguments
    if not a.paths and a.filter is None:
        raise index.IndexFileError("PATH or --filter is missing: which images to remove")
    print(f"removed {index.remove(a.index, a.paths, condition=a.filter):,} images from {a.index}")
    return 0


def _verify(arguments: argparse.Namespace, _: list[str]) -> int:
    from tcq import index

    sizes = index.verify(arguments.index)
    print(f"intact: {len(sizes):,} files, {sum(sizes.values()) / 2**20:,.1f} MiB in {arguments.index}")
    return 0


def _compact(arguments: argparse.Namespace, _: list[str]) -> int:
    from tcq import index

    before, after = index.compact(arguments.index)
    print(f"compacted {arguments.index}: {before:,} rows, now {after:,}")
    return 0


def _info(arguments: argparse.Namespace, _: list[str]) -> int:
    from tcq import index

    about = index.describe(arguments.index)
    thresholds, readable = index.thresholds(index.open_index(arguments.index, verify=False))
    if arguments.json:
        scores = {f"{t.share:g}": t.score for t in thresholds}
        print(json.dumps(about | {"random_pairs": scores, "queries": "images" if readable else "codes"}))
        return 0
    for name, value in about.items():
        text = f"{value:,}" if isinstance(value, int) else value
        if isinstance(value, dict):
            text = ", ".join(
                f"{key or 'embeddings'} ({v:,})" if isinstance(v, int) else f"{key} ({v})" for key, v in value.items()
            )
        print(f"{name.replace('_', ' '):<17}{text or '-'}")
    print(f"scores of random pairs (queries: {'images' if readable else 'codes, because no images can be read'}):")
    for t in thresholds:
        print(f"  one in {round(1 / t.share):<11,} {'needs more images' if t.score is None else f'{t.score:.6f}'}")
    return 0


def add_export(commands: flags.Commands) -> None:
    """Adds the parser of `tcq export`."""
    help = "export an index for databases and other languages (Parquet), FAISS or NumPy; or its encoder"
    parser = flags.add_command(commands, "export", help, _export)
    parser.add_argument("--index", type=flags.path, required=True, help="a folder that tcq index build wrote")
    parser.add_argument("--out", type=flags.path, required=True, help="a file that does not exist yet")
    parser.add_argument(
        "--format",
        choices=("faiss", "npz", "parquet", "stablehlo", "onnx"),
        default="faiss",
        help="format of the file (default: faiss); stablehlo and onnx hold the encoder; all but npz write <out>.json "
        "beside, with the scoring rule",
    )


def _export(arguments: argparse.Namespace, _: list[str]) -> int:
    from tcq.index import export

    print(export.export(arguments.index, arguments.out, format=arguments.format))
    return 0


def add_push(commands: flags.Commands) -> None:
    """Adds the parser of `tcq push`."""
    help = "make a database equal to an index: Qdrant or PostgreSQL"
    parser = flags.add_command(commands, "push", help, _push)
    _add_index_flag(parser)
    parser.add_argument(
        "--to",
        required=True,
        metavar="ADDRESS",
        help="qdrant://host:port/collection, qdrants:// for https, or postgresql://user@host/database#table",
    )


def _push(arguments: argparse.Namespace, _: list[str]) -> int:
    from tcq import index
    from tcq.index import engines

    engine = engines.of(arguments.to)
    if engine is None:
        raise engines.EngineError(f"--to={arguments.to} is unknown: use qdrant://, qdrants:// or postgresql://")
    connection = engine.connect(arguments.to)
    try:
        done = engine.push(connection, index.open_index(arguments.index))
    finally:
        engine.close(connection)
    print(f"pushed to {connection.address}: {done.written:,} written, {done.removed:,} removed")
    return 0
