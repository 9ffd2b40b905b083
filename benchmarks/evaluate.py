"""Scoring 10,000 queries against 50,000 items at 64 bits: tcq, and a loop over the queries as in released code.

    python benchmarks/evaluate.py

tcq computes tie-exact mAP@1000 and the precision-recall curve at 60 cut-offs, in blocks. The loop is `peers.spq` and
`peers.mecoq_curve` of tests/helpers, which score, sort and count one query after the other in NumPy. It runs on the
first --peer_queries queries, and its time is scaled to all of them. Both must give the same mAP for these.
"""

import argparse
import platform
import resource
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np

from tcq import config as configs
from tcq import quantizer, ranking
from tcq.evaluate import retrieval

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))
import peers


def world(num_queries: int, num_items: int, num_codebooks: int) -> tuple[np.ndarray, ...]:
    """Features of ten overlapping classes, codewords drawn from them, labels."""
    random = np.random.RandomState(0)
    centres = random.randn(10, num_codebooks * 16)
    labels = [random.randint(0, 10, n) for n in (num_queries, num_items)]
    queries, items = ((centres[y] + 2 * random.randn(len(y), centres.shape[1])).astype("f4") for y in labels)
    codebooks = items[:16].reshape(16, num_codebooks, 16).transpose(1, 0, 2)
    return queries, codebooks, np.asarray(quantizer.hard_assign(items, codebooks, metric="l2")), *labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--num_codebooks", type=int, default=16)
    parser.add_argument("--peer_queries", type=int, default=200)
    parser.add_argument("--max_scores", type=int, default=2**24)
    arguments = parser.parse_args()
    queries, codebooks, codes, query_labels, item_labels = world(
        arguments.queries, arguments.items, arguments.num_codebooks
    )

    def score(block: slice) -> np.ndarray:
        tables = ranking.lookup_table(queries[block], codebooks, metric="l2", squared=False)
        return np.asarray(ranking.scores(tables, codes))

    def retrieve(count: int, **options: object) -> retrieval.Retrieval:
        return retrieval.retrieve(score, query_labels[:count], item_labels, k=1000, **options)

    cuts = np.unique(np.geomspace(1, arguments.items, 60).astype(int)).tolist()
    few = arguments.peer_queries
    retrieve(few, ks=cuts, max_scores=arguments.max_scores)  # compiles
    start = time.perf_counter()
    result = retrieve(arguments.queries, ks=cuts, max_scores=arguments.max_scores)
    seconds = time.perf_counter() - start

    hot = np.eye(10, dtype=np.float32)
    loop = queries[:few], codebooks, codes, hot[query_labels[:few]], hot[item_labels]
    start = time.perf_counter()
    loop_map = peers.spq(*loop, 1000)
    map_seconds = (time.perf_counter() - start) / few * arguments.queries
    start = time.perf_counter()
    peers.mecoq_curve(*loop)
    curve_seconds = (time.perf_counter() - start) / few * arguments.queries
    tcq_map = retrieve(few, ks=[1], conventions=configs.Conventions(ties="index")).mean_average_precision
    if abs(tcq_map - loop_map) > 1e-6:
        raise SystemExit(f"mAP@1000 differs: {tcq_map} by tcq, {loop_map} by the loop")

    print(f"{platform.machine()}, Python {platform.python_version()}, numpy {metadata.version('numpy')}, ", end="")
    print(
        f"jax {metadata.version('jax')}; {arguments.queries:,} queries, {arguments.items:,} items, M={len(codebooks)}"
    )
    print(f"tcq:  {seconds:.1f} s for mAP@1000 {result.mean_average_precision:.4f} and the curve")
    print(f"loop: {map_seconds:.1f} s for mAP@1000, {curve_seconds:.1f} s for the curve")
    print(f"ratio: {(map_seconds + curve_seconds) / seconds:.1f} (mAP alone: {map_seconds / seconds:.1f})")
    print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
