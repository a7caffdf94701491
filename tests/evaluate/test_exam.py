"""Exams through lm-eval: tasks, the saved chat template, the table."""

import json
import shutil
import sys

import pytest

from sft.evaluate.command import main
from sft.evaluate.exam import exam_table, read_task
from sft.format.render import Renderer
from sft.model.load import load_tokenizer
from tests.conftest import ROOT


@pytest.mark.slow
def test_lm_eval_answers_the_exam_that_ships_through_the_saved_template(tiny_base, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    tuned = tmp_path / "tuned"
    shutil.copytree(tiny_base("qwen2"), tuned)
    arguments = ["--suite", "lm-eval", "--tasks", str(ROOT / "suites" / "exam" / "exam.json"), "--num_fewshot", "2"]
    arguments += ["--model_path", str(tuned), "--limit", "6", "--device", "cpu"]
    with pytest.raises(SystemExit, match="has no chat template"):
        main([*arguments, "--output_dir", str(tmp_path / "out")])
    tokenizer = load_tokenizer(str(tuned))
    tokenizer.chat_template = Renderer(tokenizer, "blossom").chat_template
    tokenizer.save_pretrained(tuned)
    main([*arguments, "--output_dir", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert 0 <= found["results"]["exam"]["acc,none"] <= 1 and found["n-shot"] == {"exam": 2}
    rows = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    prompt = rows[0]["arguments"][0][0]
    assert prompt.count("|Human|: ") == 3 and prompt.endswith("|Bot|:")
    assert "| exam | acc,none |" in capsys.readouterr().out


def test_without_lm_eval_a_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    arguments = ["--suite", "lm-eval", "--tasks", "gsm8k", "--model_path", "x", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"pip install lm-eval==0\.4\.13"):
        main(arguments)
    assert not (tmp_path / "out").exists()


def test_the_exam_is_in_the_form_of_c_eval():
    folder = ROOT / "suites" / "exam"
    rows = [json.loads(line) for name in ("val", "dev") for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    assert [set(row) for row in rows] == [{"id", "question", "A", "B", "C", "D", "answer"}] * 24
    assert all(row["answer"] in "ABCD" and len({row[letter] for letter in "ABCD"}) == 4 for row in rows)
    task = read_task(str(folder / "exam.json"))
    assert task["dataset_kwargs"]["data_files"]["val"] == str(folder / "val.jsonl")
    assert read_task("gsm8k") == "gsm8k"


def test_each_metric_is_a_row_with_its_error():
    results = {"a|b": {"acc,none": 0.5, "acc_stderr,none": 0.125, "alias": "a"}, "c": {"f1,strict": 0.25}}
    assert exam_table(results) == (
        "| task | metric | value | ± |\n|---|---|--:|--:|\n"
        "| a\\|b | acc,none | 0.5000 | 0.1250 |\n| c | f1,strict | 0.2500 |  |"
    )
