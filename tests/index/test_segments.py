"""Rows, segments, ids and own columns of an index."""

import datetime
import json
import os
import shutil
import time

import duckdb
import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

import small
from tcq import encode
from tcq import index as indexes
from tcq.index import columns, contents, items, store


def files(folder, kind):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith(kind))


@pytest.mark.parametrize("num_codewords", [2, 4, 8, 16, 128, 256, 512, 65536])
@pytest.mark.parametrize("num_codebooks", [1, 3, 8])
def test_codes_are_packed_as_faiss_packs_them(num_codewords, num_codebooks, monkeypatch):
    monkeypatch.setattr(items, "BLOCK", 40)
    dtype = np.uint8 if num_codewords <= 256 else np.uint16
    codes = np.random.RandomState(0).randint(0, num_codewords, (101, num_codebooks)).astype(dtype)
    packed = items.pack(codes, num_codewords)
    bits = num_codewords.bit_length() - 1
    np.testing.assert_array_equal(packed, faiss.pack_bitstrings(codes.astype(np.int32), bits))
    unpacked = items.unpack(packed, num_codebooks, num_codewords)
    assert unpacked.dtype == dtype
    np.testing.assert_array_equal(unpacked, codes)
    assert items.pack(codes[:0], num_codewords).shape == packed[:0].shape


def test_ids_belong_to_images(built, photos, images):
    before = indexes.open_index(built)
    ids = {os.path.basename(p): i for p, i in zip(before.paths, before.ids.tolist(), strict=True)}
    names = sorted(ids)
    assert sorted(ids.values()) == list(range(len(names)))
    shutil.copy(next((images / "class 7").iterdir()), photos / names[0])  # edited
    (photos / names[1]).rename(photos / "moved.png")
    (photos / names[2]).unlink()
    indexes.update(built)
    shutil.copy(sorted((images / "class 8").iterdir())[0], photos / "new.png")
    indexes.update(built)
    after = indexes.open_index(built)
    now = {os.path.basename(p): i for p, i in zip(after.paths, after.ids.tolist(), strict=True)}
    assert now.pop("new.png") == len(names)  # never that of an image that was removed
    assert now.pop("moved.png") == ids.pop(names[1]) and ids.pop(names[2]) == 2
    assert now == ids
    assert (np.diff(after.ids) > 0).all() and len(after.segments) == 3
    assert indexes.compact(built) == (len(names) + 3, len(names))
    compacted = indexes.open_index(built)
    assert list(compacted.paths) == list(after.paths) and len(compacted.segments) == 1
    np.testing.assert_array_equal(compacted.ids, after.ids)
    np.testing.assert_array_equal(compacted.codes, after.codes)
    np.testing.assert_array_equal(compacted.hashes, after.hashes)


def test_a_change_writes_only_what_is_new(built, photos, images):
    first = files(built, "items")
    before = {p.name: p.stat().st_mtime_ns for p in built.iterdir()}
    shutil.copy(sorted((images / "class 8").iterdir())[0], photos / "new.png")
    time.sleep(0.01)
    indexes.update(built)
    assert set(first) < set(files(built, "items")) and len(files(built, "items")) == 2
    for name in (*first, "encoder.npz", "config.json"):
        assert (built / name).stat().st_mtime_ns == before[name]
    indexes.remove(built, [str(photos / "new.png")])
    assert len(files(built, "items")) == 2 and len(files(built, "removed")) == 1
    assert not [p for p in indexes.open_index(built).paths if p.endswith("new.png")]
    indexes.update(built)  # it is still in the folder
    assert [p for p in indexes.open_index(built).paths if p.endswith("new.png")]


def test_many_segments_and_many_removed_rows_are_compacted(built, photos, images, monkeypatch):
    monkeypatch.setattr(contents, "SEGMENTS", 3)
    for i, file in enumerate(sorted((images / "class 8").glob("0*.png"))[:4]):
        shutil.copy(file, photos / f"new{i}.png")
        indexes.update(built)
        assert len(indexes.open_index(built).segments) <= 3
    opened = indexes.open_index(built)
    assert len(opened.paths) == len(set(opened.paths)) == len(list(photos.glob("*[0-9].png")))
    indexes.remove(built, [str(p) for p in list(opened.paths)[: len(opened.paths) * 2 // 3]])
    left = indexes.open_index(built)
    assert len(left.table) == len(left.rows) and len(left.segments) == 1
    assert list(left.paths) == list(opened.paths)[len(opened.paths) * 2 // 3 :]


def test_an_index_may_become_empty_and_grow_again(built, photos):
    indexes.remove(built, [str(photos)])
    opened = indexes.open_index(built)
    assert len(opened.codes) == len(opened.paths) == 0
    assert indexes.search_features(opened, np.zeros((1, 8), "f4"), k=3)[1].shape == (1, 0)
    assert indexes.update(built, photos).added > 0
    assert indexes.open_index(built).ids[0] > 0


def test_rows_that_were_cut_or_mixed_up_are_noticed_without_hashes(built):
    file = built / files(built, "items")[0]
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(indexes.CorruptedError, match="corrupted"):
        indexes.open_index(built, verify=False)
    table = pa.ipc.open_file(pa.BufferReader(whole)).read_all()
    for other in (table.slice(1), table.drop_columns(["hash"])):
        with pa.ipc.new_file(str(file), other.schema) as writer:
            writer.write_table(other)
        with pytest.raises(indexes.CorruptedError, match="rows of|do not fit"):
            indexes.open_index(built, verify=False)


def test_a_changed_byte_is_noticed_by_verify_and_by_search(built, photos):
    done = small.main("index", "verify", f"--index={built}")
    assert done.returncode == 0 and "intact: 3 files" in done.stdout, done.stderr
    shutil.copy(photos / "003.png", photos / "copy.png")
    indexes.update(built)
    newest = built / json.loads((built / "meta.json").read_text())["segments"][-1][0]
    data = bytearray(newest.read_bytes())
    data[data.index(b"copy.png")] ^= 1  # a valid file with another name in it
    newest.write_bytes(data)
    small.assert_refused(small.main("index", "verify", f"--index={built}"), "corrupted", newest.name)
    query = f"--query={photos / '003.png'}"
    done = small.main("search", f"--index={built}", query, "--k=99")
    assert done.returncode == 0 and "falling back to the index before its last change" in done.stderr
    assert "bopy.png" not in done.stdout and "copy.png" not in done.stdout and "003.png" in done.stdout


def table_of(paths):
    return {"path": list(paths), "year": [2000 + i for i in range(len(paths))], "who": ["é"] * len(paths)}


def test_own_columns_come_back_and_are_filtered_on(run, photos, tmp_path):
    names = sorted(p.name for p in photos.glob("[0-9]*.png"))
    pa.parquet.write_table(pa.table(table_of(names[:-1])), tmp_path / "own.parquet")  # by the name below the folder
    flags = [f"--workdir={run}", f"--images={photos}", f"--out={tmp_path / 'index'}"]
    done = small.main("index", "build", *flags, f"--columns={tmp_path / 'own.parquet'}")
    assert done.returncode == 0, done.stderr
    of_images = len(names) - 1
    assert f"own columns: {of_images} of {of_images} rows are of images; 1 images have none" in done.stderr
    query, index = f"--query={photos / names[0]}", f"--index={tmp_path / 'index'}"
    done = small.main("search", index, query, "--json", "--k=99")
    hits = json.loads(done.stdout)["hits"]
    for hit in hits:
        place = names.index(os.path.basename(hit["path"]))
        last = place == len(names) - 1
        assert (hit["id"], hit["year"], hit["who"]) == (place, None if last else 2000 + place, None if last else "é")
    done = small.main("search", index, query, "--json", "--k=99", "--filter=year between 2001 and 2004 and size > 9")
    assert [h["path"] for h in json.loads(done.stdout)["hits"]] == [
        h["path"] for h in hits if h["year"] in range(2001, 2005)
    ]
    done = small.main("search", index, query, "--k=1")
    assert "\tyear=20" in done.stdout and "\twho=é" in done.stdout
    (tmp_path / "own.csv").write_text(  # complete paths
        f"path,year,score_of_mine\n{photos / names[1]},1900,0.5\n/elsewhere.png,1901,0.6\n"
    )
    done = small.main("index", "update", index, f"--columns={tmp_path / 'own.csv'}")
    assert done.returncode == 0, done.stderr
    assert "own columns: 1 of 2 rows are of images" in done.stderr
    opened = indexes.open_index(tmp_path / "index")
    rows = columns.of(opened, np.arange(3)).to_pylist()
    assert [r["year"] for r in rows] == [2000, 1900, 2002] and [r["score_of_mine"] for r in rows] == [None, 0.5, None]
    (photos / names[1]).rename(photos / "moved.png")
    (photos / names[0]).unlink()
    indexes.update(tmp_path / "index")
    opened = indexes.open_index(tmp_path / "index")
    assert opened.paths[0].endswith("moved.png") and columns.of(opened, [0]).to_pylist()[0]["year"] == 1900
    assert indexes.remove(tmp_path / "index", condition="year = 1900") == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name,year\na,1\n", "needs a column 'path'"),
        ("path\n003.png\n", "no column beside"),
        ("path,id\n003.png,1\n", "'id' is used by tcq"),
        ("path,year\n003.png,1\n003.png,2\n", "'003.png' is given twice"),
        ("path,year\nelsewhere.png,1\n", "none of its 1 paths is in the index"),
        ("path,year\n003.png,1,2\n", "cannot be read"),
    ],
)
def test_columns_that_do_not_fit_are_refused_first(run, photos, tmp_path, text, words, monkeypatch):
    (tmp_path / "own.csv").write_text(text)
    monkeypatch.setattr(encode, "codes", None)
    flags = [f"--workdir={run}", f"--images={photos}", f"--out={tmp_path / 'index'}"]
    done = small.main("index", "build", *flags, f"--columns={tmp_path / 'own.csv'}")
    small.assert_refused(done, words)
    assert not (tmp_path / "index").exists()


def test_filters_see_paths_sizes_and_dates(built, photos, images):
    os.utime(photos / "003.png", (1e9, 1e9))
    opened = indexes.open_index(built)
    names = [os.path.basename(p) for p in opened.paths]
    np.testing.assert_array_equal(
        indexes.where(opened, f"path like '{photos}/0%'"), [name.startswith("0") for name in names]
    )
    sizes = np.array([os.path.getsize(p) for p in opened.paths])
    np.testing.assert_array_equal(indexes.where(opened, f"size > {np.median(sizes)}"), sizes > np.median(sizes))
    assert indexes.where(opened, "modified > timestamp '2020-01-01'").all()
    indexes.remove(built, [str(photos / "003.png")])
    indexes.update(built)  # its date is now that of the file
    opened = indexes.open_index(built)
    assert [opened.paths[i] for i in np.flatnonzero(indexes.where(opened, "modified < timestamp '2020-01-01'"))] == [
        str(photos / "003.png")
    ]
    np.testing.assert_array_equal(indexes.where(opened, "id >= 5"), opened.ids >= 5)
    indexes.add(built, images / "class 4")
    opened = indexes.open_index(built)
    of_second = indexes.where(opened, f"starts_with(path, '{images}/class 4/')")
    np.testing.assert_array_equal(of_second, [p.startswith(f"{images}/class 4/") for p in opened.paths])
    assert 0 < of_second.sum() < len(of_second)


@pytest.mark.parametrize(
    "condition",
    [
        "sise > 3",
        "size >",
        "size > 3) or (1=1",
        "1=1; drop table items",
        "path in (select content from read_text('/etc/hostname'))",
    ],
)
def test_conditions_that_are_none_are_refused(built, condition):
    with pytest.raises(indexes.IndexFileError, match="the columns are id, path, size, modified"):
        indexes.where(indexes.open_index(built), condition)


def test_names_that_are_no_text_can_be_filtered(run, photos, tmp_path):
    os.rename(photos / "003.png", os.fsencode(photos) + b"/\xff.png")
    indexes.build(run, photos, tmp_path / "index")
    opened = indexes.open_index(tmp_path / "index")
    assert indexes.where(opened, "path like '%/?.png'").sum() == 1
    assert os.fsencode(opened.paths[int(np.argmax(indexes.where(opened, "path like '%/?.png'")))]).endswith(b"\xff.png")


def test_the_rows_are_read_by_other_programs(built):
    opened = indexes.open_index(built)
    table = pa.ipc.open_file(str(built / files(built, "items")[0])).read_all()
    assert duckdb.from_arrow(table).aggregate("count(*), max(id)").fetchall() == [
        (len(opened.paths), len(opened.paths) - 1)
    ]


@pytest.mark.parametrize("damage", [b"{broken", b"\xff\xfe{}"])
def test_a_corrupted_version_never_replaces_the_one_before(built, photos, images, damage, monkeypatch):
    shutil.copy(sorted((images / "class 8").iterdir())[0], photos / "new.png")
    before = list(indexes.open_index(built).paths)
    indexes.update(built)
    (built / "meta.json").write_bytes(damage)
    with monkeypatch.context() as patch:
        write_text = store.storage.write_text

        def killed(path, text):
            if path.name == "meta.json":
                raise KeyboardInterrupt
            write_text(path, text)

        patch.setattr(store.storage, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            indexes.remove(built, [before[0]])
    assert list(indexes.open_index(built).paths) == before
    indexes.remove(built, [before[0]])
    assert list(indexes.open_index(built, verify=True).paths) == before[1:]


def test_an_empty_path_is_nothing(built, photos, monkeypatch):
    monkeypatch.chdir(photos)
    small.assert_refused(small.main("index", "remove", f"--index={built}", ""), "not found in index")
    assert len(indexes.open_index(built).paths) > 0


def test_images_of_a_folder_that_is_away_are_not_moved(run, images, tmp_path):
    photos = shutil.copytree(images / "class 3", tmp_path / "disk")
    indexes.build(run, photos, tmp_path / "index")
    before = indexes.open_index(tmp_path / "index")
    (tmp_path / "other").mkdir()
    shutil.copy(photos / "003.png", tmp_path / "other" / "copy.png")
    photos.rename(tmp_path / "away")
    for empty in (False, True):  # not there, and a mount point without its disk
        if empty:
            photos.mkdir()
        done = indexes.update(tmp_path / "index", tmp_path / "other", keep=True)
        assert done.moved == 0
    after = indexes.open_index(tmp_path / "index")
    assert list(after.paths)[: len(before.paths)] == list(before.paths) and len(after.paths) == len(before.paths) + 1


def test_an_index_without_images_is_described_and_updated(built, photos):
    indexes.remove(built, [str(photos)])
    done = small.main("index", "info", f"--index={built}")
    assert done.returncode == 0 and "needs more images" in done.stdout, done.stderr
    assert indexes.update(built).added > 0


def test_what_is_skipped_stays_listed_and_removed_columns_go(run, photos, tmp_path):
    (tmp_path / "own.csv").write_text("path,year\n003.png,1999\n013.png,2000\n")
    indexes.build(run, photos, tmp_path / "index", own_columns=tmp_path / "own.csv")
    skipped = (tmp_path / "index" / "skipped.jsonl").read_text()
    assert skipped
    indexes.remove(tmp_path / "index", [str(photos / "003.png")])
    indexes.compact(tmp_path / "index")
    assert (tmp_path / "index" / "skipped.jsonl").read_text() == skipped
    assert indexes.open_index(tmp_path / "index").columns["year"].to_pylist() == [2000]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,year,Year\na,1,2\n", "two columns"),
        ("path,Path\na,1\n", "two columns"),
        ("path,TCQ_version\na,1\n", "used"),
    ],
)
def test_names_that_differ_in_case_alone_are_refused(tmp_path, text, words):
    (tmp_path / "own.csv").write_text(text)
    with pytest.raises(indexes.IndexFileError, match=words):
        columns.read(tmp_path / "own.csv")


def test_words_that_look_like_null_are_text(tmp_path):
    (tmp_path / "own.csv").write_text("path,country,n\nNA,NA,\nnull,None,2\n")
    table = columns.read(tmp_path / "own.csv")
    assert table.to_pydict() == {"path": ["NA", "null"], "country": ["NA", "None"], "n": [None, 2]}


def test_flags_before_an_action_are_refused():
    for flags in (["--quiet"], ["--workdir=w"], ["--distributed"]):
        done = small.tcq("index", *flags, "build", "--images=i", "--out=o")
        assert done.returncode == 2 and f"{flags[0].partition('=')[0]} must stand after build" in done.stderr


def test_a_config_of_others_is_not_overwritten(run, photos, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("mine")
    with pytest.raises(indexes.IndexFileError, match="exists"):
        indexes.build(run, photos, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "mine"


def test_a_folder_of_no_images_is_no_query(built, tmp_path):
    (tmp_path / "queries").mkdir()
    (tmp_path / "queries" / "a.txt").write_text("no image")
    for flags in ([], ["--together"]):
        done = small.main("search", f"--index={built}", f"--query={tmp_path / 'queries'}", *flags)
        small.assert_refused(done, "no image of these folders can be read")


def test_own_columns_as_json():
    day = datetime.datetime(2020, 1, 2, 3, tzinfo=datetime.UTC)
    own = {"a": float("inf"), "b": float("nan"), "c": 1.5, "d": day, "e": None, "f": True, "g": [1, float("inf")]}
    plain = columns.plain(own | {"h": {"x": day.date()}, "i": b"x", "j": "text"})
    assert json.loads(json.dumps(plain, allow_nan=False)) == {
        **{"a": None, "b": None, "c": 1.5, "d": "2020-01-02T03:00:00+00:00", "e": None, "f": True, "g": [1, None]},
        **{"h": {"x": "2020-01-02"}, "i": "b'x'", "j": "text"},
    }


def test_json_of_a_search_has_no_words_beyond_json(run, photos, tmp_path):
    (tmp_path / "own.csv").write_text("path,weight,day\n003.png,inf,2020-01-02\n")
    indexes.build(run, photos, tmp_path / "index", own_columns=tmp_path / "own.csv")
    done = small.main("search", f"--index={tmp_path / 'index'}", "--item", "0", "--json", "--k=99")
    assert done.returncode == 0, done.stderr

    def refuse(word):
        raise AssertionError(word)

    hits = json.loads(done.stdout, parse_constant=refuse)["hits"]
    assert next(h for h in hits if h["id"] == 0)["weight"] is None
