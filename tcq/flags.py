"""What the parsers of all commands share: flags, and the types of their values."""

import argparse
import math
import os
from collections.abc import Callable
from typing import Any

LEVELS = ("debug", "info", "warning", "error")
Commands = Any  # what argparse's add_subparsers returns
Run = Callable[[argparse.Namespace, list[str]], int]


def add_command(commands: Commands, name: str, help: str, run: Run, *, compiles: bool = False) -> Any:
    """A parser with the flags that all commands have.

    `compiles` says whether compiled programs are cached.
    """
    parser = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
    parser.set_defaults(run=run, compiles=compiles)
    parser.add_argument("--quiet", action="store_true", help="log only warnings and errors")
    parser.add_argument("--log_level", choices=LEVELS, default="info", help="least level to log (default: info)")
    return parser


def add_distributed(parser: Any) -> None:
    """Adds the flags by which a process joins a run of several."""
    parser.add_argument("--distributed", action="store_true", help="join a run of several processes, which JAX detects")
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT", help="address of process 0, if JAX cannot detect the processes"
    )
    parser.add_argument("--processes", type=positive, metavar="N", help="number of processes (with --coordinator)")
    parser.add_argument(
        "--process_id", type=int, metavar="I", help="number of this process, from 0 (with --coordinator)"
    )


def add_address(parser: Any, *, port: int) -> None:
    """Adds the flags that say where a page is served."""
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: 127.0.0.1, this machine only); beyond it a token is needed",
    )
    parser.add_argument(
        "--proxy",
        metavar="URL",
        help="address at which a proxy, such as that of Colab, shows the page; the proxy decides who may see it",
    )
    parser.add_argument("--port", type=port_number, default=port, help=f"of the page (default: {port})")


def add_checkpoint(parser: Any, *, default: str | None = "best") -> None:
    """Adds --checkpoint."""
    help = "best (by validation), latest, or a step (default: best)"
    parser.add_argument("--checkpoint", type=checkpoint, default=default, help=help)


def positive(text: str) -> int:
    """A whole number of at least 1. Raises ArgumentTypeError."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def number(least: float = -math.inf, most: float = math.inf) -> Callable[[str], float]:
    """The type of a flag whose value is a finite number in a range, which includes its ends."""
    allowed = (
        "" if least == -math.inf else f" of at least {least:g}" if most == math.inf else f" from {least:g} to {most:g}"
    )

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (least <= value <= most and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text!r} must be a number{allowed}")
        return value

    return parse


def checkpoint(text: str) -> str:
    """The name of a checkpoint. Raises ArgumentTypeError."""
    if text not in ("best", "latest") and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be best, latest, or the number of a step")
    return text


def port_number(text: str) -> int:
    """The number of a port; 0 is any free one. Raises ArgumentTypeError."""
    if not text.isdecimal() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 0 to 65535")
    return int(text)


def steps(text: str) -> tuple[int, int]:
    """The first step and one past the last of "10:20". Raises ArgumentTypeError."""
    first, _, stop = text.partition(":")
    if not (first.isdecimal() and stop.isdecimal() and 0 < int(first) < int(stop)):
        raise argparse.ArgumentTypeError(f"{text!r} must have the form 10:20, the first step and one past the last")
    return int(first), int(stop)


def share(text: str) -> tuple[int, int]:
    """The number and the count of "0/8". Raises ArgumentTypeError."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} must have the form 0/8: a number from 0, and how many there are")
    return int(number), int(count)


def one_line(text: str) -> str:
    """Text for one field of a line: a tab or the end of a line in it as an escape."""
    return "".join(repr(c)[1:-1] if c in "\t\r\n\v\f\x1c\x1d\x1e\x85\u2028\u2029" else c for c in text)


path = os.path.expanduser
