"""All tests run with jaxtyping checks of tcq, strict rank promotion, and 8 simulated devices."""

import os
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

_flags = ["--xla_force_host_platform_device_count=8"]
if version("jaxlib") < "0.11":  # newer ones do not know this flag, which halves the time of compilation
    _flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_flags])
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compilation takes most of the time; `make test-slow` has all optimizations of XLA.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("TCQ_SILENT_SECONDS", "4")  # otherwise the tests of processes wait for 20 s
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # shared by the workers and the processes that they start
    _cache = tempfile.TemporaryDirectory(prefix="tcq-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax
import jaxtyping
import pytest


@pytest.fixture(autouse=True)
def _few_programs() -> Iterator[None]:
    """Clears compiled programs: those for 8 devices take many memory maps, and Linux allows a process 65,530."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > 15_000:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _no_signal() -> Iterator[None]:
    yield
    from tcq.runtime import signals

    signals.reset()


@pytest.fixture
def untyped() -> Iterator[None]:
    """Without jaxtyping's checks, as users run tcq: for its own messages about shapes."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def logs(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log lines of tcq from "info" on; `logs.text` has them all."""
    caplog.set_level("INFO", logger="tcq")
    return caplog


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 real digits as PNG files in a folder for each class, and five files that are not images."""
    from PIL import Image
    from sklearn.datasets import load_digits

    root = tmp_path_factory.mktemp("images")
    scans = load_digits()
    for i in range(120):
        folder = root / f"class {scans.target[i]}"
        folder.mkdir(exist_ok=True)
        Image.fromarray((scans.images[i] * 15).astype("uint8")).resize((20, 16)).save(folder / f"{i:03d}.png")
    whole = (root / "class 0" / "000.png").read_bytes()
    (root / "class 1" / "empty.png").write_bytes(b"")
    (root / "class 1" / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (root / "class 2" / "text.png").write_text("not an image")
    (root / "class 2" / "page.html").write_text("<html>")
    (root / "class 3" / "zeros.jpg").write_bytes(bytes(1000))
    return root


@pytest.fixture(scope="session")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a short run on these images, trained by the command line. Tests must not change it."""
    import small

    workdir = tmp_path_factory.mktemp("runs") / "run"
    flags = small.flags(
        "data.image_size=8", "data.batch_size=32", "eval.k=0", "eval.score=l2", "quantizer.num_codewords=8"
    )
    done = small.main("train", f"--config=configs/folder.py:{images}", f"--workdir={workdir}", *flags)
    assert done.returncode == 0, done.stderr
    assert "images/s" in done.stderr and "0:00:00 left" in done.stderr
    return workdir


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run of `small.shared()` with checkpoints at steps 6, 9 and 12. Tests must not change it."""
    import small
    from tcq import train

    workdir = tmp_path_factory.mktemp("runs") / "digits"
    train.train(small.shared(), workdir)
    return workdir


@pytest.fixture(scope="session")
def index(run: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of these images, built by the command line. Tests must not change it."""
    import small

    out = tmp_path_factory.mktemp("indexes") / "index"
    done = small.main("index", f"--workdir={run}", f"--images={images}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert "indexed 120 images" in done.stdout and "5 files skipped" in done.stdout
    return out
