"""A user's function as backbone, and embeddings from a folder, from training to search."""

import contextlib
import hashlib
import json
import re
import shutil
import signal
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import small
import tiny_embedder
from tcq import augment, embed, encode, evaluate, index, quantizer, train
from tcq import config as configs
from tcq.data import embeddings, sources, splits
from tcq.data.source import SourceError
from tcq.embed import files
from tcq.evaluate import held_out
from tcq.models import embedder, retriever
from tcq.runtime import signals
from tcq.train import optimizer, step
from tcq.train import run as runs

TINY = small.ROOT / "tests" / "helpers" / "tiny_embedder.py"
HEAD = ("data.image_size=16", "data.views=3", f"model.embedder={TINY}:embed", "loss.clip=0.1", "loss.clip_scope=batch")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on the digits by the function; its workdir and its cache."""
    folder = tmp_path_factory.mktemp("embedder")
    train.train(small.config(*HEAD, f"data.cache_dir={folder / 'cache'}"), folder / "run")
    return folder / "run", folder / "cache"


def test_the_config_knows_the_width_and_what_the_function_gives(run):
    config = json.loads((run[0] / "config.json").read_text())
    assert config["model"]["name"] == embedder.NAME and config["model"]["width"] == 48
    assert (
        config["optim"]["frozen_blocks"] == -1 and len(config["model"]["embedder_output"]) == 1 + 4 * embedder.NUM_SUMS
    )


def test_items_and_views_are_those_of_the_function(run):
    config = small.config(*HEAD, f"data.cache_dir={run[1]}")
    source = embed.open_source(config)
    np.testing.assert_allclose(source.images[:20], tiny_embedder.embed(source.pictures[:20]), rtol=1e-6)
    assert source.views.shape == (len(source.images), 3, 48)
    split = splits.of_source(source, config.data)
    viewed = np.union1d(split.train, split.validation)
    for i in viewed[[0, 100, -1]]:
        contents = hashlib.blake2b(source.pictures[i].tobytes(), digest_size=20).digest()
        for number in range(3):
            key = encode.view_key(files.SEED, int.from_bytes(contents[:4], "big") // 2, number)
            view = augment.random_view(
                key, jnp.asarray(source.pictures[i], jnp.float32) / 255, config.data.augment.to_dict()
            )
            pixels = np.asarray(jnp.round(view * 255)).astype(np.uint8)
            np.testing.assert_allclose(source.views[i][number], tiny_embedder.embed(pixels[None])[0], atol=1e-3)
    others = np.setdiff1d(np.arange(len(source.images)), viewed)
    assert len(others) and not source.views[others].any()  # queries get none


def test_it_is_embedded_once_for_all_seeds(run, monkeypatch):
    config = small.config(*HEAD, f"data.cache_dir={run[1]}", "train.seed=3", "loss.temperature=0.1")
    monkeypatch.setattr(embedder, "run", None)
    embed.open_source(config)


def test_judge_is_named_where_nobody_has_said_what_is_alike(run, tmp_path, logs):
    for temperature, named in (("0.7", True), ("0.2", False)):
        logs.clear()
        config = small.config(*HEAD, f"data.cache_dir={run[1]}", f"loss.temperature={temperature}")
        train.train(config, tmp_path / temperature)
        assert (f"`tcq judge --workdir={tmp_path / temperature}` asks" in logs.text) == named


class Counted:
    """The function, which fails at a number of calls; counts the images."""

    def __init__(self, at):
        self.at, self.calls, self.images, self.run = at, 0, 0, embedder.run

    def __call__(self, spec, images):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        self.images += len(images)
        return self.run(spec, images)


def stopped(function, config, *more, at=None):
    """The number of images that were embedded until a call failed, or to the end."""
    with pytest.MonkeyPatch.context() as patch:
        counted = Counted(at)
        patch.setattr(embedder, "run", counted)
        patch.setattr(files, "EVERY", 0)
        with pytest.raises(KeyboardInterrupt) if at else contextlib.nullcontext():
            function(config, *more)
    return counted.images


@pytest.mark.parametrize("at", [2, 50, 76])  # calls of 4 for each block of 64: in the first shard, and in later ones
def test_an_embedding_that_is_stopped_goes_on(run, tmp_path, monkeypatch, logs, at):
    whole = embed.open_source(small.config(*HEAD, f"data.cache_dir={run[1]}"))
    monkeypatch.setattr(files, "FILES", 3)
    config = small.config(*HEAD, f"data.cache_dir={tmp_path}")
    images = stopped(embed.open_source, config, at=at) + stopped(embed.open_source, config)
    resumed = embed.open_source(config)
    split = splits.of_source(whole, config.data)
    total = len(whole.images) + 3 * len(np.union1d(split.train, split.validation))
    assert total <= images < total + 4 * files.BLOCK
    for a, b in ((resumed.images, whole.images), (resumed.views, whole.views)):
        np.testing.assert_array_equal(a[:], b[:])
    assert ("going on after" in logs.text) == (at > 2)
    assert [p.name for p in (tmp_path / "embedded").iterdir() if "partial" in p.name] == []


def folder_for(config, source):
    return embed._cache(config, embed._with_digests(source), embed._has_views(config, source))


def test_the_cache_depends_on_all_that_embeddings_depend_on(run):
    config = small.config(*HEAD, f"data.cache_dir={run[1]}")
    source = sources.open_source(config.data)
    key = folder_for(config, source)
    assert key.is_dir()
    moved = shutil.copy(TINY, run[1] / "moved.py")
    assert folder_for(small.config(*HEAD, f"data.cache_dir={run[1]}", f"model.embedder={moved}:embed"), source) == key
    other = small.config(*HEAD, f"data.cache_dir={run[1]}", f"model.embedder={TINY}:other")
    assert folder_for(other, source) != key
    edited = source.images.copy()
    edited[700, 3, 3, 1] ^= 1
    assert folder_for(config, source._replace(images=edited, digests=None)) != key
    for override, same in (("data.augment.noise=0.1", True), ("data.augment.flip=0.1", False), ("data.views=4", False)):
        assert (folder_for(small.config(*HEAD, f"data.cache_dir={run[1]}", override), source) == key) == same


def test_it_learns_and_is_scored_beside_its_embeddings(run):
    results = evaluate.evaluate(run[0], which="latest")
    assert results["mAP"]["asymmetric"] > 1.5 * results["mAP"]["random"]
    assert {"pq_embeddings", "opq_embeddings", "float_embeddings"} <= results["mAP"].keys()
    assert (run[0] / "gallery.png").is_file()


def test_images_are_indexed_and_searched_by_the_function(run, tmp_path, images):
    count = index.build(run[0], images, tmp_path / "index").added
    opened = index.open_index(tmp_path / "index")
    queries = index.read_queries(opened, opened.paths[:4])
    codes = encode.codes(opened.encoder, tiny_embedder.embed(queries))
    np.testing.assert_array_equal(codes, opened.codes[:4])
    assert [len(hits) for hits in index.search(opened, queries, k=count)] == [count] * 4


def test_another_function_is_refused(run):
    encoder = encode.load(run[0])
    encoder.config.unlock()
    pixels = np.zeros((2, 16, 16, 3), np.uint8)
    for name, message in (("other", "gives other embeddings"), ("narrow", "5 numbers"), ("broken", "no weights")):
        encoder.config.model.embedder = f"{TINY}:{name}"
        with pytest.raises(embedder.EmbedderError, match=message):
            encode.encode(encoder, pixels)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("file.py", "must be file.py:function or module:function"),
        (f"{TINY}:missing", "has no function 'missing'"),
        (f"{TINY}:model.missing", "has no function 'model.missing'"),
        (f"{TINY}:number", "number is no function, but of type int"),
        (f"{TINY.parent}:embed", "must be a .py file or the name of a module"),
        ("mine.ipynb:embed", "must be a .py file"),
        ("missing.py:embed", "No such file"),
        ("no_such_module:embed", "No module named"),
        (f"{TINY}:nothing", r"returned \(4, 2, 2\) float64: an array of floats of shape \(4, F\) is expected"),
        (f"{TINY}:empty", r"returned \(4, 0\) float32: an array of floats of shape"),
        (f"{TINY}:returns_nothing", "returned NoneType: an array"),
        (f"{TINY}:ragged", "returned list: an array"),
        (f"{TINY}:bytes_of", r"returned \(4, 48\) uint8: an array of floats"),
        (f"{TINY}:asserts", r"AssertionError in .*tiny_embedder.py:\d+: assert len\(images\) > 64"),
        (f"{TINY}:of_the_batch", "another embedding in another batch"),
        (f"{TINY}:random", "another embedding at each call"),
        (f"{TINY}:huge", "a number that is not finite in float32"),
        (f"{TINY}:leaving", "SystemExit in .*tiny_embedder.py"),
        (f"{TINY}:broken", r"RuntimeError in .*tiny_embedder.py:\d+: no weights"),
    ],
)
def test_a_function_that_does_not_work_is_refused_before_the_run(spec, message):
    with pytest.raises(configs.ConfigError, match=message):
        small.config(f"model.embedder={spec}", "data.image_size=16")


def test_a_function_may_change_its_images_and_print(run, capsys):
    config = small.config(*HEAD, f"data.cache_dir={run[1]}")
    images = sources.open_source(config.data).images[:3].copy()
    before = images.copy()
    np.testing.assert_allclose(embedder.run(f"{TINY}:careless", images), tiny_embedder.embed(before), rtol=1e-6)
    np.testing.assert_array_equal(images, before)
    shown = capsys.readouterr()
    assert "loading" in shown.err and not shown.out


def test_embeddings_that_are_all_equal_are_refused(tmp_path):
    np.save(tmp_path / "rows.npy", np.ones((300, 6), "f4"))
    config = configs.load("configs/embeddings.py", [*small.SMALL, f"data.source=embeddings:{tmp_path}"])
    with pytest.raises(embedder.EmbedderError, match=r"all \d+ embeddings are equal"):
        train.train(config, tmp_path / "run")


def test_floats_of_any_width_and_names_with_dots(tmp_path):
    images = np.random.RandomState(0).randint(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    want = tiny_embedder.embed(images)
    np.testing.assert_array_equal(embedder.run(f"{TINY}:model.embed", images), want)
    np.testing.assert_allclose(embedder.run(f"{TINY}:bfloat16", images), want, atol=4e-3)
    (tmp_path / "helper_beside.py").write_text("factor = 2")
    (tmp_path / "mine.py").write_text(
        "from helper_beside import factor\n\ndef embed(images):\n    return images.mean(axis=(1, 2)) * factor\n"
    )
    np.testing.assert_allclose(
        embedder.run(f"{tmp_path}/mine.py:embed", images), 2 * images.mean(axis=(1, 2)), rtol=1e-6
    )


def test_a_package_in_the_current_folder_is_a_module(tmp_path, monkeypatch):
    (tmp_path / "package_here").mkdir()
    (tmp_path / "package_here" / "__init__.py").write_text("def embed(images):\n    return images.mean(axis=(1, 2))\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert embedder.run("package_here:embed", np.zeros((2, 8, 8, 3), np.uint8)).shape == (2, 3)


@pytest.mark.parametrize("change", [lambda x: 255 - x, lambda x: x[..., ::-1], lambda x: np.maximum(x, 60)])
def test_a_change_that_only_smooth_images_show_is_seen(tmp_path, change, monkeypatch):
    """Of the mean colour: noise has the same one whatever is exchanged or inverted."""
    monkeypatch.setattr(embedder, "run", lambda _, images: images.mean(axis=(1, 2)) / 255)
    stored = embedder.signature("", 32)
    monkeypatch.setattr(embedder, "run", lambda _, images: change(images).mean(axis=(1, 2)) / 255)
    assert not embedder.is_same(embedder.signature("", 32), stored, embedder.TOLERANCE)


def test_a_width_that_depends_on_the_batch_is_refused(tmp_path):
    head = [key for key in HEAD if not key.startswith("model.embedder")]
    config = small.config(*head, f"model.embedder={TINY}:wide_as_the_batch", f"data.cache_dir={tmp_path}")
    with pytest.raises(embedder.EmbedderError, match="returned 48 numbers for each of 64 images, and 40 before"):
        embed.open_source(config)


def test_an_embedding_that_is_not_finite_is_named(tmp_path, monkeypatch):
    config = small.config(*HEAD, f"data.cache_dir={tmp_path}")
    names = sources.open_source(config.data).names
    of = embedder.run

    def run(spec, images):
        seen.append(len(images))
        if len(images) == files.BLOCK and seen.count(files.BLOCK) == 3:  # view 1 of the first block
            raise embedder.NotFiniteError("no number", 5)
        return of(spec, images)

    seen = []
    monkeypatch.setattr(embedder, "run", run)
    with pytest.raises(embedder.EmbedderError, match=r"no number: view 1 of .*") as raised:
        embed.open_source(config)
    assert str(raised.value).removeprefix("no number: view 1 of ") in names


@pytest.mark.parametrize("function", [embed.open_source, embed.write])
def test_what_fails_at_the_end_is_not_embedded_again(run, tmp_path, monkeypatch, function):
    more = () if function is embed.open_source else (tmp_path / "e",)
    config = small.config(*HEAD, f"data.cache_dir={tmp_path / 'cache'}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "publish", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            function(config, *more)
    assert not embed._earlier(config)  # what has not its name yet is no source of copies
    assert stopped(function, config, *more) <= 20  # the fixed images
    assert not list(tmp_path.rglob(files.STATE)) and not list(tmp_path.rglob("*.done"))


def test_an_embedder_of_embeddings_is_refused(tmp_path):
    folder = folder_of(tmp_path / "e", 0)
    with pytest.raises(configs.ConfigError, match="embeds images, and data.source embeddings:.* leave one out"):
        configs.load("configs/embeddings.py", [f"data.source=embeddings:{folder}", f"model.embedder={TINY}:embed"])


def test_a_function_that_changed_does_not_fill_the_cache(tmp_path):
    config = small.config(*HEAD, f"data.cache_dir={tmp_path}")
    config.model.embedder = f"{TINY}:other"  # as a file that was edited after the training
    with pytest.raises(embedder.EmbedderError, match="model.embedder .*other"):
        embed.open_source(config)
    assert not list(tmp_path.glob("embedded/*"))


def rounding(cache, *more, workdir=None):
    """A config of the function that gives other sums each time."""
    head = [key for key in HEAD if not key.startswith("model.embedder")]
    overrides = [*small.SMALL, *head, f"model.embedder={TINY}:rounding", f"data.cache_dir={cache}", *more]
    return configs.load("configs/digits.py", overrides, workdir=workdir)


@pytest.mark.whole
def test_a_function_that_rounds_differently_is_the_same(tmp_path, monkeypatch):
    embed.open_source(rounding(tmp_path))
    other = rounding(tmp_path, "train.seed=1")
    assert len(list(tmp_path.glob("embedded/*"))) == 1
    train.train(other, tmp_path / "run")
    again = rounding(tmp_path, "train.seed=1", workdir=tmp_path / "run")
    fresh = rounding(tmp_path, "train.seed=1")
    assert again.model.embedder_output == other.model.embedder_output != fresh.model.embedder_output
    monkeypatch.setattr(embedder, "run", None)
    train.train(again, tmp_path / "run")
    assert len(list(tmp_path.glob("embedded/*"))) == 1


@pytest.mark.parametrize("function", ["cache", "folder"])
def test_what_rounds_differently_goes_on_after_a_stop(tmp_path, logs, function):
    def call(config):
        return embed.open_source(config) if function == "cache" else embed.write(config, tmp_path / "e")

    stopped(call, rounding(tmp_path), at=50)
    stopped(call, rounding(tmp_path), at=50)
    assert f"going on after {704 if function == 'cache' else 768} images" in logs.text


@pytest.mark.whole
def test_processes_agree_on_what_a_function_gave(tmp_path):
    head = [key for key in HEAD if not key.startswith("model.embedder")]
    flags = small.flags(*head, f"model.embedder={TINY}:rounding", f"data.cache_dir={tmp_path}")
    done = small.several(2, "train", "--config=configs/digits.py", *flags, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stdout


def test_too_few_images_are_refused_before_they_are_embedded(tmp_path, monkeypatch):
    config = small.config(*HEAD, "data.batch_size=1600", "data.labels=none", f"data.cache_dir={tmp_path}")
    monkeypatch.setattr(embedder, "run", None)
    with pytest.raises(configs.ConfigError, match="data.batch_size 1600 is above the"):
        train.train(config, tmp_path / "run")


def folder_of(tmp_path, num_views, n=400):
    """Embeddings of four clusters, with labels."""
    random = np.random.RandomState(0)
    labels = np.arange(n) % 4
    points = 3 * random.randn(4, 12)[labels]
    items = points + random.randn(n, 12)
    (tmp_path / "img_emb").mkdir(parents=True)
    np.save(tmp_path / "img_emb" / "img_emb_0.npy", (5 + items[:300]).astype("f2"))
    np.save(tmp_path / "img_emb" / "img_emb_1.npy", (5 + items[300:]).astype("f2"))
    if num_views:
        (tmp_path / "view_emb").mkdir()
        views = 5 + points[:, None] + random.randn(n, num_views, 12)
        np.save(tmp_path / "view_emb" / "view_emb_0.npy", views.astype("f4"))
    embeddings.write_metadata(tmp_path, [f"photo {i}" for i in range(n)], labels, list("abcd"))
    return tmp_path


def test_an_index_follows_embeddings_that_are_edited_or_renamed(tmp_path):
    folder = folder_of(tmp_path / "e", 0)
    shutil.rmtree(folder / "metadata")
    config = configs.load(
        "configs/embeddings.py",
        [*small.SMALL, f"data.source=embeddings:{folder}", "data.labels=none", "train.total_steps=1"],
    )
    train.train(config, tmp_path / "run")
    place = f"embeddings:{folder}"
    index.build(tmp_path / "run", place, tmp_path / "index")
    shard = folder / "img_emb" / "img_emb_1.npy"
    np.save(shard, np.load(shard)[::-1])
    np.save(folder / "img_emb" / "img_emb_0a.npy", np.load(shard)[:5] + 1)  # all rows after it get other numbers
    assert index.update(tmp_path / "index", place).edited > 90
    opened = index.open_index(tmp_path / "index")
    fresh = tmp_path / "fresh"
    index.build(tmp_path / "run", place, fresh)
    by_name = [dict(zip(i.paths, map(bytes, i.codes), strict=True)) for i in (opened, index.open_index(fresh))]
    assert by_name[0] == by_name[1] and len(by_name[0]) == 405
    embeddings.write_metadata(folder, ["same"] * 405, None, [])
    with pytest.raises(SourceError, match="1 names are given more than once, such as 'same'"):
        index.update(tmp_path / "index", place)


def test_columns_of_the_metadata_come_back_with_the_answers(tmp_path, logs):
    import pyarrow as pa
    import pyarrow.parquet

    folder = folder_of(tmp_path / "e", 0)
    shutil.rmtree(folder / "metadata")
    (folder / "metadata").mkdir()
    for number, (first, end) in enumerate(((0, 300), (300, 400))):
        table = {
            "url": [f"https://example.com/{i}" for i in range(first, end)],
            "caption": [f"caption {i}" for i in range(first, end)],
            "id": list(range(first, end)),  # the name is that of a column of tcq
            "tags": [["x", str(i)] for i in range(first, end)],
        }
        pa.parquet.write_table(pa.table(table), folder / "metadata" / f"metadata_{number}.parquet")
    config = configs.load(
        "configs/embeddings.py", [*small.SMALL, f"data.source=embeddings:{folder}", "train.total_steps=1"]
    )
    train.train(config, tmp_path / "run")
    place = f"embeddings:{folder}"
    index.build(tmp_path / "run", place, tmp_path / "index")
    assert "own columns of the metadata: caption, tags; left out: id" in logs.text
    np.save(tmp_path / "query.npy", np.load(folder / "img_emb" / "img_emb_1.npy")[[50]])
    flags = f"--index={tmp_path / 'index'}", f"--query={tmp_path / 'query.npy'}", "--json", "--k=400"
    hits = json.loads(small.main("search", *flags).stdout)["hits"]
    assert {(h["path"], h["caption"], *h["tags"]) for h in hits} == {
        (f"https://example.com/{i}", f"caption {i}", "x", str(i)) for i in range(400)
    }
    (only,) = json.loads(small.main("search", *flags, "--filter=caption = 'caption 7'").stdout)["hits"]
    assert only["path"] == "https://example.com/7"
    table["caption"] = [f"new {i}" for i in range(300, 400)]
    pa.parquet.write_table(pa.table(table), folder / "metadata" / "metadata_1.parquet")
    index.update(tmp_path / "index", place)
    hits = json.loads(small.main("search", *flags).stdout)["hits"]
    assert sum(h["caption"].startswith("new ") for h in hits) == 100
    table["caption"] = list(range(100))
    pa.parquet.write_table(pa.table(table), folder / "metadata" / "metadata_1.parquet")
    with pytest.raises(SourceError, match="the columns cannot be read: .*caption"):
        index.update(tmp_path / "index", place)


@pytest.mark.parametrize(("num_views", "resident"), [pytest.param(0, 1024, marks=pytest.mark.whole), (3, 0)])
def test_a_folder_of_embeddings_from_training_to_search(tmp_path, num_views, resident, logs, monkeypatch):
    monkeypatch.setattr(held_out, "FOUND", 12)
    folder = folder_of(tmp_path / "e", num_views)
    overrides = [f"data.source=embeddings:{folder}", f"data.resident={resident}", "data.augment.noise=0.3"]
    config = configs.load("configs/embeddings.py", [*small.SMALL, *overrides, "optim.learning_rate=0.01"])
    validated = train.train(config, tmp_path / "run")
    assert validated["mAP"] > 0.5 and 0 < validated["accuracy"] <= 1
    assert "codes find" not in logs.text
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 0, "validation/neighbours": lines[0]["validation/neighbours"]}
    assert validated["neighbours"] == pytest.approx(nearest_found(tmp_path / "run", folder), abs=0.004)
    results = evaluate.evaluate(tmp_path / "run", which="latest")
    assert results["mAP"]["asymmetric"] > 0.5
    done = small.main(
        "index", f"--workdir={tmp_path / 'run'}", f"--images=embeddings:{folder}", f"--out={tmp_path / 'index'}"
    )
    assert done.returncode == 0, done.stderr
    np.save(tmp_path / "query.npy", np.load(folder / "img_emb" / "img_emb_0.npy")[[0, 1, 2]])
    done = small.main("search", f"--index={tmp_path / 'index'}", f"--query={tmp_path / 'query.npy'}", "--k=20")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("#")] == [f"# {tmp_path / 'query.npy'} row {i}" for i in range(3)]
    of_same_class = [line.endswith("\tlabel=a") for line in lines[1:21]]
    assert np.mean(of_same_class) > 0.6


def nearest_found(workdir, folder):
    """`held_out.neighbours` by decoded codes, in float64."""
    encoder = encode.load(workdir, which="latest")
    source = sources.open_source(encoder.config.data)
    split = splits.of_source(source, encoder.config.data)
    queries, database = (np.asarray(source.images[rows], np.float64) for rows in (split.validation, split.train))
    truth = unit(queries - database.mean(axis=0)) @ unit(database - database.mean(axis=0)).T
    encoded = encode.encode(encoder, np.asarray(source.images[split.train]))
    items = np.asarray(quantizer.decode(encoded.codes, encoder.codebooks), np.float64)
    scores = encode.encode(encoder, np.asarray(source.images[split.validation])).features @ items.T
    found = [
        set(np.argsort(-t)[:10]) & set(np.argsort(-s, kind="stable")[:12]) for t, s in zip(truth, scores, strict=True)
    ]
    return np.mean([len(f) / 10 for f in found])


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.whole
def test_codes_that_lose_neighbours_are_a_warning(tmp_path, logs, monkeypatch):
    monkeypatch.setattr(runs, "LOST", 1.5)
    source = f"data.source=embeddings:{folder_of(tmp_path / 'e', 0)}"
    config = configs.load(
        "configs/embeddings.py", [*small.SMALL, source, "train.total_steps=8", "checkpoint.every_steps=2"]
    )
    with small.signal_at("step 3/8  loss"), pytest.raises(signals.Stopped):
        train.train(config, tmp_path / "run")
    assert "codes find" not in logs.text
    train.train(config, tmp_path / "run")
    assert re.search(r"codes find \d+% of the nearest embeddings, and \d+% before the first step", logs.text)


def test_what_a_model_on_embeddings_cannot_take_is_refused(tmp_path, run, images):
    folder = folder_of(tmp_path / "e", 0)
    config = configs.load("configs/embeddings.py", [*small.SMALL, f"data.source=embeddings:{folder}"])
    train.train(config, tmp_path / "run")
    index.build(tmp_path / "run", f"embeddings:{folder}", tmp_path / "index")
    assert index.add(tmp_path / "index", f"embeddings:{folder}")[:4] == (0, 0, 0, 0)  # known by name
    query = next(p for p in images.rglob("*") if p.is_file())
    np.save(tmp_path / "wide.npy", np.zeros((1, 13), "f4"))
    np.save(tmp_path / "no_row.npy", np.zeros((0, 12), "f4"))
    np.save(tmp_path / "int8.npy", np.zeros((1, 12), "i1"))
    np.save(tmp_path / "nan.npy", np.full((1, 12), np.nan, "f4"))
    for arguments, message in (
        (("search", f"--index={tmp_path / 'index'}", f"--query={query}"), "was trained on embeddings: give a .npy"),
        (("search", f"--index={tmp_path / 'index'}", f"--query={tmp_path / 'wide.npy'}"), "several of 12 floats"),
        (("search", f"--index={tmp_path / 'index'}", f"--query={tmp_path / 'no_row.npy'}"), "one row or several of"),
        (("search", f"--index={tmp_path / 'index'}", f"--query={tmp_path / 'int8.npy'}"), "(1, 12) int8 must be"),
        (("search", f"--index={tmp_path / 'index'}", f"--query={tmp_path / 'nan.npy'}"), "a number is not finite"),
        (
            ("index", f"--workdir={tmp_path / 'run'}", f"--images={images}", f"--out={tmp_path / 'o'}"),
            "embeddings:<",
        ),
        (
            ("index", f"--workdir={run[0]}", f"--images=embeddings:{folder}", f"--out={tmp_path / 'o'}"),
            "takes embeddings of 48",
        ),
    ):
        small.assert_refused(small.main(*arguments), message)


@pytest.mark.whole
def test_embed_writes_what_training_reads(tmp_path):
    flags = [*small.flags(*HEAD), f"--config.data.cache_dir={tmp_path / 'cache'}"]
    done = small.main("embed", "--config=configs/digits.py", *flags, f"--out={tmp_path / 'e'}")
    assert done.returncode == 0, done.stderr
    source = embeddings.open_folder(tmp_path / "e")
    assert source.images.shape == (1797, 48) and source.views.shape == (1797, 3, 48) and len(source.classes) == 10
    config = configs.load("configs/embeddings.py", [*small.SMALL, f"data.source=embeddings:{tmp_path / 'e'}"])
    assert train.train(config, tmp_path / "run")["mAP"] > 0.2
    again = small.main("embed", "--config=configs/digits.py", *flags, f"--out={tmp_path / 'e'}")
    small.assert_refused(again, "exists: give another folder")


def test_a_bucket_is_refused_before_anything_is_embedded(monkeypatch):
    config = small.config(*HEAD)
    monkeypatch.setattr(embedder, "run", None)
    with pytest.raises(SourceError, match="is in a bucket: give a local folder"):
        embed.write(config, "gs://bucket/embeddings")


def test_tcq_embed_goes_on_and_of_other_settings_starts_anew(tmp_path, logs):
    config = small.config(*HEAD, f"data.cache_dir={tmp_path / 'cache'}")
    stopped(embed.write, config, tmp_path / "e", at=50)
    assert not (tmp_path / "e").exists() and (tmp_path / "e-partial").is_dir()
    assert stopped(embed.write, config, tmp_path / "e", at=50) == 49 * files.BLOCK
    assert "going on after 768 images" in logs.text
    other = small.config(*HEAD, f"data.cache_dir={tmp_path / 'cache'}", "data.views=2")
    stopped(embed.write, other, tmp_path / "e", at=2)  # in the first block, so that nothing is recorded
    logs.clear()
    stopped(embed.write, config, tmp_path / "e", at=50)
    assert "going on" not in logs.text
    embed.write(other, tmp_path / "e")
    assert "going on" not in logs.text
    assert sorted(p.name for p in (tmp_path / "e").iterdir()) == ["img_emb", "metadata", "view_emb"]
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == ["e"]
    assert embeddings.open_folder(tmp_path / "e").views.shape[:2] == (1797, 2)


@pytest.mark.whole
def test_two_processes_share_the_work_and_go_on_as_one(run, tmp_path, monkeypatch):
    head = [key for key in HEAD if not key.startswith("model.embedder")]
    flags = small.flags(*head, f"model.embedder={TINY}:logged")
    command = "embed", "--config=configs/digits.py", *flags
    monkeypatch.setenv("EMBEDDED_BY", str(tmp_path / "log"))
    launched = small.launcher(2, *command, f"--out={tmp_path / 'two'}")
    process = subprocess.Popen(launched, env=small.environment(), stdout=subprocess.PIPE, text=True)
    while len(calls(tmp_path / "log")) < 30 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    before = calls(tmp_path / "log")
    done = small.several(2, *command, f"--out={tmp_path / 'two'}")
    assert done.returncode == 0 and done.stdout.count("embedded 1,797 images") == 1, done.stdout
    assert re.search(r"going on after [1-9]", done.stdout), done.stdout
    after = calls(tmp_path / "log")[len(before) :]
    by_process = [sum(n for pid, n in after if pid == one) for one in {pid for pid, n in after if n > 2}]
    assert len(by_process) == 2 and min(by_process) > 0.1 * sum(by_process), by_process
    assert small.main(*command, f"--out={tmp_path / 'one'}").returncode == 0
    one, two = (embeddings.open_folder(tmp_path / name) for name in ("one", "two"))
    np.testing.assert_array_equal(two.images[:], one.images[:])
    np.testing.assert_array_equal(two.views[:], one.views[:])
    assert two.names == one.names
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == ["img_emb", "metadata", "view_emb"]


def calls(log):
    """The process and the number of images of each call of `tiny_embedder.logged`."""
    return [tuple(map(int, line.split())) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.mark.whole
def test_a_backbone_of_ours_embeds_too(digits_run, tmp_path):
    flags = ["--config.data.views=2", f"--config.model.weights={digits_run}", "--config.data.image_size=8"]
    done = small.main("embed", "--config=configs/digits.py", *flags, f"--out={tmp_path / 'e'}")
    assert done.returncode == 0, done.stderr
    source = embeddings.open_folder(tmp_path / "e")
    encoder = encode.load(digits_run)
    images = jnp.asarray(sources.open_source(encoder.config.data).images[:5], jnp.float32) / 255
    variables = jax.tree.map(jnp.asarray, encoder.variables)
    expected = encoder.model.apply(variables, images, method="embed")
    np.testing.assert_allclose(source.images[:5], expected, atol=1e-4)
    assert source.views.shape == (len(source.images), 2, expected.shape[1])
    done = small.main("embed", "--config=configs/digits.py", f"--out={tmp_path / 'f'}")
    small.assert_refused(done, "nothing to embed with: give --config.model.embedder")


@pytest.mark.whole
def test_noise_is_a_function_of_the_seed_the_step_and_the_place(tmp_path):
    folder = folder_of(tmp_path / "e", 0)
    overrides = [*small.SMALL, f"data.source=embeddings:{folder}", "optim.name=sgd", "optim.momentum=0"]
    config = configs.load("configs/embeddings.py", overrides)
    model, rows = retriever.from_config(config, axis_name="batch"), embeddings.open_folder(folder).images[:16]
    rule = optimizer.make(config, 10)
    body, start = step.step_body(model, rule, config, 10), step.initial_state(config, model, rule, rows)
    losses = {}
    for n in (1, 8):
        batches = [small.batch(rows[:, None].astype("f4"), n)] * 2
        losses[n] = [float(logs["loss"]) for _, logs in small.run_steps(body, start, batches, n)]
    np.testing.assert_allclose(losses[1], losses[8], rtol=1e-5)
    assert losses[1][0] != losses[1][1]


@pytest.mark.parametrize(("num_views", "strength"), [(0, 1.0), (3, 1.0), (3, 0.0)])
def test_training_starts_with_a_projection_by_the_views(tmp_path, num_views, strength):
    """Where views differ in the first six numbers, these have smaller weights."""
    folder = folder_of(tmp_path / "e", num_views)
    if num_views:
        file = folder / "view_emb" / "view_emb_0.npy"
        np.save(file, np.load(file) + np.random.RandomState(1).randn(400, 3, 12).astype("f4") * np.repeat([9, 0], 6))
    overrides = [*small.SMALL, f"data.source=embeddings:{folder}", "quantizer.init=opq", "quantizer.init_images=400"]
    overrides.append(f"quantizer.whitening={strength}")
    config = configs.load("configs/embeddings.py", overrides)
    model, source = retriever.from_config(config, axis_name="batch"), embeddings.open_folder(folder)
    with jax.numpy_dtype_promotion("standard"):
        rule = optimizer.make(config, 10)
        state = runs.initial_state(config, model, rule, source, splits.of_source(source, config.data))
    lengths = np.linalg.norm(state.params["projection"]["kernel"], axis=1)
    assert (lengths[6:].mean() > 3 * lengths[:6].mean()) == (num_views * strength > 0)
