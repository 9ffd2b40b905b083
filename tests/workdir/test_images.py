"""A run knows its images by their contents."""

import json
import shutil

import pytest

import small
from tcq import encode, evaluate, train
from tcq import workdir as workdirs
from write_images import write_images

pytestmark = pytest.mark.whole


@pytest.fixture
def photos(images, tmp_path):
    return shutil.copytree(images, tmp_path / "photos")


@pytest.fixture
def own_run(run, photos, tmp_path):
    """A run on a copy of the images that a test may change."""
    workdir = shutil.copytree(run, tmp_path / "run")
    assert small.main("evaluate", f"--workdir={workdir}", f"--root={photos}").returncode == 0
    return workdir


def scores(workdir):
    return json.loads((workdir / "results.json").read_text())["mAP"]


def test_a_collection_that_was_moved_is_found(own_run, photos, tmp_path):
    before = scores(own_run)
    photos.rename(tmp_path / "elsewhere")
    small.assert_refused(small.main("evaluate", f"--workdir={own_run}"), "not found")
    done = small.main("evaluate", f"--workdir={own_run}", f"--root={tmp_path / 'elsewhere'}")
    assert done.returncode == 0, done.stderr
    assert scores(own_run) == before
    assert small.main("evaluate", f"--workdir={own_run}").returncode == 0  # the place is remembered
    config = workdirs.read_config(own_run)
    assert config.data.source == f"folder:{tmp_path / 'elsewhere'}"
    train.train(workdirs.with_source(config, f"folder:{tmp_path / 'elsewhere'}"), own_run)  # is no other config


def test_training_resumes_where_the_images_are_now(own_run, photos, tmp_path, logs):
    config = workdirs.read_config(own_run)
    photos.rename(tmp_path / "elsewhere")
    train.train(workdirs.with_source(config, f"folder:{tmp_path / 'elsewhere'}"), own_run)
    assert "the images of this run have moved" in logs.text
    assert str(tmp_path / "elsewhere") in workdirs.read_config(own_run).data.source


def test_files_that_are_renamed_keep_their_places(own_run, photos):
    before = scores(own_run)
    for i, path in enumerate(sorted(photos.glob("class */*.png"))):
        if path.stem.isdecimal():
            path.rename(path.with_name(f"{997 * i % 1000:03d}-renamed.png"))
    assert small.main("evaluate", f"--workdir={own_run}").returncode == 0
    assert scores(own_run) == before


def test_the_message_names_what_has_changed(own_run, photos):
    write_images(photos, ["class 1/new.png"], seed=3)
    write_images(photos, ["class 3/003.png"], seed=4)
    (photos / "class 4" / "004.png").unlink()
    done = small.main("evaluate", f"--workdir={own_run}")
    small.assert_refused(
        done, "120 then, 120 now", "new: class 1/new.png; gone: class 4/004.png; edited: class 3/003.png"
    )
    write_images(photos, [f"class 2/{i}.png" for i in range(20)])
    small.assert_refused(small.main("evaluate", f"--workdir={own_run}"), "and 16 more")


def test_without_the_names_of_the_images_changes_are_refused_too(own_run, photos):
    (own_run / "images.npz").write_bytes(b"half of an archive")
    write_images(photos, ["a/new.png"])
    small.assert_refused(small.main("evaluate", f"--workdir={own_run}"), "the images have changed since this run began")


def test_results_of_other_conventions_stand_beside(own_run):
    own = (own_run / "results.json").read_text()
    done = small.main("evaluate", f"--workdir={own_run}", "--config.eval.ties=index", "--config.eval.k=5")
    assert done.returncode == 0 and "results_k=5_ties=index.json" in done.stdout, done.stderr
    assert (own_run / "results.json").read_text() == own
    other = json.loads((own_run / "results_k=5_ties=index.json").read_text())
    assert other["k"] == 5 and other["conventions"]["ties"].startswith("index")


def test_every_query_and_the_origin_of_results_are_recorded(own_run):
    results = json.loads((own_run / "results.json").read_text())
    assert results["tcq"]["version"] and len(results["tcq"]["commit"]) >= 7 and results["time"].endswith("Z")
    assert results["machine"]["device"] and results["step"]
    lines = [json.loads(line) for line in (own_run / "queries.jsonl").read_text().splitlines()]
    assert len(lines) == results["sizes"]["query"]
    mean = sum(line["average_precision"] for line in lines) / len(lines)
    assert mean == pytest.approx(results["mAP"]["asymmetric"])
    for line in lines:
        assert len(line["nearest"]) == 10
        found = [n["score"] for n in line["nearest"]]
        assert found == sorted(found, reverse=True)
        assert all(n["relevant"] == (n["name"].split("/")[0] == line["query"].split("/")[0]) for n in line["nearest"])


def test_validated_checkpoints_are_saved(tmp_path):
    config = small.shared("eval.every_steps=4", "checkpoint.every_steps=5", "checkpoint.keep=9")
    train.train(config, tmp_path / "run")
    validated = [4, 8, 12]
    steps = sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdecimal())
    assert set(validated) <= set(steps)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    by_step = {line["step"]: line["validation/mAP"] for line in lines if "validation/mAP" in line}
    assert encode.load(tmp_path / "run").step == max(by_step, key=lambda s: (by_step[s], s))
    assert evaluate.evaluate(tmp_path / "run")["step"] in validated
