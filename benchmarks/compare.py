"""A picture of what two runs find for the same queries, in two rows each.

    python benchmarks/compare.py --before=runs/none --after=runs/clipped --names 'not clipped' clipped --out=compare.png

The queries are quantiles of the change in average precision over all test queries, from the largest gain to the largest
loss; none is picked by hand. Both runs need the same images and split.
"""

import argparse

import numpy as np

from tcq import config as configs
from tcq import embed, encode, plots, ranking
from tcq.data import splits

QUANTILES = (1.0, 0.9, 0.5, 0.1, 0.0)
NEAREST = 10


def rankings(workdir: str) -> tuple[np.ndarray, np.ndarray, object, splits.protocols.Split]:
    """For each test query the database in order, whether each item is of its class; the source and the split."""
    encoder = encode.load(workdir)
    source = embed.open_source(encoder.config)
    split = splits.of_source(source, encoder.config.data)
    shuffled = np.random.RandomState(0).permutation(split.database)  # equal scores are in a random order
    split = split._replace(database=shuffled)
    queries = encode.encode(encoder, source.images[split.query]).features
    codes = encode.encode(encoder, source.images[split.database]).codes
    normalize = configs.query_norm(encoder.config)
    tables = ranking.lookup_table(queries, encoder.codebooks, metric=encoder.config.eval.score, normalize=normalize)
    order = np.argsort(-np.asarray(ranking.scores(tables, codes)), axis=1, kind="stable")
    right = source.labels[split.database][order] == source.labels[split.query][:, None]
    return order, right, source, split


def average_precision(right: np.ndarray) -> np.ndarray:
    """Of each row, over all items."""
    hits = np.cumsum(right, axis=1)
    return (hits / np.arange(1, right.shape[1] + 1) * right).sum(axis=1) / hits[:, -1]


def main() -> None:
    """Draws the picture and prints the change of each query shown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("before", "after", "out"):
        parser.add_argument(f"--{flag}", required=True)
    parser.add_argument("--names", nargs=2, default=("before", "after"))
    arguments = parser.parse_args()
    runs = [rankings(workdir) for workdir in (arguments.before, arguments.after)]
    source, split = runs[0][2:]
    precision = np.stack([average_precision(right) for _, right, _, _ in runs])
    change = np.argsort(precision[1] - precision[0], kind="stable")
    shown = [change[round(q * (len(change) - 1))] for q in QUANTILES]
    pictures = source.images if source.pictures is None else source.pictures
    rows = [(query, run) for query in shown for run in runs]
    for query in shown:
        print(f"{source.names[split.query[query]]}: {precision[0, query]:.2f} -> {precision[1, query]:.2f}")
    plots.gallery(
        arguments.out,
        [pictures[split.query[query]] for query, _ in rows],
        [[pictures[split.database[i]] for i in run[0][query, :NEAREST]] for query, run in rows],
        right=np.stack([run[1][query, :NEAREST] for query, run in rows]),
        name=list(arguments.names) * len(shown),
        title=" and ".join(f"{name}: mAP {p.mean():.3f}" for name, p in zip(arguments.names, precision, strict=True)),
    )


if __name__ == "__main__":
    main()
