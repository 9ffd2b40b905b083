"""What the databases share: what they store of an image, and must agree on with an index."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from tcq.index import columns
from tcq.index.contents import Index
from tcq.index.store import ENCODER

BLOCK = 2**12  # items that are sent together


class EngineError(ValueError):
    """The database cannot be used for this index; the message says why and what to do."""


class Pushed(NamedTuple):
    """What `push` did."""

    written: int  # items that were new, or different
    removed: int


class Item(NamedTuple):
    """What a database stores of an image."""

    id: int
    code: np.ndarray
    norm: float | None  # for eval.score "cosine"
    values: dict[str, Any]  # path, hash, size, modified, own columns
    version: str  # differs if any of these does


def about(index: Index) -> dict[str, Any]:
    """What a database must agree on with those who search it."""
    q, config = index.config.quantizer, index.config
    return {
        "encoder": index.sha256[ENCODER],
        "codebooks": q.num_codebooks,
        "codewords": q.num_codewords,
        "score": config.eval.score,
    }


def require_same(address: str, stored: dict[str, Any] | None, index: Index) -> None:
    """Raises EngineError if a database was written by another encoder, or not by tcq."""
    if stored is None:
        raise EngineError(f"{address} was not written by tcq: choose another name")
    own = about(index)
    different = [key for key in own if stored.get(key) != own[key]]
    if different:
        raise EngineError(
            f"{address} holds codes of another model ({', '.join(different)} differ): use the index that was pushed, "
            f"or push to another name"
        )


def items(index: Index) -> Iterator[Item]:
    """The images of an index."""
    table = columns.table(index)
    hashes, norms = index.hashes, index.norms
    for first in range(0, len(table), BLOCK):
        for place, values in enumerate(table.slice(first, BLOCK).to_pylist(), first):
            number, code = values.pop("id"), index.codes[place]
            values["hash"] = hashes[place].tobytes().hex()
            norm = None if norms is None else float(norms[place])
            text = json.dumps([values, code.tolist(), norm], default=str)
            version = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
            yield Item(number, code, norm, values, version)


def own_types(index: Index) -> dict[str, pa.DataType]:
    """The own columns of an index and their types."""
    return {} if index.columns is None else {f.name: f.type for f in index.columns.schema if f.name != "id"}
