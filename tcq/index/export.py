"""Exports of an index: a FAISS index file, or plain NumPy arrays."""

from pathlib import Path
from typing import Any

import numpy as np

from tcq import quantizer
from tcq.index.store import Index, open_index
from tcq.runtime import storage

FORMATS = ("faiss", "npz")


class ExportError(ValueError):
    """This index cannot be exported in that format; the message says why."""


def to_faiss(index: Index) -> Any:
    """A faiss.IndexPQ with our codebooks and codes, which takes float features (`encode.encode`) and ranks as tcq does.

    eval.score "l2" becomes METRIC_L2 (smaller is closer there), "ip" METRIC_INNER_PRODUCT. If `config.query_norm` is
    not "none", features have to be normalized in that way before they are searched.
    Raises ExportError for "cosine", whose scores are not sums over codebooks alone.
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
    exported = faiss.IndexPQ(num_codebooks * d, num_codebooks, bits, metrics[score])
    faiss.copy_array_to_vector(codebooks.ravel().astype(np.float32), exported.pq.centroids)
    exported.is_trained = True
    exported.add_sa_codes(faiss.pack_bitstrings(index.codes.astype(np.int32), bits))
    return exported


def export(index_path: str | Path, out: str | Path, *, format: str) -> Path:
    """Writes `out` and returns its path. "npz" holds codes, codebooks, paths and score, without pickles.

    Raises ExportError for an unknown format or if `out` exists, and as `to_faiss` and `open_index`.
    """
    out = Path(out)
    if format not in FORMATS:
        raise ExportError(f"format {format!r} is unknown: use one of {', '.join(FORMATS)}")
    if out.exists():
        raise ExportError(f"{str(out)!r} exists: choose another --out, or delete it first")
    if not out.parent.is_dir():
        raise ExportError(f"{str(out)!r} cannot be written: its folder does not exist")
    index = open_index(index_path)
    try:
        with storage.atomic(out) as temporary:
            _write(index, temporary, format)
    except (OSError, RuntimeError) as error:  # FAISS raises RuntimeError where it cannot write
        raise ExportError(f"{str(out)!r} cannot be written: {getattr(error, 'strerror', None) or error}") from None
    return out


def _write(index: Index, path: Path, format: str) -> None:
    if format == "faiss":
        import faiss

        faiss.write_index(to_faiss(index), str(path))
        return
    with open(path, "wb") as file:
        np.savez(
            file,
            codes=index.codes,
            codebooks=index.encoder.codebooks,
            paths=np.array([p.encode("utf-8", "surrogateescape") for p in index.paths]),
            score=np.array(index.config.eval.score),
        )
