"""The commands, each in a process of its own, as a user starts them."""

import json
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

import small
from tcq import config as configs
from tcq import encode, evaluate, metrics, train
from tcq import index as indexes
from tcq.data import sources, splits
from tcq.evaluate import held_out as validation
from tcq.index import export, serve


@pytest.fixture(scope="session")
def index(run, images, tmp_path_factory):
    out = tmp_path_factory.mktemp("indexes") / "index"
    done = small.tcq("index", f"--workdir={run}", f"--images={images}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert "indexed 120 images" in done.stdout and "5 files skipped" in done.stdout
    return out


def refused(done, *messages):
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for message in messages:
        assert message in done.stderr, done.stderr


class TestTrain:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--config=configs/digits.py", "--config.loss.tempreture=1"], "did you mean loss.temperature?"),
            (
                ["--config=configs/digits.py", "--config.data.batch_size=129"],
                "129 is not divisible by the 2 devices: use 128 or 130",
            ),
            (["--config=configs/none.py"], "does not exist; those that come with tcq"),
            (["--config=configs/digits.py", "--stepz=1"], "unrecognized argument '--stepz=1' for train"),
            (["--config=configs/folder.py:/no/such/folder"], "image folder '/no/such/folder' does not exist"),
            (
                ["--config=configs/cifar10.py", "--config.data.tfds_dir=/no/such"],
                "python -m tcq prepare --dataset=cifar10",
            ),
        ],
    )
    def test_what_cannot_work_is_one_message_and_status_2(self, tmp_path, arguments, message):
        refused(small.tcq("train", *arguments, f"--workdir={tmp_path / 'run'}", devices=2), message)
        assert not (tmp_path / "run").exists()

    def test_a_workdir_that_is_a_file(self, tmp_path):
        (tmp_path / "run").write_text("")
        refused(small.tcq("train", "--config=configs/digits.py", f"--workdir={tmp_path / 'run'}"), "cannot be written")


class TestEvaluate:
    @pytest.fixture(scope="class")
    @classmethod
    def results(cls, run):
        done = small.tcq("evaluate", f"--workdir={run}")
        assert done.returncode == 0, done.stderr
        assert "FAISS PQ on pixels" in done.stdout and "gallery.png" in done.stdout
        return json.loads((run / "results.json").read_text())

    def test_results_hold_what_a_reader_needs(self, run, results):
        assert results["protocol"] == "folder" and results["bits"] == 6 and results["k"] == 108
        assert set(results["mAP"]) == set(evaluate.NAMES)
        assert all(0 < v <= 1 for v in results["mAP"].values())
        assert results["mAP"]["best_possible"] == max(results["mAP"].values())
        assert set(results["precision_at"]["asymmetric"]) == {"1", "10", "100", "108"}
        assert results["mAP"]["pq_pixels"] > results["mAP"]["random"]
        assert results["conventions"]["query_excluded"] is True and results["conventions"]["query_in_database"] is False
        assert {"ties", "denominator", "empty", "relevance", "similarity"} < set(results["conventions"])
        assert results["conventions"]["query_excluded"] and not results["conventions"]["query_in_database"]
        assert results["sizes"] == {"query": 12, "database": 108, "train": 97, "validation": 11}
        for name in ("gallery.png", "curves.png"):
            with Image.open(run / name) as picture:
                assert min(picture.size) > 200

    def test_map_is_that_of_the_stored_codes(self, run, results):
        """The number in results.json, computed here from codes with nothing but NumPy."""
        encoder = encode.load(run)
        source = sources.open_source(encoder.config.data)
        split = splits.of_source(source, encoder.config.data)
        queries = encode.encode(encoder, source.images[split.query]).features.astype(np.float64)
        codes = encode.encode(encoder, source.images[split.database]).codes
        items = np.concatenate([encoder.codebooks[m][codes[:, m]] for m in range(2)], axis=1)
        relevant = source.labels[split.query][:, None] == source.labels[split.database]
        scores = np.round(-((queries[:, None] - items) ** 2).sum(-1), 4)
        ours = metrics.mean_average_precision(scores, relevant, k=108)
        np.testing.assert_allclose(results["mAP"]["asymmetric"], ours, atol=2e-3)
        exact = metrics.mean_average_precision(np.zeros_like(scores), relevant, k=108)
        np.testing.assert_allclose(results["mAP"]["random"], exact, rtol=1e-9)

    def test_the_number_of_devices_does_not_matter(self, run, results):
        done = small.tcq("evaluate", f"--workdir={run}", devices=8)
        assert done.returncode == 0, done.stderr
        again = json.loads((run / "results.json").read_text())
        for name, value in results["mAP"].items():
            assert again["mAP"][name] == value, name
        assert again["curves"] == results["curves"]

    def test_conventions_may_be_overridden_and_are_recorded(self, run, results, tmp_path):
        import shutil

        shutil.copytree(run, tmp_path / "run")
        flags = [
            "--config.eval.ties=worst",
            "--config.eval.k=5",
            "--config.eval.squared=false",
            "--config.eval.empty=skip",
        ]
        done = small.tcq("evaluate", f"--workdir={tmp_path / 'run'}", *flags, "--config.eval.denominator=all")
        assert done.returncode == 0, done.stderr
        changed = json.loads((tmp_path / "run" / "results.json").read_text())
        assert changed["k"] == 5 and changed["conventions"]["ties"].startswith("worst: ")
        assert changed["conventions"]["denominator"] == "all: relevant items in the database"
        assert changed["conventions"]["similarity"].startswith("minus the sum of the L2 distances of subvectors")
        for ties in metrics.TIES:  # whose row is an expectation, whatever the rule for ties
            again = evaluate.evaluate(tmp_path / "run", overrides=[f"eval.ties={ties}"])
            np.testing.assert_allclose(again["mAP"]["random"], results["mAP"]["random"], rtol=1e-9)
        assert changed["mAP"]["asymmetric"] < results["mAP"]["asymmetric"]
        assert changed["mAP"]["best_possible"] < 1  # more than 5 are relevant
        refused(
            small.tcq("evaluate", f"--workdir={run}", "--config.loss.clip=3"), "takes only --config.eval.<key>=<value>"
        )
        refused(small.tcq("evaluate", f"--workdir={run}", "--config.eval.ties=random"), "eval.ties 'random' is unknown")
        refused(small.tcq("evaluate", f"--workdir={run}", "--config.eval.k=x"), "must be int")

    def test_recorded_figures_are_shown_beside(self, results, tmp_path):
        (tmp_path / "recorded.json").write_text('{"mAP": {"another method": 0.5}}')
        text = evaluate.table(results, evaluate.read_recorded(tmp_path / "recorded.json"))
        assert "another method" in text and "0.5000" in text
        with pytest.raises(evaluate.EvaluateError, match="is not a JSON file with"):
            evaluate.read_recorded(tmp_path / "none.json")

    def test_few_images_and_no_labels(self, tmp_path):
        from test_data import write_images

        write_images(tmp_path / "images", [f"{c}/{i}.png" for c in "ab" for i in range(10)])
        flags = [
            "data.batch_size=8",
            "train.total_steps=3",
            "quantizer.num_codewords=32",
            "data.query=0.2",
            "data.validation=0.1",
        ]
        c = small.config(f"data.source=folder:{tmp_path / 'images'}", *flags)
        train.train(c, tmp_path / "few")
        results = evaluate.evaluate(tmp_path / "few")  # 16 in the database, 32 codewords
        assert results["mAP"]["pq_pixels"] is None
        assert 0 < results["mAP"]["asymmetric"] <= 1
        assert "random order" in evaluate.table(results)
        c = small.config(f"data.source=folder:{tmp_path / 'images' / 'a'}", *flags)
        train.train(c, tmp_path / "unlabelled")
        with pytest.raises(evaluate.EvaluateError, match="has no labels, so there is nothing to score"):
            evaluate.evaluate(tmp_path / "unlabelled")

    def test_what_cannot_be_scored(self, run, tmp_path):
        refused(small.tcq("evaluate", f"--workdir={tmp_path}"), "holds no config.json")
        refused(small.tcq("evaluate", f"--workdir={run}", "--checkpoint=7"), "checkpoint '7' is not in")


def test_encoding_shows_every_image_once_on_any_batch(run):
    encoder = encode.load(run)
    images = np.random.RandomState(0).randint(0, 256, (37, 8, 8, 3)).astype(np.uint8)
    whole = encode.encode(encoder, images)
    assert len(whole.features) == 37
    for size in (1, 5, 16, 64):
        config = configs.from_json(configs.to_json(encoder.config))
        config.eval.batch_size = size
        part = encode.encode(encoder._replace(config=config), images)
        np.testing.assert_allclose(part.features, whole.features, atol=1e-5)
    one = encode.encode(encoder, images[20:21])
    np.testing.assert_allclose(one.features[0], whole.features[20], atol=1e-5)
    assert len(encode.encode(encoder, images[:0]).codes) == 0
    with pytest.raises(ValueError, match=r"want \(N, 8, 8, 3\)"):
        encode.encode(encoder, np.zeros((2, 9, 9, 3), np.uint8))


def test_retrieval_does_not_depend_on_the_block(run):
    encoder = encode.load(run)
    source = sources.open_source(encoder.config.data)
    both = encode.encode(encoder, source.images)
    score = validation.scorers(encoder, both, both)["asymmetric"]
    results = [
        validation.retrieve(score, source.labels, source.labels, k=50, ks=[1, 50], max_scores=120 * b)
        for b in (1, 7, 1000)
    ]
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_query_may_be_left_out_of_its_own_answers(run):
    encoder = encode.load(run)
    source = sources.open_source(encoder.config.data)
    both = encode.encode(encoder, source.images)
    score = validation.scorers(encoder, both, both)["float"]
    places = np.arange(len(source.labels))
    options = {"k": 119, "ks": [1, 119]}
    kept = validation.retrieve(score, source.labels, source.labels, **options)
    left_out = validation.retrieve(score, source.labels, source.labels, own=places, **options)
    assert kept.precision[0] == 1 > left_out.precision[0]
    np.testing.assert_array_equal(left_out.relevant, kept.relevant - 1)
    for q in (0, 50):  # the same as a database without it
        others = np.delete(places, q)
        one = validation.retrieve(
            lambda block, q=q, others=others: score(slice(q, q + 1))[:, others],
            source.labels[q : q + 1],
            source.labels[others],
            **options,
        )
        np.testing.assert_allclose(one.average_precision, left_out.average_precision[q], atol=1e-12)


class TestIndexAndSearch:
    def test_ranked_paths_with_scores(self, index, images, tmp_path):
        query = images / "class 3" / "003.png"
        gallery = tmp_path / "out.png"
        done = small.tcq("search", f"--index={index}", f"--query={query}", "--k=120", f"--gallery={gallery}")
        assert done.returncode == 0, done.stderr
        rows = [line.split("\t") for line in done.stdout.splitlines()]
        assert [int(r[0]) for r in rows] == list(range(1, 121))
        scores = [float(r[1]) for r in rows]
        assert scores == sorted(scores, reverse=True) and scores[0] > scores[-1]
        assert all(r[2].startswith(str(images)) for r in rows)
        with Image.open(gallery) as picture:
            assert picture.size[0] > 200

    def test_search_is_the_ranking_of_all_codes(self, index, images):
        opened = indexes.open_index(index)
        query = indexes.read_queries(opened, [images / "class 3" / "003.png"])
        q = encode.encode(opened.encoder, query).features[0].astype(np.float64)
        items = np.concatenate([opened.encoder.codebooks[m][opened.codes[:, m]] for m in range(2)], axis=1)
        truth = -((q - items) ** 2).sum(1)
        hits = indexes.search(opened, query, k=120)[0]
        np.testing.assert_allclose([h.score for h in hits], np.sort(truth)[::-1], atol=1e-4)
        by_path = dict(zip(opened.paths, truth, strict=True))
        np.testing.assert_allclose([h.score for h in hits], [by_path[h.path] for h in hits], atol=1e-4)

    def test_skipped_files_have_reasons(self, index):
        skipped = [json.loads(x) for x in (index / "skipped.jsonl").read_text().splitlines()]
        assert {s["path"].split("/")[1] for s in skipped} == {
            "empty.png",
            "truncated.png",
            "text.png",
            "page.html",
            "zeros.jpg",
        }
        assert all(s["reason"] for s in skipped)

    def test_the_index_needs_nothing_else(self, run, images, tmp_path):
        import shutil

        shutil.copytree(run, tmp_path / "run")
        indexes.build(tmp_path / "run", images, tmp_path / "a" / "index")
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "a").rename(tmp_path / "b")
        assert len(indexes.open_index(tmp_path / "b" / "index").paths) == 120

    def test_odd_names_are_printed_and_drawn(self, run, images, tmp_path):
        import os
        import shutil

        (tmp_path / "odd").mkdir()
        for name in (b"cost_$5_$6.png", b"\xff.png", "\u00fc \u6f22.png".encode(), b"line\nbreak.png"):
            shutil.copy(images / "class 3" / "003.png", os.fsdecode(os.fsencode(tmp_path / "odd") + b"/" + name))
        out = tmp_path / "index"
        done = small.tcq("index", f"--workdir={run}", f"--images={tmp_path / 'odd'}", f"--out={out}")
        assert done.returncode == 0, done.stderr
        query, gallery = images / "class 3" / "003.png", tmp_path / "gallery.png"
        done = small.tcq("search", f"--index={out}", f"--query={query}", f"--gallery={gallery}")
        assert done.returncode == 0, done.stderr
        assert "cost_$5_$6.png" in done.stdout
        assert gallery.stat().st_size > 1000

    def test_add_and_remove(self, run, images, tmp_path):
        out = tmp_path / "index"
        indexes.build(run, images / "class 1", out)
        before = indexes.open_index(out)
        done = small.tcq("index", f"--out={out}", "--add", f"--images={images}")
        assert done.returncode == 0 and f"added {120 - len(before.paths)} images" in done.stdout, done.stderr
        after = indexes.open_index(out)
        np.testing.assert_array_equal(after.codes[: len(before.codes)], before.codes)
        assert sorted(set(after.paths)) == sorted(after.paths) and len(after.paths) == 120
        assert (
            indexes.remove(out, [str(images / "class 1"), str(images / "class 3" / "003.png")]) == len(before.paths) + 1
        )
        left = indexes.open_index(out)
        assert not [p for p in left.paths if "class 1" in p or p.endswith("003.png")]
        by_path = dict(zip(after.paths, after.codes.tolist(), strict=True))
        assert [by_path[p] for p in left.paths] == left.codes.tolist()
        with pytest.raises(indexes.IndexFileError, match="none of nowhere is in"):
            indexes.remove(out, ["nowhere"])
        assert sorted(p.name for p in tmp_path.iterdir()) == [".index.previous", "index"]

    def test_what_cannot_work_leaves_nothing_behind(self, run, index, images, tmp_path):
        out = tmp_path / "out"
        refused(
            small.tcq("index", f"--workdir={tmp_path}", f"--images={images}", f"--out={out}"), "holds no config.json"
        )
        refused(
            small.tcq("index", f"--workdir={run}", "--images=/no/such", f"--out={out}"), "'/no/such' does not exist"
        )
        refused(
            small.tcq("index", f"--workdir={run}", f"--images={images}", f"--out={index}"),
            "exists: choose another --out",
        )
        refused(small.tcq("search", f"--index={tmp_path}", f"--query={images}"), "is not an index")
        refused(small.tcq("search", f"--index={index}", f"--query={images / 'none.png'}"), "none.png", "No such file")
        refused(small.tcq("search", f"--index={index}", f"--query={images / 'class 2' / 'text.png'}"), "not an image")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(("key", "value"), [("width", 32), ("depth", 2), ("pooling", "cls")])
    def test_a_checkpoint_that_does_not_fit_its_config(self, run, images, tmp_path, key, value):
        import shutil

        shutil.copytree(run, tmp_path / "run")
        config = json.loads((tmp_path / "run" / "config.json").read_text())
        config["model"][key] = value
        (tmp_path / "run" / "config.json").write_text(json.dumps(config))
        done = small.tcq("index", f"--workdir={tmp_path / 'run'}", f"--images={images}", f"--out={tmp_path / 'out'}")
        refused(done, "does not fit the model")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("name", ["codes.npy", "encoder.npz", "paths.json", "meta.json"])
    def test_damage_is_noticed(self, index, tmp_path, name):
        import shutil

        shutil.copytree(index, tmp_path / "index")
        file = tmp_path / "index" / name
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        try:
            opened = indexes.open_index(tmp_path / "index")
            assert name == "meta.json" and len(opened.paths) == 120  # a flipped bit in a number nobody reads
        except indexes.IndexFileError:
            pass
        file.unlink()
        with pytest.raises(indexes.IndexFileError, match="missing|is not an index"):
            indexes.open_index(tmp_path / "index")


class TestExport:
    def test_faiss_ranks_as_we_do(self, index, images, tmp_path):
        import faiss

        done = small.tcq("export", f"--index={index}", f"--out={tmp_path / 'x.faiss'}")
        assert done.returncode == 0, done.stderr
        peer, opened = faiss.read_index(str(tmp_path / "x.faiss")), indexes.open_index(index)
        query = indexes.read_queries(opened, [images / "class 5" / "005.png", images / "class 6" / "006.png"])
        features = encode.encode(opened.encoder, query).features
        distances, ids = peer.search(features, 9)
        ours, _ = indexes.search_features(opened, features, k=9)
        np.testing.assert_allclose(ours, -distances, rtol=1e-3, atol=1e-4)
        items = np.concatenate([opened.encoder.codebooks[m][opened.codes[:, m]] for m in range(2)], axis=1)
        own = ((features[:, None] - items[ids]) ** 2).sum(-1)  # which of equals comes first is FAISS's choice
        np.testing.assert_allclose(own, distances, rtol=1e-3, atol=1e-4)

    def test_npz_without_pickles(self, index, tmp_path):
        export.export(index, tmp_path / "x.npz", format="npz")
        opened = indexes.open_index(index)
        with np.load(tmp_path / "x.npz", allow_pickle=False) as saved:
            np.testing.assert_array_equal(saved["codes"], opened.codes)
            np.testing.assert_array_equal(saved["codebooks"], opened.encoder.codebooks)
            assert saved["paths"][3].decode() == opened.paths[3]
        refused(small.tcq("export", f"--index={index}", f"--out={tmp_path / 'x.npz'}"), "exists")


class TestServe:
    @pytest.fixture
    def address(self, index):
        import threading

        server = serve.make_server(index, port=0, k=3)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()
        server.server_close()

    def test_page_and_search(self, address, images):
        with urllib.request.urlopen(address) as answer:
            page = answer.read().decode()
        assert "120 images" in page and '<input type="file"' in page
        body = (images / "class 3" / "003.png").read_bytes()
        with urllib.request.urlopen(urllib.request.Request(f"{address}/search", body)) as answer:
            hits = json.load(answer)["hits"]
        assert len(hits) == 3 and all(h["image"].startswith("data:image/jpeg;base64,") for h in hits)

    def test_a_port_in_use(self, address, index):
        refused(small.tcq("serve", f"--index={index}", f"--port={address.rsplit(':')[-1]}"), "Address already in use")

    def test_what_is_no_image_and_other_paths(self, address):
        for path, body in (("/search", b"hello"), ("/search", b""), ("/other", b"x"), ("/etc/passwd", None)):
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(urllib.request.Request(address + path, body))
            assert caught.value.code in (400, 404)
            assert json.load(caught.value)["error"]
            caught.value.close()


def test_doctor(tmp_path):
    done = small.tcq("doctor", "--config=configs/digits.py", devices=4)
    assert done.returncode == 0 and "4 devices" in done.stdout and "1,797 images" in done.stdout, done.stderr
    refused(small.tcq("doctor", "--config=configs/digits.py", "--config.data.batch_size=129", devices=4), "128 or 132")
