"""Scoring a trained model under its protocol: encode, rank, measure, write results.json and the pictures."""

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from tcq import config as configs
from tcq import encode, metrics, ranking
from tcq import plots as pictures
from tcq.data import protocols, splits
from tcq.data.sources import Source, open_source
from tcq.evaluate import baselines
from tcq.evaluate import held_out as validation
from tcq.runtime import processes
from tcq.runtime import storage as buckets
from tcq.runtime.log import say

MEANINGS = {
    "ties": {
        "expected": "exact expectation over the orders of equal scores",
        "index": "equal scores in database order",
        "best": "of equal scores relevant items first",
        "worst": "of equal scores relevant items last",
    },
    "denominator": {
        "hits": "relevant items among the first k",
        "min": "relevant items in the database, at most k",
        "all": "relevant items in the database",
    },
    "empty": {
        "zero": "a query without a hit scores 0 and counts",
        "skip": "a query to which nothing in the database is relevant is left out",
    },
}
NAMES = {
    "asymmetric": "tcq, float query against codes",
    "symmetric": "tcq, codes against codes",
    "float": "tcq, float features (no quantization)",
    "best_possible": "best possible order",
    "random": "random order (exact expectation)",
    "pq_pixels": "FAISS PQ on pixels",
    "pq_features": "FAISS PQ on tcq's float features",
    "pca_pq_features": "PCA and FAISS PQ on tcq's float features",
    "pca_sign_features": "PCA, rotation and signs of tcq's float features",
}


class EvaluateError(ValueError):
    """This run cannot be scored; the message says why."""


def evaluate(workdir: str | Path, *, which: str = "best", overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Scores the run of a workdir on its queries; returns what results.json holds. Several processes share the work.

    Leaves results.json, curves.png and gallery.png in the workdir. The model is rebuilt from the workdir alone; `overrides`
    such as "eval.ties=index" change the conventions of the scoring.
    Raises EvaluateError without labels or queries, or as `encode.load`, `configs.with_eval` and `open_source`.
    """
    encoder = encode.load(workdir, which=which)
    with buckets.at(workdir, writes=processes.first()) as at:
        return _evaluate(at.folder, encoder, overrides)


def _evaluate(workdir: Path, encoder: encode.Encoder, overrides: Sequence[str]) -> dict[str, Any]:
    config = configs.with_eval(encoder.config, overrides)
    encoder = encoder._replace(config=config)
    source = open_source(config.data)
    split = splits.of_source(source, config.data)
    processes.same("images", {"names": splits.names_digest(source), "split": protocols.digest(split)})
    processes.on_first(lambda: splits.claim(workdir, source, split))
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

    protocol = protocols.PROTOCOLS[config.data.protocol]
    conventions = validation.conventions_of(config)
    k = protocols.cut_off(config.data.protocol, config.eval.k, len(split.database))
    ks = sorted(
        {
            *np.unique(np.geomspace(1, len(split.database), 60).astype(int)).tolist(),
            k,
            *(c for c in (1, 10, 100, 1000) if c <= len(split.database)),
        }
    )
    labels = source.labels[split.query], source.labels[split.database]
    own = _own_places(split) if config.eval.exclude_query else None
    found = {
        name: validation.retrieve(
            score, *labels, k=k, ks=ks, conventions=conventions, own=own, max_scores=config.eval.max_scores
        )
        for name, score in _scorers(encoder, source, split, queries, database).items()
    }
    relevant = found["asymmetric"].relevant
    others = len(split.database) - int(own is not None and bool((own >= 0).all()))
    chance = metrics.random_order(relevant, others, k=k, cuts=ks, denominator=conventions.denominator)
    found["random"] = validation.summary(chance, ks, empty=conventions.empty)
    best = metrics.best_possible(relevant, k=k, denominator=conventions.denominator)
    values = {name: result.mean_average_precision for name, result in found.items()}
    values["best_possible"] = metrics.mean(best, relevant, empty=conventions.empty)
    results = {
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
        "conventions": {
            **{name: f"{value}: {MEANINGS[name][value]}" for name, value in conventions._asdict().items()},
            "relevance": protocol.relevance,
            "query_in_database": bool(np.isin(split.query, split.database).any()),
            "query_excluded": config.eval.exclude_query,
            "similarity": _similarity(config),
            "similarity_of_float_features": f"{config.eval.score} of the whole features as they are",
        },
        "notes": list(source.notes),
        "mAP": {name: values.get(name) for name in NAMES},
        "precision_at": {
            name: {str(c): float(result.precision[ks.index(c)]) for c in ks if c in (1, 10, 100, 1000) or c == k}
            for name, result in found.items()
        },
        "curves": {
            "k": ks,
            **{n: {"precision": r.precision.tolist(), "recall": r.recall.tolist()} for n, r in found.items()},
        },
        "distinct_codes": len(np.unique(database.codes, axis=0)),
        "validation": validation.held_out(encoder, source, split),
        "machine": {
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "python": f"Python {platform.python_version()}",
            "jax": f"jax {jax.__version__}",
        },
    }

    def write() -> None:
        half = workdir / "results.half"
        half.write_text(json.dumps(results, indent=2) + "\n")
        half.replace(workdir / "results.json")
        title = f"{config.data.source}, {configs.bits(config)} bits, mAP@{k}"
        pictures.curves(workdir / "curves.png", {NAMES[n]: results["curves"][n] for n in found}, ks=ks, title=title)
        precision = found["asymmetric"].average_precision
        _gallery(workdir / "gallery.png", encoder, source, split, queries, database, precision)

    processes.on_first(write)
    return results


def table(results: Mapping[str, Any], recorded: Mapping[str, float] | None = None) -> str:
    """results.json as text, with rows for recorded figures {name: mAP} where given."""
    rows = [(NAMES[n], v) for n, v in results["mAP"].items() if v is not None]
    rows[1:1] = list((recorded or {}).items())
    width = max(len(name) for name, _ in rows)
    notes = [f"note: {note}" for note in results.get("notes", [])]
    rules = results["conventions"]
    told = [f"{name} {rules[name].partition(':')[0]}" for name in validation.DEFAULT._fields]
    head = f"mAP@{results['k']}, {results['bits']} bits, protocol {results['protocol']}, {results['source']}"
    lines = [
        head,
        f"({', '.join(told)})",
        "-" * max(len(head), width + 8),
        *(f"{name:<{width}}  {value:.4f}" for name, value in rows),
        *notes,
    ]
    held_out = results.get("validation", {})
    if "mAP" in held_out:
        lines.append(f"validation images against training images: {held_out['mAP']:.4f}")
    if "clip_precision" in held_out:
        lines.append(
            f"of the clipped negatives {held_out['clip_precision']:.0%} were of the anchor's own class "
            f"({held_out['false_negative_rate']:.0%} by chance); {held_out['clip_recall']:.0%} of those were clipped"
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
    scorers = validation.scorers(encoder, queries, database)
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
    bits = configs.bits(encoder.config)
    project = baselines.pca(database.features[sample], bits)
    projected = project(queries.features)  # at once: a product of other blocks rounds otherwise
    scorers["pca_pq_features"] = pq(lambda b: projected[b], lambda i: project(database.features[i]))
    signs = baselines.sign_bits(database.features[sample], bits)
    codes = signs(database.features)
    scorers["pca_sign_features"] = lambda block: signs(queries.features[block]) @ codes.T
    return scorers


def _own_places(split: protocols.Split) -> np.ndarray | None:
    """Where each query itself lies in the database, -1 where it does not; None where no query does."""
    place = {int(image): i for i, image in enumerate(split.database)}
    places = np.array([place.get(int(image), -1) for image in split.query])
    return places if (places >= 0).any() else None


def _similarity(config: ConfigDict) -> str:
    """How the asymmetric scores compare a query with an item, in words."""
    name = {"ip": "inner product", "cosine": "cosine", "l2": "minus the squared L2 distance"}[config.eval.score]
    if config.eval.score == "l2" and not config.eval.squared:
        name = "minus the sum of the L2 distances of subvectors"
    norm = {
        "none": "queries as they are",
        "whole": "queries of unit length",
        "subvectors": "queries of unit subvectors",
    }
    return f"{name}, {norm[validation.query_norm(config)]}"


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
    tables = ranking.lookup_table(
        queries.features[shown],
        codebooks,
        metric=metric,
        squared=encoder.config.eval.squared,
        normalize=validation.query_norm(encoder.config),
    )
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
