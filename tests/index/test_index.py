import json
import os
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

import small
from tcq import config as configs
from tcq import encode, nearest
from tcq import index as indexes


def test_ranked_paths_with_scores(index, images, tmp_path):
    query, gallery = images / "class 3" / "003.png", tmp_path / "out.png"
    done = small.main("search", f"--index={index}", f"--query={query}", "--k=120", f"--gallery={gallery}")
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [int(r[0]) for r in rows] == list(range(1, 121))
    scores = [float(r[1]) for r in rows]
    assert scores == sorted(scores, reverse=True) and scores[0] > scores[-1]
    assert all(r[2].startswith(str(images)) for r in rows)
    with Image.open(gallery) as picture:
        assert picture.size[0] > 200


@pytest.mark.whole
def test_output_for_programs(run, images, tmp_path):
    folder = tmp_path / "names"
    folder.mkdir()
    names = [b"tab\there.png", b"line\nbreak.png", b"\xff.png"]
    for name in names:
        shutil.copy(images / "class 3" / "003.png", os.fsdecode(os.fsencode(folder) + b"/" + name))
    indexes.build(run, folder, tmp_path / "index")
    command = ("search", f"--index={tmp_path / 'index'}", f"--query={images / 'class 3' / '003.png'}")
    plain = small.tcq(*command)
    assert [line.count("\t") for line in plain.stdout.splitlines()] == [2, 2, 2], plain.stdout
    (row,) = map(json.loads, small.tcq(*command, "--json").stdout.splitlines())
    assert {os.fsencode(os.path.basename(h["path"])) for h in row["hits"]} == set(names)
    assert row["query"].endswith("003.png") and row["hits"][0]["score"] >= row["hits"][1]["score"]
    environment = small.environment()
    done = subprocess.run([*small.command(), *command, "--null"], capture_output=True, env=environment)
    assert {os.path.basename(p) for p in done.stdout.split(b"\0")[:-1]} == set(names), done.stderr


def test_search_ranks_all_codes(index, images):
    opened = indexes.open_index(index)
    query = indexes.read_queries(opened, [images / "class 3" / "003.png"])
    q = encode.encode(opened.encoder, query).features[0].astype(np.float64)
    items = np.concatenate([opened.encoder.codebooks[m][opened.codes[:, m]] for m in range(2)], axis=1)
    truth = -((q - items) ** 2).sum(1)
    hits = indexes.search(opened, query, k=120)[0]
    np.testing.assert_allclose([h.score for h in hits], np.sort(truth)[::-1], atol=1e-4)
    by_path = dict(zip(opened.paths, truth, strict=True))
    np.testing.assert_allclose([h.score for h in hits], [by_path[h.path] for h in hits], atol=1e-4)


@pytest.mark.parametrize("cosine", [False, True])
def test_one_query_and_many_have_the_same_answers(index, monkeypatch, cosine):
    """Whether the items are scanned, or an engine is built for them."""
    random = np.random.RandomState(0)
    opened = indexes.open_index(index)
    if cosine:
        config = configs.from_json(configs.to_json(opened.config))
        config.eval.score = "cosine"
        opened = opened.replace(config=config)
    assert (opened.norms is not None) == cosine
    features = random.randn(20, opened.encoder.codebooks[:, 0].size).astype("f4")
    monkeypatch.setattr(nearest, "FEW", 1)
    monkeypatch.setattr(nearest, "MANY_BY_CODE", 1)
    scores, ids = indexes.search_features(opened, features, k=30)
    engine = indexes.build_engine(opened)
    assert nearest.name(engine).startswith("buckets by code")
    for row in range(20):
        for options in ({}, {"engine": engine}):
            found = indexes.search_features(opened, features[row : row + 1], k=30, **options)
            np.testing.assert_array_equal(found[0], scores[row : row + 1])
            np.testing.assert_array_equal(found[1], ids[row : row + 1])


def test_skipped_files_have_reasons(index):
    skipped = [json.loads(x) for x in (index / "skipped.jsonl").read_text().splitlines()]
    names = {"empty.png", "truncated.png", "text.png", "page.html", "zeros.jpg"}
    assert {s["path"].split("/")[1] for s in skipped} == names
    assert all(s["reason"] for s in skipped)


def test_an_index_needs_nothing_else(run, images, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    indexes.build(tmp_path / "run", images, tmp_path / "a" / "index")
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "a").rename(tmp_path / "b")
    assert len(indexes.open_index(tmp_path / "b" / "index").paths) == 120


def test_any_file_name_is_printed_and_drawn(run, images, tmp_path):
    folder = tmp_path / "names"
    folder.mkdir()
    for name in (b"cost_$5_$6.png", b"\xff.png", "\u00fc \u6f22.png".encode(), b"line\nbreak.png"):
        shutil.copy(images / "class 3" / "003.png", os.fsdecode(os.fsencode(folder) + b"/" + name))
    indexes.build(run, folder, tmp_path / "index")
    query, gallery = images / "class 3" / "003.png", tmp_path / "gallery.png"
    done = small.tcq("search", f"--index={tmp_path / 'index'}", f"--query={query}", f"--gallery={gallery}")
    assert done.returncode == 0, done.stderr
    assert "cost_$5_$6.png" in done.stdout
    assert gallery.stat().st_size > 1000


def test_add_and_remove(run, images, tmp_path):
    out = tmp_path / "index"
    indexes.build(run, images / "class 1", out)
    before = indexes.open_index(out)
    done = small.main("index", f"--out={out}", "--add", f"--images={images}")
    assert done.returncode == 0 and f"{120 - len(before.paths)} images added" in done.stdout, done.stderr
    after = indexes.open_index(out)
    np.testing.assert_array_equal(after.codes[: len(before.codes)], before.codes)
    assert sorted(set(after.paths)) == sorted(after.paths) and len(after.paths) == 120
    removed = indexes.remove(out, [str(images / "class 1"), str(images / "class 3" / "003.png")])
    assert removed == len(before.paths) + 1
    left = indexes.open_index(out)
    assert not [p for p in left.paths if "class 1" in p or p.endswith("003.png")]
    by_path = dict(zip(after.paths, after.codes.tolist(), strict=True))
    assert [by_path[p] for p in left.paths] == left.codes.tolist()
    with pytest.raises(indexes.IndexFileError, match="nowhere not found in index"):
        indexes.remove(out, ["nowhere"])
    assert [p.name for p in tmp_path.iterdir()] == ["index"]


def test_a_refusal_leaves_nothing_behind(run, index, images, tmp_path):
    out = tmp_path / "out"

    def refused(command, *arguments):
        return lambda *messages: small.assert_refused(small.main(command, *arguments), *messages)

    refused("index", f"--workdir={tmp_path}", f"--images={images}", f"--out={out}")("holds no config.json")
    refused("index", f"--workdir={run}", "--images=/no/such", f"--out={out}")("'/no/such' not found")
    refused("index", f"--workdir={run}", f"--images={images}", f"--out={index}")("exists: choose another --out")
    refused("index", f"--workdir={run}", f"--out={out}")("--images is missing")
    refused("index", f"--images={images}", f"--out={out}")("--workdir is missing")
    refused("search", f"--index={tmp_path}", f"--query={images}")("is not an index")
    refused("search", f"--index={index}", f"--query={images / 'none.png'}")("none.png", "No such file")
    refused("search", f"--index={index}", f"--query={images / 'class 2' / 'text.png'}")("not an image")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("key", "value"), [("width", 32), ("depth", 2), ("pooling", "cls")])
def test_a_checkpoint_that_does_not_fit_its_config(run, images, tmp_path, key, value):
    shutil.copytree(run, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["model"][key] = value
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    done = small.main("index", f"--workdir={tmp_path / 'run'}", f"--images={images}", f"--out={tmp_path / 'out'}")
    small.assert_refused(done, "does not fit the model")
    assert not (tmp_path / "out").exists()


def file_of(folder, name, meta="meta.json"):
    """The newest segment for "items"; else a file by its name."""
    return folder / (json.loads((folder / meta).read_text())["segments"][-1][0] if name == "items" else name)


@pytest.mark.parametrize("name", ["items", "encoder.npz", "config.json", "meta.json"])
def test_corruption_is_noticed(index, tmp_path, name):
    shutil.copytree(index, tmp_path / "index")
    file = file_of(tmp_path / "index", name)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(indexes.IndexFileError, match=str(tmp_path / "index")):
        indexes.open_index(tmp_path / "index")
    file.unlink()
    with pytest.raises(indexes.CorruptedError, match="missing|is not an index"):
        indexes.open_index(tmp_path / "index")


def test_a_corrupted_index_falls_back_to_the_one_before_its_last_change(run, images, tmp_path, logs):
    indexes.build(run, images / "class 3", tmp_path / "index")
    before = indexes.open_index(tmp_path / "index")
    indexes.add(tmp_path / "index", images / "class 4")
    assert len(indexes.open_index(tmp_path / "index").paths) > len(before.paths)
    for name in ("items", "meta.json"):
        copy = shutil.copytree(tmp_path / "index", tmp_path / "copy" / "index")
        file_of(copy, name).unlink()
        logs.clear()
        assert list(indexes.open_index(copy).paths) == list(before.paths)
        assert f"corrupted: '{copy}" in logs.text
        assert f"falling back to the index before its last change, with {len(before.paths)} images" in logs.text
        shutil.rmtree(tmp_path / "copy")
