"""Workdirs, indexes and images in a bucket, which a stand-in for Google's storage holds on this machine."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest

import small
from tcq import encode
from tcq import index as indexes
from tcq.runtime import storage as buckets

FLAGS = small.small_flags("data.image_size=8", "eval.k=0", "data.query=0.2")


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """Ours as gs://bucket for this process and those that it starts; fsspec's file system of it."""
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("gcs.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://localhost:{int(server.stdout.readline())}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", address)  # gcsfs
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)  # what Orbax writes arrays with
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it would ask Google for the kind of bucket
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        fsspec.filesystem("gs").clear_instance_cache()
        yield fsspec.filesystem("gs", use_listings_cache=False)
        fsspec.filesystem("gs").clear_instance_cache()
    server.communicate()


@pytest.fixture(scope="module")
def run(bucket, images):
    """Images in a bucket; a run of them whose workdir is in the bucket, stopped once and scored; the same run here."""
    bucket.put(f"{images}/", "gs://bucket/images", recursive=True)
    command = small.command(
        "train", "--config=configs/folder.py:gs://bucket/images", "--workdir=gs://bucket/run", *FLAGS
    )
    process = subprocess.Popen(command, env=small.environment(), stderr=subprocess.PIPE, text=True)
    said = ""
    for line in process.stderr:
        said += line
        if "step 4/" in line:
            process.send_signal(signal.SIGTERM)
    process.stderr.close()
    assert process.wait(60) == 128 + signal.SIGTERM and "is saved; the same command goes on" in said, said
    again = subprocess.run(command, env=small.environment(), capture_output=True, text=True)
    assert again.returncode == 0 and "going on from step " in again.stderr, again.stderr
    return "gs://bucket/run"


def test_a_run_in_a_bucket_is_the_run_here(run, bucket, images, tmp_path):
    done = small.tcq("train", f"--config=configs/folder.py:{images}", f"--workdir={tmp_path}", *FLAGS)
    assert done.returncode == 0, done.stderr
    a, b = (encode.load(w, which="latest") for w in (run, tmp_path))
    assert a.step == b.step == 12
    jax.tree.map(np.testing.assert_array_equal, a.variables, b.variables)
    there = [json.loads(line) for line in bucket.cat("gs://bucket/run/metrics.jsonl").splitlines()]
    here = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    kept = [[{k: v for k, v in x.items() if not k.startswith("speed/")} for x in lines] for lines in (there, here)]
    assert kept[0] == kept[1]
    names = {path.rpartition("/")[2] for path in bucket.ls("gs://bucket/run")}
    assert names >= {"config.json", "data.json", "metrics.jsonl", "checkpoints", "tensorboard"}
    done = small.tcq("evaluate", f"--workdir={run}")
    assert done.returncode == 0, done.stderr
    results = json.loads(bucket.cat("gs://bucket/run/results.json"))
    assert results["mAP"]["asymmetric"] > 0 and bucket.exists("gs://bucket/run/gallery.png")
    other = small.tcq("train", "--config=configs/folder.py:gs://bucket/images", f"--workdir={run}", *FLAGS[:-1])
    assert other.returncode == 2 and "holds a run with another config" in other.stderr, other.stderr
    found = small.tcq("doctor", "--config=configs/folder.py:gs://bucket/images", f"--workdir={run}", *FLAGS)
    assert found.returncode == 0 and "it holds a run of this config, which will go on" in found.stdout, found.stderr


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # Orbax, of reads beside the one that failed
@pytest.mark.slow
def test_a_flipped_bit_in_a_bucket(run, bucket, capsys):
    bucket.copy("gs://bucket/run", "gs://bucket/damaged", recursive=True)
    for path in bucket.find("gs://bucket/damaged/checkpoints/12/variables"):
        data = bytearray(bucket.cat(path))
        if len(data) > 200 and "METADATA" not in path:
            data[len(data) // 2] ^= 1
            bucket.pipe(path, bytes(data))
    assert encode.load("gs://bucket/damaged", which="latest").step < 12
    assert re.search(r"DAMAGED: checkpoint 12 (.|\n)*GOING BACK", capsys.readouterr().err)
    done = small.tcq("train", "--config=configs/folder.py:gs://bucket/images", "--workdir=gs://bucket/damaged", *FLAGS)
    assert done.returncode == 0, done.stderr
    a, b = (encode.load(f"gs://bucket/{w}", which="12").variables for w in ("run", "damaged"))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_an_index_in_a_bucket(run, bucket, images, tmp_path):
    done = small.tcq("index", f"--workdir={run}", "--images=gs://bucket/images", "--out=gs://bucket/index")
    assert done.returncode == 0 and "indexed 120 images: gs://bucket/index" in done.stdout, done.stderr
    opened = indexes.open_index("gs://bucket/index")
    indexes.build(run, images, tmp_path / "index")
    np.testing.assert_array_equal(opened.codes, indexes.open_index(tmp_path / "index").codes)
    assert all(path.startswith("gs://bucket/images/") for path in opened.paths)
    query = opened.paths[7]
    (images / "query.png").unlink(missing_ok=True)
    (tmp_path / "query.png").write_bytes(bucket.cat(query))
    found = small.tcq(
        "search",
        "--index=gs://bucket/index",
        f"--query={tmp_path / 'query.png'}",
        "--k=120",
        f"--gallery={tmp_path / 'gallery.png'}",
    )
    assert found.returncode == 0 and query in found.stdout and (tmp_path / "gallery.png").is_file(), found.stderr
    hit = indexes.Hit(query, 1.0)
    assert indexes.picture_of(hit) == bucket.cat(query)
    again = small.tcq("index", f"--workdir={run}", "--images=gs://bucket/images", "--out=gs://bucket/index")
    assert again.returncode == 2 and "exists: choose another --out" in again.stderr
    for change in ("--add", "--remove=gs://bucket/images"):
        refused = small.tcq("index", "--out=gs://bucket/index", "--images=gs://bucket/images", change)
        assert refused.returncode == 2 and "an index in a bucket cannot be changed" in refused.stderr
    bucket.pipe("gs://bucket/index/codes.npy", bucket.cat("gs://bucket/index/codes.npy")[:-1] + b"\x7f")
    with pytest.raises(indexes.DamagedError, match=r"codes.npy' is damaged"):
        indexes.open_index("gs://bucket/index")


def test_only_what_changed_is_fetched(bucket, tmp_path, monkeypatch):
    bucket.pipe({f"bucket/folder/{n}": n.encode() for n in ("a.txt", "b/c.txt", "b/d.txt")})
    fetched = []
    real = buckets._fetch
    monkeypatch.setattr(
        buckets, "_fetch", lambda fs, inside, names, *rest: (fetched.append(names), real(fs, inside, names, *rest))
    )
    folder = buckets.brought("gs://bucket/folder")
    assert (folder / "b" / "c.txt").read_text() == "b/c.txt"
    bucket.pipe("bucket/folder/b/d.txt", b"more")
    bucket.rm("bucket/folder/a.txt")
    assert buckets.brought("gs://bucket/folder/") == folder
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*.txt")) == ["b/c.txt", "b/d.txt"]
    assert (folder / "b" / "d.txt").read_text() == "more"
    assert fetched == [["a.txt", "b/c.txt", "b/d.txt"], ["b/d.txt"]]


def test_names_that_lead_outside_are_refused(monkeypatch):
    memory = fsspec.filesystem("memory")
    monkeypatch.setattr(type(memory), "find", lambda *_, **__: {"/evil/../../out.txt": {"type": "file"}})
    with pytest.raises(buckets.BucketError, match="names a place outside of it"):
        buckets.brought("memory://evil")


@pytest.mark.slow
def test_several_processes_with_a_workdir_in_a_bucket(run, bucket):
    flags = [f for f in FLAGS if "workdir" not in f]
    command = ("train", "--config=configs/folder.py:gs://bucket/images", "--workdir=gs://bucket/two", *flags)
    done = small.several(2, *command)
    assert done.returncode == 0, done.stdout
    lines = bucket.cat("gs://bucket/two/metrics.jsonl").splitlines()
    assert [json.loads(x)["step"] for x in lines if b"train/loss" in x] == list(range(1, 13))
    assert encode.load("gs://bucket/two", which="latest").step == 12


def test_what_is_not_there(bucket, tmp_path):
    for arguments, words in (
        (("evaluate", "--workdir=gs://bucket/none"), "holds no config.json"),
        (("search", "--index=gs://bucket/none", "--query=a.png"), "there is no file below 'gs://bucket/none'"),
        (("train", "--config=configs/folder.py:gs://bucket/none", f"--workdir={tmp_path}"), "there is no file below"),
        (("evaluate", "--workdir=nothing://bucket/none"), "nothing"),
    ):
        done = small.tcq(*arguments)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
