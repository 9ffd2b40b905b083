"""Databases (Qdrant, PostgreSQL) hold the codes of an index and rank them as tcq does.

Each is a module with these functions: `connect`, `push`, which makes a database equal to an index, `search`, `close`.
"""

from types import ModuleType

from tcq.index.engines.common import EngineError, Item, Pushed, items

__all__ = ["EngineError", "Item", "Pushed", "items", "of"]


def of(address: str) -> ModuleType | None:
    """The module for an address such as "qdrant://host:6333/collection".

    None if the address names no database.
    """
    scheme = address.partition("://")[0] if "://" in address else ""
    if scheme in ("qdrant", "qdrants"):
        from tcq.index.engines import qdrant

        return qdrant
    if scheme in ("postgres", "postgresql"):
        from tcq.index.engines import postgres

        return postgres
    return None
