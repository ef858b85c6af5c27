"""Every notebook runs from top to bottom, holds no stored output and no long cell."""

import os
from pathlib import Path

import nbformat
import pytest
from _xla import COMPILE_QUICKLY
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_prose_and_calls(path):
    notebook = nbformat.read(path, as_version=4)
    first = notebook.cells[0].source
    assert (
        f"colab.research.google.com/github/jaxcompress/jaxcompress/blob/main/colab/{path.name}"
        in first
    )
    assert any("%pip install" in cell.source for cell in notebook.cells)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
            assert len(cell.source.splitlines()) <= 15


# Each of these takes half a minute to a minute.
LONG = "prune", "ptq", "search", "train"
RUNS = [
    pytest.param(p, marks=pytest.mark.long if p.stem in LONG else pytest.mark.broad, id=p.stem)
    for p in NOTEBOOKS
]


@pytest.mark.filterwarnings("ignore")  # of the Jupyter client, about event loops and sockets
@pytest.mark.parametrize("path", RUNS)
def test_notebook_runs(path, tmp_path, monkeypatch):
    # As a user would run it: without the tests' strict settings.
    for name in list(os.environ):
        if name.startswith(("JAX_NUMPY", "XLA_FLAGS", "MPLBACKEND")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XLA_FLAGS", COMPILE_QUICKLY)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=170, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    printed = "".join(
        output.get("text", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )
    assert "compressed student" in printed or path.stem != "quickstart"
