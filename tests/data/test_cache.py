import contextlib
import multiprocessing
import os
import shutil
import sqlite3
import sys
import time
import warnings

import numpy as np
import pytest

from tcq.data import cache, images, shards, sources
from tcq.data.cache import Item, Rule
from tcq.runtime import signals
from write_images import png, write_images


@pytest.fixture
def rule(tmp_path):
    return Rule(8, home=str(tmp_path / "home"))


@pytest.fixture
def decoded(monkeypatch):
    """The files that were decoded."""
    names = []
    read = images.read

    def counted(source, **options):
        names.append(os.path.basename(source))
        return read(source, **options)

    monkeypatch.setattr(images, "read", counted)
    return names


@pytest.fixture(autouse=True)
def _settled(monkeypatch):
    monkeypatch.setattr(cache, "RECENT", 0.0)  # else files written just now are always hashed again


def items(root):
    return [Item(p.name, p) for p in sorted(root.iterdir())]


def test_only_what_is_new_is_decoded(tmp_path, rule, decoded):
    write_images(tmp_path / "a", [f"{i:03d}.png" for i in range(20)])
    first = cache.decode(items(tmp_path / "a"), rule)
    assert len(decoded) == 20
    for name, pixels in zip(first.names, np.asarray(first.images), strict=True):
        np.testing.assert_array_equal(pixels, images.decode(tmp_path / "a" / name, size=8))
    decoded.clear()
    write_images(tmp_path / "a", ["new.png"], seed=5)
    second = cache.decode(items(tmp_path / "a"), rule)
    assert decoded == ["new.png"]
    np.testing.assert_array_equal(second.images[:20], first.images[:])
    decoded.clear()
    (tmp_path / "a").rename(tmp_path / "b")
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    for folder in ("b", "c"):  # a folder that was moved, and another with the same images
        np.testing.assert_array_equal(cache.decode(items(tmp_path / folder), rule).images[:], second.images[:])
    assert decoded == []
    write_images(tmp_path / "b", ["003.png"], seed=9)
    third = cache.decode(items(tmp_path / "b"), rule)
    assert decoded == ["003.png"] and not np.array_equal(third.images[3], second.images[3])
    cache.decode(items(tmp_path / "b"), rule._replace(size=9))
    assert len(decoded) == 22  # another rule


def test_files_are_hashed_only_if_they_may_have_changed(tmp_path, rule, monkeypatch):
    write_images(tmp_path / "a", ["0.png", "1.png"])
    cache.decode(items(tmp_path / "a"), rule)
    hashed, digest = [], cache.digest
    monkeypatch.setattr(cache, "digest", lambda source: hashed.append(source) or digest(source))
    cache.decode(items(tmp_path / "a"), rule)
    assert hashed == []
    monkeypatch.setattr(cache, "RECENT", 60.0)
    cache.decode(items(tmp_path / "a"), rule)
    assert len(hashed) == 2  # within the resolution of its time a file can change unseen


def test_what_cannot_be_read_now_is_tried_again_and_verdicts_on_contents_are_not(tmp_path, rule, decoded, monkeypatch):
    write_images(tmp_path / "a", ["0.png", "1.png"])
    (tmp_path / "a" / "text.png").write_text("text")
    opened = images.opened

    def denied(source):
        if os.path.basename(source) == "1.png":
            raise images.UnreadableError("cannot be read: Permission denied")
        return opened(source)

    with monkeypatch.context() as patch:
        patch.setattr(images, "opened", denied)
        first = cache.decode(items(tmp_path / "a"), rule)
    assert first.names == ["0.png"]
    reasons = {s["path"]: s["reason"] for s in first.skipped}
    assert reasons["1.png"] == "cannot be read: Permission denied"
    assert reasons["text.png"].startswith("not an image")
    decoded.clear()
    second = cache.decode(items(tmp_path / "a"), rule)
    assert second.names == ["0.png", "1.png"] and decoded == ["1.png"]
    assert [s["path"] for s in second.skipped] == ["text.png"]


def test_an_error_of_the_file_system_while_decoding_is_no_verdict(tmp_path, rule, decoded, monkeypatch):
    from PIL import Image

    write_images(tmp_path / "a", ["0.png"])

    def failing(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "draft", failing)
        first = cache.decode(items(tmp_path / "a"), rule)
    assert first.unreadable == ["0.png"] and "Input/output error" in first.skipped[0]["reason"]
    assert cache.decode(items(tmp_path / "a"), rule).names == ["0.png"]


def test_a_library_that_is_installed_later_is_used(tmp_path, rule, monkeypatch):
    pillow_heif = pytest.importorskip("pillow_heif")
    from PIL import Image

    (tmp_path / "a").mkdir()
    pillow_heif.from_pillow(Image.new("RGB", (40, 40), "red")).save(tmp_path / "a" / "0.heic")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pillow_heif", None)
        images._factories.cache_clear()
        assert "pip install pillow-heif" in cache.decode(items(tmp_path / "a"), rule).skipped[0]["reason"]
    images._factories.cache_clear()
    assert cache.decode(items(tmp_path / "a"), rule).names == ["0.heic"]


def test_repaired_files_are_listed_each_time(tmp_path, rule):
    (tmp_path / "a").mkdir()
    whole = png(np.random.RandomState(0).randint(0, 256, (60, 60, 3)).astype(np.uint8))
    (tmp_path / "a" / "cut.png").write_bytes(whole[: int(len(whole) * 0.97)])
    for _ in range(2):
        entry = cache.decode(items(tmp_path / "a"), rule)
        assert entry.names == ["cut.png"] and "lacks" in entry.repaired[0]["reason"]


def test_shards_are_filled_and_limited(tmp_path, rule, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 192 * 7)
    write_images(tmp_path / "a", [f"{i:03d}.png" for i in range(20)])
    for count in (1, 5, 6, 20):
        entry = cache.decode(items(tmp_path / "a")[:count], rule)
    sizes = [p.stat().st_size // 192 for p in sorted(rule.folder.glob("*.u8"))]
    assert sizes == [7, 7, 6]
    for name, pixels in zip(entry.names, np.asarray(entry.images), strict=True):
        np.testing.assert_array_equal(pixels, images.decode(tmp_path / "a" / name, size=8))


@pytest.mark.parametrize("damage", ["short", "gone", "database"])
def test_a_corrupted_cache_is_made_again(tmp_path, rule, damage):
    write_images(tmp_path / "a", ["0.png", "1.png"])
    first = np.array(cache.decode(items(tmp_path / "a"), rule).images)
    (shard,) = rule.folder.glob("*.u8")
    if damage == "short":
        os.truncate(shard, 200)
    elif damage == "gone":
        shard.unlink()
    else:
        (rule.folder / shards.DATABASE).write_bytes(b"garbage" * 1000)
    np.testing.assert_array_equal(cache.decode(items(tmp_path / "a"), rule).images[:], first)


def test_the_longest_unused_images_are_deleted(tmp_path, rule, decoded):
    limited = rule._replace(gib=2.5 * 192 * 4 / 2**30)  # two shards of four images and a half
    for name in "abc":
        write_images(tmp_path / name, [f"{i}.png" for i in range(4)], seed=ord(name))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shards, "SHARD_BYTES", 192 * 4)
            held = cache.decode(items(tmp_path / name), limited)
        if name == "a":
            first = held
        time.sleep(0.01)
    with contextlib.closing(sqlite3.connect(rule.folder / shards.DATABASE)) as database:
        assert database.execute("SELECT count(*) FROM images").fetchone() == (8,)
    assert np.asarray(first.images).shape == (4, 8, 8, 3)  # a process that uses them keeps them
    decoded.clear()
    assert len(cache.decode(items(tmp_path / "b"), limited).names) == 4 and not decoded
    assert len(cache.decode(items(tmp_path / "a"), limited).names) == 4 and len(decoded) == 4


def test_a_list_is_remembered_while_its_images_are_there(tmp_path, rule):
    write_images(tmp_path / "a", ["0.png", "1.png"])
    entry = cache.decode([Item(p.name, p.read_bytes) for p in sorted((tmp_path / "a").iterdir())], rule)
    cache.remember("key", entry.names, entry.digests, b"labels", rule)
    again, arrays = cache.recall("key", rule)
    np.testing.assert_array_equal(again.images[:], entry.images[:])
    assert again.names == entry.names and arrays == b"labels"
    assert cache.recall("other", rule) is None and cache.recall("key", rule._replace(size=9)) is None
    next(iter(rule.folder.glob("*.u8"))).unlink()
    assert cache.recall("key", rule) is None


def _decode_many(root, home, start, count, done):
    found = cache.decode([Item(str(i), root / f"{i:03d}.png") for i in range(start, start + count)], Rule(8, home=home))
    done.put([found.names, np.asarray(found.images).tobytes()])


def test_processes_share_it(tmp_path, rule, monkeypatch):
    write_images(tmp_path / "a", [f"{i:03d}.png" for i in range(300)])
    context = multiprocessing.get_context("spawn")
    done = context.Queue()
    arguments = [(tmp_path / "a", rule.home, start, 200, done) for start in (0, 50, 100)]
    running = [context.Process(target=_decode_many, args=a) for a in arguments]
    for process in running:
        process.start()
    for names, pixels in [done.get(timeout=120) for _ in running]:
        got = np.frombuffer(pixels, np.uint8).reshape(-1, 8, 8, 3)
        for name, image in zip(names, got, strict=True):
            np.testing.assert_array_equal(image, images.decode(tmp_path / "a" / f"{int(name):03d}.png", size=8))
    assert sum(p.stat().st_size for p in rule.folder.glob("*.u8")) == 300 * 192
    assert len(sources.folder(tmp_path / "a", rule).names) == 300


def test_a_killed_batch_is_not_seen_and_is_written_over(tmp_path, rule, monkeypatch):
    write_images(tmp_path / "a", [f"{i}.png" for i in range(6)])
    cache.decode(items(tmp_path / "a")[:2], rule)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            cache.decode(items(tmp_path / "a")[:4], rule)
    (shard,) = rule.folder.glob("*.u8")
    assert shard.stat().st_size == 4 * 192  # the pixels are there, but nothing knows of them
    entry = cache.decode(items(tmp_path / "a")[::-1], rule)
    for name, pixels in zip(entry.names, np.asarray(entry.images), strict=True):
        np.testing.assert_array_equal(pixels, images.decode(tmp_path / "a" / name, size=8))


def test_it_is_shown_and_cleaned(tmp_path, rule, decoded):
    import small

    write_images(tmp_path / "a", [f"{i}.png" for i in range(6)])
    cache.decode(items(tmp_path / "a"), rule)
    old = tmp_path / "home" / "2-0123"
    old.mkdir()
    (old / "names.json").write_text("{}")
    shown = small.main("cache", f"--cache_dir={rule.home}").stdout
    assert "images of 8 x 8 pixels" in shown and "2-0123, of an older version" in shown
    small.main("cache", f"--cache_dir={rule.home}", "--delete_unused=1")
    cache.decode(items(tmp_path / "a"), rule)
    assert len(decoded) == 6
    for days in ("-1", "nan", "all"):
        small.assert_refused(small.main("cache", f"--cache_dir={rule.home}", f"--delete_unused={days}"), "at least 0")
    assert "deleted" in small.main("cache", f"--cache_dir={rule.home}", "--delete_unused=0").stdout
    assert not old.exists() and not list(rule.folder.glob("*.u8"))
    cache.decode(items(tmp_path / "a"), rule)
    assert len(decoded) == 12


def test_threads_leave_the_filters_of_warnings_as_they_were(tmp_path, rule):
    write_images(tmp_path, [f"{i}.png" for i in range(400)])
    before = list(warnings.filters)
    cache.decode([Item(str(i), tmp_path / f"{i}.png") for i in range(400)], rule)
    assert warnings.filters == before


def test_a_stop_does_not_wait_for_images_that_are_queued(tmp_path, rule, monkeypatch):
    read, started = images.read, []

    def slow(source, **options):
        started.append(source)
        time.sleep(0.05)
        if len(started) == 6:
            signals.request("SIGTERM")
        return read(source, **options)

    monkeypatch.setattr(images, "read", slow)
    write_images(tmp_path, [f"{i}.png" for i in range(200)])
    with pytest.raises(signals.Stopped):
        cache.decode([Item(str(i), tmp_path / f"{i}.png") for i in range(200)], rule)
    signals.reset()
    assert len(started) < 30
