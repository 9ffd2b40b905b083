"""tcq: unlabelled images to a compact, searchable index.

`import tcq` is light: `tcq.losses`, `tcq.encode` and the other public modules are imported when they are first used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
PUBLIC = (
    "augment",
    "config",
    "encode",
    "evaluate",
    "index",
    "losses",
    "metrics",
    "nearest",
    "quantizer",
    "ranking",
    "train",
)


def __getattr__(name: str) -> Any:
    if name in PUBLIC:
        return import_module(f"tcq.{name}")
    raise AttributeError(f"module 'tcq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC])
