"""An index and a collection that changes: files are known by their contents."""

import json
import os
import shutil
import subprocess
import threading
import time
import types

import numpy as np
import pyarrow as pa
import pytest

import small
from tcq import encode
from tcq import index as indexes
from tcq.index import items
from tcq.runtime import locks


def by_name(path):
    opened = indexes.open_index(path)
    return {os.path.basename(p): c.tolist() for p, c in zip(opened.paths, opened.codes, strict=True)}


def test_edited_deleted_renamed_and_new_files(built, photos, images, monkeypatch):
    before = by_name(built)
    names = sorted(before)
    other = next((images / "class 7").iterdir())
    shutil.copy(other, photos / names[0])  # edited
    (photos / names[1]).unlink()  # deleted
    (photos / names[2]).rename(photos / "renamed.png")
    (photos / "below").mkdir()
    (photos / names[3]).rename(photos / "below" / names[3])
    shutil.copy(sorted((images / "class 8").iterdir())[0], photos / "new.png")
    encoded, codes = [], encode.codes
    monkeypatch.setattr(encode, "codes", lambda encoder, rows: encoded.append(len(rows)) or codes(encoder, rows))
    done = small.main("index", f"--out={built}", "--update")
    assert done.returncode == 0, done.stderr
    assert "1 images added, 1 edited, 2 moved, 1 removed" in done.stdout
    assert sum(encoded) == 2  # a file that was moved costs nothing
    after = by_name(built)
    assert after.keys() == (before.keys() - {names[1], names[2]}) | {"renamed.png", "new.png"}
    assert after["renamed.png"] == before[names[2]] and after[names[3]] == before[names[3]]
    opened = indexes.open_index(built)
    query = indexes.read_queries(opened, [photos / names[0]])
    assert after[names[0]] == encode.encode(opened.encoder, query).codes[0].tolist() != before[names[0]]
    assert indexes.update(built)[:4] == (0, 0, 0, 0)


def test_folders_that_overlap(run, images, tmp_path):
    photos = shutil.copytree(images, tmp_path / "photos")
    indexes.build(run, photos / "class 3", tmp_path / "index")
    assert indexes.add(tmp_path / "index", photos).added == 120 - len(list((images / "class 3").glob("[0-9]*.png")))
    (photos / "class 3" / "003.png").unlink()
    (photos / "class 4" / "004.png").unlink()
    assert indexes.update(tmp_path / "index", photos / "class 4")[:4] == (0, 0, 0, 1)
    assert indexes.update(tmp_path / "index", photos)[:4] == (0, 0, 0, 1)
    assert len(indexes.open_index(tmp_path / "index").paths) == 118


def test_add_keeps_what_is_gone(built, photos):
    before = by_name(built)
    (photos / sorted(before)[0]).unlink()
    done = indexes.add(built, photos)
    assert done[:4] == (0, 0, 0, 0) and by_name(built) == before


def test_a_moved_library_is_recognised(built, photos, tmp_path):
    before = by_name(built)
    photos.rename(tmp_path / "elsewhere")
    done = indexes.add(built, tmp_path / "elsewhere")
    assert (done.added, done.moved) == (0, len(before)) and by_name(built) == before
    assert all(p.startswith(str(tmp_path / "elsewhere")) for p in indexes.open_index(built).paths)
    assert indexes.update(built)[:4] == (0, 0, 0, 0)  # the old folder is forgotten


def test_a_root_is_changed_without_reading_images(built, photos, tmp_path):
    small.assert_refused(small.main("index", f"--out={built}", f"--root={tmp_path / 'no'}"), "none of the", "is there")
    photos.rename(tmp_path / "a=b")
    done = small.main("index", f"--out={built}", f"--root={photos}={tmp_path / 'a=b'}")
    assert done.returncode == 0 and str(tmp_path / "a=b") in done.stdout, done.stderr
    assert all(os.path.exists(p) for p in indexes.open_index(built).paths)


def test_a_folder_that_is_not_there_removes_nothing(built, photos, tmp_path):
    before = by_name(built)
    photos.rename(tmp_path / "unmounted")
    small.assert_refused(small.main("index", f"--out={built}", "--update"), "not found")
    photos.mkdir()  # an empty mount point
    small.assert_refused(small.main("index", f"--out={built}", "--update"), "holds no files")
    assert by_name(built) == before


def test_what_cannot_be_read_now_is_not_gone(built, photos, monkeypatch):
    from tcq.data import images as decoders

    before, opened = by_name(built), decoders.opened
    name = sorted(before)[0]
    os.utime(photos / name)

    def denied(source):
        if os.path.basename(source) == name:
            raise decoders.UnreadableError("cannot be read: Input/output error")
        return opened(source)

    monkeypatch.setattr(decoders, "opened", denied)
    assert indexes.update(built).removed == 0 and by_name(built) == before


def test_the_entry_with_the_given_name_goes(run, images, tmp_path, monkeypatch):
    photos = shutil.copytree(images / "class 3", tmp_path / "photos")
    (tmp_path / "elsewhere").mkdir()
    (photos / "003.png").rename(tmp_path / "elsewhere" / "linked.png")
    (photos / "favourite.png").symlink_to(photos / sorted(p.name for p in photos.iterdir())[0])
    (photos / "folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos link").symlink_to(photos)
    indexes.build(run, tmp_path / "photos link", tmp_path / "index")
    names = {os.path.relpath(p, photos.resolve()) for p in indexes.open_index(tmp_path / "index").paths}
    assert {"favourite.png", "folder/linked.png"} <= names
    monkeypatch.chdir(tmp_path)
    for name in ("photos/favourite.png", str(photos / "folder" / "linked.png"), "photos link/023.png"):
        if os.path.exists(name):
            indexes.remove(tmp_path / "index", [name])
            names -= {os.path.relpath(name, "photos link") if "link/" in name[:12] else os.path.relpath(name, "photos")}
        left = {os.path.relpath(p, photos.resolve()) for p in indexes.open_index(tmp_path / "index").paths}
        assert left == names, name


def test_a_file_that_moves_to_another_folder_of_the_index_is_not_encoded_again(run, images, tmp_path, monkeypatch):
    first, second = (shutil.copytree(images / f"class {i}", tmp_path / str(i)) for i in (3, 4))
    indexes.build(run, first, tmp_path / "index")
    indexes.add(tmp_path / "index", second)
    names = sorted(p.name for p in first.iterdir() if p.stem.isdecimal())
    (first / names[0]).rename(second / "from the other folder.png")
    encoded, codes = [], encode.codes
    monkeypatch.setattr(encode, "codes", lambda encoder, rows: encoded.append(len(rows)) or codes(encoder, rows))
    assert indexes.update(tmp_path / "index")[:4] == (0, 0, 1, 0) and sum(encoded) == 0


def test_urls_and_names_of_embeddings_are_matched_as_they_are(built, monkeypatch, tmp_path):
    from tcq.index import changes

    opened = indexes.open_index(built)
    names, codes = ["class 1/a.png", "class 1/b.png", "class 2/a.png"], opened.codes[:3]
    files = items.files("", names, [bytes(20)] * 3)
    parts = [items.rows(np.arange(3), root, files, codes, 8).slice(2 * root, 2 - root) for root in (0, 1)]
    index = opened.replace(
        table=pa.concat_tables(parts), rows=np.arange(3), roots=("gs://bucket/photos", ""), segments=()
    )
    assert list(index.paths) == ["gs://bucket/photos/class 1/a.png", "gs://bucket/photos/class 1/b.png", names[2]]
    assert changes.matches(index, "gs://bucket/photos/class 1/a.png") == [0]
    assert (
        changes.matches(index, "gs://bucket/photos/class 1/") == changes.matches(index, "gs://bucket/photos") == [0, 1]
    )
    assert changes.matches(index, "gs://bucket/photos2") == changes.matches(index, "gs://bucket/photos/class") == []
    assert changes.matches(index, "class 2/a.png") == [2] and changes.matches(index, "class 2") == []
    monkeypatch.chdir(tmp_path)
    for path in ("/class 1", "class 1", "/class 1/a.png", "/class 2/a.png", str(tmp_path / "class 1")):
        assert changes.matches(index, path) == [], path


def test_a_change_of_no_index_leaves_nothing_behind(images, tmp_path):
    for flags in (["--update"], ["--remove", "x"], [f"--root={images}"], ["--add", f"--images={images}"]):
        done = small.main("index", f"--out={tmp_path / 'no' / 'index'}", *flags)
        small.assert_refused(done, "not found")
        assert list(tmp_path.iterdir()) == []


def test_flags_that_do_not_go_together_are_refused(built, run, images):
    for flags, words in (
        (["--add", "--remove", "x"], "not allowed with"),
        (["--add", f"--images={images}", f"--workdir={run}"], "--add and --workdir do not go together"),
        (["--update", "--checkpoint=best"], "--update and --checkpoint do not go together"),
        (["--remove", "x", f"--images={images}"], "remove and --images do not go together"),
    ):
        done = (
            small.tcq("index", f"--out={built}", *flags)
            if "not allowed" in words
            else small.main("index", f"--out={built}", *flags)
        )
        assert done.returncode == 2 and words in done.stderr, done.stderr


def test_two_writers_at_once_lose_nothing(run, images, tmp_path):
    indexes.build(run, images / "class 1", tmp_path / "index")
    start = len(indexes.open_index(tmp_path / "index").paths)
    folders = [images / f"class {i}" for i in range(2, 6)]
    threads = [threading.Thread(target=indexes.add, args=(tmp_path / "index", f)) for f in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = start + sum(len([p for p in f.iterdir() if p.stem.isdecimal()]) for f in folders)
    assert len(indexes.open_index(tmp_path / "index").paths) == expected


def test_the_lock_of_a_killed_process_is_free_and_that_of_a_living_one_names_it(tmp_path):
    code = (
        "import time; from tcq.runtime import locks\n"
        f"with locks.lock({str(tmp_path / 'x')!r}, wait=False):\n print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [small.command()[0], "-c", code], stdout=subprocess.PIPE, text=True, env=small.environment()
    )
    assert process.stdout.readline() == "held\n"
    with (
        pytest.raises(locks.LockedError, match=f"in use by process {process.pid} on "),
        locks.lock(tmp_path / "x", wait=False),
    ):
        pass
    timer = threading.Timer(0.3, process.kill)
    timer.start()
    before = time.monotonic()
    with locks.lock(tmp_path / "x", wait=True):
        assert time.monotonic() - before > 0.2
    process.wait()
    process.stdout.close()


@pytest.mark.whole
def test_readers_see_the_old_or_the_new_index(built, images):
    from tcq.index import store

    small_index = indexes.open_index(built)
    indexes.add(built, images / "class 4")
    large = indexes.open_index(built)
    sizes = {len(small_index.paths), len(large.paths)}
    rows = small_index.rows, large.rows  # of the table of the large one
    ended = threading.Event()

    def write():
        try:
            for i in range(150):
                with store.changing(built):
                    now = indexes.open_index(built, verify=False)
                    store.write(built, now.replace(rows=rows[i % 2]), [])
        finally:
            ended.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = []
    while not ended.is_set() or not seen:
        opened = indexes.open_index(built)
        assert len(opened.codes) == len(opened.paths)
        seen.append(len(opened.paths))
    writer.join()
    assert set(seen) <= sizes and len(seen) > 2
    names = {p.name for p in built.iterdir()}
    assert not [n for n in names if n.startswith(".tmp-")] and len([n for n in names if n.startswith("items-")]) == 2


def test_an_index_that_is_replaced_while_it_is_opened_is_read_again(built, images, monkeypatch):
    from tcq.index import store

    small_index, real = indexes.open_index(built), store._open
    indexes.add(built, images / "class 4")
    large, writers = indexes.open_index(built), [0]

    def replaced(path, meta, verify):
        for _ in range(3 if not writers[0] else 0):  # the files of this version are deleted by the second change
            writers[0] += 1
            rows = small_index.table.slice(writers[0])
            store.write(built, small_index.replace(table=rows, rows=np.arange(len(rows)), segments=()), [])
        return real(path, meta, verify)

    monkeypatch.setattr(store, "_open", replaced)
    np.testing.assert_array_equal(indexes.open_index(built, verify=False).ids, small_index.ids[3:])
    assert len(large.paths) > len(small_index.paths)


def test_a_lock_file_that_is_deleted_meanwhile_is_opened_again(tmp_path):
    held, release = threading.Event(), threading.Event()

    def second():
        with locks.lock(tmp_path / "x", wait=True):
            held.set()
            release.wait(20)

    thread = threading.Thread(target=second)
    with locks.lock(tmp_path / "x", wait=False):  # deletes its file and folder at the end: nothing was written
        thread.start()
        time.sleep(0.3)
    assert held.wait(20)
    with pytest.raises(locks.LockedError), locks.lock(tmp_path / "x", wait=False):
        pass
    release.set()
    thread.join()


@pytest.mark.parametrize("moment", ["rows", "previous", "meta"])
def test_a_writer_that_is_killed_leaves_the_old_index(built, photos, images, moment, monkeypatch):
    from tcq.index import store

    before = by_name(built)
    with monkeypatch.context() as patch:

        def killed(*_):
            raise KeyboardInterrupt

        if moment == "rows":
            patch.setattr(store.pa.ipc, "new_file", killed)
        else:
            write_text = store.storage.write_text

            def write(path, text):
                if path.name == {"previous": store.PREVIOUS, "meta": store.META}[moment]:
                    raise KeyboardInterrupt
                write_text(path, text)

            patch.setattr(store.storage, "write_text", write)
        with pytest.raises(KeyboardInterrupt):
            indexes.add(built, images / "class 4")
    assert by_name(built) == before
    indexes.add(built, images / "class 4")
    assert len(by_name(built)) > len(before)
    assert not [p for p in built.iterdir() if p.name.startswith(".tmp-")]


def test_a_build_that_was_killed_is_begun_again(run, images, tmp_path):
    out = tmp_path / "index"
    out.mkdir()
    (out / ".lock").write_text("")
    (out / "items-0123.arrow").write_bytes(b"cut")
    (out / ".tmp-x").write_bytes(b"cut")
    indexes.build(run, images / "class 3", out)
    assert not (out / "items-0123.arrow").exists() and not (out / ".tmp-x").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("mine")
    with pytest.raises(indexes.IndexFileError, match="exists"):
        indexes.build(run, images / "class 3", tmp_path / "mine")
    assert json.loads((out / "meta.json").read_text())["count"] == len(np.unique(list(by_name(out))))


def test_a_full_disk_leaves_no_part_of_a_new_index(run, images, tmp_path, monkeypatch):
    from tcq.index import store

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_write_file", full)
    done = small.main("index", f"--workdir={run}", f"--images={images / 'class 3'}", f"--out={tmp_path / 'index'}")
    small.assert_refused(done, "cannot be written: No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_meanwhile_leaves_no_temporary_file(run, images, tmp_path, monkeypatch):
    from tcq.index import store

    indexes.build(run, images / "class 3", tmp_path / "i")
    before = sorted(p.name for p in (tmp_path / "i").iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "os", types.SimpleNamespace(**vars(os) | {"fsync": full}))
    done = small.main("index", "update", f"--index={tmp_path / 'i'}", f"--images={images / 'class 4'}", "--keep")
    small.assert_refused(done, "cannot be written: No space left on device")
    assert sorted(p.name for p in (tmp_path / "i").iterdir()) == before


@pytest.mark.slow
def test_kills_during_adds_while_others_read(run, images, tmp_path):
    """TCQ_KILLS adds (20) are killed at any moment; readers see whole indexes, and one more add completes."""
    import random

    out, chance = tmp_path / "index", random.Random(0)
    indexes.build(run, images / "class 1", out)
    sizes = {len(indexes.open_index(out).paths)}
    for kill in range(int(os.environ.get("TCQ_KILLS", "20"))):
        folder = images / f"class {2 + kill % 8}"
        command = small.command("index", f"--out={out}", "--add", f"--images={folder}")
        process = subprocess.Popen(
            command, env=small.environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        end = time.monotonic() + chance.uniform(0.5, 6)
        while process.poll() is None and time.monotonic() < end:
            opened = indexes.open_index(out)
            assert len(opened.codes) == len(opened.paths) == len(opened.hashes)
            sizes.add(len(opened.paths))
        process.kill()
        process.wait()
    indexes.add(out, images)
    assert len(indexes.open_index(out).paths) == 120
    assert not [p for p in out.iterdir() if p.name.startswith(".tmp-")]
    print(f"sizes seen: {sorted(sizes)}")
