"""The house rules that a machine can check."""

import ast
import subprocess
import sys
from pathlib import Path

FLOORS = {
    "tcq": 0,
    "tcq.quantizer": 0,
    "tcq.selection": 0,
    "tcq.anchors": 0,
    "tcq.losses": 0,
    "tcq.augment": 0,
    "tcq.ranking": 0,
    "tcq.metrics": 0,
    "tcq.models.vit": 1,
    "tcq.models.retriever": 1,
    "tcq.models.positions": 1,
    "tcq.models.layouts": 1,
    "tcq.models.resnet": 1,
    "tcq.clusters": 1,
    "tcq.models.pretrained": 1,
    "tcq.data.images": 2,
    "tcq.data.sources": 2,
    "tcq.data.protocols": 2,
    "tcq.data.loader": 2,
    "tcq.data.splits": 2,
    "tcq.data.cache": 2,
    "tcq.data.prepared": 2,
    "tcq.data.archives": 2,
    "tcq.data.prepare": 2,
    "tcq.data.cifar10": 2,
    "tcq.data.mirflickr25k": 2,
    "tcq.data.nus_wide": 2,
    "tcq.buckets": 2,
    "tcq.checkpoint": 2,
    "tcq.processes": 2,
    "tcq.signals": 2,
    "tcq.parallel": 2,
    "tcq.checks": 2,
    "tcq.config": 2,
    "tcq.journal": 2,
    "tcq.pictures": 2,
    "tcq.baselines": 2,
    "tcq.optimizer": 2,
    "tcq.encode": 3,
    "tcq.validation": 4,
    "tcq.learner": 4,
    "tcq.loop": 5,
    "tcq.train": 6,
    "tcq.index": 6,
    "tcq.evaluate": 6,
    "tcq.sweep": 7,
    "tcq.export": 7,
    "tcq.serve": 7,
    "tcq.doctor": 7,
    "tcq.__main__": 8,
}
PEERS_ALLOWED = {0, 1, 2}  # floors whose files may import one another
OUTSIDE = {0: {"jax", "numpy", "jaxtyping", "math", "typing", "collections", "functools"}}
ONLY_IN = {
    "fsspec": {"tcq.buckets"},
    "orbax": {"tcq.checkpoint"},
    "grain": {"tcq.data.loader"},
    "faiss": {"tcq.baselines", "tcq.clusters", "tcq.export"},
}


def modules():
    for path in Path("tcq").rglob("*.py"):
        name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        if name not in ("tcq.models", "tcq.data"):
            yield name, ast.parse(path.read_text())


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in FLOORS else node.module for a in node.names
            )


def test_every_file_has_a_floor_and_imports_only_downwards():
    found = dict(modules())
    assert set(found) == set(FLOORS)
    for name, tree in found.items():
        for other in imported(tree):
            if other.split(".")[0] == "tcq":
                up = FLOORS[other] > FLOORS[name] or (
                    FLOORS[other] == FLOORS[name] and FLOORS[name] not in PEERS_ALLOWED
                )
                assert not up, f"{name} imports {other}"
            elif FLOORS[name] in OUTSIDE:
                assert other.split(".")[0] in OUTSIDE[FLOORS[name]], f"{name} imports {other}"
            for package, allowed in ONLY_IN.items():
                assert other.split(".")[0] != package or name in allowed, f"{name} imports {other}"


def test_importing_tcq_is_light():
    heavy = ("jax", "tensorflow", "faiss", "matplotlib", "orbax", "grain", "sklearn")
    code = f"import sys, tcq; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_optional_libraries_are_imported_where_they_are_used():
    heavy = ("tensorflow", "tensorflow_datasets", "faiss", "matplotlib", "sklearn", "tensorboardX")
    code = f"import sys; from tcq import train, evaluate, index, export, serve; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_pmap_stands_in_one_file():
    for path in Path("tcq").rglob("*.py"):
        if path.name != "parallel.py":
            assert "jax.pmap" not in path.read_text(), path
