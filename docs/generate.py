"""Writes docs/api.md and docs/commands.md from the code, and the address of the repository: `make docs`.

The address is `url` in setup.cfg, once; the badge of README.md and the notebook follow it. A test compares all.
"""

import argparse
import ast
import configparser
import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType

import tcq
from tcq import cli

DOCS = Path(__file__).resolve().parent
API_HEAD = """# Python API

For people who call tcq from Python. `make docs` writes this page from the docstrings.

`import tcq` is light: the modules below are imported when they are first used, as in `tcq.losses.nt_xent(...)`.
Errors that a user can fix are tcq's own subclasses of ValueError, such as `config.ConfigError`; the message says what
to do. Messages go to the standard library's logger `tcq`, which shows warnings unless you set its level.
"""
COMMANDS_HEAD = """# Commands

For people who use the command line. `make docs` writes this page from the parsers that `tcq COMMAND --help` uses.

`tcq COMMAND` and `python -m tcq COMMAND` are the same.
Exit status: 0: success; 1: the command failed while running; 2: the arguments, the config or a file is invalid;
128 + n: signal n stopped the command, and the same command resumes it.

Every command has `--quiet` (log only warnings and errors) and `--log_level` (`debug`, `info`, `warning`, `error`).
Commands marked *several processes* also have the flags of [that section](#several-processes).
"""
COMMON = ("quiet", "log_level")
SEVERAL = ("distributed", "coordinator", "processes", "process_id")


def api() -> str:
    """The text of docs/api.md."""
    modules = {name: importlib.import_module(f"tcq.{name}") for name in tcq.PUBLIC}
    rows = [f"| [tcq.{name}](#tcq{name}) | {inspect.getdoc(m).splitlines()[0]} |" for name, m in modules.items()]
    parts = [API_HEAD, "\n".join(["| module | |", "|---|---|", *rows, ""])]
    for name, module in modules.items():
        parts.append(f"## tcq.{name}\n\n{inspect.getdoc(module)}\n")
        parts += [_entry(name, module, member) for member in _members(module)]
    return "\n".join(parts)


def _members(module: ModuleType) -> list[str]:
    """The public functions and classes of a module, in the order of their definition or of `__all__`."""
    names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    own = f"{module.__name__}."
    return [
        name
        for name in names
        if (inspect.isfunction(value := getattr(module, name)) or inspect.isclass(value))
        and f"{value.__module__}.".startswith(own)
    ]


def _entry(module_name: str, module: ModuleType, name: str) -> str:
    value = getattr(module, name)
    tree = ast.parse(inspect.getsource(inspect.getmodule(value)))
    node = next(n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == name)
    documented = ast.get_docstring(node) or ""
    return f"### {module_name}.{name}\n\n```python\n{_signature(node)}\n```\n\n```text\n{documented}\n```\n"


def _signature(node: ast.FunctionDef | ast.ClassDef) -> str:
    """The head of a function with an argument on each line, or of a class with its fields."""
    if isinstance(node, ast.ClassDef):
        fields = [f"    {ast.unparse(n)}" for n in node.body if isinstance(n, ast.AnnAssign)]
        bases = f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
        return "\n".join([f"class {node.name}{bases}:", *(fields or ["    ..."])])
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"def {node.name}({ast.unparse(node.args)}){returns}"
    if len(line) <= 100:
        return line
    a = node.args
    defaults = [None] * (len(a.args) - len(a.defaults)) + a.defaults
    lines = [_argument(x, d) for x, d in zip(a.args, defaults, strict=True)]
    if a.kwonlyargs:
        lines += ["*", *(_argument(x, d) for x, d in zip(a.kwonlyargs, a.kw_defaults, strict=True))]
    if a.kwarg:
        lines.append(f"**{ast.unparse(a.kwarg)}")
    return "\n".join([f"def {node.name}(", *(f"    {text}," for text in lines), f"){returns}"])


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    return ast.unparse(argument) + (f" = {ast.unparse(default)}" if default is not None else "")


def commands() -> str:
    """The text of docs/commands.md."""
    parts, several = [COMMANDS_HEAD], {}
    for name, parser in _parsers(cli.make_parser(), "tcq"):
        actions = [a for a in parser._actions if not isinstance(a, argparse._SubParsersAction)]
        flags = {a.dest: _row(a) for a in actions if a.dest not in ("help", *COMMON)}
        several |= {dest: row for dest, row in flags.items() if dest in SEVERAL}
        own = [row for dest, row in flags.items() if dest not in SEVERAL]
        note = " *Several processes.*" if "distributed" in flags else ""
        parts.append(f"## {name}\n\n{_sentence(parser.description)}{note}\n\n{_table(own)}")
    parts.append(f"## Several processes\n\n{_table(list(several.values()))}")
    return "\n".join(parts)


def _parsers(parser: argparse.ArgumentParser, name: str) -> list[tuple[str, argparse.ArgumentParser]]:
    """The parsers of all commands, each followed by those of its actions."""
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, below in action.choices.items():
                found += [(f"{name} {word}", below), *_parsers(below, f"{name} {word}")]
    return found


def _table(rows: list[str]) -> str:
    return "\n".join(["| flag | |", "|---|---|", *rows, ""])


def _row(action: argparse.Action) -> str:
    values = action.metavar or (" or ".join(map(str, action.choices)) if action.choices else action.dest.upper())
    value = "" if action.nargs == 0 else f" {values}"
    many = " ..." if action.nargs == "+" else ""
    required = " (required)" if action.required and action.nargs != "*" else ""
    flag = f"{', '.join(action.option_strings)}{value}" if action.option_strings else action.metavar
    many = " ..." if action.nargs == "*" else many
    help = (action.help or "").replace("%%", "%").replace("|", "\\|")
    return f"| `{flag}{many}` | {help}{required} |"


def _sentence(text: str | None) -> str:
    text = text or ""
    return text[:1].upper() + text[1:] + "."


def addressed(text: str) -> str:
    """The text with its links to the repository set to the address in setup.cfg."""
    setup = configparser.ConfigParser()
    setup.read(DOCS.parent / "setup.cfg")
    owner_and_name = setup["metadata"]["url"].removeprefix("https://github.com/")
    return re.sub(r"(?<=/github/|hub\.com/)[\w.-]+/[\w-]+(?=/blob/main/colab|\.git\b)", owner_and_name, text)


PAGES = {"api.md": api, "commands.md": commands}
ADDRESSED = ("README.md", "colab/quickstart.ipynb")

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
    for name in ADDRESSED:
        (DOCS.parent / name).write_text(addressed((DOCS.parent / name).read_text()))
