"""Scoring a trained model under its protocol: encode, rank, score, report."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from tcq import config as configs
from tcq import embed, encode, metrics, ranking
from tcq import workdir as workdirs
from tcq.data import protocols, splits
from tcq.data.rows import take
from tcq.data.source import Source
from tcq.evaluate import baselines, clipped, report, retrieval
from tcq.evaluate.report import NAMES, EvaluateError, Evaluation, read_recorded, table
from tcq.models import opq, retriever
from tcq.runtime import log, processes, storage

__all__ = ["NAMES", "EvaluateError", "evaluate", "read_recorded", "table"]
FAISS_SAMPLE = 256  # vectors for each codeword, as many as FAISS's k-means uses at most
FAISS_LEAST = 39  # of these, below which FAISS warns
BLOCK_BYTES = 2**24  # of float32 rows that a baseline encodes at a time
NUM_CURVE_POINTS = 60
NOISE = 0.005  # of mAP, about the deviation over seeds (docs/clipping.md)

logger = logging.getLogger(__name__)


def evaluate(
    workdir: str | Path, *, which: str = "best", overrides: Sequence[str] = (), root: str | None = None
) -> dict[str, Any]:
    """Scores the run in a workdir on its queries, and returns the contents of results.json.

    Writes results.json, queries.jsonl and curves.png to the workdir, and if there are images gallery.png and
    clipped.png. Overrides such as "eval.ties=index" change the conventions of the scoring: their results stand beside
    the run's own, as results_ties=index.json. `root` is where the image folder of the run is now, if it was moved. The
    processes of a run share the work.
    Raises EvaluateError without labels or queries, and as `encode.load`, `config.with_eval` and `open_source`.
    """
    encoder = encode.load(workdir, which=which)
    config = encoder.config if root is None else _moved(encoder.config, root)
    encoder = encoder._replace(config=configs.with_eval(config, overrides))
    with storage.mirror(workdir, writes=processes.is_first()) as mirror:
        evaluation = _encode(mirror.folder, encoder)
        if root is not None:
            processes.on_first(lambda: workdirs.move_images(mirror.folder, config))
        k, ks = cut_offs(encoder, len(evaluation.split.database))
        retrievals = _retrieve(evaluation, k, ks)
        results = report.results(evaluation, retrievals, k=k, ks=ks)
        _warn_of_baselines(results["mAP"], results["bits"])
        processes.on_first(lambda: report.write(mirror.folder, evaluation, retrievals, results, overrides=overrides))
        if not overrides:
            clipped.write(mirror.folder, encoder, evaluation.source, evaluation.split)
    return results


def _moved(config: ConfigDict, root: str) -> ConfigDict:
    """The config of a run whose image folder has moved. Raises EvaluateError if it had none."""
    if not config.data.source.startswith("folder:"):
        raise EvaluateError(f"--root={root}: data.source {config.data.source} is not a folder of images")
    place = root if storage.is_url(root) else str(Path(root).expanduser().resolve())
    return workdirs.with_source(config, f"folder:{place}")


def _encode(folder: Path, encoder: encode.Encoder) -> Evaluation:
    """The images of a run and their codes. Raises EvaluateError if there is nothing to score."""
    config = encoder.config
    source = embed.open_source(config, partial(_to_score, folder, config.data))
    split = splits.of_source(source, config.data)
    start = time.monotonic()
    queries = encode.encode(encoder, take(source.images, split.query))
    database = encode.encode(encoder, take(source.images, split.database))
    rate = (len(split.query) + len(split.database)) / (time.monotonic() - start)
    logger.info(
        f"encoded {len(split.query):,} queries and {len(split.database):,} database images, {rate:,.0f} images/s"
    )
    return Evaluation(encoder, source, split, queries, database)


def _to_score(folder: Path, data: ConfigDict, source: Source) -> Source:
    """The source in the run's order, before it is embedded.

    Raises EvaluateError if there is nothing to score, and as `workdir.unchanged`.
    """
    source = workdirs.unchanged(folder, data, source)
    split = splits.of_source(source, data)
    if source.labels is None or not len(split.query):
        missing = "no labels" if source.labels is None else "no queries (data.query is 0)"
        raise EvaluateError(
            f"{data.source} has {missing}, so there is nothing to score; tcq index and tcq search need neither"
        )
    return source


def cut_offs(encoder: encode.Encoder, num_database: int) -> tuple[int, list[int]]:
    """The k of mAP@k, and the cut-offs of the curves of precision and recall."""
    k = protocols.cut_off(encoder.config.data.protocol, encoder.config.eval.k, num_database)
    spaced = np.unique(np.geomspace(1, num_database, NUM_CURVE_POINTS).astype(int)).tolist()
    return k, sorted({k, *spaced, *(c for c in report.SHOWN if c <= num_database)})


def _retrieve(evaluation: Evaluation, k: int, ks: list[int]) -> dict[str, retrieval.Retrieval]:
    """Scores our rankings, those of the baselines, and a random order (its exact expectation)."""
    config, split, labels = evaluation.encoder.config, evaluation.split, evaluation.source.labels
    assert labels is not None
    conventions = configs.conventions(config)
    own = _own_positions(split) if config.eval.exclude_query else None
    scorers = retrieval.scorers(evaluation.encoder, evaluation.queries, evaluation.database)
    logger.info("training the baselines on the same bits")
    scorers |= _baselines(evaluation)
    progress = log.Progress(logger, "scoring rankings", len(scorers), unit="rankings")
    retrievals = {}
    for done, (name, score) in enumerate(scorers.items(), 1):
        retrievals[name] = retrieval.retrieve(
            score,
            labels[split.query],
            labels[split.database],
            k=k,
            ks=ks,
            conventions=conventions,
            own=own,
            max_scores=config.eval.max_scores,
        )
        progress.update(done)
    relevant = retrievals["asymmetric"].relevant
    others = len(split.database) - int(own is not None and bool((own >= 0).all()))
    chance = metrics.random_order(relevant, others, k=k, cuts=ks, denominator=conventions.denominator)
    return retrievals | {"random": retrieval.summary(chance, ks, empty=conventions.empty)}


def _warn_of_baselines(scores: Mapping[str, float | None], bits: int) -> None:
    """Warns if FAISS has found better codes for the embeddings without any training of ours.

    Better by more than NOISE.
    """
    own = scores["asymmetric"] or 0.0
    better = [(s, name) for name in ("pq_embeddings", "opq_embeddings") if (s := scores.get(name)) and s > own + NOISE]
    if better:
        best, name = max(better)
        logger.warning(
            f"{report.NAMES[name]} scores {best:.3f} with {bits} bits, and this run {own:.3f}: train longer, or "
            f"compare other values of loss.clip, such as kinds=N for N kinds of things, or what tcq judge finds"
        )


def _own_positions(split: protocols.Split) -> np.ndarray | None:
    """The position of each query in the database, -1 if it is not there; None if no query is."""
    position = {int(image): i for i, image in enumerate(split.database)}
    positions = np.array([position.get(int(image), -1) for image in split.query])
    return positions if (positions >= 0).any() else None


def _cosine(queries: np.ndarray, database: np.ndarray) -> retrieval.Scorer:
    unit = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (queries, database)]
    return lambda block: unit[0][block] @ unit[1].T


def _split(rows: np.ndarray, most: int) -> list[np.ndarray]:
    """The rows in parts of about one size, at most `most`."""
    return np.array_split(rows, max(-(-len(rows) // most), 1))


def _baselines(evaluation: Evaluation) -> dict[str, retrieval.Scorer]:
    """Scores at our number of bits: FAISS PQ on pixels; PQ, PCA + PQ, PCA + signs on features."""
    encoder, source, split, queries, database = evaluation
    config, q, bits = encoder.config, encoder.config.quantizer, configs.bits(encoder.config)
    if len(split.database) < q.num_codewords:
        logger.warning(f"no FAISS baselines: {len(split.database)} database images for {q.num_codewords} codewords")
        return {}

    def inputs(images: np.ndarray) -> np.ndarray:
        return np.asarray(retriever.scaled(source.images[images])).reshape(len(images), -1)

    sample = np.random.RandomState(0).permutation(len(split.database))[: FAISS_SAMPLE * q.num_codewords]

    def pq(
        query: Callable[[np.ndarray], np.ndarray], item: Callable[[np.ndarray], np.ndarray], sample: np.ndarray = sample
    ) -> retrieval.Scorer:
        most = max(BLOCK_BYTES // max(item(sample[:1]).nbytes, 1), 1)
        blocks = _split(np.arange(len(split.database)), most)
        codebooks, codes = baselines.faiss_pq(
            item(sample), map(item, blocks), num_codebooks=q.num_codebooks, num_codewords=q.num_codewords
        )

        def table(rows: np.ndarray) -> np.ndarray:
            return np.asarray(ranking.lookup_table(baselines.pad(query(rows), q.num_codebooks), codebooks, metric="l2"))

        def score(block: slice) -> np.ndarray:
            parts = _split(np.arange(len(split.query))[block], most)
            return np.asarray(ranking.scores(np.concatenate([table(rows) for rows in parts]), codes))

        return score

    name = "pq_pixels" if source.images.ndim == 4 else "pq_embeddings"
    project = baselines.pca(database.features[sample], bits)
    projected = project(queries.features)  # all at once: products of other shapes round differently
    signs = baselines.sign_bits(database.features[sample], bits)
    codes = signs(database.features)
    others: dict[str, retrieval.Scorer] = {}
    if name == "pq_embeddings":
        mean = inputs(split.database[sample]).mean(axis=0, keepdims=True)
        others["float_embeddings"] = _cosine(inputs(split.query) - mean, inputs(split.database) - mean)
    if name == "pq_embeddings" and len(sample) >= q.num_codewords:
        width = q.num_codebooks * q.codeword_dim
        shape = {"num_codebooks": q.num_codebooks, "num_codewords": q.num_codewords, "width": width}
        rotation = opq.rotation(inputs(split.database[sample]), **shape, seed=None)
        rotated = (inputs(split.query) - mean) @ rotation
        others["opq_embeddings"] = pq(lambda b: rotated[b], lambda i: (inputs(split.database[i]) - mean) @ rotation)
    fewer = sample[: int(config.eval.baseline_mib * 2**20 / inputs(split.query[:1]).nbytes)]
    if len(fewer) >= min(FAISS_LEAST * q.num_codewords, len(sample)):
        others[name] = pq(lambda b: inputs(split.query[b]), lambda i: inputs(split.database[i]), fewer)
    else:
        logger.warning(
            f"no {name}: eval.baseline_mib {config.eval.baseline_mib} leaves {len(fewer):,} rows to train on"
        )
    return others | {
        "pq_features": pq(lambda b: queries.features[b], lambda i: database.features[i]),
        "pca_pq_features": pq(lambda b: projected[b], lambda i: project(database.features[i])),
        "pca_sign_features": lambda block: signs(queries.features[block]) @ codes.T,
    }
