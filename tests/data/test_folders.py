import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

from tcq.data import cache, folders, sources
from tcq.data.source import SourceError
from write_images import write_images

RULE = cache.Rule(8)


def labels_of(names, rule="auto", root=Path("/nowhere")):
    return folders.labels([n.replace("/", os.sep) for n in names], rule, root)


def test_split_folders_are_not_classes():
    found = labels_of(["train/cat/a.png", "val/dog/b.png", "test/cat/c.png"])
    assert found.classes == ["cat", "dog"] and found.labels.tolist() == [0, 1, 0]
    assert "test, train, val are parts" in found.note
    assert labels_of(["Train/a.png", "TEST/b.png"]).labels is None
    assert labels_of(["train/cat/a.png", "plane/cat/b.png"]).classes == ["plane", "train"]
    below = labels_of(["set/train/cat/a.png", "set/test/dog/b.png"])
    assert below.classes == ["cat", "dog"]


@pytest.mark.parametrize("names", [["2019/a.jpg", "2020-07 Rome/b.jpg"], ["100CANON/a.jpg", "101CANON/b.jpg"]])
def test_years_and_cameras_are_classes_only_on_request(names):
    assert labels_of(names).labels is None and "data.labels=folders" in labels_of(names).note
    assert labels_of(names, "folders").labels.tolist() == [0, 1]
    assert labels_of(["cat/a.png", "dog/b.png"], "none").labels is None


def test_what_is_not_of_the_collection_is_left_out(tmp_path):
    write_images(tmp_path, ["a.png", "b/c.png", "@eaDir/a.png", "b/#recycle/x.png", "$RECYCLE.BIN/y.png"])
    write_images(tmp_path, [".thumbnails/a.png", "b/thumb_1.png", "old/d.png", "deep/er/e.png"])
    listing = folders.walk(tmp_path, "thumb_*, old, deep/er")
    assert listing.files == ["a.png", "b/c.png"]
    assert set(listing.excluded) == {"@eaDir", "b/#recycle", "$RECYCLE.BIN", "b/thumb_1.png", "old", "deep/er"}


def test_what_tcq_writes_is_never_input(tmp_path, run, index):
    import shutil

    from tcq import plots

    write_images(tmp_path, ["a.png", "b.png"])
    shutil.copytree(run, tmp_path / "runs" / "mine")
    write_images(tmp_path, ["runs/mine/curves.png"])
    shutil.copytree(index, tmp_path / "index")
    write_images(tmp_path, ["index/picture.png"])
    plots.gallery(tmp_path / "answers.png", [np.zeros((8, 8, 3), np.uint8)], [[np.zeros((8, 8, 3), np.uint8)]])
    source = sources.folder(tmp_path, RULE)
    assert source.names == ["a.png", "b.png"]
    assert [s["reason"] for s in source.skipped] == ["a picture that tcq has drawn"]


def test_any_name_has_labels(tmp_path):
    names = ["line\nbreak.png", "separator\u2028.png", 'quote".png', "comma, space.png"]
    write_images(tmp_path / "images", names)
    rows = [{"path": name, "label": str(i % 2)} for i, name in enumerate(names)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([row["path"], row["label"]] for row in rows)
    for table in ("a.csv", "a.jsonl"):
        source = sources.folder(tmp_path / "images", RULE, labels=str(tmp_path / table))
        assert [source.classes[i] for i in source.labels] == [str(names.index(n) % 2) for n in source.names], table


def test_labels_of_a_file(tmp_path):
    write_images(tmp_path / "images", ["a.png", "b/c.png", "d.png"])
    table = tmp_path / "labels.csv"
    table.write_text('path,label\na.png,cat\nb/c.png,"dog, brown"\nd.png,cat\nz.png,fox\n')
    source = sources.folder(tmp_path / "images", RULE, labels=str(table))
    assert source.classes == ["cat", "dog, brown"] and source.labels.tolist() == [0, 1, 0]
    table.write_text("a.png,cat,dog\nb/c.png,dog\n./d.png,fox\n")
    hot = sources.folder(tmp_path / "images", RULE, labels=str(table))
    assert hot.classes == ["cat", "dog", "fox"]
    np.testing.assert_array_equal(hot.labels, [[1, 1, 0], [0, 1, 0], [0, 0, 1]])
    lines = tmp_path / "labels.jsonl"
    lines.write_text('{"path": "a.png", "labels": ["cat", "dog"]}\n{"path": "b/c.png", "label": "dog"}\n')
    with pytest.raises(SourceError, match=r"has no label for 1 of 3 images, the first is 'd.png'.*data.exclude"):
        sources.folder(tmp_path / "images", RULE, labels=str(lines))
    found = sources.folder(tmp_path / "images", RULE, labels=str(lines), exclude="d.png")
    np.testing.assert_array_equal(found.labels, [[1, 1], [0, 1]])
    lines.write_text('{"path": "a.png"}\n')
    with pytest.raises(SourceError, match="line 1: KeyError"):
        sources.folder(tmp_path / "images", RULE, labels=str(lines))
    for wrong in ('{"path": 7, "label": "cat"}', '{"path": "a.png", "labels": "cat"}', "[]"):
        lines.write_text(wrong + "\n")
        with pytest.raises(SourceError, match="line 1: TypeError"):
            sources.folder(tmp_path / "images", RULE, labels=str(lines))
    table.write_bytes(b'a.png,"' + b"x" * 200_000 + b'"\n')
    with pytest.raises(SourceError, match="line 1: field larger than field limit"):
        sources.folder(tmp_path / "images", RULE, labels=str(table))
    with pytest.raises(SourceError, match=r"none.csv' not found"):
        sources.folder(tmp_path / "images", RULE, labels=str(tmp_path / "none.csv"))
