"""The command that finds copies of images in an index."""

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from typing import Any

from tcq import flags

DRAWN = 40  # groups of a gallery


def add_duplicates(commands: flags.Commands) -> None:
    """Adds the parser of `tcq duplicates`."""
    help = "list groups of images that are copies of each other; nothing is deleted"
    parser = flags.add_command(commands, "duplicates", help, _duplicates)
    parser.add_argument("--index", type=flags.path, required=True, help="a folder that tcq index build wrote")
    parser.add_argument(
        "--kind",
        choices=("bytes", "pixels", "near"),
        default="near",
        help="copies to list: bytes; pixels, and bytes; near, and both others (default: near)",
    )
    parser.add_argument(
        "--min_likeness",
        type=flags.number(0, 1),
        default=0.97,
        help="least correlation of small pictures of near images, from 0 to 1 (default: 0.97)",
    )
    parser.add_argument(
        "--others",
        type=flags.positive,
        default=20,
        help="nearest other codes whose images an image is compared with (default: 20)",
    )
    parser.add_argument(
        "--reference",
        nargs="+",
        default=[],
        metavar="PATH",
        help="images or folders that are kept, and not compared with each other",
    )
    parser.add_argument(
        "--not_copies",
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="remember that no two of these images, by path or id, are copies; and list nothing",
    )
    parser.add_argument(
        "--gallery", type=flags.path, metavar="PNG", help=f"write a picture of the first {DRAWN} groups"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a line of JSON for each group")
    form.add_argument("--csv", action="store_true", help="print CSV with a row for each image")


def _duplicates(arguments: argparse.Namespace, _: list[str]) -> int:
    from tcq import index
    from tcq.index import duplicates, store
    from tcq.runtime import storage

    a = arguments
    verdicts = storage.join(a.index, store.VERDICTS)
    if a.not_copies:
        with store.changing(a.index):
            count = duplicates.add_verdicts(verdicts, index.open_index(a.index), a.not_copies)
        print(f"remembered {count:,} pairs that are not copies: {verdicts}")
        return 0
    opened = index.open_index(a.index)
    kinds = dict(zip(("bytes", "pixels", "near"), duplicates.KINDS, strict=True))
    groups = duplicates.find(
        opened,
        kind=kinds[a.kind],
        likeness=a.min_likeness,
        others=a.others,
        references=a.reference,
        verdicts=duplicates.read_verdicts(verdicts),
    )
    _print_groups(a, groups)
    if a.gallery and groups:
        duplicates.draw(opened, groups[:DRAWN], a.gallery)
        print(f"gallery: {a.gallery}", file=sys.stderr)
    return 0


def _print_groups(arguments: argparse.Namespace, groups: Sequence[Any]) -> None:
    fields = ("id", "path", "size", "modified", "keep", "reference")
    if arguments.csv:
        writer = csv.writer(sys.stdout)
        writer.writerow(["group", "kind", "likeness", *fields])
        for number, group in enumerate(groups):
            writer.writerows([number, group.kind, f"{group.likeness:.6f}", *copy] for copy in group.copies)
        return
    for group in groups:
        copies = [copy._asdict() for copy in group.copies]
        if arguments.json:
            print(json.dumps({"kind": group.kind, "likeness": group.likeness, "copies": copies}))
            continue
        print(f"# {group.kind}" + (f", likeness {group.likeness:.4f}" if group.kind == "near" else ""))
        for copy in group.copies:
            print(f"{'keep' if copy.keep else '-'}\t{flags.one_line(copy.path)}")
    if not arguments.json:
        more = sum(not copy.keep for group in groups for copy in group.copies)
        print(f"{len(groups):,} groups, {more:,} images beside those to keep", file=sys.stderr)
