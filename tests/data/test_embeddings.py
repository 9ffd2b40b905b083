import io
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcq.data import embeddings
from tcq.data.rows import Rows
from tcq.data.source import SourceError


def write(root, *shards, metadata=None):
    """A folder as clip-retrieval leaves it: img_emb_<i>.npy in float16, metadata_<i>.parquet beside."""
    (root / "img_emb").mkdir(parents=True)
    start = 0
    for number, rows in enumerate(shards):
        np.save(root / "img_emb" / f"img_emb_{number}.npy", rows)
        if metadata:
            (root / "metadata").mkdir(exist_ok=True)
            part = {key: values[start : start + len(rows)] for key, values in metadata.items()}
            pyarrow.parquet.write_table(pyarrow.table(part), root / "metadata" / f"metadata_{number}.parquet")
        start += len(rows)
    return root


def changed(root, *tables):
    """The folder with other metadata."""
    for number, table in enumerate(tables):
        pyarrow.parquet.write_table(pyarrow.table(table), root / "metadata" / f"metadata_{number}.parquet")
    return root


def renamed(root):
    (root / "metadata" / "metadata_1.parquet").rename(root / "metadata" / "metadata_2.parquet")
    return root


def more(root):
    shutil.copy(root / "metadata" / "metadata_1.parquet", root / "metadata" / "metadata_2.parquet")
    return root


def broken(root, content):
    (root / "img_emb").mkdir(parents=True)
    (root / "img_emb" / "img_emb_0.npy").write_bytes(content)
    return root


def zipped():
    out = io.BytesIO()
    np.savez(out, a=rows(3))
    return out.getvalue()


def unreadable(root):
    (root / "metadata" / "metadata_0.parquet").write_bytes(b"PAR1 junk")
    return root


def rows(n, width=6, seed=0):
    return np.random.RandomState(seed).randn(n, width).astype("f2")


def test_shards_are_in_the_order_of_their_numbers(tmp_path):
    shards = [rows(3, seed=i) for i in range(11)]
    metadata = {"image_path": [f"p/{i}.jpg" for i in range(33)], "caption": ["a"] * 33, "label": list("abc") * 11}
    source = embeddings.open_folder(write(tmp_path / "e", *shards, metadata=metadata))
    assert source.images.shape == (33, 6) and source.images.dtype == "f2" and source.views is None
    np.testing.assert_array_equal(source.images[:], np.concatenate(shards))
    assert source.names == metadata["image_path"]
    assert source.classes == ["a", "b", "c"] and list(source.labels) == [0, 1, 2] * 11
    assert embeddings.width(tmp_path / "e") == 6


def test_plain_files_without_metadata(tmp_path):
    np.save(tmp_path / "a.npy", rows(5))
    source = embeddings.open_folder(tmp_path)
    assert source.labels is None and source.names[4] == "000000004"


@given(st.lists(st.integers(0, 7), min_size=1, max_size=5), st.data())
def test_rows_of_shards_are_those_of_the_whole(sizes, data):
    sizes = [*sizes, 1]
    whole = rows(sum(sizes))
    shards = Rows(np.split(whole, np.cumsum(sizes)[:-1]))
    index = data.draw(st.lists(st.integers(0, len(whole) - 1)))
    np.testing.assert_array_equal(shards[np.array(index, int)], whole[np.array(index, int)])
    part = data.draw(st.slices(len(whole)))
    np.testing.assert_array_equal(shards[part], whole[part])
    np.testing.assert_array_equal(shards[len(whole) - 1], whole[-1])
    np.testing.assert_array_equal(shards.with_axis()[part], whole[part][:, None])


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="the mapped pages are counted by Linux")
def test_rows_read_here_and_there_leave_few_pages_mapped(tmp_path):
    """The operating system maps many pages around each row that is read."""
    path, width, count = tmp_path / "rows.u8", 4096, 2**15
    with open(path, "wb") as file:
        file.truncate(width * count)
    rows = Rows([np.memmap(path, np.uint8, "r", shape=(count, width))])
    for first in range(0, count, 32):
        assert not rows[first : first + 1].any()
    lines = Path("/proc/self/smaps").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if str(path) in line)
    resident = next(line for line in lines[start:] if line.startswith("Rss:"))
    assert int(resident.split()[1]) * 1024 <= width * count / 4


def test_what_does_not_fit_is_refused(tmp_path):
    bad = rows(4)
    bad[2, 1] = np.inf
    six = {"path": list("abcdef")}
    views = write(tmp_path / "views", rows(4))
    (views / "view_emb").mkdir()
    np.save(views / "view_emb" / "view_emb_0.npy", np.zeros((3, 2, 6), "f4"))
    for folder, message in {
        tmp_path / "none": "no .npy files found",
        archives(tmp_path / "archives"): "the 2 .npz files hold several arrays each",
        write(
            tmp_path / "widths", rows(4), rows(4, 7)
        ): r"img_emb_1.npy: \(4, 7\) float16 must have the width and the floats of img_emb_0.npy, \(4, 6\) float16",
        write(tmp_path / "whole", np.zeros((4, 6), int)): r"\(4, 6\) int64 must have 2 axes of floats",
        write(tmp_path / "inf", bad): r"img_emb_0.npy: row 2 \(from 0\) has a number that is not finite",
        write(
            tmp_path / "large", rows(4).astype("f4"), 1e30 * rows(2).astype("f4")
        ): "img_emb_1.npy: row 0 .* above 1e",
        write(tmp_path / "rows", rows(4), metadata={"path": ["a"] * 3}): "3 rows for 4 embeddings",
        write(
            tmp_path / "labels", rows(2), metadata={"label": ["a", None]}
        ): r"metadata_0.parquet: row 1 \(from 0\) has no",
        changed(
            write(tmp_path / "lengths", rows(4), rows(2), metadata=six), {"path": ["a"] * 2}, {"path": ["b"] * 4}
        ): (r"img_emb_0.npy with 4 rows does not fit .*metadata_0.parquet with 2 rows"),
        renamed(write(tmp_path / "numbers", rows(4), rows(2), metadata=six)): (
            r"img_emb_1.npy with 2 rows does not fit .*metadata_2.parquet with 2 rows"
        ),
        more(write(tmp_path / "more", rows(4), rows(2), metadata=six)): "no file does not fit .*metadata_2.parquet",
        broken(tmp_path / "empty", b""): "img_emb_0.npy: cannot be read",
        broken(tmp_path / "zip", zipped()): "img_emb_0.npy: is an archive of arrays",
        write(tmp_path / "nothing", rows(0)): "the .npy files have no rows",
        write(tmp_path / "swapped", rows(3).astype(">f4")): "bits, in this machine's order of bytes: save it",
        write(
            tmp_path / "mixed", rows(3), rows(3).astype("f4")
        ): r"img_emb_1.npy: \(3, 6\) float32 must have .* float16",
        write(
            tmp_path / "late", np.concatenate([rows(9000), bad])
        ): r"img_emb_0.npy: row 9,002 \(from 0\) has a number that is not finite",
        write(
            tmp_path / "mixed labels", rows(2), metadata={"label": [[1], [2]]}
        ): r"row 0 .* the label \[1\] of type list",
        write(tmp_path / "no number", rows(2), metadata={"label": [1.0, np.nan]}): "label 1.0 of type float",
        unreadable(write(tmp_path / "junk", rows(4), metadata={"path": list("abcd")})): "metadata_0.parquet: cannot be",
        changed(write(tmp_path / "lacks", rows(4), rows(2), metadata=six), {"path": list("abcd"), "label": [0] * 4}): (
            "metadata_1.parquet: has no column 'label', which metadata_0.parquet has"
        ),
        write(
            tmp_path / "null", rows(2), metadata={"path": ["a", None]}
        ): "row 1 .* has None in column 'path': a name must",
        write(
            tmp_path / "blank", rows(2), metadata={"path": ["", "b"]}
        ): "row 0 .* has '' in column 'path': a name must be",
        write(tmp_path / "bytes", rows(2), metadata={"path": [b"a", b"b"]}): "row 0 .* has b'a' in column 'path'",
        write(tmp_path / "latin", rows(2), metadata={"path": not_utf8()}): "column 'path' is not UTF-8",
        changed(
            write(tmp_path / "second", rows(4), rows(2), metadata=six), {"path": list("abcd")}, {"path": ["e", None]}
        ): "metadata_1.parquet: row 1 .* has None in column",
        one_view(write(tmp_path / "one", rows(4))): r"view_emb: \(4, 1, 6\) must have two views or more",
        twice(write(tmp_path / "twice", rows(4))): "metadata_0.parquet: has more than one column 'path'",
        views: r"\(3, 2, 6\) does not fit the embeddings \(4, 6\)",
    }.items():
        with pytest.raises(SourceError, match=message):
            embeddings.open_folder(folder)


def one_view(root):
    (root / "view_emb").mkdir()
    np.save(root / "view_emb" / "view_emb_0.npy", np.zeros((4, 1, 6), "f4"))
    return root


def twice(root):
    (root / "metadata").mkdir(exist_ok=True)
    table = pyarrow.table([list("abcd"), list("efgh")], names=["path", "path"])
    pyarrow.parquet.write_table(table, root / "metadata" / "metadata_0.parquet")
    return root


def archives(folder):
    folder.mkdir()
    for i in range(2):
        np.savez(folder / f"{i}.npz", rows(3))
    return folder


def not_utf8():
    return pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, *map(pyarrow.py_buffer, (np.array([0, 1, 2], "i4").tobytes(), b"\xff\xfe"))]
    )


def test_equal_names_are_a_warning(tmp_path, logs):
    embeddings.open_folder(write(tmp_path / "a", rows(3), metadata={"path": list("aba")}))
    assert "rows with the name of another one: 1;" in logs.text


def test_hidden_files_and_pipes_are_no_shards(tmp_path, logs):
    write(tmp_path, rows(4))
    np.save(tmp_path / "img_emb" / ".img_emb_1.npy", rows(2))
    (tmp_path / "img_emb" / "._img_emb_0.npy").write_bytes(b"resource")
    os.mkfifo(tmp_path / "img_emb" / "img_emb_2.npy")
    assert len(embeddings.open_folder(tmp_path).images) == 4
    assert "no .parquet files found, so items have numbers as names" in logs.text


def test_a_row_has_the_digest_of_its_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "BLOCK", 3)
    two = rows(4), rows(4)[::-1]
    digests = embeddings.open_folder(write(tmp_path, *two)).digests
    assert len(digests) == 8 and len(set(digests)) == 4 and digests[:4] == digests[:3:-1]


def test_nothing_is_unpickled(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(SourceError, match="cannot be read"):
        embeddings.open_folder(tmp_path)


def test_metadata_holds_names_that_are_no_text(tmp_path):
    embeddings.write_metadata(tmp_path, ["caf\udce9.jpg", "b"], None, [])
    np.save(tmp_path / "rows.npy", rows(2))
    assert embeddings.open_folder(tmp_path).names == ["caf\\udce9.jpg", "b"]
