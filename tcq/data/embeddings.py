"""Folders of embeddings: `.npy` shards and Parquet metadata.

clip-retrieval and img2dataset leave them in this form:

    img_emb/img_emb_0.npy ...     (n, F), float16 or float32: the items, one row each
    view_emb/view_emb_0.npy ...   (n, V, F), optional: embeddings of V views of each item, for training
    metadata/metadata_0.parquet   optional: a row for each item, with "image_path", "path", "key" or "url", and "label"

The shards are in the order of the numbers in their names. Arrays are memory-mapped, never loaded as a whole.
"""

import hashlib
import itertools
import logging
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tcq.data.cache import DIGEST_BYTES
from tcq.data.rows import Rows
from tcq.data.source import Source, SourceError
from tcq.runtime import log, signals

ITEMS, VIEWS, METADATA = "img_emb", "view_emb", "metadata"
logger = logging.getLogger(__name__)

FLOATS = (np.float16, np.float32, np.float64)
LARGEST = 1e15  # the squares of larger numbers have no sum in float32
NAMES = ("image_path", "path", "key", "url", "image_url")
CHECKED = 65_536  # views that are tested for numbers that are not finite, spread over all
BLOCK = 8192  # rows tested at a time


def open_folder(path: str | Path) -> Source:
    """The embeddings below a folder, as a source.

    Its `images` are rows (N, F), and its `views` rows (N, V, F) or None. All rows of `images` are read once, for their
    digests.

    Raises SourceError if there are none, if shards have different widths or numbers that are not finite, or if the
    metadata does not have one row for each embedding.
    """
    root = Path(path).expanduser()
    items = read_shards(root, ITEMS)
    views = read_shards(root, VIEWS) if (root / VIEWS).is_dir() else None
    if views is not None and (len(views) != len(items) or views.shape[2] != items.shape[1]):
        raise SourceError(f"{root / VIEWS}: {views.shape} does not fit the embeddings {items.shape} of {root / ITEMS}")
    if views is not None and views.shape[1] < 2:
        raise SourceError(f"{root / VIEWS}: {views.shape} must have two views or more of each item, or be left out")
    names, labels, classes = _metadata(root, items)
    if views is not None:
        places = np.unique(np.linspace(0, len(views) - 1, CHECKED).astype(np.int64))
        for some in np.array_split(places, -(-len(places) // BLOCK)):
            _check_finite(_files(root, VIEWS), views, some)
    return Source(items, labels, names, classes, [], views=views, digests=_digests(_files(root, ITEMS), items))


def width(path: str | Path) -> int:
    """The number F of the embeddings below a folder. Raises SourceError."""
    return read_shards(Path(path).expanduser(), ITEMS).shape[1]


def read_shards(root: Path, name: str) -> Rows:
    """The rows of all `.npy` files of ITEMS or VIEWS, mapped from them.

    Raises SourceError.
    """
    files, ndim = _files(root, name), 3 if name == VIEWS else 2
    if not files:
        folder = root / name if (root / name).is_dir() else root
        others = sum(1 for _ in folder.glob("[!.]*.npz"))
        raise SourceError(
            f"{folder}: no .npy files found: embeddings are in {root}/{ITEMS}/*.npy or {root}/*.npy"
            + (f"; the {others} .npz files hold several arrays each and are not read" if others else "")
        )
    arrays: list[np.ndarray] = []
    for file in files:
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, EOFError, OverflowError) as error:
            raise SourceError(f"{file}: cannot be read: {error}") from None
        except ValueError:  # NumPy's message advises to unpickle
            raise SourceError(f"{file}: cannot be read: it must be a complete .npy file of numbers") from None
        if not isinstance(array, np.ndarray):
            raise SourceError(f"{file}: is an archive of arrays, not a .npy file of one")
        first = (*arrays, array)[0]
        same = array.shape[1:] == first.shape[1:] and array.dtype == first.dtype
        if array.ndim != ndim or array.dtype not in FLOATS or not same or 0 in array.shape[1:]:
            must = f"{ndim} axes of floats of 16, 32 or 64 bits, in this machine's order of bytes"
            if arrays:
                must = f"the width and the floats of {files[0].name}, {first.shape} {first.dtype}"
            raise SourceError(f"{file}: {array.shape} {array.dtype} must have {must}: save it again")
        arrays.append(array)
    if not any(map(len, arrays)):
        raise SourceError(f"{files[0].parent}: the .npy files have no rows")
    return Rows(arrays)


def _files(root: Path, name: str) -> list[Path]:
    folder = root / name if (root / name).is_dir() else root
    return sorted((p for p in folder.glob("[!.]*.npy") if p.is_file() or not p.exists()), key=_number)


def _check_pairs(shards: list[Path], rows: list[int], files: list[Path], lines: list[int]) -> None:
    """Raises SourceError unless each shard has a metadata file of its number and length."""
    for shard, n, file, m in itertools.zip_longest(shards, rows, files, lines):
        if shard is None or file is None or _number(shard)[0] != _number(file)[0] or n != m:
            one, other = (
                f"{path} with {count:,} rows" if path else "no file" for path, count in ((shard, n), (file, m))
            )
            raise SourceError(f"{one} does not fit {other}: each shard needs metadata of its number and length")


def _number(path: Path) -> tuple[list[int], str]:
    return [int(n) for n in re.findall(r"\d+", path.stem)], path.name


def _place(files: Sequence[Path], lengths: Sequence[int], row: int) -> str:
    """The file of a row, and its number there, from 0."""
    ends = np.cumsum(lengths)
    number = int(np.searchsorted(ends, row, side="right"))
    return f"{files[number]}: row {row - int(ends[number]) + lengths[number]:,} (from 0)"


def _digests(files: list[Path], rows: Rows) -> list[bytes]:
    """The digest of each row, which knows it under another name. Raises SourceError."""
    digests: list[bytes] = []
    progress = log.Progress(logger, "reading embeddings", len(rows))
    for first in range(0, len(rows), BLOCK):
        signals.poll()
        places = np.arange(first, min(first + BLOCK, len(rows)))
        block = _check_finite(files, rows, places)
        digests += [hashlib.blake2b(row.data, digest_size=DIGEST_BYTES).digest() for row in block]
        progress.update(len(digests))
    return digests


def _check_finite(files: list[Path], rows: Rows, places: np.ndarray) -> np.ndarray:
    """The rows at these places. Raises SourceError."""
    block = np.ascontiguousarray(rows[places])
    with np.errstate(over="ignore", invalid="ignore"):
        finite = (np.abs(block.reshape(len(block), -1).astype(np.float32)) <= LARGEST).all(axis=1)
    if not finite.all():
        raise SourceError(
            f"{_place(files, rows.lengths, int(places[~finite][0]))} has a number that is not finite or above "
            f"{LARGEST:g}: leave such rows out"
        )
    return block


def _tables(files: list[Path]) -> tuple[list[Any], str | None]:
    """The names and labels of metadata files as tables, and the name of the column of names."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise SourceError(f"{files[0]}: reading Parquet needs pyarrow: pip install pyarrow") from None
    tables: list[Any] = []
    for file in files:
        try:
            opened = pyarrow.parquet.ParquetFile(file)
            if not tables:
                columns = opened.schema_arrow.names
                name = next((n for n in NAMES if n in columns), None)
                wanted = [c for c in (name, "label") if c in columns]
            twice = [c for c in wanted if opened.schema_arrow.names.count(c) > 1]
            if twice:
                raise SourceError(f"{file}: has more than one column {twice[0]!r}: leave only one")
            lacking = [c for c in wanted if c not in opened.schema_arrow.names]
            if lacking:
                raise SourceError(f"{file}: has no column {lacking[0]!r}, which {files[0].name} has")
            tables.append(opened.read(wanted))
        except (OSError, pyarrow.ArrowException) as error:
            raise SourceError(f"{file}: cannot be read: {error}") from None
    return tables, name


def _metadata(root: Path, items: Rows) -> tuple[list[str], np.ndarray | None, list[str]]:
    """Names, labels and classes of the items."""
    files, count = sorted((root / METADATA).glob("[!.]*.parquet"), key=_number), len(items)
    if not files:
        logger.info(f"{root / METADATA}: no .parquet files found, so items have numbers as names")
        return [f"{i:09d}" for i in range(count)], None, []
    tables, name = _tables(files)
    columns = tables[0].column_names
    total = sum(len(t) for t in tables)
    if len(files) > 1:
        _check_pairs(_files(root, ITEMS), items.lengths, files, [len(t) for t in tables])
    if total != count:
        raise SourceError(f"{root / METADATA}: {total:,} rows for {count:,} embeddings: it must have one for each")

    def column(key: str) -> list[Any]:
        try:
            return [value for table in tables for value in table[key].to_pylist()]
        except UnicodeDecodeError as error:
            raise SourceError(f"{root / METADATA}: column {key!r} is not UTF-8: {error}") from None

    place = partial(_place, files, [len(t) for t in tables])
    names = _names(column(name), name, place) if name else [f"{i:09d}" for i in range(count)]
    if repeated := count - len(set(names)):
        logger.warning(
            f"{root / METADATA}: rows with the name of another one: {repeated:,}; training takes them, but `tcq index` "
            f"needs a name for each row"
        )
    if "label" not in columns:
        return names, None, []
    values = column("label")
    kind = type(next((v for v in values if v is not None), None))
    for i, value in enumerate(values):
        if value is None:
            raise SourceError(f"{place(i)} has no label: give all rows one, or leave out the column")
        if kind not in (str, int, bool) or type(value) is not kind:
            raise SourceError(
                f"{place(i)} has the label {value!r:.80} of type {type(value).__name__}: labels must be texts or whole "
                f"numbers, one for each row and all alike"
            )
    classes = sorted(set(values))
    number = {c: i for i, c in enumerate(classes)}
    return names, np.array([number[v] for v in values], np.int64), [str(c) for c in classes]


def _names(values: list[Any], column: str, place: Callable[[int], str]) -> list[str]:
    wrong = next((i for i, v in enumerate(values) if not isinstance(v, str | int) or v == ""), None)
    if wrong is not None:
        raise SourceError(
            f"{place(wrong)} has {values[wrong]!r:.80} in column {column!r}: a name must be a text or a whole number; "
            f"leave such rows out, here and in {ITEMS}"
        )
    return [str(v) for v in values]


def other_columns(path: str | Path) -> Any:
    """The columns of the metadata beside that of the names, as a table of Arrow.

    None without metadata. Raises SourceError if they cannot be read, or a column changes its type from file to file.
    """
    files = sorted((Path(path).expanduser() / METADATA).glob("[!.]*.parquet"), key=_number)
    if not files:
        return None
    import pyarrow.parquet

    try:
        table = pyarrow.concat_tables([pyarrow.parquet.read_table(f) for f in files], promote_options="permissive")
    except (OSError, pyarrow.ArrowException) as error:
        raise SourceError(f"{files[0].parent}: the columns cannot be read: {error}") from None
    name = next((n for n in NAMES if n in table.column_names), None)
    return table if name is None else table.drop_columns([name])


def write_metadata(folder: Path, names: Sequence[str], labels: np.ndarray | None, classes: Sequence[str]) -> None:
    """Writes the names of items, and of the classes of their labels, as one Parquet file."""
    import pyarrow
    import pyarrow.parquet

    # Names of files may have bytes that are no text.
    columns: dict[str, Any] = {"image_path": [name.encode("utf-8", "backslashreplace").decode() for name in names]}
    if labels is not None and labels.ndim > 1:
        logger.warning("an image has several labels, which metadata cannot hold: they are left out")
    if labels is not None and labels.ndim == 1:
        columns["label"] = [classes[i] for i in labels]
    (folder / METADATA).mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / METADATA / "metadata_0.parquet")
