"""Embeddings of images that an earlier run has embedded."""

import os
import shutil
import time

import numpy as np
import pytest
from PIL import Image

import small
from tcq import config as configs
from tcq import embed, encode, evaluate, index, train
from tcq.data import cleaning, known, protocols, shards, splits
from tcq.embed import files
from tcq.evaluate import judge
from tcq.index import parts
from tcq.models import embedder

TINY = small.ROOT / "tests" / "helpers" / "tiny_embedder.py"
VIEWS = 3


def config_of(photos, cache, *more, function="embed"):
    head = "data.image_size=16", f"data.views={VIEWS}", f"model.embedder={TINY}:{function}", "data.labels=none"
    return small.config(f"data.source=folder:{photos}", *head, f"data.cache_dir={cache}", *more)


@pytest.fixture
def counted(monkeypatch):
    """The numbers of images of all calls of the function, but for those of its signature."""
    calls, run, signature = [], embedder.run, embedder.signature

    def counting(spec, images):
        calls.append(len(images))
        return run(spec, images)

    def not_counted(*arguments):
        before = len(calls)
        result = signature(*arguments)
        del calls[before:]
        return result

    monkeypatch.setattr(embedder, "run", counting)
    monkeypatch.setattr(embedder, "signature", not_counted)
    return calls


@pytest.fixture
def photos(images, tmp_path):
    return shutil.copytree(images, tmp_path / "photos")


def add(photos, *names):
    for i, name in enumerate(names):
        pixels = np.random.RandomState(i).randint(0, 256, (20, 20, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(photos / name)


def assert_same(source, other):
    assert source.names == other.names
    np.testing.assert_allclose(source.images[:], other.images[:], atol=1e-6)
    np.testing.assert_allclose(source.views[:], other.views[:], atol=1e-6)


NEW = "0.png", "class 5/new.png", "z.png"  # the first, one between others, and the last


def test_an_image_that_is_added_is_embedded_alone(photos, tmp_path, counted, logs):
    embed.open_source(config_of(photos, tmp_path / "cache"))
    add(photos, *NEW)
    counted.clear()
    source = embed.open_source(config_of(photos, tmp_path / "cache"))
    assert sum(counted) == len(NEW) * (1 + VIEWS)
    assert "120 of 123 images are embedded already" in logs.text
    assert_same(source, embed.open_source(config_of(photos, tmp_path / "fresh")))


def test_an_image_without_views_is_embedded_once_they_are_needed(photos, tmp_path, counted):
    labelled = "data.labels=folders", "data.query=0.2"
    one = embed.open_source(config_of(photos, tmp_path / "cache", *labelled))
    counted.clear()
    config = config_of(photos, tmp_path / "cache", *labelled, "data.split_seed=1")
    other = embed.open_source(config)
    had, has = (source.views[:].any(axis=(1, 2)) for source in (one, other))
    assert 0 < has.sum() < len(has) and sum(counted) == int((has & ~had).sum()) * (1 + VIEWS) > 0
    assert_same(other, embed.open_source(config_of(photos, tmp_path / "fresh", *labelled, "data.split_seed=1")))


@pytest.mark.whole
@pytest.mark.parametrize("override", ["data.views=2", "data.augment.flip=0.2", "data.crop_share=0.5"])
def test_views_that_were_drawn_in_another_way_are_not_taken(photos, tmp_path, override):
    embed.open_source(config_of(photos, tmp_path / "cache"))
    config = config_of(photos, tmp_path / "cache", override)
    fresh = config_of(photos, tmp_path / "fresh", override)
    assert_same(embed.open_source(config), embed.open_source(fresh))


def test_equal_images_share_what_is_known(photos, tmp_path, counted):
    embed.open_source(config_of(photos, tmp_path / "cache"))
    shutil.copy(photos / "class 0" / "000.png", photos / "a.png")
    counted.clear()
    source = embed.open_source(config_of(photos, tmp_path / "cache"))
    assert not counted and "a.png" in source.names
    at, other = source.names.index("a.png"), source.names.index("class 0/000.png")
    np.testing.assert_array_equal(source.views[at], source.views[other])


@pytest.mark.whole
@pytest.mark.parametrize("broken", ["images.npz", "img_emb/img_emb_0.npy", "view_emb"])
def test_a_folder_that_cannot_be_read_is_left_out(photos, tmp_path, counted, logs, broken):
    embed.open_source(config_of(photos, tmp_path / "cache"))
    (file,) = (tmp_path / "cache" / "embedded").glob(f"*/{broken}")
    shutil.rmtree(file) if file.is_dir() else file.write_bytes(file.read_bytes()[:100])
    add(photos, *NEW)
    counted.clear()
    source = embed.open_source(config_of(photos, tmp_path / "cache"))
    assert sum(counted) == len(source.images) * (1 + VIEWS)
    assert "cannot be read" in logs.text and "its embeddings are not used" in logs.text


def test_a_stopped_call_goes_on_beside_what_is_known(photos, tmp_path, monkeypatch, counted):
    cache = tmp_path / "cache"
    embed.open_source(config_of(photos, cache))
    add(photos, *(f"class {i % 10}/{i:03}b.png" for i in range(100)))
    counting = embedder.run
    monkeypatch.setattr(files, "BLOCK", 16)
    monkeypatch.setattr(files, "FILES", 2)

    def failing(spec, images):
        if sum(counted) > (120 + 35) * (1 + VIEWS):
            raise KeyboardInterrupt
        return counting(spec, images)

    with monkeypatch.context() as patch:
        patch.setattr(embedder, "run", failing)
        patch.setattr(files, "EVERY", 0)
        with pytest.raises(KeyboardInterrupt):
            embed.open_source(config_of(photos, cache))
    source = embed.open_source(config_of(photos, cache))
    assert 100 * (1 + VIEWS) <= sum(counted) - 120 * (1 + VIEWS) < 100 * (1 + VIEWS) + 2 * files.BLOCK
    assert_same(source, embed.open_source(config_of(photos, tmp_path / "fresh")))


@pytest.mark.whole
def test_tcq_embed_takes_what_training_embedded(photos, tmp_path, counted):
    config = config_of(photos, tmp_path / "cache")
    source = embed.open_source(config)
    counted.clear()
    embed.write(config, tmp_path / "out")
    assert not counted
    assert_same(source, embed.embeddings.open_folder(tmp_path / "out"))


@pytest.mark.parametrize("way", [*(pytest.param(w, marks=pytest.mark.whole) for w in ("build", "parts")), "update"])
def test_an_index_of_the_training_images_embeds_none(photos, tmp_path, counted, way):
    train.train(config_of(photos, tmp_path / "cache"), tmp_path / "run")
    fresh = encode.load(tmp_path / "run", which="latest")
    counted.clear()
    if way == "parts":
        assert parts.write(tmp_path / "run", photos, tmp_path / "parts", which="latest").images == 120
        parts.join(tmp_path / "run", tmp_path / "parts", tmp_path / "index", which="latest")
    else:
        index.build(tmp_path / "run", photos, tmp_path / "index", which="latest")
    assert not counted
    if way == "update":
        add(photos, *NEW)
        assert index.update(tmp_path / "index", photos).added == len(NEW)
        assert counted == [len(NEW)]
    opened = index.open_index(tmp_path / "index")
    queries = index.read_queries(opened, list(opened.paths))
    np.testing.assert_array_equal(encode.codes(fresh, queries), opened.codes)


@pytest.mark.whole
def test_a_collection_is_embedded_in_blocks(photos, tmp_path, counted, monkeypatch):
    train.train(config_of(photos, tmp_path / "cache"), tmp_path / "run")
    encoder = encode.load(tmp_path / "run", which="latest")
    monkeypatch.setattr(encode, "EMBEDDED", 10)
    images = np.random.RandomState(0).randint(0, 256, (95, 16, 16, 3)).astype(np.uint8)
    counted.clear()
    encoded = encode.encode(encoder, images)
    assert sum(counted) == 95 and max(counted) <= 10
    np.testing.assert_array_equal(encode.encode(encoder, embedder.run(f"{TINY}:embed", images)).codes, encoded.codes)


@pytest.mark.whole
def test_images_that_changed_are_refused_before_they_are_embedded(photos, tmp_path, counted):
    labelled = "data.labels=folders", "data.query=0.2"
    config = config_of(photos, tmp_path / "cache", *labelled)
    train.train(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "cache")
    add(photos, *NEW)
    counted.clear()
    for call in (
        lambda: train.train(config, tmp_path / "run"),
        lambda: evaluate.evaluate(tmp_path / "run"),
        lambda: judge.run(tmp_path / "run", count=5, labels=True),
    ):
        with pytest.raises(protocols.ProtocolError, match="the images have changed since this run began: 120 then"):
            call()
    with pytest.raises(configs.ConfigError, match="data.split_seed"):
        train.train(config_of(photos, tmp_path / "cache", *labelled, "data.split_seed=3"), tmp_path / "run")
    assert not counted


@pytest.mark.whole
def test_embeddings_in_use_are_not_deleted_as_unused(photos, tmp_path, counted):
    config = config_of(photos, tmp_path / "cache")
    embed.open_source(config)
    for file in (tmp_path / "cache").rglob("*"):
        os.utime(file, (time.time() - 9 * cleaning.DAY,) * 2)
    embed.open_source(config)
    cleaning.delete_unused(tmp_path / "cache", days=5)
    counted.clear()
    embed.open_source(config)
    assert not counted


def test_a_function_gets_blocks_of_one_size(photos, tmp_path, counted, monkeypatch):
    monkeypatch.setattr(files, "BLOCK", 16)
    monkeypatch.setattr(files, "FILES", 4)
    labelled = "data.labels=folders", "data.query=0.3"
    embed.open_source(config_of(photos, tmp_path / "cache", *labelled))
    assert len(set(counted) - {16}) <= 2  # the last blocks with and without views
    add(photos, *(f"class {i % 10}/{i:03}b.png" for i in range(40)))
    counted.clear()
    source = embed.open_source(config_of(photos, tmp_path / "cache", *labelled))
    assert len(counted) and len(set(counted) - {16}) <= 2
    assert_same(source, embed.open_source(config_of(photos, tmp_path / "fresh", *labelled)))


def test_images_that_get_views_later_are_embedded_then(images, tmp_path):
    """Labels by folder decide which images are queries, and the folders may go."""
    (tmp_path / "flat").mkdir()
    files_of = sorted(p for p in images.rglob("*.png") if not p.name.startswith(("empty", "trunc", "text")))
    for i, file in enumerate(files_of):
        shutil.copy(file, tmp_path / "flat" / f"{i:03}.png")
    for folder in (images, tmp_path / "flat"):
        config = config_of(folder, tmp_path / "cache", "data.labels=auto", "data.query=0.2")
        source = embed.open_source(config)
        split = splits.of_source(source, config.data)
        assert source.views[np.union1d(split.train, split.validation)].any(axis=(1, 2)).all()
        assert (len(split.query) > 0) == (folder == images)


def test_folders_are_opened_until_all_images_are_known(photos, tmp_path, logs):
    source = embed.open_source(config_of(photos, tmp_path / "cache"))
    (folder,) = (tmp_path / "cache" / "embedded").iterdir()
    views = folder.name.split("-")[1]
    needed = np.ones(len(source.images), bool)
    found = known.find([folder, tmp_path / "gone"], source.digests, needed, drawn_as=views)
    assert (found.numbers == 0).all() and found.places == [folder] and not logs.text
    strange = [b"0" * 20] * 20_000
    found = known.find([folder], source.digests[:3] * 10_000 + strange, np.ones(50_000, bool), drawn_as=views)
    assert (found.numbers[:30_000] == 0).all() and (found.numbers[30_000:] == -1).all()
    assert known.find([folder], strange, np.zeros(20_000, bool), drawn_as=views).folders == []


def test_a_cache_of_another_user_is_read(photos, tmp_path, monkeypatch, counted):
    embed.open_source(config_of(photos, tmp_path / "cache"))

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(embed.os, "utime", refuse)
    counted.clear()
    embed.open_source(config_of(photos, tmp_path / "cache"))
    assert not counted


def test_rounding_does_not_grow_from_folder_to_folder(photos, tmp_path, logs):
    recorded = []
    for i in range(2):
        add(photos, *(f"{name}.png" for name in range(i + 1)))
        embed.open_source(config_of(photos, tmp_path / "cache", function="rounding"))
        done = max((tmp_path / "cache" / "embedded").glob(f"*/{embed.DONE}"), key=lambda p: p.stat().st_mtime_ns)
        recorded.append(files.read_state(done).output)
    assert "120 of 122" not in logs.text and "121 of 122 images are embedded already" in logs.text
    assert recorded[0] == recorded[1]


@pytest.mark.whole
def test_the_rate_is_of_what_is_embedded_now(photos, tmp_path, monkeypatch):
    starts, progress = [], files.log.Progress

    def recording(logger, task, total, **options):
        starts.append((task, total, options.get("done")))
        return progress(logger, task, total, **options)

    monkeypatch.setattr(files.log, "Progress", recording)
    embed.open_source(config_of(photos, tmp_path / "cache"))
    add(photos, *NEW)
    embed.open_source(config_of(photos, tmp_path / "cache"))
    assert [s[1:] for s in starts if s[0].startswith("embedding images and")] == [(120, 0), (123, 120)]


def test_images_that_another_version_decoded_are_embedded_again(photos, tmp_path, counted, monkeypatch):
    embed.open_source(config_of(photos, tmp_path / "cache"))
    monkeypatch.setattr(shards, "VERSION", shards.VERSION + 1)
    counted.clear()
    embed.open_source(config_of(photos, tmp_path / "cache"))
    assert sum(counted) == 120 * (1 + VIEWS)


def test_what_is_known_is_copied_in_blocks_of_few_bytes(photos, tmp_path, counted, monkeypatch):
    embed.open_source(config_of(photos, tmp_path / "cache"))
    add(photos, *NEW)
    rows, store = [], files._store

    def storing(work, file, images, plain, views):
        rows.append(len(images))
        store(work, file, images, plain, views)

    monkeypatch.setattr(files, "_store", storing)
    monkeypatch.setattr(files, "COPIED", 10 * 4 * 48 * (1 + VIEWS))
    source = embed.open_source(config_of(photos, tmp_path / "cache"))
    assert max(rows) == 10 and sum(rows) == 120 + len(NEW)
    assert_same(source, embed.open_source(config_of(photos, tmp_path / "fresh")))
