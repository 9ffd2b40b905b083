"""Exports of an index: Parquet, FAISS, NumPy arrays, and the encoder as a program.

Parquet is for databases and other languages. Beside all but the NumPy file, `<out>.json` has what a query needs:
codebooks, scoring rule, scaling of features, and what the encoder takes. docs/exchange.md scores with it in NumPy, SQL
and JavaScript.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tcq import config as configs
from tcq import quantizer
from tcq.index import columns, items, programs
from tcq.index.contents import Index
from tcq.index.store import open_index
from tcq.runtime import storage

ROWS = 2**17  # of a row group of a Parquet file


class ExportError(ValueError):
    """This index cannot be exported in that format; the message says why."""


def scoring(index: Index) -> dict[str, Any]:
    """What turns a feature into scores of codes, as JSON: see `ranking.lookup_table`."""
    config = index.config
    return {
        "score": config.eval.score,
        "squared": bool(config.eval.squared),
        "normalize": configs.query_norm(config),
        "step": index.step,
        "codebooks": index.encoder.codebooks.tolist(),  # (M, K, d)
        "encoder": programs.about(index.encoder),
    }


def to_table(index: Index) -> pa.Table:
    """A table of the images with their codes.

    The columns are id, path, hash, size, modified, own columns, and code0, code1, ... of the codebooks.
    For eval.score "cosine" also norm, by which scores are divided.
    """
    table = columns.table(index)
    table = table.add_column(2, "hash", items.fixed(index.hashes))
    for m in range(index.codes.shape[1]):
        table = table.append_column(f"code{m}", pa.array(index.codes[:, m]))
    if index.norms is not None:
        table = table.append_column("norm", pa.array(index.norms))
    return table


def to_faiss(index: Index) -> Any:
    """A faiss.IndexIVFPQ of one list with our ids, codebooks and codes.

    It ranks as tcq does and takes filters. eval.score "l2" becomes METRIC_L2 (smaller is closer there), "ip"
    METRIC_INNER_PRODUCT. Features (`encode.encode`) have to be scaled as `config.query_norm` says before they are
    searched.
    Raises ExportError for "cosine", whose scores are not sums over codebooks alone, and for distances that are not
    squared.
    """
    import faiss

    codebooks, score = index.encoder.codebooks, index.config.eval.score
    metrics = {"l2": faiss.METRIC_L2, "ip": faiss.METRIC_INNER_PRODUCT}
    if score not in metrics:
        raise ExportError(f"eval.score {score!r} has no FAISS metric: must be one of {', '.join(metrics)}")
    if score == "l2" and not index.config.eval.squared:
        raise ExportError("eval.squared False cannot be exported: FAISS sums squared distances")
    num_codebooks, num_codewords, d = codebooks.shape
    bits = quantizer.code_bits(num_codewords)
    zero = faiss.IndexFlat(num_codebooks * d, metrics[score])
    zero.add(np.zeros((1, num_codebooks * d), np.float32))
    exported: Any = faiss.IndexIVFPQ(zero, num_codebooks * d, 1, num_codebooks, bits, metrics[score])
    exported.by_residual, exported.is_trained = False, True
    faiss.copy_array_to_vector(codebooks.ravel().astype(np.float32), exported.pq.centroids)
    ids, packed = np.ascontiguousarray(index.ids), np.ascontiguousarray(items.pack(index.codes, num_codewords))
    exported.invlists.add_entries(0, len(ids), faiss.swig_ptr(ids), faiss.swig_ptr(packed))
    exported.ntotal = len(ids)
    return exported


def export(index_path: str | Path, out: str | Path, *, format: str) -> Path:
    """Writes `out`, a file, and returns its path.

    Formats: "parquet" (`to_table`), "faiss" (`to_faiss`), and the encoder as "stablehlo" or "onnx" (programs.py), each
    with `<out>.json`; "npz" holds codes, codebooks, paths and score, without pickles.
    Raises ExportError if it exists or cannot be written, and as `open_index`, `to_faiss` and programs.py.
    """
    out = Path(out)
    if format not in FORMATS:
        raise ExportError(f"format {format!r} is unknown: use one of {', '.join(FORMATS)}")
    beside = out.with_name(out.name + ".json")
    for file in (out, beside) if format != "npz" else (out,):
        if file.exists():
            raise ExportError(f"{str(file)!r} exists: choose another --out, or delete it first")
    if not out.parent.is_dir():
        raise ExportError(f"{str(out)!r} cannot be written: its folder does not exist")
    index = open_index(index_path)
    try:
        with storage.atomic(out) as temporary:
            FORMATS[format](index, temporary)
            if format != "npz":
                about = scoring(index)
                if format == "faiss":
                    about |= {"ids": index.ids.tolist(), "paths": list(index.paths)}
                storage.write_text(beside, json.dumps(about) + "\n")
    except (OSError, RuntimeError, pa.ArrowInvalid) as error:  # FAISS raises RuntimeError where it cannot write
        raise ExportError(f"{str(out)!r} cannot be written: {getattr(error, 'strerror', None) or error}") from None
    return out


def _write_parquet(index: Index, path: Path) -> None:
    import pyarrow.parquet

    pyarrow.parquet.write_table(to_table(index), path, row_group_size=ROWS, compression="zstd")


def _write_faiss(index: Index, path: Path) -> None:
    import faiss

    faiss.write_index(to_faiss(index), str(path))


def _write_npz(index: Index, path: Path) -> None:
    with open(path, "wb") as file:
        np.savez(
            file,
            codes=index.codes,
            codebooks=index.encoder.codebooks,
            ids=index.ids,
            paths=np.array([os.fsencode(p) for p in index.paths]),
            score=np.array(index.config.eval.score),
        )


FORMATS: dict[str, Callable[[Index, Path], None]] = {
    "faiss": _write_faiss,
    "npz": _write_npz,
    "parquet": _write_parquet,
    "stablehlo": lambda index, path: programs.write_stablehlo(index.encoder, path),
    "onnx": lambda index, path: programs.write_onnx(index.encoder, path),
}
