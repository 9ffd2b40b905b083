"""Scoring a trained model under its protocol: encode, rank, measure, write results.json and the pictures."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tcq import baselines, encode, pictures, ranking, validation
from tcq import config as configs
from tcq.data import protocols
from tcq.data.sources import Source, open_source
from tcq.journal import say

CONVENTIONS = {
    "average_precision": "divided by the relevant items among the first k",
    "empty_queries": "a query without a hit scores 0 and counts",
    "ties": "exact expectation over the orders of equal scores",
    "relevance": "same class, or at least one shared label",
    "query_in_database": False,
}
NAMES = {
    "asymmetric": "tcq, float query against codes",
    "symmetric": "tcq, codes against codes",
    "float": "tcq, float features (no quantization)",
    "random": "random order (exact expectation)",
    "pq_pixels": "FAISS PQ on pixels",
    "pq_features": "FAISS PQ on tcq's float features",
}


class EvaluateError(ValueError):
    """This run cannot be scored; the message says why."""


def evaluate(workdir: str | Path, *, which: str = "best") -> dict[str, Any]:
    """Scores the run of a workdir on its queries; returns what results.json holds.

    Leaves results.json, curves.png and gallery.png in the workdir. The model is rebuilt from the workdir alone.
    Raises EvaluateError without labels or queries, or as `encode.load` and `open_source`.
    """
    workdir = Path(workdir)
    encoder = encode.load(workdir, which=which)
    config = encoder.config
    source = open_source(config.data)
    split = protocols.of_source(source, config.data)
    protocols.claim(workdir, source, split)
    if source.labels is None or not len(split.query):
        raise EvaluateError(
            f"{config.data.source} has {'no labels' if source.labels is None else 'no queries (data.query is 0)'}, so "
            f"there is nothing to score; `tcq index` and `tcq search` need none"
        )
    start = time.monotonic()
    queries = encode.encode(encoder, source.images[split.query])
    database = encode.encode(encoder, source.images[split.database])
    speed = (len(split.query) + len(split.database)) / (time.monotonic() - start)
    say(f"encoded {len(split.query):,} queries and {len(split.database):,} database images, {speed:,.0f} images/s")

    k = min(config.eval.k or len(split.database), len(split.database))
    ks = sorted(
        {
            *np.unique(np.geomspace(1, len(split.database), 60).astype(int)).tolist(),
            k,
            *(c for c in (1, 10, 100, 1000) if c <= len(split.database)),
        }
    )
    labels = source.labels[split.query], source.labels[split.database]
    found = {
        name: validation.retrieve(score, *labels, k=k, ks=ks)
        for name, score in _scorers(encoder, source, split, queries, database).items()
    }
    results = {
        "protocol": config.data.protocol,
        "source": config.data.source,
        "split_sha256": protocols.digest(split),
        "sizes": {name: len(part) for name, part in split._asdict().items()},
        "bits": configs.bits(config),
        "k": k,
        "step": encoder.step,
        "conventions": CONVENTIONS | {"similarity": config.eval.score},
        "mAP": {name: found[name].mean_average_precision if name in found else None for name in NAMES},
        "precision_at": {
            name: {str(c): float(result.precision[ks.index(c)]) for c in ks if c in (1, 10, 100, 1000) or c == k}
            for name, result in found.items()
        },
        "curves": {
            "k": ks,
            **{n: {"precision": r.precision.tolist(), "recall": r.recall.tolist()} for n, r in found.items()},
        },
        "distinct_codes": len(np.unique(database.codes, axis=0)),
    }
    if len(split.validation) >= 2:
        held_out = source.images[split.validation], source.labels[split.validation]
        results["clipping"] = validation.clip_quality(encoder, *held_out)
    half = workdir / "results.half"
    half.write_text(json.dumps(results, indent=2) + "\n")
    half.replace(workdir / "results.json")
    title = f"{config.data.source}, {configs.bits(config)} bits, mAP@{k}"
    pictures.curves(workdir / "curves.png", {NAMES[n]: results["curves"][n] for n in found}, ks=ks, title=title)
    _gallery(workdir / "gallery.png", encoder, source, split, queries, database, found["asymmetric"].average_precision)
    return results


def table(results: Mapping[str, Any], recorded: Mapping[str, float] | None = None) -> str:
    """results.json as text, with rows for recorded figures {name: mAP} where given."""
    rows = [(NAMES[n], v) for n, v in results["mAP"].items() if v is not None]
    rows[1:1] = list((recorded or {}).items())
    width = max(len(name) for name, _ in rows)
    head = f"mAP@{results['k']}, {results['bits']} bits, protocol {results['protocol']}, {results['source']}"
    lines = [head, "-" * max(len(head), width + 8), *(f"{name:<{width}}  {value:.4f}" for name, value in rows)]
    clipping = results.get("clipping", {})
    if "clip_precision" in clipping:
        lines.append(
            f"of the clipped negatives {clipping['clip_precision']:.0%} were of the anchor's own class "
            f"({clipping['false_negative_rate']:.0%} by chance); {clipping['clip_recall']:.0%} of those were clipped"
        )
    return "\n".join(lines)


def read_recorded(path: str | Path) -> dict[str, float]:
    """{name: mAP} from a JSON file. Raises EvaluateError if it holds anything else."""
    try:
        recorded = json.loads(Path(path).read_text())["mAP"]
        return {str(name): float(value) for name, value in recorded.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvaluateError(
            f"--recorded {str(path)!r} is not a JSON file with {{'mAP': {{name: value}}}}: {error}"
        ) from None


def _scorers(
    encoder: encode.Encoder, source: Source, split: protocols.Split, queries: encode.Encoded, database: encode.Encoded
) -> dict[str, validation.Scorer]:
    """Ours, the ceiling, the floor, and FAISS PQ at the same bits."""
    scorers = validation.scorers(encoder, queries, database, metric=encoder.config.eval.score)
    scorers["random"] = lambda block: np.zeros((block.stop - block.start, len(split.database)), np.float32)
    q = encoder.config.quantizer
    if len(split.database) < q.num_codewords:
        say(f"FAISS PQ is left out: {len(split.database)} database images for {q.num_codewords} codewords")
        return scorers

    def pixels(places: np.ndarray) -> np.ndarray:
        return source.images[places].reshape(len(places), -1).astype(np.float32) / 255

    sample = np.random.RandomState(0).permutation(len(split.database))[
        : 256 * q.num_codewords
    ]  # as many as FAISS looks at

    def pq(query: Callable[[slice], np.ndarray], item: Callable[[np.ndarray], np.ndarray]) -> validation.Scorer:
        blocks = np.array_split(np.arange(len(split.database)), -(-len(split.database) // 4096))
        codebooks, codes = baselines.faiss_pq(
            item(sample), map(item, blocks), num_codebooks=q.num_codebooks, num_codewords=q.num_codewords
        )

        def score(block: slice) -> np.ndarray:
            rows = baselines.padded(query(block), q.num_codebooks)
            return np.asarray(ranking.scores(ranking.lookup_table(rows, codebooks, metric="l2"), codes))

        return score

    scorers["pq_pixels"] = pq(lambda b: pixels(split.query[b]), lambda i: pixels(split.database[i]))
    scorers["pq_features"] = pq(lambda b: queries.features[b], lambda i: database.features[i])
    return scorers


def _gallery(
    path: Path,
    encoder: encode.Encoder,
    source: Source,
    split: protocols.Split,
    queries: encode.Encoded,
    database: encode.Encoded,
    average_precision: np.ndarray,
) -> None:
    """Eight queries, from the best answered to the worst, with their ten nearest database images."""
    places = np.unique(np.linspace(0, len(split.query) - 1, 8).astype(int))
    shown = np.argsort(-average_precision, kind="stable")[places]
    metric, codebooks = encoder.config.eval.score, encoder.codebooks
    tables = ranking.lookup_table(queries.features[shown], codebooks, metric=metric)
    norms = np.asarray(ranking.code_norms(database.codes, codebooks)) if metric == "cosine" else None
    _, nearest = ranking.top_k(tables, database.codes, 10, norms=norms)
    assert source.labels is not None
    relevant = validation.relevance(source.labels[split.query[shown]], source.labels[split.database])
    pictures.gallery(
        path,
        [source.images[i] for i in split.query[shown]],
        [[source.images[split.database[n]] for n in row] for row in nearest],
        right=np.take_along_axis(relevant, nearest, axis=1),
        title=f"{encoder.config.data.source}, {configs.bits(encoder.config)} bits: queries from the best answered to the worst",
    )
