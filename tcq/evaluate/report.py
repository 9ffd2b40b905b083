"""The files of an evaluation: results.json, its text table, curves.png and gallery.png."""

import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from tcq import config as configs
from tcq import encode, metrics, plots, ranking
from tcq.data import protocols, splits
from tcq.data.source import Source
from tcq.evaluate import held_out, retrieval
from tcq.runtime import checkout, storage

RESULTS, CURVES, GALLERY, QUERIES = "results.json", "curves.png", "gallery.png", "queries.jsonl"
NEAREST = 10  # items of each query in queries.jsonl
SHOWN = (1, 10, 100, 1000)  # cut-offs of the precision in results.json, beside k
GALLERY_QUERIES, GALLERY_ITEMS = 8, 10
MEANINGS = {
    "ties": {
        "expected": "exact expectation over the orders of tied scores",
        "index": "tied scores in database order",
        "best": "tied scores with relevant items first",
        "worst": "tied scores with relevant items last",
    },
    "denominator": {
        "hits": "relevant items among the first k",
        "min": "relevant items in the database, at most k",
        "all": "relevant items in the database",
    },
    "empty": {
        "zero": "a query without a hit scores 0 and counts",
        "skip": "a query with no relevant item in the database is left out",
    },
}
NAMES = {
    "asymmetric": "tcq, float query against codes",
    "symmetric": "tcq, codes against codes",
    "float": "tcq, float features (no quantization)",
    "best_possible": "best possible order",
    "random": "random order (exact expectation)",
    "pq_pixels": "FAISS PQ on pixels",
    "pq_embeddings": "FAISS PQ on the embeddings",
    "opq_embeddings": "FAISS OPQ and PQ on the embeddings",
    "float_embeddings": "the embeddings, centred, cosine",
    "pq_features": "FAISS PQ on tcq's float features",
    "pca_pq_features": "PCA and FAISS PQ on tcq's float features",
    "pca_sign_features": "PCA, rotation and signs of tcq's float features",
}
OF_PIXELS = ("pq_pixels",)
OF_EMBEDDINGS = ("pq_embeddings", "opq_embeddings", "float_embeddings")


class EvaluateError(ValueError):
    """This run cannot be scored, or recorded figures cannot be read; the message says why."""


class Evaluation(NamedTuple):
    """A run with its encoded queries and database."""

    encoder: encode.Encoder
    source: Source
    split: protocols.Split
    queries: encode.Encoded
    database: encode.Encoded


def results(
    evaluation: Evaluation, retrievals: Mapping[str, retrieval.Retrieval], *, k: int, ks: list[int]
) -> dict[str, Any]:
    """The contents of results.json; the cut-offs of `ks` include k."""
    encoder, source, split, _, database = evaluation
    config, protocol = encoder.config, protocols.PROTOCOLS[encoder.config.data.protocol]
    conventions, relevant = configs.conventions(config), retrievals["asymmetric"].relevant
    values = {name: result.mean_average_precision for name, result in retrievals.items()}
    best = metrics.best_possible(relevant, k=k, denominator=conventions.denominator)
    values["best_possible"] = metrics.mean(best, relevant, empty=conventions.empty)
    shown = [c for c in ks if c in SHOWN or c == k]
    absent = OF_EMBEDDINGS if source.images.ndim == 4 else OF_PIXELS
    return {
        "protocol": config.data.protocol,
        "protocol_source": protocol.source,
        "source": config.data.source,
        "draw_sha256": protocols.digest(splits.of_source(source, config.data, validation=0.0)),
        "split_sha256": protocols.digest(split),
        "names_sha256": splits.names_digest(source),
        "sizes": {name: len(part) for name, part in split._asdict().items()},
        "bits": configs.bits(config),
        "k": k,
        "step": encoder.step,
        "seed": protocol.seed if config.data.split_seed < 0 else config.data.split_seed,
        "conventions": _conventions(config, split),
        "notes": list(source.notes),
        "mAP": {name: values.get(name) for name in NAMES if name not in absent},
        "precision_at": {
            name: {str(c): float(result.precision[ks.index(c)]) for c in shown} for name, result in retrievals.items()
        },
        "curves": {
            "k": ks,
            **{n: {"precision": r.precision.tolist(), "recall": r.recall.tolist()} for n, r in retrievals.items()},
        },
        "distinct_codes": len(np.unique(database.codes, axis=0)),
        "validation": held_out.validate(encoder, source, split),
        "machine": {
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "python": f"Python {platform.python_version()}",
            "jax": f"jax {jax.__version__}",
        },
        "tcq": {"version": version("tcq"), "commit": checkout.commit()},
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _conventions(config: ConfigDict, split: protocols.Split) -> dict[str, Any]:
    """Every convention of the scoring, in words."""
    conventions = configs.conventions(config)
    return {
        **{name: f"{value}: {MEANINGS[name][value]}" for name, value in conventions._asdict().items()},
        "relevance": protocols.PROTOCOLS[config.data.protocol].relevance,
        "query_in_database": bool(np.isin(split.query, split.database).any()),
        "query_excluded": config.eval.exclude_query,
        "similarity": _similarity(config),
        "similarity_of_float_features": f"{config.eval.score} of the whole features as they are",
    }


def _similarity(config: ConfigDict) -> str:
    """The similarity of a query and a code, in words."""
    name = {"ip": "inner product", "cosine": "cosine", "l2": "minus the squared L2 distance"}[config.eval.score]
    if config.eval.score == "l2" and not config.eval.squared:
        name = "minus the sum of the L2 distances of subvectors"
    norm = {
        "none": "queries not normalized",
        "whole": "queries scaled to unit length",
        "subvectors": "queries with subvectors scaled to unit length",
    }
    return f"{name}, {norm[configs.query_norm(config)]}"


def beside(name: str, overrides: Sequence[str]) -> str:
    """A results file's name: as it is, or with the conventions that differ from the run's."""
    keys = sorted(o.removeprefix("--").removeprefix("config.").removeprefix("eval.") for o in overrides)
    suffix = "".join(f"_{''.join(c if c.isalnum() or c in '=.-' else '_' for c in key)}" for key in keys)
    stem, dot, end = name.rpartition(".")
    return f"{stem}{suffix}{dot}{end}"


def write(
    folder: Path,
    evaluation: Evaluation,
    retrievals: Mapping[str, retrieval.Retrieval],
    results: Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
) -> None:
    """Writes results.json, queries.jsonl, curves.png, and gallery.png if there are images.

    Those of other conventions than the run's own stand beside them: see `beside`.
    """
    storage.write_text(folder / beside(RESULTS, overrides), json.dumps(results, indent=2) + "\n")
    lines = _query_lines(evaluation, retrievals["asymmetric"].average_precision)
    storage.write_text(folder / beside(QUERIES, overrides), "".join(json.dumps(line) + "\n" for line in lines))
    if overrides:
        return
    title = f"{results['source']}, {results['bits']} bits, mAP@{results['k']}"
    curves = {NAMES[n]: results["curves"][n] for n in retrievals}
    plots.curves(folder / CURVES, curves, ks=results["curves"]["k"], title=title)
    if evaluation.source.images.ndim == 4 or evaluation.source.pictures is not None:
        _gallery(folder / GALLERY, evaluation, retrievals["asymmetric"].average_precision)


def _query_lines(evaluation: Evaluation, average_precision: np.ndarray) -> Iterator[dict[str, Any]]:
    """For each query its name, average precision, and nearest items with score and relevance."""
    source, split = evaluation.source, evaluation.split
    own = evaluation.encoder.config.eval.exclude_query
    block = max(evaluation.encoder.config.eval.max_scores // 4 // max(len(split.database), 1), 1)
    for first in range(0, len(split.query), block):
        rows = np.arange(first, min(first + block, len(split.query)))
        scores, nearest, relevant = _nearest(evaluation, rows, NEAREST + own)
        for row, *columns in zip(rows, scores, nearest, relevant, strict=True):
            yield {
                "query": source.names[split.query[row]],
                "average_precision": float(average_precision[row]),
                "nearest": [
                    {"name": source.names[split.database[n]], "score": float(s), "relevant": bool(r)}
                    for s, n, r in zip(*columns, strict=True)
                    if not own or split.database[n] != split.query[row]
                ][:NEAREST],
            }


def _nearest(evaluation: Evaluation, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, places in the database, and relevance of the k nearest items of some queries."""
    encoder, source, split, queries, database = evaluation
    config, codebooks = encoder.config, encoder.codebooks
    tables = ranking.lookup_table(
        queries.features[rows],
        codebooks,
        metric=config.eval.score,
        squared=config.eval.squared,
        normalize=configs.query_norm(config),
    )
    norms = np.asarray(ranking.code_norms(database.codes, codebooks)) if config.eval.score == "cosine" else None
    scores, nearest = ranking.top_k(tables, database.codes, k, norms=norms)
    assert source.labels is not None
    relevant = retrieval.relevance(source.labels[split.query[rows]], source.labels[split.database])
    return scores, nearest, np.take_along_axis(relevant, nearest, axis=1)


def _gallery(path: Path, evaluation: Evaluation, average_precision: np.ndarray) -> None:
    """Queries sorted by average precision, each with its nearest database images."""
    config, source, split = evaluation.encoder.config, evaluation.source, evaluation.split
    places = np.unique(np.linspace(0, len(split.query) - 1, GALLERY_QUERIES).astype(int))
    shown = np.argsort(-average_precision, kind="stable")[places]
    _, nearest, relevant = _nearest(evaluation, shown, GALLERY_ITEMS)
    images = source.images if source.pictures is None else source.pictures
    plots.gallery(
        path,
        [images[i] for i in split.query[shown]],
        [[images[split.database[n]] for n in row] for row in nearest],
        right=relevant,
        title=f"{config.data.source}, {configs.bits(config)} bits: queries sorted by average precision",
    )


def table(results: Mapping[str, Any], recorded: Mapping[str, float] | None = None) -> str:
    """results.json as text, with rows for recorded figures {name: mAP} if given."""
    rows = [(NAMES[n], v) for n, v in results["mAP"].items() if v is not None]
    rows[1:1] = list((recorded or {}).items())
    width = max(len(name) for name, _ in rows)
    conventions = results["conventions"]
    rules = [f"{name} {conventions[name].partition(':')[0]}" for name in configs.Conventions._fields]
    head = f"mAP@{results['k']}, {results['bits']} bits, protocol {results['protocol']}, {results['source']}"
    lines = [
        head,
        f"({', '.join(rules)})",
        "-" * max(len(head), width + 8),
        *(f"{name:<{width}}  {value:.4f}" for name, value in rows),
        *(f"note: {note}" for note in results.get("notes", [])),
    ]
    validation = results.get("validation", {})
    if "mAP" in validation:
        lines.append(f"validation images against training images: {validation['mAP']:.4f}")
    if "clip_precision" in validation:
        lines.append(
            f"clip precision {validation['clip_precision']:.0%} (by chance {validation['false_negative_rate']:.0%}), "
            f"clip recall {validation['clip_recall']:.0%}"
        )
    return "\n".join(lines)


def read_recorded(path: str | Path) -> dict[str, float]:
    """{name: mAP} from a JSON file. Raises EvaluateError if it holds anything else."""
    try:
        recorded = json.loads(Path(path).read_text())["mAP"]
        return {str(name): float(value) for name, value in recorded.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvaluateError(
            f"--recorded {str(path)!r} must be a JSON file with {{'mAP': {{name: value}}}}: {error}"
        ) from None
