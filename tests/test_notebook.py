from pathlib import Path

import nbformat
import pytest


@pytest.mark.filterwarnings("ignore")  # Jupyter's own
def test_the_quickstart_runs_and_has_no_stored_output(tmp_path, monkeypatch):
    from nbclient import NotebookClient

    root = Path(__file__).resolve().parent.parent
    notebook = nbformat.read(root / "colab" / "quickstart.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)
    monkeypatch.setenv("TCQ_NOTEBOOK_STEPS", "60")
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(root)}}).execute()
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    for expected in ("did you mean loss.temperature?", "bits per image: 32", "FAISS PQ on pixels", "the query is a"):
        assert expected in printed
