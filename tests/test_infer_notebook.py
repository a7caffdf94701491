"""infer.ipynb runs top to bottom from a fresh kernel, and is committed without outputs."""

import json
import shutil

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT

QUESTIONS = ["你好", "Hello", "写一首关于春天的诗", "What is the capital of France?"]


def read_notebook():
    return nbformat.read(ROOT / "infer.ipynb", as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_notebook_is_valid_and_without_outputs():
    notebook = read_notebook()
    nbformat.validate(notebook)
    assert [cell for cell in code_cells(notebook) if cell.outputs or cell.execution_count is not None] == []


def test_the_notebook_defines_nothing():
    assert [cell.source for cell in code_cells(read_notebook()) if "def " in cell.source] == []


def test_each_heading_has_a_chinese_line():
    headings = [cell.source for cell in read_notebook().cells if cell.source.startswith("#")]
    assert len(headings) == 9
    for text in headings:
        assert any("\u4e00" <= character <= "\u9fff" for character in text.split("\n")[1]), text


@pytest.fixture
def run_notebook(tiny_base, tmp_path, monkeypatch):
    """Return a function that runs the notebook on a run folder whose run.json names `base`, and gives its outputs."""

    def run(base: str) -> list[str]:
        model = shutil.copytree(tiny_base("qwen2"), tmp_path / "model")
        (model / "run.json").write_text(json.dumps({"model": base, "chat_format": "blossom"}), encoding="utf-8")
        monkeypatch.setenv("MODEL_PATH", str(model))
        monkeypatch.setenv("MAX_NEW_TOKENS", "12")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        notebook = read_notebook()
        NotebookClient(
            notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
        ).execute()
        return [printed(cell) for cell in code_cells(notebook)]

    return run


def printed(cell) -> str:
    """What a cell wrote to stdout or displayed."""
    texts = [output.get("text", "") for output in cell.outputs if output.get("name") == "stdout"]
    return "".join(texts + [output.data.get("text/html", "") for output in cell.outputs if "data" in output])


@pytest.mark.slow
def test_the_notebook_runs_top_to_bottom(run_notebook, tiny_base):
    loaded, one, _sampled, _streamed, turns, batch, file, table, coloured = run_notebook(str(tiny_base("qwen2")))
    assert "chat format: blossom | device: cpu | context window: 2048" in loaded
    assert " tokens, ended: " in one
    assert turns.startswith("> 你好\n") and "\n> 一年有几个季节？\n" in turns
    assert [line[2:] for line in batch.split("\n") if line.startswith("> ")] == QUESTIONS
    answers = [json.loads(line) for line in file.strip().split("\n")]
    assert [answer["messages"][0]["content"] for answer in answers] == QUESTIONS
    assert [answer["messages"][1]["content"] for answer in answers] == batch_replies(batch)
    assert table.count("<th>base</th>") == table.count("<th>tuned</th>") == 1 and table.count("<tr>") == len(QUESTIONS)
    assert coloured.count("\033[32m") == 2
    assert "\033[32m 一年有四个季节。<|endoftext|>\033[0m" in coloured


def batch_replies(batch: str) -> list[str]:
    """The replies in the printed batch: what stands behind each question."""
    replies = []
    for question, following in zip(QUESTIONS, [*QUESTIONS[1:], None], strict=True):
        start = batch.index(f"> {question}\n") + len(question) + 3
        end = batch.index(f"> {following}\n") if following else len(batch)
        replies.append(batch[start:end].rstrip("\n"))
    return replies


@pytest.mark.slow
def test_without_the_base_the_comparison_is_left_out(run_notebook):
    outputs = run_notebook("/no/such/base")
    assert outputs[7] == "No comparison: the base /no/such/base is not there any more.\n"
    assert "\033[32m" in outputs[8]
