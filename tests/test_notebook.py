import importlib.util
import socket

import nbformat
import numpy as np
import pytest
from PIL import Image

import small
from tcq.data import sources

pytestmark = pytest.mark.whole

NOTEBOOK = small.ROOT / "colab" / "quickstart.ipynb"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """300 digits as files, in folders by kind."""
    folder = tmp_path_factory.mktemp("photos")
    source = sources.open_source(small.config().data)
    for n in range(300):
        path = folder / str(source.labels[n]) / f"{n}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.asarray(source.images[n])).save(path)
    return folder


@pytest.mark.filterwarnings("ignore")  # Jupyter's own
def test_the_quickstart_runs_and_has_no_stored_output(photos, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)
    tiny = small.ROOT / "tests" / "helpers" / "tiny_embedder.py"
    values = {"PHOTOS": photos, "EMBEDDER": f"{tiny}:embed", "SIZE": 16, "STEPS": 60, "PORT": free_port()}
    for name, value in values.items():
        monkeypatch.setenv(f"TCQ_NOTEBOOK_{name}", str(value))
    for name, value in small.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(small.ROOT)}}).execute()
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    printed = "".join(o.get("text", "") for o in outputs)
    for expected in (
        "did you mean loss.temperature?",
        "50 answers: ",
        "bits per image: 32",
        "FAISS OPQ",
        "300 images indexed, 0 skipped",
        "200 the page answers",
    ):
        assert expected in printed, printed[-2000:]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 4  # views, clipped pairs, neighbours, hits


def test_only_what_is_missing_is_installed():
    spec = importlib.util.spec_from_file_location("colab_install", small.ROOT / "colab" / "install.py")
    install = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(install)
    assert install.missing() == []
    absent = {"grain": None, "pillow": "9.0"}
    assert install.missing(lambda name: absent.get(name, install.version_of(name))) == ["grain>=0.2.15", "pillow>=12"]
    with pytest.raises(SystemExit, match="tcq needs jax>=0.10.2,<0.13, and this runtime has 0.5.3"):
        install.missing(lambda name: "0.5.3" if name == "jax" else install.version_of(name))
