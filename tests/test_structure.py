"""The rules of docs/architecture.md that a test can check."""

import ast
import configparser
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

LAYERS = (
    {"runtime", "quantizer", "augment", "metrics", "plots", "flags"},
    {"models", "losses", "data", "ranking", "nearest", "web"},
    {"config", "workdir"},
    {"encode", "sweep", "doctor"},
    {"embed"},
    {"evaluate", "index"},
    {"train"},
    {"cli_index"},
    {"cli_search", "cli_duplicates"},
    {"cli"},
)
PEERS = {("workdir", "config"), ("plots", "runtime")}  # the only imports between two packages of one layer
PURE = {"quantizer", "augment", "metrics", "ranking", "losses"}
PURE_IMPORTS = {"jax", "numpy", "jaxtyping", "math", "typing", "collections", "functools", "tcq"}
ONLY_IN = {
    "fsspec": {"tcq.runtime.storage"},
    "orbax": {"tcq.workdir.checkpoint"},
    "grain": {"tcq.data.loader"},
    "faiss": {
        "tcq.evaluate.baselines",
        "tcq.models.kmeans",
        "tcq.models.opq",
        "tcq.index.export",
        "tcq.nearest.candidates",
    },
}
LAYER = {package: layer for layer, packages in enumerate(LAYERS) for package in packages}


def modules() -> dict[str, ast.Module]:
    files = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in Path("tcq").rglob("*.py")}
    return {name: ast.parse(path.read_text()) for name, path in files.items()}


def imported(tree: ast.AST, known: dict[str, ast.Module]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in known else node.module for name in names)


def package_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_package_has_a_layer():
    assert {package_of(name) for name in modules()} == {*LAYER, "", "__main__"}


@pytest.mark.parametrize("layer", range(len(LAYERS)))
def test_imports_go_down(layer):
    known = modules()
    for name, tree in known.items():
        here = package_of(name)
        if LAYER.get(here) != layer:
            continue
        for other in imported(tree, known):
            if other.split(".")[0] == "tcq" and package_of(other) not in ("", here):
                down = LAYER[package_of(other)] < layer or (here, package_of(other)) in PEERS
                assert down, f"{name} imports {other}, which is not below it"


def test_some_libraries_are_known_to_one_file_only():
    known = modules()
    for name, tree in known.items():
        for other in imported(tree, known):
            library = other.split(".")[0]
            assert name in ONLY_IN.get(library, {name}), f"{name} imports {other}"
            if package_of(name) in PURE:
                assert library in PURE_IMPORTS, f"{name} imports {other}"


def test_importing_tcq_is_light():
    heavy = ("jax", "tensorflow", "faiss", "matplotlib", "orbax", "grain", "sklearn")
    code = f"import sys, tcq; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_optional_libraries_are_imported_where_they_are_used():
    heavy = ("tensorflow", "tensorflow_datasets", "faiss", "matplotlib", "sklearn", "tensorboardX")
    code = "import sys; from tcq import train, evaluate, index; from tcq.index import export, serve; "
    code += f"print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_pmap_is_called_in_one_file():
    for path in Path("tcq").rglob("*.py"):
        if path.name != "devices.py":
            assert "jax.pmap" not in path.read_text(), path


def test_modules_import_each_other_in_no_circle():
    known = modules()
    graph = {
        name: {other for other in imported(tree, known) if other in known} - {name} for name, tree in known.items()
    }
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_files_and_functions_are_short():
    for path in Path("tcq").rglob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 450, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 60, f"{path}:{node.lineno}: {node.name} has {lines} lines"


def test_the_first_line_of_a_docstring_is_short():
    for path in [*Path("tcq").rglob("*.py"), *Path("configs").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                first = (ast.get_docstring(node) or "").split("\n")[0]
                assert len(first) <= 88, f"{path}:{getattr(node, 'lineno', 1)}: {len(first)} characters"


def test_the_wheel_has_every_package():
    setup = configparser.ConfigParser()
    setup.read("setup.cfg")
    folders = {".".join(path.parent.parts) for path in Path("tcq").rglob("__init__.py")}
    assert set(setup["options"]["packages"].split()) == folders | {"tcq.configs"}
