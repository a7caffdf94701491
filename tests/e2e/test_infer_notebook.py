"""infer.ipynb runs top to bottom from a fresh kernel, and is committed with small outputs of the default run."""

import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from sft.model.adapters import add_lora
from sft.model.load import load_model, load_tokenizer
from tests.conftest import ROOT
from tests.e2e.notebooks import INFER, PROCESS, code_cells, execute, printed

QUESTIONS = ["你好", "Hello", "写一首关于春天的诗", "What is the capital of France?"]


def read_notebook():
    return nbformat.read(INFER, as_version=4)


@pytest.mark.parametrize("path", [INFER, PROCESS], ids=lambda path: path.stem)
def test_the_committed_outputs_are_whole_small_and_without_paths_of_a_machine(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert [cell.source for cell in cells if cell.metadata] == []
    outputs = json.dumps([cell.outputs for cell in cells])
    assert 2_000 < len(outputs) < 20_000
    assert not re.search(r"/(tmp|home|root|work|mnt|usr|opt)/|\"stderr\"|Traceback", outputs)


def test_the_notebook_defines_nothing():
    assert [cell.source for cell in code_cells(read_notebook()) if "def " in cell.source] == []


def test_each_heading_has_a_chinese_line():
    headings = [cell.source for cell in read_notebook().cells if cell.source.startswith("#")]
    assert len(headings) == 10
    for text in headings:
        assert any("\u4e00" <= character <= "\u9fff" for character in text.split("\n")[1]), text


@pytest.fixture
def checkpoint(tiny_base, tmp_path):
    """Return a function that makes a run folder of a family, whose run.json names its base (or `base`)."""

    def make(family: str, *, lora: bool = False, base: str | None = None) -> Path:
        source, model = tiny_base(family), tmp_path / "model"
        if lora:
            tokenizer, tuned = load_tokenizer(str(source)), load_model(str(source), lora=True)
            add_lora(tuned, rank=4, alpha=8, dropout=0.0).save_pretrained(model)
            tokenizer.save_pretrained(model)
        else:
            shutil.copytree(source, model)
        record = {"model": base or str(source), "chat_format": "blossom"}
        (model / "run.json").write_text(json.dumps(record), encoding="utf-8")
        return model

    return make


@pytest.fixture
def run_notebook(tmp_path, monkeypatch):
    """Return a function that runs the notebook on a model folder, and gives its outputs."""

    def run(model: Path | None) -> list[str]:
        monkeypatch.setenv("MODEL_PATH", str(model or ""))
        monkeypatch.setenv("MAX_NEW_TOKENS", "12")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        return [printed(cell) for cell in code_cells(execute(INFER, tmp_path))]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("family", "lora"), [("qwen2", False), ("bloom", True)])
def test_the_notebook_runs_top_to_bottom(run_notebook, checkpoint, family, lora):
    outputs = run_notebook(checkpoint(family, lora=lora))
    loaded, one, _sampled, _streamed, turns, batch, _source, file, table, sure, coloured = outputs
    assert "chat format: blossom | device: cpu | context window: " in loaded
    assert " tokens, ended: " in one
    assert turns.startswith("> 你会做算术吗？\n") and "\n> 8+9等于多少？\n" in turns
    assert [line[2:] for line in batch.split("\n") if line.startswith("> ")] == QUESTIONS
    answers = [json.loads(line) for line in file.strip().split("\n")]
    assert [answer["messages"][0]["content"] for answer in answers] == QUESTIONS
    assert [answer["messages"][1]["content"] for answer in answers] == batch_replies(batch)
    assert table.count("<th>base</th>") == table.count("<th>tuned</th>") == 1 and table.count("<tr>") == len(QUESTIONS)
    assert sure.count("<span style=") > 1 and sure.count("<li>") == 3
    assert coloured.count("\033[32m") == 2 and "一年有四个季节。" in coloured


def batch_replies(batch: str) -> list[str]:
    """The replies in the printed batch: the text after each question."""
    replies = []
    for question, following in zip(QUESTIONS, [*QUESTIONS[1:], None], strict=True):
        start = batch.index(f"> {question}\n") + len(question) + 3
        end = batch.index(f"> {following}\n") if following else len(batch)
        replies.append(batch[start:end].rstrip("\n"))
    return replies


@pytest.mark.slow
def test_without_the_base_the_comparison_is_left_out(run_notebook, checkpoint):
    outputs = run_notebook(checkpoint("qwen2", base="/no/such/base"))
    assert outputs[8].startswith("No comparison, the base isn't there: /no/such/base: no such folder;")
    assert "\033[32m" in outputs[10]


@pytest.mark.slow
def test_without_a_model_the_notebook_says_how_to_make_one(run_notebook):
    with pytest.raises(CellExecutionError, match=r"no finished run in runs/: make one with `sh base_run.sh`"):
        run_notebook(None)
