"""data_proj/process_data.ipynb, top to bottom from a fresh kernel."""

import pytest
from nbformat import read

from sft.opendata import build_opendata
from tests.conftest import ROOT
from tests.e2e.notebooks import PROCESS, code_cells, execute


@pytest.mark.slow
def test_the_notebook_makes_what_the_command_line_makes_and_shows_its_committed_outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("OUTPUT", str(tmp_path / "notebook"))
    notebook = execute(PROCESS, ROOT)
    build_opendata([str(ROOT / "data_proj/sample")], output=str(tmp_path / "shell"))
    for name in ("train.json", "eval.json", "rejects.jsonl"):
        assert (tmp_path / "notebook" / name).read_bytes() == (tmp_path / "shell" / name).read_bytes()
    # They are written anew by `python -m tests.e2e.notebooks`.
    assert code_cells(notebook) == code_cells(read(PROCESS, as_version=4))
