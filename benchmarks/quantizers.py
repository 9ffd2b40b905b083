"""What FAISS makes of the embeddings of a run at its number of bits, without labels and without our training.

    python benchmarks/quantizers.py runs/first runs/second

For each run: mAP on its test queries of its codes, of the float embeddings, and of PQ, OPQ, ITQ, LSQ and RaBitQ, all
trained on the database. Queries are never quantized. RaBitQ stores 8 bytes more for each image than its bits.
"""

import argparse
import platform
import time
from collections.abc import Callable
from importlib import metadata

import numpy as np

from tcq import config as configs
from tcq import embed, encode, evaluate, ranking
from tcq.data import splits
from tcq.evaluate import baselines, retrieval
from tcq.models import opq, retriever

Scores = Callable[[np.ndarray, np.ndarray], np.ndarray]  # of queries (Q, D) and items (N, D): (Q, N)


def float_cosine(queries: np.ndarray, items: np.ndarray) -> np.ndarray:
    return ranking.dense_scores(queries, items, metric="cosine")


def product(num_codebooks: int, num_codewords: int, width: int, *, optimized: bool) -> Scores:
    """PQ, or OPQ to `width` numbers."""

    def scores(queries: np.ndarray, items: np.ndarray) -> np.ndarray:
        if optimized:
            shape = {"num_codebooks": num_codebooks, "num_codewords": num_codewords, "width": width}
            rotation = opq.rotation(items, **shape, seed=None)
            queries, items = queries @ rotation, items @ rotation
        codebooks, codes = baselines.faiss_pq(items, [items], num_codebooks=num_codebooks, num_codewords=num_codewords)
        table = ranking.lookup_table(baselines.pad(queries, num_codebooks), codebooks, metric="l2")
        return np.asarray(ranking.scores(table, codes))

    return scores


def itq(bits: int) -> Scores:
    """Iterative quantization (Gong et al. 2013): PCA, a learned rotation, and signs, which a float query meets."""

    def scores(queries: np.ndarray, items: np.ndarray) -> np.ndarray:
        import faiss

        transform = faiss.ITQTransform(items.shape[1], bits, True)
        transform.train(items)
        return transform.apply(queries) @ np.where(transform.apply(items) >= 0, 1, -1).astype(np.float32).T

    return scores


def lsq(num_codebooks: int, num_codewords: int, width: int) -> Scores:
    """Local search quantization (Martinez et al. 2018) of the first `width` principal components."""

    def scores(queries: np.ndarray, items: np.ndarray) -> np.ndarray:
        import faiss

        project = baselines.pca(items, width)
        queries, items = project(queries), project(items)
        quantizer = faiss.LocalSearchQuantizer(items.shape[1], num_codebooks, (num_codewords - 1).bit_length())
        quantizer.train(items)
        return ranking.dense_scores(queries, quantizer.decode(quantizer.compute_codes(items)), metric="l2")

    return scores


def rabitq(bits: int) -> Scores:
    """RaBitQ (Gao and Long 2024) of as many randomly rotated principal components as there are bits."""

    def scores(queries: np.ndarray, items: np.ndarray) -> np.ndarray:
        import faiss

        index = faiss.index_factory(items.shape[1], f"PCAR{bits},RaBitQ")
        index.train(items)
        index.add(items)
        distances, ids = index.search(queries, len(items))
        result = np.empty((len(queries), len(items)), np.float32)
        np.put_along_axis(result, ids, -distances, axis=1)
        return result

    return scores


def measure(workdir: str) -> None:
    """Prints a row for each method."""
    encoder = encode.load(workdir)
    config, q = encoder.config, encoder.config.quantizer
    source = embed.open_source(config)
    split = splits.of_source(source, config.data)
    labels = source.labels[split.query], source.labels[split.database]
    k, _ = evaluate.cut_offs(encoder, len(split.database))

    def report(name: str, score: retrieval.Scorer, seconds: float) -> None:
        result = retrieval.retrieve(score, *labels, k=k, ks=[1], conventions=configs.conventions(config))
        print(f"  {name}: mAP {result.mean_average_precision:.3f}, {seconds:.1f} s", flush=True)

    print(
        f"{workdir}: {configs.bits(config)} bits, {len(split.query):,} queries, {len(split.database):,} items, k {k:,}"
    )
    both = (encode.encode(encoder, source.images[rows]) for rows in (split.query, split.database))
    report("tcq", retrieval.scorers(encoder, *both)["asymmetric"], 0.0)
    rows = [np.asarray(retriever.scaled(source.images[part]), np.float32) for part in (split.query, split.database)]
    mean = rows[1].mean(axis=0, keepdims=True)
    queries, items = (np.ascontiguousarray(part - mean) for part in rows)
    shape, bits = (q.num_codebooks, q.num_codewords), configs.bits(config)
    methods: dict[str, Scores] = {
        "float": float_cosine,
        "PQ": product(*shape, 0, optimized=False),
        "OPQ": product(*shape, q.num_codebooks * q.codeword_dim, optimized=True),
        "ITQ": itq(bits),
        "LSQ": lsq(*shape, q.num_codebooks * q.codeword_dim),
        "RaBitQ": rabitq(bits),
    }
    for name, method in methods.items():
        begin = time.perf_counter()
        scores = method(queries, items)
        report(name, scores.__getitem__, time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdirs", nargs="+")
    print(f"{platform.machine()}, Python {platform.python_version()}, faiss-cpu {metadata.version('faiss-cpu')}")
    for workdir in parser.parse_args().workdirs:
        measure(workdir)


if __name__ == "__main__":
    main()
