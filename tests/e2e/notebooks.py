"""Run the notebooks as the tests do, and write the outputs that are committed.

OUTPUT=runs/sample sh base_run.sh && python -m tests.e2e.notebooks runs/sample/model
"""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
INFER, PROCESS = ROOT / "infer.ipynb", ROOT / "data_proj" / "process_data.ipynb"


def execute(path: Path, folder: Path):
    """Run a notebook in a fresh kernel in `folder`; progress bars are left out of its outputs."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources=resources, record_timing=False, coalesce_streams=True
    )
    client.execute()
    for cell in code_cells(notebook):
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        cell.metadata.pop("execution", None)  # timestamps that the kernel sent
    notebook.metadata.language_info = {"name": "python"}  # without the version of this machine
    return notebook


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell) -> str:
    """Text that a cell wrote to stdout or displayed as HTML."""
    texts = [output.get("text", "") for output in cell.outputs if output.get("name") == "stdout"]
    return "".join(texts + [output.data.get("text/html", "") for output in cell.outputs if "data" in output])


def main(model: str) -> None:
    os.environ |= {"MODEL_PATH": model, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["OUTPUT"] = f"{folder}/opendata"
        for path in (INFER, PROCESS):
            nbformat.write(execute(path, ROOT), path)


if __name__ == "__main__":
    main(*sys.argv[1:])
