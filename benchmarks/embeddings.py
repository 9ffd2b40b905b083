"""From a million embeddings to a searchable index: time and peak memory, beside FAISS's OPQ + PQ at the same bits.

    python benchmarks/embeddings.py --folder=runs/million            # 10^6 x 512, float16: 1 GB of disk

    python benchmarks/embeddings.py --folder=runs/close --count=20000 --width=256 --clusters=200 --groups=20

The embeddings are synthetic: points of clusters plus noise. With --groups the centres of the clusters lie around those
of some groups. Each part runs in a process of its own, one after the
other. tcq trains on two noisy views of each embedding, without or with --kinds; FAISS trains on a sample, as it does by
default. The last lines are `neighbours` before the first step and after the last one, and the share of the ten nearest
items of 200 queries that are of the query's cluster.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

CODEBOOKS, CODEWORDS, WIDTH = 8, 16, 128
SAMPLE = 2**16
QUERIES, NEAREST = 200, 10


def make(folder: Path, count: int, width: int, *, clusters: int, groups: int) -> None:
    """Writes the embeddings in shards, and queries, once."""
    if (folder / "queries.npy").is_file():
        return
    random = np.random.RandomState(0)
    centres = random.randn(clusters, width).astype("f4")
    if groups:
        centres += random.randn(groups, width).astype("f4")[random.randint(0, groups, clusters)]
    (folder / "items").mkdir(parents=True, exist_ok=True)

    def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
        own = random.randint(0, clusters, n)
        return (centres[own] + 1.5 * random.randn(n, width)).astype("f2"), own

    drawn = []
    for shard, start in enumerate(range(0, count, 100_000)):
        rows, of_rows = draw(min(100_000, count - start))
        np.save(folder / "items" / f"items_{shard}.npy", rows)
        drawn.append(of_rows)
    np.save(folder / "clusters.npy", np.concatenate(drawn))
    queries, of_queries = draw(QUERIES)
    np.save(folder / "query_clusters.npy", of_queries)
    np.save(folder / "queries.npy", queries)


def faiss_codes(folder: Path) -> None:
    """Trains OPQ + PQ, encodes all, and writes the nearest items of the queries."""
    import faiss

    from tcq.data import embeddings

    items = embeddings.open_folder(folder / "items").images
    sample = np.asarray(items[np.sort(np.random.RandomState(0).permutation(len(items))[:SAMPLE])], "f4")
    opq, pq = faiss.OPQMatrix(items.shape[1], CODEBOOKS, WIDTH), faiss.ProductQuantizer(WIDTH, CODEBOOKS, 4)
    opq.pq = pq  # else the rotation is for 256 codewords
    opq.train(sample)
    index = faiss.IndexPQ(WIDTH, CODEBOOKS, 4)
    index.train(opq.apply(sample))
    for start in range(0, len(items), 100_000):
        index.add(opq.apply(np.asarray(items[start : start + 100_000], "f4")))
    queries = np.load(folder / "queries.npy").astype("f4")
    np.save(folder / "faiss.npy", index.search(opq.apply(queries), NEAREST)[1])


def measure(command: list[str]) -> tuple[float, float]:
    """Seconds and peak GiB of a process."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return time.monotonic() - start, usage.ru_maxrss / 2**20


def precision(folder: Path, index: Path) -> dict[str, float]:
    """The share of the ten nearest items that are of the query's cluster."""
    from tcq import index as indexes

    queries = np.load(folder / "queries.npy").astype("f4")
    opened = indexes.open_index(index)
    ours = [[int(hit.path) for hit in hits] for hits in indexes.search(opened, queries, k=NEAREST)]
    clusters, own = np.load(folder / "clusters.npy"), np.load(folder / "query_clusters.npy")[:, None]
    found = {"tcq": np.array(ours), "FAISS OPQ + PQ": np.load(folder / "faiss.npy")}
    return {name: float(np.mean(clusters[rows] == own)) for name, rows in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--count", type=int, default=10**6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--groups", type=int, default=0)
    parser.add_argument("--kinds", type=int, help="for configs/embeddings.py")
    parser.add_argument("--part", choices=["faiss"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.folder
    if arguments.part:
        return faiss_codes(folder)
    make(folder, arguments.count, arguments.width, clusters=arguments.clusters, groups=arguments.groups)
    tcq = [sys.executable, "-m", "tcq"]
    source, run, index = f"{folder}/items", folder / "run", folder / "index"
    config = f"configs/embeddings.py:{source}" + (f",kinds={arguments.kinds}" if arguments.kinds else "")
    for old in (run, index):
        subprocess.run(["rm", "-rf", old], check=True)
    parts = {
        "tcq train": [*tcq, "train", f"--config={config}", f"--workdir={run}", "--quiet"],
        "tcq index": [*tcq, "index", f"--workdir={run}", f"--images=embeddings:{source}", f"--out={index}"],
        "FAISS OPQ + PQ, train and encode": [sys.executable, __file__, f"--folder={folder}", "--part=faiss"],
    }
    results = {}
    for name, command in parts.items():
        results[name] = measure(command)
        print(f"{name:<34} {results[name][0]:7.1f} s  {results[name][1]:5.2f} GiB", flush=True)
    total = results["tcq train"][0] + results["tcq index"][0]
    print(f"tcq / FAISS: x {total / results['FAISS OPQ + PQ, train and encode'][0]:.2f}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shares = [line["validation/neighbours"] for line in lines if "validation/neighbours" in line]
    print(json.dumps({"neighbours": [shares[0], shares[-1]]}))
    print(json.dumps({"of the query's cluster": precision(folder, index)}))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
