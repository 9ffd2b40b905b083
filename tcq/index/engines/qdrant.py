"""Qdrant: an item is a sparse vector, a query the lookup table, a score their product.

The sparse vector has a one for each codeword. Qdrant ranks sparse vectors exactly, also with negative weights, so that
"ip" and "l2" need no change. For "cosine" the ones are 1 / norm. Items with equal scores may come in any order.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from tcq.index import columns
from tcq.index.contents import Index
from tcq.index.engines import common
from tcq.index.engines.common import EngineError, Item, Pushed
from tcq.index.search import Hit

VECTOR = "code"
VERSION = "tcq_version"
STORED = (VERSION, "path", "hash", "size", "modified")


class Connection(NamedTuple):
    """A collection of a Qdrant server, or of a folder."""

    client: Any  # qdrant_client.QdrantClient
    collection: str
    address: str


def connect(address: str) -> Connection:
    """Opens "qdrant://host:port/collection" or "qdrant:///folder/collection" without a server.

    "qdrants:" is for https. The key of a server is read from QDRANT_API_KEY. Raises EngineError.
    """
    try:
        from qdrant_client import QdrantClient
    except ImportError:
        raise EngineError(f"{address}: Qdrant needs its client: pip install qdrant-client") from None
    try:
        parts = urlsplit(address)
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        server = f"{host}:{parts.port or 6333}"
    except ValueError:
        raise EngineError(f"{address} must be qdrant://host:port/collection, with a number for the port") from None
    folder, _, collection = parts.path.rpartition("/")
    if not collection or (parts.netloc and (folder or not parts.hostname)):
        raise EngineError(f"{address} must be qdrant://host:port/collection, or qdrant:///folder/collection")
    if not parts.netloc:
        try:
            return Connection(QdrantClient(path=folder), collection, address)
        except (RuntimeError, OSError) as error:  # another process has opened the folder
            raise EngineError(f"{address} cannot be opened: {str(error)[:500]}") from None
    scheme = "https" if parts.scheme == "qdrants" else "http"
    key = os.environ.get("QDRANT_API_KEY")
    return Connection(
        QdrantClient(url=f"{scheme}://{server}", api_key=key, check_compatibility=False), collection, address
    )


def push(connection: Connection, index: Index) -> Pushed:
    """Makes the collection equal to the index.

    Writes what is new or different, and removes the rest.
    Raises EngineError if the collection holds codes of another model.
    """
    from qdrant_client import models

    client, collection, address = connection
    with _reachable(address):
        if not client.collection_exists(collection):
            sparse = {VECTOR: models.SparseVectorParams()}
            about = {"tcq": common.about(index)}
            client.create_collection(collection, vectors_config={}, sparse_vectors_config=sparse, metadata=about)
        common.require_same(address, _about(connection), index)
        versions = dict(_versions(connection))
        written, waiting = 0, []
        for item in common.items(index):
            if versions.pop(item.id, None) != item.version:
                waiting.append(models.PointStruct(**point(item, index)))
                written += 1
            if len(waiting) == common.BLOCK:
                client.upsert(collection, waiting, wait=True)
                waiting = []
        if waiting:
            client.upsert(collection, waiting, wait=True)
        gone: list[Any] = list(versions)
        for first in range(0, len(gone), common.BLOCK):
            client.delete(collection, models.PointIdsList(points=gone[first : first + common.BLOCK]), wait=True)
    return Pushed(written, len(gone))


def point(item: Item, index: Index) -> dict[str, Any]:
    """The fields of a point: id, vector and payload."""
    num_codewords = index.config.quantizer.num_codewords
    positions = np.arange(len(item.code)) * num_codewords + item.code.astype(np.int64)
    value = 1.0 if item.norm is None else 1 / max(item.norm, 1e-12)
    values = columns.plain(item.values)
    payload = {key: value for key, value in values.items() if value is not None} | {VERSION: item.version}
    vector = {"indices": positions.tolist(), "values": [value] * len(positions)}
    return {"id": item.id, "vector": {VECTOR: vector}, "payload": payload}


def search(
    connection: Connection,
    index: Index,
    tables: np.ndarray,
    *,
    k: int,
    condition: str | None = None,
    min_score: float = -np.inf,
) -> list[list[Hit]]:
    """The k nearest items of lookup tables (Q, M, K); `condition` is a Qdrant filter as JSON.

    `index` says which model the queries come from. Raises EngineError.
    """
    from qdrant_client import models

    client, collection, address = connection
    try:
        chosen = None if condition is None else models.Filter.model_validate_json(condition)
    except ValueError as error:
        raise EngineError(f"--filter {condition!r}: must be a filter of Qdrant as JSON: {error}") from None
    with _reachable(address):
        if not client.collection_exists(collection):
            raise EngineError(f"{address} not found: tcq push writes it")
        common.require_same(address, _about(connection), index)
        answers = []
        for table in tables:
            response = client.query_points(
                collection,
                query=models.SparseVector(**query(table)),
                using=VECTOR,
                limit=k,
                query_filter=chosen,
                score_threshold=None if min_score == -np.inf else float(min_score),
            )
            hits = [_hit(p.id, p.score, p.payload or {}) for p in response.points]
            answers.append(sorted(hits, key=lambda hit: (-hit.score, hit.id)))
    return answers


def query(table: np.ndarray) -> dict[str, Any]:
    """A lookup table (M, K) as a sparse vector."""
    return {"indices": list(range(table.size)), "values": table.ravel().tolist()}


def _hit(number: Any, score: float, payload: Mapping[str, Any]) -> Hit:
    own = {key: value for key, value in payload.items() if key not in STORED}
    return Hit(str(payload.get("path", "")), score, int(number), own)


def _about(connection: Connection) -> dict[str, Any] | None:
    metadata = connection.client.get_collection(connection.collection).config.metadata or {}
    about: dict[str, Any] | None = metadata.get("tcq")
    return about


def _versions(connection: Connection) -> Iterator[tuple[int, str]]:
    start: Any = None
    while True:
        points, start = connection.client.scroll(
            connection.collection, limit=common.BLOCK, offset=start, with_payload=[VERSION], with_vectors=False
        )
        yield from ((int(p.id), (p.payload or {}).get(VERSION, "")) for p in points)
        if start is None:
            return


@contextlib.contextmanager
def _reachable(address: str) -> Iterator[None]:
    from qdrant_client.http.exceptions import ApiException

    try:
        yield
    except (ApiException, OSError) as error:
        raise EngineError(f"{address} cannot be used: {str(error)[:500]}") from None


def close(connection: Connection) -> None:
    """Closes the connection."""
    connection.client.close()
