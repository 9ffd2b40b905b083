"""Time and memory of exact search, against FAISS and a scan of all codes.

    python benchmarks/search.py --items=1e5,1e6,1e7 --bits=16,32,64 --plot=docs/search.png

The codes are synthetic: drawn around N / 200 centres. Each method answers the same queries, on one thread and on all.
FastScan's scores are rounded, so it is not exact; the share of the right items that it finds is beside it. Every answer
of ours is compared with that of `ranking.top_k`, the scan.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np

SHAPES = {16: [(2, 256), (4, 16)], 32: [(4, 256), (8, 16)], 64: [(8, 256), (16, 16)]}
CHUNK = 10**6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", default="1e5,1e6", help="numbers of items")
    parser.add_argument("--bits", default="16,32,64", help="bits of a code")
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--queries", type=int, default=20, help="single queries; a batch has 100")
    parser.add_argument("--scan", type=float, default=1e7, help="most items that ranking.top_k scans")
    parser.add_argument("--plot", help="a picture of the single-query times")
    a = parser.parse_args()
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("jax", "numpy", "faiss-cpu"))
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, {versions}; k = {a.k}; ms for each query")
    rows = []
    for bits in (int(b) for b in a.bits.split(",")):
        for shape in SHAPES[bits]:
            for count in (int(float(n)) for n in a.items.split(",")):
                rows += measure(count, shape, k=a.k, queries=a.queries, scan=count <= a.scan)
    if a.plot:
        plot(rows, a.plot)


def codes_and_tables(count: int, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Codes (N, M) around N / 200 centres, and the tables of 100 queries with metric "l2"."""
    from tcq import ranking

    num_codebooks, num_codewords = shape
    random = np.random.RandomState(0)
    centres = random.randint(0, num_codewords, (max(count // 200, 1), num_codebooks)).astype(np.uint8)
    codes = np.empty((count, num_codebooks), np.uint8)
    for first in range(0, count, CHUNK):
        part = centres[random.randint(0, len(centres), min(CHUNK, count - first))]
        drawn = random.randint(0, num_codewords, part.shape)
        codes[first : first + CHUNK] = np.where(random.rand(*part.shape) < 0.4, drawn, part)
    codebooks = random.randn(num_codebooks, num_codewords, 32 // num_codebooks).astype(np.float32)
    queries = random.randn(100, 32 // num_codebooks * num_codebooks).astype(np.float32)
    return codes, np.asarray(ranking.lookup_table(queries, codebooks, metric="l2"))


def measure(count: int, shape: tuple[int, int], *, k: int, queries: int, scan: bool) -> list[dict[str, Any]]:
    """Prints and returns a row for each method. Raises SystemExit if our answers are not those of the scan."""
    from tcq import nearest, ranking

    codes, tables = codes_and_tables(count, shape)
    begin = time.perf_counter()
    engine = nearest.build(codes, shape[1])
    built = time.perf_counter() - begin
    found = nearest.top_k(engine, tables, k)
    if scan and not all(map(np.array_equal, found, ranking.top_k(tables, codes, k))):
        raise SystemExit("the answers differ from those of the scan")
    rows = [{"method": f"tcq, {nearest.name(engine)}", "recall": 1.0, "build_s": built, "bytes": size(engine) / count}]
    rows[0] |= timed(lambda t: nearest.top_k(engine, t, k), tables, queries)
    for name, index in faiss_indexes(codes, shape[1]).items():
        ids = index.search(tables.reshape(len(tables), -1), k)[1]
        recall = np.mean([len(np.intersect1d(x, y)) / k for x, y in zip(ids, found[1], strict=True)])
        times = timed(lambda t, index=index: index.search(t.reshape(len(t), -1), k), tables, queries)
        rows.append({"method": name, "recall": float(recall), **times})
    if scan:
        times = timed(lambda t: ranking.top_k(t, codes, k), tables, min(queries, 5))
        rows.append({"method": "scan, ranking.top_k in JAX", "recall": 1.0, **times})
    rows = [
        {"bits": shape[0] * (8 if shape[1] > 16 else 4), "M": shape[0], "K": shape[1], "N": count} | r for r in rows
    ]
    for row in rows:
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    return rows


def size(engine: Any) -> int:
    """Bytes of the arrays of an engine, and of its index of FAISS."""
    return sum(
        x.nbytes if isinstance(x, np.ndarray) else x.sa_code_size() * x.ntotal if hasattr(x, "sa_code_size") else 0
        for x in engine
    )


def faiss_indexes(codes: np.ndarray, num_codewords: int) -> dict[str, Any]:
    """FAISS on the same codes and tables; IndexPQ is exact."""
    import faiss

    from tcq.nearest import candidates

    bits, num_codebooks = (8 if num_codewords > 16 else 4), codes.shape[1]
    if bits == 8:
        return {"FAISS IndexPQ": candidates.build(codes, num_codewords).faiss_index}
    index = faiss.IndexPQ(num_codebooks * 16, num_codebooks, 4, faiss.METRIC_INNER_PRODUCT)
    one_hot = np.broadcast_to(np.eye(16, dtype=np.float32), (num_codebooks, 16, 16))
    faiss.copy_array_to_vector(np.ascontiguousarray(one_hot).ravel(), index.pq.centroids)
    index.is_trained = True
    index.add_sa_codes(faiss.pack_bitstrings(codes.astype(np.int32), 4))
    return {"FAISS IndexPQ": index, "FAISS IndexPQFastScan": candidates.build(codes, num_codewords).faiss_index}


def timed(search: Callable[[np.ndarray], Any], tables: np.ndarray, queries: int) -> dict[str, float]:
    """Medians of single queries, and the time of a query in a batch of 100, on one thread and on all, in ms."""
    import faiss

    times = {}
    for threads in (1, os.cpu_count() or 1):
        faiss.omp_set_num_threads(threads)
        limit = f"{threads}_thread" + "s" * (threads > 1)
        search(tables[:1])
        single = [clock(search, tables[i : i + 1]) for i in range(queries)]
        times[f"one_{limit}"] = float(np.median(single)) * 1e3
        if threads > 1:
            times[f"batch_{limit}"] = clock(search, tables) / len(tables) * 1e3
    return times


def clock(search: Callable[[np.ndarray], Any], tables: np.ndarray) -> float:
    begin = time.perf_counter()
    search(tables)
    return time.perf_counter() - begin


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """Single-query times by the number of items, a panel for each shape of code."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shapes = sorted({(r["bits"], r["M"], r["K"]) for r in rows})
    lines = list(dict.fromkeys(r["method"].split(",")[0] for r in sorted(rows, key=lambda r: r["K"])))
    figure, axes = plt.subplots(2, -(-len(shapes) // 2), figsize=(9, 6.2), sharex=True, sharey=True, squeeze=False)
    for axis, shape in zip(axes.ravel(), shapes, strict=False):
        for number, label in enumerate(lines):
            own = [r for r in rows if (r["bits"], r["M"], r["K"]) == shape and r["method"].split(",")[0] == label]
            if own:
                marker = "osD^"[number % 4]
                axis.loglog([r["N"] for r in own], [r["one_1_thread"] for r in own], f"C{number}{marker}-", label=label)
        axis.set_title(f"{shape[0]} bits, M = {shape[1]}, K = {shape[2]}")
    for axis in axes[-1]:
        axis.set_xlabel("items")
    for axis in axes[:, 0]:
        axis.set_ylabel("ms for one query, one thread")
    shown = {
        label: line for axis in axes.ravel() for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend([shown[label] for label in lines], lines, loc="lower center", ncols=len(lines))
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
