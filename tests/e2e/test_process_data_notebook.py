"""data_proj/process_data.ipynb, top to bottom from a fresh kernel."""

import json

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT

NOTEBOOK = ROOT / "data_proj" / "process_data.ipynb"


def text_of(notebook) -> str:
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


@pytest.mark.slow
def test_the_notebook_makes_what_the_command_line_makes(tmp_path, monkeypatch):
    from sft.opendata.build import build_opendata

    monkeypatch.setenv("OUTPUT", str(tmp_path / "notebook"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    build_opendata([str(ROOT / "data_proj/sample")], output=str(tmp_path / "shell"))
    for name in ("train.json", "eval.json", "rejects.jsonl"):
        assert (tmp_path / "notebook" / name).read_bytes() == (tmp_path / "shell" / name).read_bytes()
    shown = text_of(notebook)
    assert "blossom-v5-stage2: Azure99/blossom-chat-v3@10000" in shown
    assert "belle_alpaca.json line 31: malformed_json" in shown


def test_the_committed_notebook_has_no_stale_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert [cell["outputs"] for cell in cells if cell["cell_type"] == "code" and cell["outputs"]] == []
