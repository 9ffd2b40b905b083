"""How many answers `tcq judge` needs, with labels as the judge: the error of the share, the scope, and what it costs.

    python benchmarks/judge.py runs/first=runs/share/table.csv --answers=25,50,100 --seeds=20

Each argument is the workdir of a short first run, and the table of a sweep of loss.clip_scope and loss.clip on the same
images (`tcq sweep`, one temperature). The loss is what the judged share and scope give, in validation mAP, below the
best cell of the table; between two shares of the table mAP is interpolated over the logarithm of the share.
"""

import argparse
import csv
from collections import defaultdict
from pathlib import Path

import numpy as np

from tcq import embed, encode
from tcq.data import splits
from tcq.evaluate import judge


def curves(table: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The shares and their mean validation mAP for each scope, of a table of `tcq sweep`."""
    cells = defaultdict(list)
    with open(table) as file:
        for row in csv.DictReader(file):
            cells[row["loss.clip_scope"], float(row["loss.clip"])].append(float(row["validation_mAP"]))
    found = {}
    for scope in ("anchor", "batch"):
        shares = sorted(share for name, share in cells if name == scope)
        found[scope] = np.array(shares), np.array([np.mean(cells[scope, share]) for share in shares])
    return found


def measure(workdir: Path, table: Path, counts: list[int], seeds: int) -> None:
    """Prints a line for each number of answers."""
    encoder = encode.load(workdir, which="latest")
    source = embed.open_source(encoder.config)
    split = splits.of_source(source, encoder.config.data)
    scores, same = curves(table), judge.by_labels(source)
    best = max(values.max() for _, values in scores.values())
    random = np.random.RandomState(0)
    pairs = random.choice(split.train, (200_000, 2))
    truth = np.mean([same(i, [j], 0)[0] for i, j in pairs if i != j])
    results = defaultdict(list)
    for seed in range(seeds):
        for count in counts:
            results[count].append(judge.judge(None, encoder, source, split, same, count=count, seed=seed))
    print(f"\n{workdir}: {truth:.2%} of the pairs are of one kind; best validation mAP {best:.3f}")
    print("| answers | share, median (5 to 95 %) | interval holds | batch | loss, median (worst) | within 0.01 |")
    print("|---|---|---|---|---|---|")
    for count, found in results.items():
        share = np.array([j.share for j in found])
        low, middle, high = np.quantile(share, (0.05, 0.5, 0.95))
        holds = np.mean([j.low <= truth <= j.high for j in found])
        batch = np.mean([j.scope == "batch" for j in found])
        loss = np.array(
            [best - np.interp(np.log(j.share), np.log(scores[j.scope][0]), scores[j.scope][1]) for j in found]
        )
        print(
            f"| {count} | {middle:.1%} ({low:.1%} to {high:.1%}) | {holds:.0%} | {batch:.0%} | "
            f"{np.median(loss):.3f} ({loss.max():.3f}) | {np.mean(loss <= 0.01):.0%} |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", metavar="WORKDIR=TABLE")
    parser.add_argument("--answers", default="25,50,100", help="numbers of answers")
    parser.add_argument("--seeds", type=int, default=20)
    arguments = parser.parse_args()
    for item in arguments.sets:
        first, _, second = item.rpartition("=")
        measure(Path(first), Path(second), [int(n) for n in arguments.answers.split(",")], arguments.seeds)
