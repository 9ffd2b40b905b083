"""Workdirs, indexes and images in a bucket, which an emulator of Google Cloud Storage holds; and atomic files."""

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
from tcq.runtime import storage

FLAGS = small.flags("data.image_size=8", "eval.k=0", "checkpoint.keep=2", "data.query=0.2")


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """The emulator as gs://bucket, for this process and those that it starts; its fsspec file system."""
    server = subprocess.Popen(
        [sys.executable, Path(small.__file__).with_name("gcs.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://localhost:{int(server.stdout.readline())}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", address)  # gcsfs
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)  # what Orbax writes arrays with
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # which would ask Google for the kind of bucket
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        fsspec.filesystem("gs").clear_instance_cache()
        yield fsspec.filesystem("gs", use_listings_cache=False)
        fsspec.filesystem("gs").clear_instance_cache()
    server.communicate()


@pytest.fixture(scope="module")
def run(bucket, images):
    """A run of images in a bucket, with a workdir in the bucket, stopped and resumed."""
    bucket.put(f"{images}/", "gs://bucket/images", recursive=True)
    arguments = ("train", "--config=configs/folder.py:gs://bucket/images", "--workdir=gs://bucket/run", *FLAGS)
    with small.signal_at("step 4/"):
        done = small.main(*arguments)
    assert done.returncode == 128 + signal.SIGTERM and "is saved; the same command resumes" in done.stderr, done.stderr
    again = small.main(*arguments)
    assert again.returncode == 0 and "resuming from step " in again.stderr, again.stderr
    return "gs://bucket/run"


@pytest.mark.whole
def test_a_run_in_a_bucket_equals_a_local_one(run, bucket, images, tmp_path):
    done = small.main("train", f"--config=configs/folder.py:{images}", f"--workdir={tmp_path}", *FLAGS)
    assert done.returncode == 0, done.stderr
    a, b = (encode.load(w, which="latest") for w in (run, tmp_path))
    assert a.step == b.step == 12
    jax.tree.map(np.testing.assert_array_equal, a.variables, b.variables)
    remote = [json.loads(line) for line in bucket.cat("gs://bucket/run/metrics.jsonl").splitlines()]
    local = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    records = [[{k: v for k, v in x.items() if not k.startswith("speed/")} for x in lines] for lines in (remote, local)]
    assert records[0] == records[1]
    names = {path.rpartition("/")[2] for path in bucket.ls("gs://bucket/run")}
    assert names >= {"config.json", "data.json", "metrics.jsonl", "checkpoints", "tensorboard"}
    done = small.main("evaluate", f"--workdir={run}")
    assert done.returncode == 0, done.stderr
    results = json.loads(bucket.cat("gs://bucket/run/results.json"))
    assert results["mAP"]["asymmetric"] > 0 and bucket.exists("gs://bucket/run/gallery.png")
    other = small.main("train", "--config=configs/folder.py:gs://bucket/images", f"--workdir={run}", *FLAGS[:-1])
    assert other.returncode == 2 and "holds a run with another config" in other.stderr, other.stderr
    done = small.main("doctor", "--config=configs/folder.py:gs://bucket/images", f"--workdir={run}", *FLAGS)
    assert done.returncode == 0 and "it holds a run of this config, which train resumes" in done.stdout, done.stderr


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # by Orbax, about reads beside the one that failed
@pytest.mark.slow
def test_a_flipped_bit_in_a_bucket(run, bucket, logs):
    bucket.copy("gs://bucket/run", "gs://bucket/corrupted", recursive=True)
    for path in bucket.find("gs://bucket/corrupted/checkpoints/12/variables"):
        data = bytearray(bucket.cat(path))
        if len(data) > 200 and "METADATA" not in path:
            data[len(data) // 2] ^= 1
            bucket.pipe(path, bytes(data))
    assert encode.load("gs://bucket/corrupted", which="latest").step < 12
    assert re.search(r"corrupted: checkpoint 12 (.|\n)*falling back", logs.text)
    done = small.main(
        "train", "--config=configs/folder.py:gs://bucket/images", "--workdir=gs://bucket/corrupted", *FLAGS
    )
    assert done.returncode == 0, done.stderr
    a, b = (encode.load(f"gs://bucket/{w}", which="12").variables for w in ("run", "corrupted"))
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.whole
def test_an_index_in_a_bucket(run, bucket, images, tmp_path):
    done = small.main("index", f"--workdir={run}", "--images=gs://bucket/images", "--out=gs://bucket/index")
    assert done.returncode == 0 and "indexed 120 images: gs://bucket/index" in done.stdout, done.stderr
    opened = indexes.open_index("gs://bucket/index")
    indexes.build(run, images, tmp_path / "index")
    np.testing.assert_array_equal(opened.codes, indexes.open_index(tmp_path / "index").codes)
    assert all(path.startswith("gs://bucket/images/") for path in opened.paths)
    query = opened.paths[7]
    (images / "query.png").unlink(missing_ok=True)
    (tmp_path / "query.png").write_bytes(bucket.cat(query))
    done = small.main(
        "search",
        "--index=gs://bucket/index",
        f"--query={tmp_path / 'query.png'}",
        "--k=120",
        f"--gallery={tmp_path / 'gallery.png'}",
    )
    assert done.returncode == 0 and query in done.stdout and (tmp_path / "gallery.png").is_file(), done.stderr
    assert indexes.image_of(query) == bucket.cat(query)
    again = small.main("index", f"--workdir={run}", "--images=gs://bucket/images", "--out=gs://bucket/index")
    assert again.returncode == 2 and "exists: choose another --out" in again.stderr
    for change in (["--add", "--images=gs://bucket/images"], ["--remove=gs://bucket/images"], ["--update"]):
        refused = small.main("index", "--out=gs://bucket/index", *change)
        assert refused.returncode == 2 and "an index in a bucket cannot be changed" in refused.stderr
    (rows,) = bucket.glob("gs://bucket/index/items-*.arrow")
    bucket.pipe(rows, bucket.cat(rows)[:-1] + b"\x7f")
    with pytest.raises(indexes.CorruptedError, match=r"items-.*arrow' is corrupted"):
        indexes.open_index("gs://bucket/index")


def test_only_what_changed_is_fetched(bucket, tmp_path, monkeypatch):
    bucket.pipe({f"bucket/folder/{n}": n.encode() for n in ("a.txt", "b/c.txt", "b/d.txt")})
    fetched = []
    real = storage._fetch
    monkeypatch.setattr(
        storage, "_fetch", lambda fs, inside, names, *rest: (fetched.append(names), real(fs, inside, names, *rest))
    )
    folder = storage.download("gs://bucket/folder")
    assert (folder / "b" / "c.txt").read_text() == "b/c.txt"
    bucket.pipe("bucket/folder/b/d.txt", b"more")
    bucket.rm("bucket/folder/a.txt")
    assert storage.download("gs://bucket/folder/") == folder
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*.txt")) == ["b/c.txt", "b/d.txt"]
    assert (folder / "b" / "d.txt").read_text() == "more"
    assert fetched == [["a.txt", "b/c.txt", "b/d.txt"], ["b/d.txt"]]


def test_names_that_lead_outside_are_refused(monkeypatch):
    memory = fsspec.filesystem("memory")
    monkeypatch.setattr(type(memory), "find", lambda *_, **__: {"/evil/../../out.txt": {"type": "file"}})
    with pytest.raises(storage.BucketError, match="a path outside of it"):
        storage.download("memory://evil")


@pytest.mark.slow
def test_several_processes_with_a_workdir_in_a_bucket(run, bucket):
    flags = [f for f in FLAGS if "workdir" not in f]
    command = ("train", "--config=configs/folder.py:gs://bucket/images", "--workdir=gs://bucket/two", *flags)
    done = small.several(2, *command)
    assert done.returncode == 0, done.stdout
    lines = bucket.cat("gs://bucket/two/metrics.jsonl").splitlines()
    assert [json.loads(x)["step"] for x in lines if b"train/loss" in x] == list(range(1, 13))
    assert encode.load("gs://bucket/two", which="latest").step == 12


def test_missing_workdirs_indexes_and_images(bucket, tmp_path):
    for arguments, words in (
        (("evaluate", "--workdir=gs://bucket/none"), "holds no config.json"),
        (("search", "--index=gs://bucket/none", "--query=a.png"), "no file found below 'gs://bucket/none'"),
        (("train", "--config=configs/folder.py:gs://bucket/none", f"--workdir={tmp_path}"), "no file found below"),
        (("evaluate", "--workdir=nothing://bucket/none"), "nothing"),
    ):
        done = small.main(*arguments)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_an_atomic_file_is_whole_or_absent(tmp_path):
    path = tmp_path / "a.txt"
    storage.write_text(path, "old")

    def fail():
        with storage.atomic(path) as temporary:
            temporary.write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with storage.atomic(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert storage.cache_home() == tmp_path / "tcq"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert storage.cache_home() == Path.home() / ".cache" / "tcq"
