"""Exchange: an index as a FAISS index file, or as plain NumPy arrays."""

from pathlib import Path
from typing import Any

import numpy as np

from tcq import index as indexes

FORMATS = ("faiss", "npz")


class ExportError(ValueError):
    """This index cannot be written in that format; the message says why."""


def to_faiss(index: indexes.Index) -> Any:
    """A faiss.IndexPQ with our codebooks and codes. It takes float features (`encode.encode`) and ranks as we do.

    eval.score "l2" becomes METRIC_L2 (smaller is closer there), "ip" METRIC_INNER_PRODUCT. Where `validation.query_norm` is
    not "none", features have to be scaled so before they are handed to FAISS.
    Raises ExportError for "cosine", whose scores are no sum over codebooks alone.
    """
    import faiss

    codebooks, score = index.encoder.codebooks, index.encoder.config.eval.score
    metrics = {"l2": faiss.METRIC_L2, "ip": faiss.METRIC_INNER_PRODUCT}
    if score not in metrics:
        raise ExportError(f"eval.score {score!r} has no FAISS metric: only {', '.join(metrics)} do")
    if score == "l2" and not index.encoder.config.eval.squared:
        raise ExportError("FAISS sums squared distances: this index has eval.squared False")
    num_codebooks, num_codewords, d = codebooks.shape
    bits = num_codewords.bit_length() - 1
    made = faiss.IndexPQ(num_codebooks * d, num_codebooks, bits, metrics[score])
    faiss.copy_array_to_vector(codebooks.ravel().astype(np.float32), made.pq.centroids)
    made.is_trained = True
    made.add_sa_codes(faiss.pack_bitstrings(index.codes.astype(np.int32), bits))
    return made


def export(index_path: str | Path, out: str | Path, *, format: str) -> Path:
    """Writes `out` and returns its path. "npz" holds codes, codebooks, paths, score and bits, without pickles.

    Raises ExportError for an unknown format or where `out` exists, and as `to_faiss` and `open_index`.
    """
    out = Path(out)
    if format not in FORMATS:
        raise ExportError(f"format {format!r} is unknown: use one of {', '.join(FORMATS)}")
    if out.exists():
        raise ExportError(f"{str(out)!r} exists: choose another --out, or delete it first")
    index = indexes.open_index(index_path)
    half = out.with_name(f".{out.name}.half")
    try:
        if format == "faiss":
            import faiss

            made = to_faiss(index)
            faiss.write_index(made, str(half))
        else:
            with open(half, "wb") as file:
                np.savez(
                    file,
                    codes=index.codes,
                    codebooks=index.encoder.codebooks,
                    paths=np.array([p.encode("utf-8", "surrogateescape") for p in index.paths]),
                    score=np.array(index.encoder.config.eval.score),
                )
        half.rename(out)
    except OSError as error:
        raise ExportError(f"{str(out)!r} cannot be written: {error.strerror}") from None
    finally:
        half.unlink(missing_ok=True)
    return out
