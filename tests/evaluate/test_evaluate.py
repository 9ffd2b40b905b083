"""Scoring a run by the command line."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import small
from tcq import encode, evaluate, metrics, train
from tcq.data import sources, splits
from tcq.evaluate import report
from write_images import write_images


@pytest.fixture(scope="module")
def scored(run, tmp_path_factory):
    """A copy of the run, its results, and what evaluate printed."""
    workdir = shutil.copytree(run, tmp_path_factory.mktemp("scored") / "run")
    done = small.main("evaluate", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    return workdir, json.loads((workdir / "results.json").read_text()), done.stdout


def test_results_have_what_a_reader_needs(scored):
    workdir, results, printed = scored
    assert "FAISS PQ on pixels" in printed and "gallery.png" in printed
    assert results["protocol"] == "folder" and results["bits"] == 6 and results["k"] == 108
    assert set(results["mAP"]) == set(evaluate.NAMES) - set(report.OF_EMBEDDINGS)
    assert all(0 < v <= 1 for v in results["mAP"].values())
    assert results["mAP"]["best_possible"] == max(results["mAP"].values())
    assert set(results["precision_at"]["asymmetric"]) == {"1", "10", "100", "108"}
    assert results["mAP"]["pq_pixels"] > results["mAP"]["random"]
    conventions = results["conventions"]
    assert conventions["query_excluded"] is True and conventions["query_in_database"] is False
    assert {"ties", "denominator", "empty", "relevance", "similarity"} < set(conventions)
    assert results["sizes"] == {"query": 12, "database": 108, "train": 97, "validation": 11}
    for name in (report.GALLERY, report.CURVES):
        with Image.open(workdir / name) as picture:
            assert min(picture.size) > 200


def test_map_is_that_of_the_stored_codes(run, scored):
    """The number in results.json, computed from codes by NumPy alone."""
    _, results, _ = scored
    encoder = encode.load(run)
    source = sources.open_source(encoder.config.data)
    split = splits.of_source(source, encoder.config.data)
    queries = encode.encode(encoder, source.images[split.query]).features.astype(np.float64)
    codes = encode.encode(encoder, source.images[split.database]).codes
    items = np.concatenate([encoder.codebooks[m][codes[:, m]] for m in range(2)], axis=1)
    relevant = source.labels[split.query][:, None] == source.labels[split.database]
    scores = np.round(-((queries[:, None] - items) ** 2).sum(-1), 4)
    ours = metrics.mean_average_precision(scores, relevant, k=108)
    np.testing.assert_allclose(results["mAP"]["asymmetric"], ours, atol=2e-3)
    exact = metrics.mean_average_precision(np.zeros_like(scores), relevant, k=108)
    np.testing.assert_allclose(results["mAP"]["random"], exact, rtol=1e-9)


def test_devices_and_blocks_do_not_matter(run, scored, tmp_path, monkeypatch):
    workdir = shutil.copytree(run, tmp_path / "run")
    monkeypatch.setattr(evaluate, "BLOCK_BYTES", 3 * 8 * 8 * 3 * 4)  # three images at a time for FAISS
    again = evaluate.evaluate(workdir)  # on 8 devices
    results = scored[1]
    assert again["mAP"] == results["mAP"] and again["curves"] == results["curves"]


def test_conventions_can_be_overridden_and_are_recorded(scored, tmp_path):
    workdir, results, _ = scored
    copy = shutil.copytree(workdir, tmp_path / "run")
    flags = ["ties=worst", "k=5", "squared=false", "empty=skip", "denominator=all"]
    done = small.main("evaluate", f"--workdir={copy}", *(f"--config.eval.{f}" for f in flags))
    assert done.returncode == 0, done.stderr
    changed = json.loads((copy / report.beside("results.json", [f"--config.eval.{f}" for f in flags])).read_text())
    assert changed["k"] == 5 and changed["conventions"]["ties"].startswith("worst: ")
    assert changed["conventions"]["denominator"] == "all: relevant items in the database"
    assert changed["conventions"]["similarity"].startswith("minus the sum of the L2 distances of subvectors")
    assert changed["mAP"]["asymmetric"] < results["mAP"]["asymmetric"]
    assert changed["mAP"]["best_possible"] < 1  # more than 5 are relevant
    best = evaluate.evaluate(copy, overrides=["eval.ties=best"])  # the random row is an expectation for any ties
    np.testing.assert_allclose(best["mAP"]["random"], results["mAP"]["random"], rtol=1e-9)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.clip=3", "--config.loss.clip cannot be changed after training: only --config.eval.<key>=<value> can"),
        ("eval.ties=random", "eval.ties 'random' is unknown"),
        ("eval.k=x", "--config.eval.k=x: must be int"),
        ("eval.tie=best", "--config.eval.tie is unknown: did you mean eval.ties?"),
    ],
)
def test_other_overrides_are_refused(run, override, message):
    small.assert_refused(small.main("evaluate", f"--workdir={run}", f"--config.{override}"), message)


def test_recorded_figures_are_shown_beside(scored, tmp_path):
    (tmp_path / "recorded.json").write_text('{"mAP": {"another method": 0.5}}')
    text = evaluate.table(scored[1], evaluate.read_recorded(tmp_path / "recorded.json"))
    assert "another method" in text and "0.5000" in text
    with pytest.raises(evaluate.EvaluateError, match="must be a JSON file with"):
        evaluate.read_recorded(tmp_path / "none.json")


@pytest.mark.whole
def test_few_images_have_no_faiss_baselines(tmp_path):
    write_images(tmp_path / "images", [f"{c}/{i}.png" for c in "ab" for i in range(10)])
    flags = ["data.batch_size=8", "train.total_steps=1", "eval.every_steps=0", "quantizer.num_codewords=32"]
    flags += ["data.query=0.2", "data.validation=0.1", f"data.source=folder:{tmp_path / 'images'}"]
    train.train(small.config(*flags), tmp_path / "few")
    results = evaluate.evaluate(tmp_path / "few")  # 16 images in the database, 32 codewords
    assert results["mAP"]["pq_pixels"] is None
    assert 0 < results["mAP"]["asymmetric"] <= 1
    assert "random order" in evaluate.table(results)


@pytest.mark.whole
def test_without_labels_there_is_nothing_to_score(tmp_path):
    write_images(tmp_path / "images", [f"{i}.png" for i in range(12)])
    flags = ["data.batch_size=8", "train.total_steps=1", "eval.every_steps=0"]
    train.train(small.config(*flags, f"data.source=folder:{tmp_path / 'images'}"), tmp_path / "run")
    with pytest.raises(evaluate.EvaluateError, match="has no labels, so there is nothing to score"):
        evaluate.evaluate(tmp_path / "run")


def test_other_workdirs_and_checkpoints(run, tmp_path):
    small.assert_refused(small.main("evaluate", f"--workdir={tmp_path}"), "holds no config.json")
    small.assert_refused(small.main("evaluate", f"--workdir={run}", "--checkpoint=7"), "checkpoint '7' not found in")


def test_better_codes_by_faiss_are_a_warning(logs):
    for scores, warned in (
        ({"asymmetric": 0.5, "pq_embeddings": 0.4, "opq_embeddings": 0.5}, ""),
        (
            {"asymmetric": 0.5, "pq_embeddings": None, "opq_embeddings": 0.612},
            "OPQ and PQ on the embeddings scores 0.612",
        ),
        ({"asymmetric": 0.5, "pq_embeddings": 0.51, "opq_embeddings": 0.4}, "FAISS PQ on the embeddings scores 0.510"),
        ({"asymmetric": 0.5, "pq_embeddings": 0.504}, ""),
        ({"asymmetric": 0.5, "pq_features": 0.9}, ""),
    ):
        logs.clear()
        evaluate._warn_of_baselines(scores, 32)
        assert warned in logs.text and bool(warned) == bool(logs.text)
