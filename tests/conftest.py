"""Every test runs with jaxtyping checks on tcq, and 8 simulated devices."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling takes most of the time; `make test-slow` has XLA's optimisations.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # for this run and the processes it starts: what is compiled is kept
    _cache = tempfile.TemporaryDirectory(prefix="tcq-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax
import jaxtyping
import pytest


@pytest.fixture(autouse=True)
def _few_programs() -> Iterator[None]:
    """Programs for 8 devices take many memory maps, of which Linux gives a process 65,530; XLA crashes where they end."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > 15_000:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def untyped() -> Iterator[None]:
    """Without jaxtyping's checks, as users run it: for our own messages about shapes."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 real digits as PNG files in a folder for each class, and five files that are no images."""
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
    """The workdir of a short training run on these images, made by the command line on 2 devices."""
    import small

    workdir = tmp_path_factory.mktemp("runs") / "run"
    flags = small.small_flags(
        "data.image_size=8", "data.batch_size=32", "eval.k=0", "eval.score=l2", "quantizer.num_codewords=8"
    )
    done = small.tcq("train", f"--config=configs/folder.py:{images}", f"--workdir={workdir}", *flags, devices=2)
    assert done.returncode == 0, done.stderr
    assert "images/s" in done.stderr and "left 0:00:00" in done.stderr
    return workdir
