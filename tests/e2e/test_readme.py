"""README: the output of its first command, and the notebook's committed outputs, on the model that it makes."""

import os
import re
import subprocess
import sys

import nbformat
import pytest

from tests.conftest import ROOT
from tests.e2e.notebooks import INFER, code_cells, execute, printed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of `sh base_run.sh` with all defaults, and its output."""
    folder = tmp_path_factory.mktemp("default")
    environment = {name: value for name, value in os.environ.items() if name not in ("MODEL", "DATA", "EPOCHS")}
    environment |= {"OUTPUT": str(folder / "runs" / "sample"), "OMP_NUM_THREADS": "2", "PYTHON": sys.executable}
    done = subprocess.run(["sh", "base_run.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_first_command_ends_as_the_readme_says(finished, name):
    _folder, said = finished
    (shown,) = re.findall(r"^```\n(> .*?)^```$", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    replies, summary = shown.split("\ndone: ")
    for reply in replies.split("\n\n"):
        assert reply.strip() in said
    (last,) = re.findall(r"^done: (.*)$", said, re.MULTILINE)
    pattern = r"(\w+) [\d.e+-]+"
    assert re.findall(pattern, summary.replace("\n", " ")) == re.findall(pattern, last)
    for fact in ("steps 1980", "stop_rate 1", "tokens_seen 982500", "replies_as_in_data 15 of 15"):
        assert fact in last and fact in summary


def test_the_notebook_shows_its_committed_outputs(finished, monkeypatch):
    folder, _said = finished
    monkeypatch.setenv("MODEL_PATH", "runs/sample/model")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ours, committed = (map(printed, code_cells(book)) for book in (execute(INFER, folder), nbformat.read(INFER, 4)))
    # The probabilities have their last digits from the machine.
    assert list(map(without_numbers, ours)) == list(map(without_numbers, committed))


def without_numbers(text: str) -> str:
    return re.sub(r"<ol>.*</ol>|<ul>.*</ul>|<[^>]*>", "", text, flags=re.DOTALL)
