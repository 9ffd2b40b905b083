import nbformat
import pytest

import small


@pytest.mark.filterwarnings("ignore")  # Jupyter's own
def test_the_quickstart_runs_and_has_no_stored_output(tmp_path, monkeypatch):
    from nbclient import NotebookClient

    notebook = nbformat.read(small.ROOT / "colab" / "quickstart.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)
    monkeypatch.setenv("TCQ_NOTEBOOK_STEPS", "60")
    for name, value in small.environment().items():
        monkeypatch.setenv(name, value)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(small.ROOT)}}).execute()
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    for expected in ("did you mean loss.temperature?", "bits per image: 32", "FAISS PQ on pixels", "the query is a"):
        assert expected in printed
