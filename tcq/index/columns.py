"""Own columns of an index, from a CSV or Parquet file joined by path; and filters.

The filters are on own columns, paths, sizes and dates.
"""

import datetime
import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool

from tcq.data import embeddings
from tcq.index import items
from tcq.index.contents import Index, IndexFileError

PATH = "path"  # the column by which a file is joined
logger = logging.getLogger(__name__)

RESERVED = re.compile(r"id|size|modified|hash|score|query|norm|code\d*|place__|tcq_version", re.IGNORECASE)


def read(file: str | Path) -> pa.Table:
    """The columns of a CSV or Parquet file, one of which is "path". Raises IndexFileError."""
    import pyarrow.csv
    import pyarrow.parquet

    try:
        if str(file).endswith(".parquet"):
            table = pyarrow.parquet.read_table(file)
        else:
            options = pyarrow.csv.ConvertOptions(
                column_types={PATH: pa.string()}, strings_can_be_null=True, null_values=[""]
            )
            table = pyarrow.csv.read_csv(file, convert_options=options)
    except (OSError, pa.ArrowInvalid) as error:
        raise IndexFileError(f"--columns {str(file)!r} cannot be read: {error}") from None
    names = table.column_names
    lower = [name.lower() for name in names]  # SQL does not tell A from a
    bad = [name for name in names if RESERVED.fullmatch(name)] or [n for n in names if lower.count(n.lower()) > 1]
    if bad or PATH not in names:
        reason = (
            f"it needs a column {PATH!r}"
            if not bad
            else f"the name {bad[0]!r} is that of two columns: rename one"
            if lower.count(bad[0].lower()) > 1
            else f"the name {bad[0]!r} is used by tcq: rename it"
        )
        raise IndexFileError(f"--columns {str(file)!r} has the columns {', '.join(names)}: {reason}")
    if len(names) == 1:
        raise IndexFileError(f"--columns {str(file)!r} has no column beside {PATH!r}")
    try:
        paths = table[PATH].cast(pa.string())
    except pa.ArrowInvalid:
        raise IndexFileError(f"--columns {str(file)!r}: column {PATH!r} must be text in UTF-8") from None
    twice = pc.filter((counts := pc.value_counts(paths)).field("values"), pc.greater(counts.field("counts"), 1))
    if len(twice):
        raise IndexFileError(f"--columns {str(file)!r}: path {twice[0].as_py()!r} is given twice")
    return table.set_column(names.index(PATH), PATH, paths)


def of_metadata(folder: str | Path, names: Sequence[str]) -> pa.Table | None:
    """The columns of the metadata of a folder of embeddings, beside that of the names.

    Those whose names tcq uses itself are left out. None if there are none. Raises SourceError.
    """
    table = embeddings.other_columns(folder)
    if table is None:
        return None
    lower = [name.lower() for name in table.column_names]
    left_out = [n for n in table.column_names if RESERVED.fullmatch(n) or n == PATH or lower.count(n.lower()) > 1]
    table = table.drop_columns(left_out)
    kept = ", ".join(table.column_names) or "none"
    logger.info(f"own columns of the metadata: {kept}" + (f"; left out: {', '.join(left_out)}" if left_out else ""))
    return table.append_column(PATH, pa.array(names, pa.string())) if table.column_names else None


def places(own: pa.Table, roots: Sequence[str], paths: Sequence[str]) -> np.ndarray:
    """The row of `own` of each path, -1 where it has none.

    The paths of `own` are complete, or names below one of the roots.
    Raises IndexFileError if `own` has a row of none of the paths.
    """
    numbers = {path: row for row, path in enumerate(own[PATH].to_pylist())}
    starts = [root.rstrip("/") + "/" for root in roots if root]
    rows = np.full(len(paths), -1, np.int64)
    for place, path in enumerate(paths):
        names = [path, *(path.removeprefix(start) for start in starts if path.startswith(start))]
        rows[place] = next((numbers[name] for name in names if name in numbers), -1)
    if len(rows) and (rows < 0).all():
        raise IndexFileError(
            f"--columns: none of its {len(own):,} paths is in the index; the first are {own[PATH][0].as_py()!r} and "
            f"{paths[0]!r}: write paths as tcq search prints them, or below the folder of the images"
        )
    return rows


def joined(index: Index, own: pa.Table | None) -> Index:
    """The index with the columns of `own` for its images; rows it had for other images stay.

    Raises IndexFileError as `places`, and if a column changes its type.
    """
    if own is None:
        return index
    rows = places(own, index.roots, list(index.paths))
    joined = len(set(rows[rows >= 0].tolist()))
    logger.info(
        f"own columns: {joined:,} of {len(own):,} rows are of images; {int((rows < 0).sum()):,} images have none"
    )
    new = own.take(pa.array(rows[rows >= 0])).drop_columns([PATH])
    new = new.add_column(0, "id", pa.array(index.ids[rows >= 0]))
    if index.columns is not None:
        clash = {n.lower(): n for n in index.columns.column_names}
        different = [n for n in new.column_names if clash.get(n.lower(), n) != n]
        if different:
            raise IndexFileError(
                f"--columns: {different[0]!r} differs from {clash[different[0].lower()]!r} of the index in case alone: "
                f"rename it"
            )
        others = pc.invert(pc.is_in(index.columns["id"], new["id"]))
        try:
            new = pa.concat_tables([index.columns.filter(others), new], promote_options="permissive")
        except pa.ArrowTypeError as error:
            raise IndexFileError(f"--columns: a column has another type than before: {error}") from None
    return index.replace(columns=new.sort_by("id").combine_chunks(), columns_segment=None)


def names(index: Index) -> list[str]:
    """The names of the own columns."""
    return [] if index.columns is None else [name for name in index.columns.column_names if name != "id"]


def of(index: Index, which: Sequence[int] | np.ndarray) -> pa.Table:
    """Own columns of some images, in their order; null for images without any."""
    assert index.columns is not None
    ids, known = index.ids[np.asarray(which, np.int64)], index.columns["id"].to_numpy()
    rows = np.minimum(np.searchsorted(known, ids), max(len(known) - 1, 0))
    missing = known[rows] != ids if len(known) else np.ones(len(ids), bool)
    return index.columns.drop_columns(["id"]).take(pa.array(rows, mask=missing))


def plain(value: Any) -> Any:
    """A value of an own column as JSON.

    It is null for a number that is not finite, and text for what JSON does not know.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, list):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {str(key): plain(v) for key, v in value.items()}
    return value if isinstance(value, str | int | None) else str(value)


def table(index: Index) -> pa.Table:
    """All images as an Arrow table.

    The columns are id, path (with "?" for bytes that are not UTF-8), size, modified, and own columns.
    """
    live = index.table.select(["id", "size", "modified"])
    whole = len(live) == len(index.rows) and (index.rows == np.arange(len(live))).all()
    live = live if whole else live.take(pa.array(index.rows))
    result = live.add_column(1, PATH, _paths(index))
    if index.columns is not None:
        own = of(index, np.arange(len(index.rows)))
        for name in own.column_names:
            result = result.append_column(name, own[name])
    return result


def _paths(index: Index) -> pa.Array | pa.ChunkedArray:
    try:
        names = index.table["name"].take(pa.array(index.rows)).cast(pa.large_string())
        starts = pa.array([items.join(root, "x")[:-1] if root else "" for root in index.roots], pa.large_string())
        return pc.binary_join_element_wise(
            starts.take(pa.array(index.paths.numbers)), names, pa.scalar("", pa.large_string())
        )
    except pa.ArrowInvalid:  # not UTF-8
        return pa.array([p.encode("utf-8", "replace").decode() for p in index.paths], pa.large_string())


def where(index: Index, condition: str) -> Bool[np.ndarray, " N"]:
    """Whether each image meets a condition in SQL, as DuckDB reads it.

    The condition is on path, size, modified, id and own columns. Raises IndexFileError with DuckDB's message.
    """
    import duckdb

    rows = table(index)
    rows = rows.append_column("place__", pa.array(np.arange(len(rows))))
    with duckdb.connect(config={"enable_external_access": False, "lock_configuration": True}) as database:
        try:
            places: Any = database.from_arrow(rows).filter(condition).project("place__").fetchnumpy()["place__"]
        except duckdb.Error as error:
            columns = ", ".join(rows.column_names[:-1])
            raise IndexFileError(f"--filter {condition!r}: {error}; the columns are {columns}") from None
    allowed = np.zeros(len(rows), bool)
    allowed[np.asarray(places, np.int64)] = True
    return allowed
