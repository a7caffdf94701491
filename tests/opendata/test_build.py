"""Cleaning rules one by one, and the command as a whole: conservation, determinism, and what a kill leaves behind."""

import hashlib
import http.server
import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sft.opendata import build as opendata
from sft.opendata.build import RULES, build_opendata, clean, find_problem, main, print_ledger
from sft.opendata.conversation import RecordError, list_files
from tests.conftest import ROOT


def record(number, **more):
    return {"instruction": f"question {number}", "input": "", "output": f"answer {number}."} | more


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def build(inputs, output, **options):
    options = {"workers": 1, "eval_share": 0.0, "max_rejected": 1.0} | options
    return build_opendata([inputs] if isinstance(inputs, str) else inputs, output=str(output), **options)


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n")[:-1]]


def texts(output, name="train.json"):
    return [[message["content"] for message in row["messages"]] for row in read_lines(Path(output) / name)]


def digests(output):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(output).iterdir())}


def talk(*turns):
    """`talk("u: hi", "a: hello")` as messages."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[turn[0]], "content": turn[3:]} for turn in turns]


def without(*names):
    return [rule for rule in RULES if rule not in names]


def dropped(messages, rules=RULES):
    with pytest.raises(RecordError) as caught:
        clean(messages, rules)
    return caught.value.reason


# --- Rules


def test_strip_edges_strips_both_ends_of_each_text():
    messages = talk("u: \n q ", "a: \n\n a\n b \u3000")
    assert clean(messages) == (talk("u: q", "a: a\n b"), ["strip_edges"])
    assert clean(messages, without("strip_edges")) == (messages, [])


def test_cut_at_empty_turn_keeps_what_comes_before():
    for empty in (("u: q2", "a: "), ("u: ", "a: a2"), ("u: q2", "u: ", "a: a2")):
        messages = talk("s: ", "u: q", "a: a.", *empty, "u: q3", "a: a3")
        assert clean(messages) == (talk("u: q", "a: a."), ["cut_at_empty_turn"])
        assert dropped(messages, without("cut_at_empty_turn")) in ("empty", "role_order")
    assert dropped(talk("u: q", "a: ", "u: q2", "a: a2")) == "empty"
    assert dropped([]) == "empty"


def test_fix_roles_merges_moves_and_trims():
    messages = talk("a: hello", "u: q", "s: s1", "u: more", "a: a1", "a: a2", "s: s2", "u: bye")
    assert clean(messages) == (talk("s: s1\ns2", "u: q\nmore", "a: a1\na2"), ["fix_roles"])
    assert dropped(messages, without("fix_roles")) == "role_order"
    assert dropped(talk("u: q")) == "role_order"
    assert dropped(talk("a: a", "u: q")) == "role_order"


def test_fix_roles_does_not_learn_a_merged_text_of_which_one_part_is_not_to_be_learned():
    messages = talk("u: q", "a: a1", "a: a2")
    messages[1]["train"] = False
    assert clean(messages)[0][1] == {"role": "assistant", "content": "a1\na2", "train": False}


@pytest.mark.parametrize(
    "reply",
    [
        "作为一个AI语言模型，我无法提供实时信息。",
        "作为一个人工智能语言模型，我没有感情。",
        "抱歉，作为一名人工智能助手，我不能这样做。",
        "作为语言模型，无法回答。",
        "我是ChatGPT，很高兴认识你。",
        "我是一个由OpenAI训练的大型语言模型。",
        "我是由OpenAI开发的。",
        "我是一个语言AI，看不到图片。",
        "As an AI language model, I cannot do that.",
        "I'm sorry, but as an AI I don't have feelings.",
        "I am ChatGPT.",
        "I'm just an AI assistant.",
        "I was trained by OpenAI.",
    ],
)
def test_drop_self_identity_drops_claims_in_the_first_person(reply):
    assert dropped(talk("u: hello", f"a: {reply}")) == "self_identity"
    clean(talk("u: hello", f"a: {reply}"), without("drop_self_identity"))


@pytest.mark.parametrize(
    ("question", "reply"),
    [
        ("ChatGPT是什么？", "ChatGPT是由OpenAI开发的聊天机器人。"),
        ("What is ChatGPT?", "ChatGPT is a language model trained by OpenAI."),
        ("他做什么？", "他作为人工智能领域的专家，写了很多书。"),
        ("What did she do?", "As an AI researcher, she studied language models."),
        ("翻译：我是ChatGPT", "I am ChatGPT."),
        ("写一句话", "如果我是一个人工智能，世界会怎样？"),
        ("Who are you in the story?", "I am a teacher and I aim to help."),
    ],
)
def test_drop_self_identity_leaves_the_subject_alone(question, reply):
    clean(talk(f"u: {question}", f"a: {reply}"))


PROSE_ZH = "这是一段比较长的文字，它一直写下去，描述了很多很多的事情，然后忽然就在这个地方停住了没有"
PROSE_EN = (
    "This is a rather long text. It goes on and on about a number of things, and then it just stops in the middle of"
)


@pytest.mark.parametrize(
    "reply",
    ["```python\nx = 1", "1. one\n2. two\n3.", "甲、乙、", "one, two,", PROSE_ZH, PROSE_EN, f"Short.\n{PROSE_EN}"],
)
def test_drop_cut_off_drops_what_stops_in_the_middle(reply):
    assert dropped(talk("u: q", f"a: {reply}"), without("drop_language_mismatch")) == "cut_off"
    clean(talk("u: q", f"a: {reply}"), without("drop_cut_off"))


@pytest.mark.parametrize(
    "reply",
    [
        "```python\nx = 1\n```",
        "Use ``` to open a block.",
        "42",
        "Paris",
        "(5 + 8 + 10 + 12) / 4 = 8.75",
        PROSE_ZH + "。",
        PROSE_EN + " it.",
        PROSE_EN + " https://example.com/page",
        PROSE_EN + " #travel",
        '"The only way to do great work is to love what you do, every day, and never settle." - Steve Jobs',
        "1. Infinity\n2. A very long film title without any punctuation that goes on for more than eighty characters",
    ],
)
def test_drop_cut_off_leaves_whole_replies_alone(reply):
    clean(talk("u: q", f"a: {reply}"))


def test_drop_cut_off_looks_at_the_last_reply_only():
    clean(talk("u: q", "a: one, two,", "u: go on", "a: three."))


def test_drop_language_mismatch_goes_both_ways_and_knows_who_asks_for_a_language():
    english = "This is a long English answer that nobody had asked for."
    assert dropped(talk("u: 请介绍一下北京的历史。", f"a: {english}")) == "language_mismatch"
    assert dropped(
        talk("u: Please tell me about the long history of Beijing.", "a: 北京是一座有三千多年历史的城市。")
    ) == ("language_mismatch")
    for question in (
        "请翻译这句话：你好世界和平",
        "用英文介绍一下北京的历史。",
        "写一个排序的函数给我看看",
        "用opulent一词造句给我看看",
    ):
        clean(talk(f"u: {question}", f"a: {english}"))
    clean(talk("u: Translate into Chinese: good morning to all of you", "a: 大家早上好，祝你们愉快。"))
    clean(talk("u: 请计算一下这个算式的结果", "a: 12 + 30 = 42"))
    clean(talk("u: 请给我看一个例子好吗", "a: ```\none two three four five six seven eight nine\n```"))


@pytest.mark.parametrize(
    "line",
    [
        "Human: x",
        "Assistant: x",
        "User: x",
        "用户：x",
        "助手: x",
        "|Human|: x",
        "|Bot|: x",
        "### Instruction:",
        "<|im_start|>user",
    ],
)
def test_drop_role_words_drops_a_line_that_begins_like_a_turn(line):
    assert dropped(talk("u: q", f"a: fine\n{line}")) == "role_words"
    clean(talk(f"u: fine\n{line}", "a: ok"))
    clean(talk("u: q", f"a: he said {line}"))


# --- The command as a whole


def test_every_record_is_accounted_for_and_every_loss_is_traceable(tmp_path):
    bad, surrogate = '{"instruction": "q"', '{"instruction": "\\ud800", "output": "a"}'
    lines = [
        record(1),
        record(1, instruction="Question １ "),
        record(2, output=""),
        bad,
        surrogate,
        record(3),
        record(4),
    ]
    write(tmp_path / "in/a.json", lines)
    write(tmp_path / "in/b.json", [record(3), record(5, output=" x\n")])
    ledger = build(str(tmp_path / "in"), tmp_path / "out")
    total = {
        "in": 9,
        "train": 4,
        "eval": 0,
        "duplicates": 2,
        "near_duplicates": 0,
        "not_sampled": 0,
        "dropped": {"empty": 1},
        "rejected": {"malformed_json": 1, "lone_surrogate": 1},
        "changed": {"strip_edges": 1},
        "notes": {},
        "characters": {"p50": 19, "p90": 19, "p99": 19},
    }
    assert ledger["total"] == total
    assert ledger["files"]["b.json"]["duplicates"] == 1
    assert [row["id"] for row in read_lines(tmp_path / "out/train.json")] == [
        "a.json:1",
        "a.json:6",
        "a.json:7",
        "b.json:2",
    ]
    rejects = [
        (row["file"], row["line"], row["kind"], row["reason"]) for row in read_lines(tmp_path / "out/rejects.jsonl")
    ]
    assert rejects == [
        ("a.json", 3, "cleaning", "empty"),
        ("a.json", 4, "malformed", "malformed_json"),
        ("a.json", 5, "malformed", "lone_surrogate"),
    ]
    assert [row["raw"] for row in read_lines(tmp_path / "out/rejects.jsonl")][1:] == [bad, surrogate]
    assert json.loads((tmp_path / "out/ledger.json").read_text()) == json.loads(json.dumps(ledger))


def test_text_in_is_text_out(tmp_path):
    odd = ["007", "2024-01-01", "a\x00b", "a\u2028b", "👩‍👩‍👧", "1e400", "e\u0301 é", "  lead", "trail\t "]
    path = write(tmp_path / "a.json", [{"instruction": text, "output": text} for text in odd])
    build(path, tmp_path / "out", without=["strip_edges"])
    assert texts(tmp_path / "out") == [[text, text] for text in odd]
    assert "👩‍👩‍👧" in (tmp_path / "out/train.json").read_text(encoding="utf-8")


def test_percentiles_are_lengths_that_so_many_conversations_do_not_exceed(tmp_path):
    rows = [{"instruction": "q", "output": "x" * length} for length in range(1, 11)]
    total = build(write(tmp_path / "a.json", rows), tmp_path / "out", without=["drop_cut_off"])["total"]
    assert total["characters"] == {"p50": 6, "p90": 10, "p99": 11}


def test_our_own_output_can_be_read_again_and_keeps_its_sources(tmp_path):
    build(write(tmp_path / "a.json", [record(1), record(2)]), tmp_path / "out")
    build(str(tmp_path / "out"), tmp_path / "again")
    assert (tmp_path / "again/train.json").read_bytes() == (tmp_path / "out/train.json").read_bytes()


def messy_folder(folder):
    """Files of several sizes and forms, with duplicates, dirt and broken lines."""
    rng = random.Random(0)
    for name, num in (("b.json", 700), ("a.jsonl", 300), ("sub/b.json", 400)):
        rows = [record(rng.randrange(800)) for _ in range(num)]
        rows[5], rows[50], rows[77] = '{"instruction": ', record(1, output=""), {"instruction": "x", "output": 1}
        write(folder / name, rows)
    array = json.dumps([record(number) for number in range(700, 900)])
    (folder / "c.json").write_text(array)
    return folder


def test_bytes_do_not_depend_on_workers_or_the_order_of_arguments(tmp_path):
    folder = messy_folder(tmp_path / "in")
    inputs = [f"{folder}/b.json@200", f"{folder}/a.jsonl", f"{folder}/sub@50%", f"{folder}/c.json"]
    runs = []
    for number, (workers, order) in enumerate([(1, inputs), (2, inputs[::-1]), (3, inputs[2:] + inputs[:2])]):
        build(order, tmp_path / f"out{number}", workers=workers, eval_share=0.1, near_duplicates=0.95)
        runs.append(digests(tmp_path / f"out{number}"))
    assert sorted(runs[0]) == ["eval.json", "ledger.json", "rejects.jsonl", "train.json"]
    assert runs[0] == runs[1] == runs[2]


def test_names_are_as_short_as_they_can_be_told_apart(tmp_path):
    ledger = build(str(messy_folder(tmp_path / "in")), tmp_path / "out")
    assert list(ledger["files"]) == ["a.jsonl", "c.json", "in/b.json", "sub/b.json"]


def test_a_sample_has_exactly_its_size_and_is_spread_over_all_files_of_its_input(tmp_path):
    for name in "abc":
        write(tmp_path / f"in/{name}.json", [record(f"{name}{number}") for number in range(200)])
    ledger = build(f"{tmp_path}/in@90", tmp_path / "out")
    rows = ledger["files"].values()
    assert (ledger["total"]["train"], ledger["total"]["not_sampled"]) == (90, 510)
    assert all(15 <= row["train"] <= 45 for row in rows)
    places = [row["id"].split(":") for row in read_lines(tmp_path / "out/train.json")]
    assert places == sorted(places, key=lambda place: (place[0], int(place[1])))
    other = build(f"{tmp_path}/in@90", tmp_path / "other", seed=1)
    assert other["total"]["train"] == 90
    assert digests(tmp_path / "other")["train.json"] != digests(tmp_path / "out")["train.json"]
    assert build(f"{tmp_path}/in@10000", tmp_path / "all")["total"]["train"] == 600


def test_a_share_takes_about_that_much_of_a_file_whose_records_stand_on_one_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([record(number) for number in range(1000)]))
    total = build(f"{path}@10%", tmp_path / "out")["total"]
    assert 70 <= total["train"] <= 130
    assert total["train"] + total["not_sampled"] == 1000


def test_a_path_that_exists_wins_over_a_sample_size(tmp_path):
    path = write(tmp_path / "a@1", [record(1), record(2)])
    assert build(path, tmp_path / "out")["total"]["train"] == 2


def test_the_held_out_split_stays_when_data_is_added_and_shares_no_prompt(tmp_path):
    rows = [record(number % 300, output=f"answer {number}.") for number in range(600)]
    path, more = write(tmp_path / "b.json", rows), write(tmp_path / "a.json", [record(number) for number in range(400)])
    build(path, tmp_path / "out", eval_share=0.1)
    build([path, more], tmp_path / "more", eval_share=0.1)
    before, after = (
        [{question for question, _ in texts(tmp_path / folder, name)} for name in ("train.json", "eval.json")]
        for folder in ("out", "more")
    )
    assert 15 <= len(before[1]) <= 50
    assert not before[0] & before[1]
    assert not after[0] & after[1]
    assert before[0] <= after[0]
    assert before[1] <= after[1]


def test_near_duplicates_are_verified_by_what_they_share(tmp_path):
    base = "".join(random.Random(0).choices("的一是不了在人有我他这个们中来上大为和国", k=200))
    rows = [
        {"instruction": "q", "output": base[::-1] + "。"},
        {"instruction": "q", "output": base + "。"},
        {"instruction": "q", "output": base[:-3] + "好好好。"},
        {"instruction": "q", "output": base[:120] + "。"},
    ]
    ledger = build(write(tmp_path / "a.json", rows), tmp_path / "out", near_duplicates=0.8)
    assert (ledger["total"]["train"], ledger["total"]["near_duplicates"]) == (3, 1)
    assert [row["id"] for row in read_lines(tmp_path / "out/train.json")] == ["a.json:1", "a.json:2", "a.json:4"]


def test_each_rule_has_a_switch(tmp_path, capsys):
    path = write(tmp_path / "a.json", [record(1, output="one, two,"), record(2)])
    for number, (flags, kept) in enumerate([((), 1), (("--no_drop_cut_off",), 2), (("--drop_cut_off",), 1)]):
        assert main([path, "--output", str(tmp_path / f"out{number}"), "--eval_share", "0", *flags]) == 0
        assert len(texts(tmp_path / f"out{number}")) == kept
    assert capsys.readouterr().out.count("dropped: cut_off 1") == 2


def test_reasoning_is_kept_on_request(tmp_path):
    reply = {"role": "assistant", "content": "a.", "reasoning_content": "r"}
    path = write(tmp_path / "a.json", [{"messages": [{"role": "user", "content": "q"}, reply]}])
    assert build(path, tmp_path / "out")["total"]["notes"] == {"reasoning_dropped": 1}
    build(path, tmp_path / "kept", reasoning="keep")
    assert texts(tmp_path / "kept") == [["q", "<think>\nr\n</think>\n\na."]]


def test_the_table_fits_120_columns_and_adds_up(tmp_path, capsys):
    write(
        tmp_path / "in/一个名字很长很长的文件一个名字很长很长的文件一个名字很长很长的文件.json", [record(1), record(2)]
    )
    write(tmp_path / "in/b.json", [record(1), "broken"])
    print_ledger(build(str(tmp_path / "in"), tmp_path / "out"))
    lines = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()) for line in lines[:2] + lines[3:4]] == [
        "file in train eval dupl. near unsampled dropped rejected p50 p90 p99",
        "b.json 2 1 0 0 0 0 0 1 19 19 19",
        "total 4 2 0 1 0 0 0 1 19 19 19",
    ]
    assert lines[-1] == "rejected: malformed_json 1"
    assert max(map(opendata._width, lines)) <= 120


# --- Mistakes


def run(*arguments, **options):
    command = [sys.executable, "-m", "sft.opendata", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, **options)


def test_all_mistakes_are_told_at_once_in_a_line_each_and_nothing_is_written(tmp_path):
    path = write(tmp_path / "a.json", [record(1)])
    gbk = tmp_path / "gbk.json"
    gbk.write_bytes(json.dumps(record(1, output="我们在这里说中文"), ensure_ascii=False).encode("gb18030"))
    (tmp_path / "file").touch()
    done = run(
        *(path, gbk, tmp_path / "missing.json", f"{path}@many", f"{path}@0", f"{path}@5", "--mix", "nothing"),
        *("--output", tmp_path / "file/out", "--workers", 0, "--eval_share", 2, "--near_duplicates", 7),
        *("--max_rejected", 3, "--reasoning", "maybe"),
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"{tmp_path}/missing.json: no such file or folder, and as a glob it matches no data file",
        f"{path}@many: 'many' is no sample size; write a number as in @20000, or a share as in @10%",
        f"{path}@0: '0' is no sample size; write a number as in @20000, or a share as in @10%",
        f"{path}@5: {path} is also given with another sample size; give it once",
        "--mix nothing: there are belle, blossom-v5-stage1, blossom-v5-stage2",
        f"{gbk}: not UTF-8 text, it looks like gb18030; read it with --encoding gb18030, or convert it",
        "--eval_share 2.0: give a share from 0 up to, but without, 1",
        "--max_rejected 3.0: give a share from 0 to 1",
        "--near_duplicates 7.0: give a similarity above 0 and up to 1, such as 0.8",
        "--reasoning maybe: use drop or keep",
        "--workers 0: give at least 1",
        f"{tmp_path}/file: can't be written to; choose another --output or --report",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "file", "gbk.json"]


def test_no_input_and_a_bad_encoding_are_mistakes(tmp_path, capsys):
    assert main(["--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "no input: name a file, a folder, a glob, a data set or --mix\n"
    path = write(tmp_path / "a.json", [record(1)])
    assert main([path, "--encoding", "nope", "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "--encoding nope: unknown; use utf-8, gb18030, big5, utf-16 or the like\n"
    assert not (tmp_path / "out").exists()


def test_another_encoding_is_read_on_request(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(json.dumps(record(1, output="我们在这里。"), ensure_ascii=False).encode("gb18030"))
    build(str(path), tmp_path / "out", encoding="gb18030")
    assert texts(tmp_path / "out") == [["question 1", "我们在这里。"]]


def test_nothing_is_overwritten_unless_asked_and_then_only_our_files(tmp_path, capsys):
    path, out = write(tmp_path / "a.json", [record(1)]), tmp_path / "out"
    assert main([path, "--output", str(out)]) == 0
    (out / "mine.txt").write_text("keep")
    before = digests(out)
    write(tmp_path / "a.json", [record(2)])
    capsys.readouterr()
    assert main([path, "--output", str(out)]) == 2
    files = ", ".join(str(out / name) for name in ("train.json", "eval.json", "rejects.jsonl", "ledger.json"))
    assert capsys.readouterr().err == f"{files}: already there; use --overwrite to replace, or another --output\n"
    assert digests(out) == before
    assert main([path, "--output", str(out), "--overwrite", "--eval_share", "0"]) == 0
    assert texts(out) == [["question 2", "answer 2."]]
    assert (out / "mine.txt").read_text() == "keep"
    assert sorted(os.listdir(out)) == ["eval.json", "ledger.json", "mine.txt", "rejects.jsonl", "train.json"]


def test_an_output_inside_the_input_folder_does_not_feed_on_itself(tmp_path):
    write(tmp_path / "a.json", [record(1)])
    build(str(tmp_path), tmp_path / "out")
    before = digests(tmp_path / "out")
    build(str(tmp_path), tmp_path / "out", overwrite=True)
    assert digests(tmp_path / "out") == before


def test_report_says_where_the_ledger_goes(tmp_path):
    path, out = write(tmp_path / "a.json", [record(1)]), tmp_path / "out"
    ledger = build(path, out, report=str(tmp_path / "reports/ledger.json"))
    assert sorted(os.listdir(out)) == ["eval.json", "rejects.jsonl", "train.json"]
    assert os.listdir(tmp_path / "reports") == ["ledger.json"]
    written = json.loads((tmp_path / "reports/ledger.json").read_text())
    assert written["outputs"]["train.json"]["sha256"] == digests(out)["train.json"]
    assert written["outputs"] == ledger["outputs"]


def test_too_much_malformed_input_is_written_and_then_told_by_the_exit_code(tmp_path, capsys):
    path = write(tmp_path / "a.json", [*map(record, range(30)), "broken", record(1, output="")])
    assert main([path, "--output", str(tmp_path / "out"), "--eval_share", "0"]) == 1
    assert len(texts(tmp_path / "out")) == 30
    message = f"1 of 32 records (3.1%) are malformed, more than --max_rejected 0.01; see {tmp_path}/out/rejects.jsonl\n"
    assert capsys.readouterr().err == message
    assert main([path, "--output", str(tmp_path / "out2"), "--max_rejected", "0.05"]) == 0


def test_nothing_kept_is_a_problem(tmp_path):
    ledger = build(write(tmp_path / "a.json", [record(1, output="")]), tmp_path / "out")
    assert find_problem(ledger) == "nothing was kept"
    (tmp_path / "empty.json").touch()
    assert find_problem(build(str(tmp_path / "empty.json"), tmp_path / "out2")) == "nothing was kept"


def test_a_missing_rensa_is_told_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(opendata, "find_spec", lambda name: None)
    path = write(tmp_path / "a.json", [record(1)])
    with pytest.raises(ValueError, match=r"^--near_duplicates needs rensa; run: pip install rensa$"):
        build(path, tmp_path / "out", near_duplicates=0.8)


# --- Killed, crowded, and from afar


def test_a_run_killed_while_writing_leaves_the_old_output_and_can_be_run_again(tmp_path):
    small = write(tmp_path / "small.json", [record(1)])
    big = write(tmp_path / "big.json", map(record, range(40_000)))
    out, reference = tmp_path / "out", tmp_path / "reference"
    assert run(small, "--output", out).returncode == 0
    before = digests(out)
    command = [sys.executable, "-m", "sft.opendata", big, "--output", out, "--overwrite", "--workers", "2"]
    killed = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    draft = out / ".opendata.tmp/train.json"
    while killed.poll() is None and not (draft.exists() and draft.stat().st_size > 200_000):
        pass
    second = run(small, "--output", out, "--overwrite")
    assert (second.returncode, second.stderr.split("; ")[0]) == (2, f"{out}: another run is writing there")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert draft.exists()
    draft.parent.joinpath("not ours").touch()
    assert {name: digest for name, digest in digests_of_files(out).items()} == before
    assert list_files(out) == [f"{out}/eval.json", f"{out}/train.json"]
    for target in (out, reference):
        assert run(big, "--output", target, "--overwrite").returncode == 0
    assert digests_of_files(out) == digests(reference)
    assert os.listdir(draft.parent) == ["not ours"]
    with pytest.raises(ProcessLookupError):
        os.killpg(killed.pid, 0)


def digests_of_files(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def test_a_failure_in_the_middle_changes_nothing_and_cleans_up(tmp_path, monkeypatch, capsys):
    path, out = write(tmp_path / "a.json", [record(1)]), tmp_path / "out"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(opendata, "_write", full)
    assert main([path, "--output", str(out), "--workers", "1"]) == 1
    assert capsys.readouterr().err == f"{out}: No space left on device; nothing was changed\n"
    assert not out.exists()


FILES = {
    "train/a.json": json.dumps([record(number) for number in range(40)]).encode(),
    "b.jsonl": json.dumps(record(99)).encode(),
    "dataset_infos.json": b"{}",
    "README.md": b"hello",
}


class Hub(http.server.BaseHTTPRequestHandler):
    """The few endpoints of huggingface.co that a data set's files are read through."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = self.path.split("?")[0]
        if path.startswith("/datasets/me/data/resolve/"):
            body = FILES[path.split("/", 6)[6]]
            start, _, end = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            self.answer(206, body[int(start) : int(end or len(body)) + 1])
        elif path.startswith("/api/datasets/me/data/tree/"):
            folder = path.split("/", 7)[7] if path.count("/") > 6 else ""
            files = [{"type": "file", "path": name, "size": len(body), "oid": "0"} for name, body in FILES.items()]
            self.answer(200, json.dumps([file for file in files if os.path.dirname(file["path"]) == folder]).encode())
        elif path.startswith("/api/datasets/me/data"):
            info = {"id": "me/data", "sha": "c" * 40, "siblings": [{"rfilename": name} for name in FILES]}
            self.answer(200, json.dumps(info).encode())
        else:
            self.answer(404, b"{}")

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
    server.shutdown()


def test_a_data_set_of_the_hub_is_streamed_from_the_endpoint(tmp_path, hub):
    done = run("me/data@30", "--output", tmp_path / "out", "--eval_share", 0, env=hub)
    assert (done.returncode, done.stderr) == (0, "")
    ledger = json.loads((tmp_path / "out/ledger.json").read_text())
    assert {name: row["in"] for name, row in ledger["files"].items()} == {
        "me/data/b.jsonl": 1,
        "me/data/train/a.json": 40,
    }
    assert (ledger["total"]["train"], ledger["total"]["not_sampled"]) == (30, 11)
    assert {row["id"].rpartition(":")[0] for row in read_lines(tmp_path / "out/train.json")} >= {"me/data/train/a.json"}


def test_a_data_set_out_of_reach_is_one_line(tmp_path, hub):
    done = run("me/missing", "--output", tmp_path / "out", env=hub)
    assert done.returncode == 2
    assert done.stderr.startswith("me/missing: no such path here, and no data set the hub would give us (")
    assert done.stderr.count("\n") == 1
    done = run("me/data", "--output", tmp_path / "out", env=hub | {"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_the_mixes_are_data_that_the_command_can_read():
    for inputs in opendata.MIXES.values():
        for text in inputs:
            name, size = opendata._split_sample(text)
            assert name.count("/") == 1
            assert size > 0


def test_memory_stays_flat(tmp_path):
    path = write(tmp_path / "a.json", map(record, range(50_000)))
    code = (
        "import sys; from sft.opendata.build import main;"
        "code = main([sys.argv[1], '--output', sys.argv[2], '--workers', '1']);"
        "peak = open('/proc/self/status').read().split('VmHWM:')[1].split()[0];"
        "print(code, int(peak) < 80_000)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path, tmp_path / "out"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1] == "0 True", done.stderr


def test_the_ledger_is_written_on_its_disk_before_any_file_is_replaced(tmp_path, monkeypatch):
    (tmp_path / "in.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
    report, replace, drafted = tmp_path / "elsewhere" / "ledger.json", os.replace, []

    def watch(source, target):
        drafted.append(bool(list(report.parent.glob(".ledger.json.*.partial"))))
        replace(source, target)

    monkeypatch.setattr(opendata.os, "replace", watch)
    opendata.build_opendata([str(tmp_path / "in.jsonl")], output=str(tmp_path / "out"), report=str(report), workers=1)
    assert drafted == [True, True, True, True]
    assert report.exists()
