"""The quick check: its rules, its numbers with their intervals, and the command."""

import json
import math
import re

import pytest
import torch

from sft.chat.reply import Reply, load_chat
from sft.evaluate import command as evaluate
from sft.evaluate import quick
from tests.train.test_train import data, run  # noqa: F401


def test_the_questions_are_of_both_languages_and_the_sums_follow_from_the_seed():
    asked = quick.questions(7)
    kinds = [(q["language"], "format" if "check" in q else "sum" if "answer" in q else "open") for q in asked]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        **dict.fromkeys([("zh", "open"), ("en", "open")], 15),
        **dict.fromkeys([("zh", "format"), ("en", "format")], 14),
        **dict.fromkeys([("zh", "sum"), ("en", "sum")], 12),
    }
    assert len({q["id"] for q in asked}) == len({q["prompt"] for q in asked}) == len(asked) == 82
    assert quick.questions(7) == asked != quick.questions(8)
    assert {name for q in asked for name in q.get("check", {})} == set(quick.CHECKS)


def test_the_sums_are_right():
    by_hand = {"zh-sum-1": "{} + {} = ?", "en-sum-2": "What is {} minus {}?", "en-sum-3": "What is {} times 7?"}
    for question in quick.questions(3):
        if question["id"] in by_hand:
            numbers = [int(n) for n in re.findall(r"\d+", question["prompt"])]
            right = {"zh-sum-1": sum(numbers), "en-sum-2": numbers[0] - numbers[-1], "en-sum-3": math.prod(numbers)}
            assert question["answer"] == right[question["id"]]


@pytest.mark.parametrize(
    ("text", "check", "expected"),
    [
        ('{"name": "梨", "count": 3}', {"json": {"name": "string", "count": "integer"}}, True),
        ('```json\n{"name": "梨", "count": 3}\n```', {"json": {"name": "string", "count": "integer"}}, True),
        ('Here: {"name": "a", "count": 3}', {"json": {"name": "string", "count": "integer"}}, False),
        ('{"name": "a", "count": "3"}', {"json": {"name": "string", "count": "integer"}}, False),
        ('{"name": "a", "count": true}', {"json": {"name": "string", "count": "integer"}}, False),
        ('{"name": "a", "count": 3, "more": 1}', {"json": {"name": "string", "count": "integer"}}, False),
        ("[" * 100_000, {"json_items": 3}, False),
        ('["a", "b", "c"]', {"json_items": 3}, True),
        ("1. 绿萝\n2、吊兰\n\n3) 芦荟", {"items": 3}, True),
        ("Sure:\n1. a\n2. b\n3. c", {"items": 3}, False),
        ("- a\n- b", {"items": 3}, False),
        ("a\nb\n\nc\nd", {"lines": 4}, True),
        ("水是生命之源，多喝水身体好。", {"max_units": 12}, True),
        ("水是生命之源，多喝水身体好。", {"max_units": 11}, False),
        ("it's well-known in 2024", {"max_units": 4, "min_units": 4}, True),
        ("TOKYO.", {"max_units": 1, "contains": ["Tokyo"]}, True),
        ("是。", {"one_of": ["是", "否"]}, True),
        ("No!", {"one_of": ["yes", "no"]}, True),
        ("No, it isn't", {"one_of": ["yes", "no"]}, False),
        ("Yellowish", {"excludes": ["yellow"]}, False),
        ("Dear Anna, thanks. Best wishes!", {"starts": "Dear Anna", "ends": "Best wishes"}, True),
        ("The weather is nice. 公园", {"language": "en"}, True),
        ("WINTER IS 3 MONTHS", {"capitals": True}, True),
        ("Winter", {"capitals": True}, False),
        ("  ", {"excludes": ["yellow"]}, False),
    ],
)
def test_a_form_is_kept_or_not(text, check, expected):
    assert quick.is_in_form(text, check) is expected


def test_languages_lengths_and_numbers_are_read_as_people_do():
    assert [quick.language_of(t) for t in ("你好 OK", "I said 你好 twice", "42", "")] == ["zh", "en", None, None]
    assert [quick.count_units(t) for t in ("我有2个apple。", "don't, well", "")] == [5, 2, 0]
    found = [quick.last_number(t) for t in ("3 + 4 = 7.", "一共是１，２３４元", "答案是−5", "none", "7 (=3+4.5)")]
    assert found == [7, 1234, -5, None, 4.5]


def test_a_reply_scores_in_the_measures_that_its_question_is_meant_for():
    said = Reply("天空是蓝色的。", True, 7)
    assert quick.score_reply({"language": "zh"}, said) == {"stop_rate": 1, "repetition": 0, "language": 1, "length": 7}
    assert quick.score_reply({"language": "en"}, said)["language"] == 0
    assert quick.score_reply({"language": "en", "answer": 7}, Reply("It is 7", False, 4)) == {
        "stop_rate": 0,
        "repetition": 0,
        "arithmetic": 1,
    }
    assert quick.score_reply({"language": "en", "check": {"items": 1}}, Reply("x", True, 1))["format"] == 0


def test_intervals_are_those_of_the_literature():
    # Wilson's for 8 of 10 and 0 of 10; Newcombe's for 56/70 - 48/80 is his own example, method 10.
    assert [round(x, 4) for x in quick.wilson([1.0] * 8 + [0.0] * 2)] == [0.4902, 0.9433]
    assert [round(x, 4) for x in quick.wilson([0.0] * 10)] == [0.0, 0.2775]
    sides = {"tuned": [1.0] * 56 + [0.0] * 14, "base": [1.0] * 48 + [0.0] * 32}
    row = {name: [sum(v) / len(v), *quick.wilson(v)] for name, v in sides.items()}
    assert [round(x, 4) for x in quick.newcombe(row)] == [0.0524, 0.3339]


def test_the_bootstrap_is_seeded_and_draws_within_groups():
    groups = [[1.0, 2.0, 3.0], [10.0]]
    found = quick.bootstrap(groups, lambda g: [sum(map(sum, g)), None], seed=1)
    assert found == quick.bootstrap(groups, lambda g: [sum(map(sum, g)), None], seed=1)
    assert (
        found[1] == [] and 13 <= found[0][0] < 16 < found[0][1] <= 19
    )  # the lone item of the second group is always drawn


def test_base_and_tuned_are_shown_side_by_side_with_their_difference():
    asked = [{"id": str(n), "language": "zh", "prompt": "?", "answer": n} for n in range(4)]
    asked += [{"id": "e", "language": "en", "prompt": "?"}]
    tuned = [Reply(str(n), True, 1) for n in range(4)] + [Reply("yes it is", True, 3)]
    base = [Reply("0", False, 1)] * 4 + [Reply("是的", True, 2)]
    found = quick.compare_replies(asked, tuned, base, ([(2.0, 4), (1.0, 2)], [(4.0, 4), (2.0, 2)]))
    rows = {(row["measure"], row["language"]): row for row in found["rows"]}
    assert rows["arithmetic", "zh"]["tuned"][0] == 1.0 and rows["arithmetic", "zh"]["base"][0] == 0.25
    assert rows["arithmetic", "zh"]["difference"][0] == 0.75
    assert rows["stop_rate", "zh"]["questions"] == 4 and rows["language", "en"]["difference"][0] == 1.0
    assert rows["held_out_loss", ""]["tuned"] == [0.5, 0.5, 0.5]
    assert rows["held_out_loss", ""]["difference"] == [-0.5, -0.5, -0.5]
    assert ("format", "en") not in rows  # no question was asked
    assert found["answers"][0]["base"] == "0" and found["answers"][0]["scores"]["arithmetic"] == 1
    assert "| arithmetic zh | 4 | 25.0% [4.6, 69.9] | 100.0% [51.0, 100.0] |" in quick.quick_table(found["rows"])


def test_the_held_out_loss_is_the_models_own(tiny_base, tmp_path):
    lines = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": t}]} for t in ("b c", "d")
    ]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    chat = load_chat(str(tiny_base("qwen2")))
    expected = []
    for line in lines:
        example = chat.renderer.render(line["messages"])
        ids, labels = (torch.tensor(x, dtype=torch.long)[None] for x in (example.input_ids, example.labels))
        with torch.inference_mode():
            expected.append((float(chat.model(ids, labels=labels).loss), int((labels[:, 1:] != -100).sum())))
    found = quick.held_out_losses(chat, [str(tmp_path)], max_length=512, cache_dir=str(tmp_path / "cache"))
    assert [num for _total, num in found] == [num for _loss, num in expected]
    assert all(math.isclose(t / n, loss, rel_tol=1e-4) for (t, n), (loss, _n) in zip(found, expected, strict=True))
    (tmp_path / "held.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(ValueError, match="no conversation in it can be scored"):
        quick.held_out_losses(chat, [str(tmp_path / "held.jsonl")], max_length=512, cache_dir=str(tmp_path / "cache"))


def test_the_command_writes_what_it_found_and_leaves_other_folders_alone(tiny_base, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--suite", "quick", "--model_path", str(tiny_base("qwen2")), "--base_path", str(tiny_base("yi"))]
    arguments += ["--max_new_tokens", "4", "--limit", "20", "--batch_size", "4"]
    evaluate.main([*arguments, "--output_dir", str(out)])
    results = json.loads((out / "results.json").read_text())
    assert [row["measure"] for row in results["rows"]][:2] == ["stop_rate", "stop_rate"]
    assert all(set(row) >= {"tuned", "base", "difference"} for row in results["rows"])
    assert len((out / "answers.jsonl").read_text().splitlines()) == 20
    assert "| stop_rate zh | 15 |" in (out / "results.md").read_text() and "| stop_rate zh" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="its evaluation has limit 20, not 2; choose another folder"):
        evaluate.main([*arguments, "--limit", "2", "--output_dir", str(out)])
    with pytest.raises(SystemExit, match="is not empty, and not an evaluation's"):
        evaluate.main([*arguments, "--output_dir", str(tiny_base("qwen2"))])
    with pytest.raises(SystemExit, match="--suite quick needs --model_path"):
        evaluate.main(["--suite", "quick", "--output_dir", str(tmp_path / "none"), "--limit", "0"])
    assert not (tmp_path / "none").exists()


def test_questions_in_the_training_data_are_left_out_of_second_rows(tiny_base, tmp_path):
    asked = quick.questions()
    (tmp_path / "train.json").write_bytes(
        (json.dumps({"instruction": asked[0]["prompt"], "output": "好"}, ensure_ascii=False) + "\n").encode("gbk")
    )
    (tmp_path / "held.json").write_text(json.dumps({"instruction": "你好", "output": "好"}) + "\n")
    arguments = ["--suite", "quick", "--model_path", str(tiny_base("qwen2")), "--chat_format", "chatml", "--limit", "3"]
    arguments += ["--max_new_tokens", "2", "--train_data_path", str(tmp_path / "train.json"), "--encoding", "gbk"]
    arguments += ["--eval_data_path", str(tmp_path / "held.json"), "--max_length", "64", "--trust_remote_code"]
    evaluate.main([*arguments, "--cache_dir", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["overlap"]["found"] == {"zh-open-1": f"{tmp_path / 'train.json'} line 1"}
    assert [row["questions"] for row in (found["rows"][0], found["rows_without_overlap"][0])] == [3, 2]
    assert found["rows"][-1]["measure"] == "held_out_loss" and found["rows"][-1]["questions"] == 1
    assert "Without them:" in (tmp_path / "out" / "results.md").read_text()


@pytest.mark.slow
def test_a_run_with_eval_quick_compares_before_and_after(tiny_base, data, tmp_path, capsys):  # noqa: F811
    folder = run(tiny_base("qwen2"), data, tmp_path / "run", "--eval_quick", "true", "--max_steps", "4")
    record = json.loads((folder / "run.json").read_text())
    rows = record["quick"]["rows"]
    assert (rows[0]["measure"], rows[0]["questions"]) == ("stop_rate", 41) and len(record["quick"]["answers"]) == 82
    page = (folder / "report.html").read_text()
    assert "Quick check: before training and after" in page and rows[0]["shown"]["difference"] in page
    assert "| arithmetic en | 12 |" in capsys.readouterr().out
