"""What a search may start from, thresholds, and what an index says of itself."""

import json
import shutil

import numpy as np
import pytest

import small
from tcq import config, encode, ranking
from tcq import index as indexes
from tcq.index import info
from tcq.index.search import thumbnail


def hits_of(done):
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_same(answer, other):
    """Equal but for the rounding of features in batches of other sizes."""
    assert answer["query"] == other["query"]
    np.testing.assert_allclose(*([h["score"] for h in a["hits"]] for a in (answer, other)), atol=1e-5)
    assert [h["path"] for h in answer["hits"]] == [h["path"] for h in other["hits"]]


@pytest.fixture
def opened(index):
    return indexes.open_index(index)


def test_a_small_picture_takes_the_largest_image_that_the_index_takes(opened):
    strict = opened.replace(config=config.with_eval(opened.config, []))
    strict.config.data.max_pixels = 98  # images have 11 x 9
    grays = [np.ptp(thumbnail(i, opened.paths[1])) == 0 for i in (opened, strict)]
    assert grays == [False, True]


def test_items_are_queries_without_their_images(index, opened, images, monkeypatch):
    monkeypatch.setattr(encode, "encode", None)  # the model is not needed
    place = 17
    decoded = opened.encoder.codebooks[np.arange(2), opened.codes[place]].reshape(1, -1)
    truth = -((decoded - opened.encoder.codebooks[np.arange(2), opened.codes].reshape(120, -1)) ** 2).sum(1)
    for name in (str(opened.ids[place]), opened.paths[place]):
        (answer,) = hits_of(small.main("search", f"--index={index}", "--item", name, "--json", "--k=120"))
        assert answer["query"] == name
        np.testing.assert_allclose([h["score"] for h in answer["hits"]], np.sort(truth)[::-1], atol=1e-4)
        assert answer["hits"][0]["score"] == pytest.approx(0, abs=1e-4)
    for name in ("9999", str(images / "class 3"), "nowhere.png"):
        small.assert_refused(small.main("search", f"--index={index}", "--item", name), f"{name!r} names")


def test_a_folder_of_queries_gives_a_line_for_each_image(index, images, tmp_path):
    folder = shutil.copytree(images / "class 2", tmp_path / "queries")
    done = small.main("search", f"--index={index}", f"--query={folder}", "--json", "--k=3")
    found = hits_of(done)
    assert [a["query"] for a in found] == sorted(str(p) for p in folder.glob("[0-9]*.png"))
    for answer in found[:3]:
        (alone,) = hits_of(small.main("search", f"--index={index}", f"--query={answer['query']}", "--json", "--k=3"))
        assert_same(alone, answer)
    assert "left out: query" in done.stderr and "text.png" in done.stderr
    (tmp_path / "empty").mkdir()
    small.assert_refused(small.main("search", f"--index={index}", f"--query={tmp_path / 'empty'}"), "holds no files")


def test_many_queries_in_blocks(index, images, monkeypatch):
    from tcq import cli_search

    flags = ["search", f"--index={index}", f"--query={images / 'class 4'}", "--json", "--k=5"]
    whole = hits_of(small.main(*flags))
    monkeypatch.setattr(cli_search, "BLOCK", 4)
    found = hits_of(small.main(*flags))
    assert len(found) == len(whole) > 8
    for one, other in zip(found, whole, strict=True):
        assert_same(one, other)


def test_several_images_are_one_query(index, opened, images):
    queries = [str(images / "class 3" / "003.png"), str(images / "class 5" / "005.png")]
    flags = ["search", f"--index={index}", "--json", "--k=120", "--query", *queries]
    (answer,) = hits_of(small.main(*flags, "--together"))
    scores = np.zeros(120)
    for single in hits_of(small.main(*flags)):
        for hit in single["hits"]:
            scores[hit["id"]] += hit["score"] / 2
    np.testing.assert_allclose([h["score"] for h in answer["hits"]], np.sort(scores)[::-1], atol=1e-4)
    np.testing.assert_allclose([scores[h["id"]] for h in answer["hits"]], np.sort(scores)[::-1], atol=1e-4)


def test_features_are_queries(index, opened, images, tmp_path):
    query = images / "class 3" / "003.png"
    features = encode.encode(opened.encoder, indexes.read_queries(opened, [query])).features
    np.save(tmp_path / "f.npy", features[0])
    (found,) = hits_of(small.main("search", f"--index={index}", f"--features={tmp_path / 'f.npy'}", "--json"))
    (truth,) = hits_of(small.main("search", f"--index={index}", f"--query={query}", "--json"))
    assert found["hits"] == truth["hits"]
    np.save(tmp_path / "f.npy", features[0, :3])
    small.assert_refused(
        small.main("search", f"--index={index}", f"--features={tmp_path / 'f.npy'}"), "one row or several of 8 floats"
    )


def test_a_least_score(index, images):
    flags = ["search", f"--index={index}", f"--query={images / 'class 3' / '003.png'}", "--json", "--k=120"]
    (whole,) = hits_of(small.main(*flags))
    least = whole["hits"][30]["score"]
    (some,) = hits_of(small.main(*flags, f"--min_score={least}"))
    assert some["hits"] == [h for h in whole["hits"] if h["score"] >= least] and 30 < len(some["hits"]) < 120
    done = small.main(*flags, "--min_score=1")
    (none,) = hits_of(done)
    assert none["hits"] == []
    assert f"1 of 1 queries have no hit of --min_score 1.0: best {whole['hits'][0]['score']:.6f}" in done.stderr
    assert "no hit" not in small.main(*flags, f"--min_score={least}").stderr


def test_a_query_is_needed(index):
    small.assert_refused(small.main("search", f"--index={index}"), "--query, --item or --features is missing")


def test_thresholds_are_quantiles_of_pairs(index, opened, monkeypatch):
    queries = indexes.read_queries(opened, list(opened.paths))
    tables = indexes.tables(opened, encode.encode(opened.encoder, queries).features)
    scores = np.asarray(ranking.scores(tables, opened.codes))
    pairs = np.sort(scores[~np.eye(120, dtype=bool)])[::-1]
    found, readable = indexes.thresholds(opened)
    assert readable and [t.share for t in found] == [1e-3, 1e-6]
    assert found[0].score == pairs[round(1e-3 * len(pairs)) - 1] and found[1].score is None
    monkeypatch.setattr(info, "BEYOND", 100)  # a sample of the images is enough
    monkeypatch.setattr(info, "SHARES", (0.05,))
    sampled = [indexes.thresholds(opened, seed=s)[0][0].score for s in range(9)]
    assert pairs[round(0.09 * len(pairs))] < np.median(sampled) < pairs[round(0.025 * len(pairs))]
    assert len(set(sampled)) > 1


def test_info_says_what_an_index_holds(run, images, tmp_path):
    folder = shutil.copytree(images / "class 3", tmp_path / "photos")
    (tmp_path / "own.csv").write_text("path,year\n003.png,1999\n")
    indexes.build(run, folder, tmp_path / "index", own_columns=tmp_path / "own.csv")
    indexes.add(tmp_path / "index", images / "class 4")
    count = len(list(folder.glob("[0-9]*.png")))
    shutil.rmtree(folder)
    indexes.remove(tmp_path / "index", [str(folder / "003.png")])
    done = small.main("index", "info", f"--index={tmp_path / 'index'}")
    assert done.returncode == 0, done.stderr
    assert f"{folder} ({count - 1})" in done.stdout and "year (int64)" in done.stdout
    assert "scan of all items" in done.stdout and "because no images can be read" in done.stdout
    (about,) = hits_of(small.main("index", "info", f"--index={tmp_path / 'index'}", "--json"))
    assert about["segments"] == 2 and about["rows_out_of_date"] == 1 and about["bits"] == 6
    sizes = [p.stat().st_size for p in (tmp_path / "index").iterdir()]
    assert 0.7 * sum(sizes) < about["bytes"] < sum(sizes)
