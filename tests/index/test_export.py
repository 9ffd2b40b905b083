"""Exports, and the programs of docs/exchange.md that read them."""

import json
import re
import shutil
import subprocess

import duckdb
import faiss
import numpy as np
import pyarrow.parquet
import pytest

import small
from tcq import config as configs
from tcq import encode
from tcq import index as indexes
from tcq.index import columns, export, store

RULES = [
    ("l2", True, "none"),
    ("l2", False, "subvectors"),
    ("ip", True, "none"),
    ("ip", True, "whole"),
    ("ip", True, "subvectors"),
    ("cosine", True, "none"),
]


@pytest.fixture
def ruled(index, images, tmp_path):
    """Makes an index of 118 images with another scoring rule, and returns it with its path and a feature."""

    def make(score, squared, normalize):
        opened = indexes.open_index(index)
        config = configs.from_json(configs.to_json(opened.config))
        config.eval.score, config.eval.squared, config.eval.normalize = score, squared, normalize
        encoder = opened.encoder._replace(config=config)
        rows = np.delete(opened.rows, [5, 77])
        changed = opened.replace(load_encoder=lambda: encoder, config=config, rows=rows, segments=(), sha256={})
        changed.__dict__.pop("encoder", None)
        store.write(tmp_path / "ruled", changed, [])
        opened = indexes.open_index(tmp_path / "ruled")
        query = indexes.read_queries(opened, [images / "class 5" / "005.png"])
        return tmp_path / "ruled", opened, encode.encode(opened.encoder, query).features[0]

    return make


def assert_ranked(opened, feature, paths, scores):
    """The same scores, and each path has its own score: ties may stand in any order."""
    ours, _ = indexes.search_features(opened, feature[None], k=len(scores))
    np.testing.assert_allclose(scores, ours[0], rtol=1e-4, atol=1e-4)
    whole, order = indexes.search_features(opened, feature[None], k=len(opened.paths))
    own = {opened.paths[i]: s for i, s in zip(order[0].tolist(), whole[0].tolist(), strict=True)}
    np.testing.assert_allclose([own[p] for p in paths], scores, rtol=1e-4, atol=1e-4)
    assert len(set(paths)) == len(paths)


def blocks(language):
    text = (small.ROOT / "docs" / "exchange.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("rule", RULES)
def test_the_page_ranks_with_numpy_as_tcq_does(ruled, rule, tmp_path, monkeypatch):
    path, opened, feature = ruled(*rule)
    export.export(path, tmp_path / "items.parquet", format="parquet")
    monkeypatch.chdir(tmp_path)
    np.save("feature.npy", feature)
    (code,) = [b for b in blocks("python") if "np.argsort" in b]
    names = {}
    exec(code, names)
    assert len(names["hits"]) == 10
    assert_ranked(opened, feature, *zip(*names["hits"], strict=True))


@pytest.mark.parametrize("score", ["ip", "l2"])
def test_the_page_ranks_with_sql_as_tcq_does(ruled, score, tmp_path, monkeypatch):
    path, opened, feature = ruled(score, True, "none")
    export.export(path, tmp_path / "items.parquet", format="parquet")
    (query,) = blocks("sql")
    if score == "l2":
        query = re.sub(r"list_inner_product\((c, .*?\])\)\)\)", r"-pow(list_distance(\1), 2)))", query)
        assert "list_distance" in query
    monkeypatch.chdir(tmp_path)
    with duckdb.connect() as database:
        database.execute(f"SET VARIABLE feature = {feature.tolist()}")
        found = database.execute(query).fetchall()
    assert len(found) == 10
    assert_ranked(opened, feature, [row[1] for row in found], [row[2] for row in found])
    assert [opened.ids.tolist()[list(opened.paths).index(row[1])] for row in found] == [row[0] for row in found]


def test_a_parquet_file_has_all_columns(ruled, tmp_path):
    path, opened, _ = ruled("cosine", True, "none")
    (tmp_path / "own.csv").write_text(f"path,code7x\n{opened.paths[3]},9\n")
    rows = columns.joined(opened, columns.read(tmp_path / "own.csv"))
    path = tmp_path / "with columns"
    store.write(path, rows.replace(sha256={}, segments=()), [])
    export.export(path, tmp_path / "items.parquet", format="parquet")
    table = pyarrow.parquet.read_table(tmp_path / "items.parquet")
    names = ["id", "path", "hash", "size", "modified", "code7x", "code0", "code1", "norm"]
    assert table.column_names == names and len(table) == 118
    np.testing.assert_array_equal(table["id"], opened.ids)
    assert table["path"].to_pylist() == list(opened.paths)
    np.testing.assert_array_equal(np.stack([table["code0"], table["code1"]], axis=1), opened.codes)
    assert [x for x in table["code7x"].to_pylist() if x] == [9] and table["code7x"][3].as_py() == 9
    assert table["hash"].to_pylist() == [row.tobytes() for row in opened.hashes]
    done = small.main("export", f"--index={path}", f"--out={tmp_path / 'items.parquet'}", "--format=parquet")
    small.assert_refused(done, "exists")


@pytest.mark.parametrize(("score", "normalize"), [("l2", "none"), ("ip", "none"), ("ip", "subvectors")])
def test_faiss_ranks_as_tcq(ruled, score, normalize, tmp_path):
    path, opened, feature = ruled(score, True, normalize)
    done = small.main("export", f"--index={path}", f"--out={tmp_path / 'x.faiss'}")
    assert done.returncode == 0, done.stderr
    peer = faiss.read_index(str(tmp_path / "x.faiss"))
    about = json.loads((tmp_path / "x.faiss.json").read_text())
    assert about["normalize"] == normalize and about["score"] == score
    paths = dict(zip(about["ids"], about["paths"], strict=True))
    scaled = feature.reshape(2, -1)
    scaled = scaled / np.linalg.norm(scaled, axis=1, keepdims=True) if normalize == "subvectors" else scaled
    query = scaled.reshape(1, -1).astype("f4")
    distances, ids = peer.search(query, 9)
    sign = -1 if score == "l2" else 1
    assert_ranked(opened, feature, [paths[i] for i in ids[0].tolist()], sign * distances[0])
    chosen = [int(i) for i in opened.ids[[3, 7, 11]]]
    _, ids = peer.search(query, 3, params=faiss.SearchParametersIVF(sel=faiss.IDSelectorBatch(chosen)))
    assert sorted(ids[0].tolist()) == chosen
    peer.remove_ids(faiss.IDSelectorBatch(chosen))
    assert peer.ntotal == 115 and not set(chosen) & set(peer.search(query, 115)[1][0].tolist())


@pytest.mark.parametrize("rule", [("cosine", True, "none"), ("l2", False, "none")])
def test_what_faiss_does_not_score_is_refused(ruled, rule, tmp_path):
    path, _, _ = ruled(*rule)
    small.assert_refused(small.main("export", f"--index={path}", f"--out={tmp_path / 'x.faiss'}"), "FAISS")
    assert not (tmp_path / "x.faiss").exists() and not (tmp_path / "x.faiss.json").exists()


def test_npz_without_pickles(index, tmp_path):
    export.export(index, tmp_path / "x.npz", format="npz")
    opened = indexes.open_index(index)
    with np.load(tmp_path / "x.npz", allow_pickle=False) as saved:
        np.testing.assert_array_equal(saved["codes"], opened.codes)
        np.testing.assert_array_equal(saved["codebooks"], opened.encoder.codebooks)
        assert saved["paths"][3].decode() == opened.paths[3] and saved["ids"][3] == opened.ids[3]
    small.assert_refused(small.main("export", f"--index={index}", f"--out={tmp_path / 'x.npz'}"), "exists")


def test_a_folder_that_is_missing_is_one_message(index, tmp_path):
    for format in export.FORMATS:
        out = tmp_path / "no" / "such" / "x"
        done = small.main("export", f"--index={index}", f"--out={out}", f"--format={format}")
        small.assert_refused(done, "its folder does not exist")


@pytest.mark.peers
@pytest.mark.parametrize("score", ["ip", "l2"])
def test_the_page_ranks_with_lance_as_tcq_does(ruled, score, tmp_path, monkeypatch):
    pytest.importorskip("lance")
    path, opened, feature = ruled(score, True, "none")
    export.export(path, tmp_path / "items.parquet", format="parquet")
    monkeypatch.chdir(tmp_path)
    np.save("feature.npy", feature)
    (code,) = [b for b in blocks("python") if "import lance" in b]
    if score == "l2":
        code = code.replace('metric="dot"', 'metric="L2"').replace("1 - answer", "-answer")
    names = {}
    exec(code, names)
    assert len(names["hits"]) == 10
    assert_ranked(opened, feature, *zip(*names["hits"], strict=True))


@pytest.mark.peers
@pytest.mark.parametrize("rule", RULES)
def test_node_ranks_as_tcq(ruled, rule, tmp_path, tmp_path_factory):
    if not shutil.which("npm"):
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.getbasetemp() / "node"
    if not folder.exists():
        folder.mkdir()
        done = subprocess.run(["npm", "install", "hyparquet", "hyparquet-compressors"], cwd=folder, capture_output=True)
        assert done.returncode == 0, done.stderr
    path, opened, feature = ruled(*rule)
    export.export(path, tmp_path / "items.parquet", format="parquet")
    (tmp_path / "feature.json").write_text(json.dumps(feature.tolist()))
    script = shutil.copy(small.ROOT / "examples" / "search.mjs", folder)
    command = ["node", script, tmp_path / "items.parquet", tmp_path / "feature.json", "10"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    hits = json.loads(done.stdout)
    assert len(hits) == 10
    assert_ranked(opened, feature, [h["path"] for h in hits], [h["score"] for h in hits])
