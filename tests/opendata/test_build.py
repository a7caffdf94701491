"""The run as a whole: conservation, determinism, and what a kill leaves behind."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sft.opendata import build as opendata
from sft.opendata.__main__ import find_problem, print_ledger
from sft.opendata.cleaning import RULES
from sft.opendata.files import list_files
from tests.conftest import ROOT
from tests.opendata.make import build, digests, digests_of_files, read_lines, record, run, texts, write


def test_every_record_is_accounted_for_and_every_loss_is_traceable(tmp_path):
    bad, surrogate = '{"instruction": "q"', '{"instruction": "\\ud800", "output": "a"}'
    lines = [
        record(1),
        record(1, instruction="question 1 "),
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
        "not_read": {},
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


def test_names_are_as_short_as_they_stay_distinct(tmp_path):
    ledger = build(str(messy_folder(tmp_path / "in")), tmp_path / "out")
    assert list(ledger["files"]) == ["a.jsonl", "c.json", "in/b.json", "sub/b.json"]


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


def test_thoughts_are_kept_unless_they_are_to_be_dropped(tmp_path):
    reply = {"role": "assistant", "content": "a.", "reasoning_content": "r"}
    path = write(tmp_path / "a.json", [{"messages": [{"role": "user", "content": "q"}, reply]}])
    for reasoning, kept in (("auto", {"reasoning_content": "r"}), ("keep", {"reasoning_content": "r"}), ("drop", {})):
        ledger = build(path, tmp_path / reasoning, reasoning=reasoning)
        assert ledger["total"]["notes"] == {f"reasoning_{'kept' if kept else 'dropped'}": 1}
        answer = read_lines(tmp_path / reasoning / "train.json")[0]["messages"][1]
        assert answer == {"role": "assistant", "content": "a."} | kept


def test_another_encoding_is_read_on_request(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(json.dumps(record(1, output="我们在这里。"), ensure_ascii=False).encode("gb18030"))
    build(str(path), tmp_path / "out", encoding="gb18030")
    assert texts(tmp_path / "out") == [["question 1", "我们在这里。"]]


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


def test_a_build_that_keeps_no_record_is_a_problem(tmp_path):
    ledger = build(write(tmp_path / "a.json", [record(1, output="")]), tmp_path / "out")
    assert find_problem(ledger) == "nothing was kept"
    (tmp_path / "empty.json").touch()
    assert find_problem(build(str(tmp_path / "empty.json"), tmp_path / "out2")) == "nothing was kept"


def test_a_missing_rensa_is_reported_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(opendata, "find_spec", lambda name: None)
    path = write(tmp_path / "a.json", [record(1)])
    with pytest.raises(ValueError, match=r"^--near_duplicates needs rensa; run: pip install rensa$"):
        build(path, tmp_path / "out", near_duplicates=0.8)


@pytest.mark.slow
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


def running(parent: int | None = None) -> list[int]:
    """The processes that run, of one parent or of all, by /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state, ppid, *_rest = path.read_text().rpartition(")")[2].split()
            found += [int(path.parent.name)] if state != "Z" and parent in (None, int(ppid)) else []
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("receiver", "number", "code", "said"),
    [
        ("worker", signal.SIGKILL, 2, "{path} line "),
        ("forking process", signal.SIGKILL, 2, "{path} line "),
        ("parent", signal.SIGINT, 130, "interrupted; nothing was changed"),
        ("parent", signal.SIGTERM, 143, "stopped by SIGTERM; nothing was changed"),
        ("parent", signal.SIGKILL, -9, ""),
    ],
)
def test_a_run_that_is_stopped_leaves_no_process_and_no_file(tmp_path, receiver, number, code, said):
    path, out = write(tmp_path / "big.json", map(record, range(60_000))), tmp_path / "out"
    command = [sys.executable, "-m", "sft.opendata", path, "--output", out, "--preprocessing_num_workers", "2"]
    started = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    draft = out / ".opendata.tmp/train.json"
    while started.poll() is None and not (draft.exists() and draft.stat().st_size > 200_000):
        pass
    (forking,) = running(started.pid)
    workers = running(forking)
    assert len(workers) == 2
    os.kill({"worker": workers[0], "forking process": forking, "parent": started.pid}[receiver], number)
    _out, error = started.communicate()
    assert started.returncode == code
    assert error.startswith(said.format(path=path))
    assert len(error.splitlines()) == (1 if said else 0)
    while {forking, *workers} & set(running()):  # their parent's end closes their sockets
        pass
    assert out.exists() == (code == -9)
    if receiver != "parent":
        assert re.fullmatch(rf"{path} line \d+ to \d+: a worker was killed by SIGKILL while it read them, .*\n", error)


@pytest.mark.slow
def test_memory_stays_flat(tmp_path):
    path = write(tmp_path / "a.json", map(record, range(50_000)))
    code = (
        "import sys; from sft.opendata.__main__ import main;"
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


# Output of the same files before records had tools and thoughts (commit 37c5ef9).
BEFORE_TOOLS = {
    "train.json": "e44f27152bb195a4896e50a6b1980509760b4ea1a02addef658e5c37980aa1e8",
    "eval.json": "a0a44d75d5d512b5d7dfb9d8b2def7de7281ed2808d41081d555b96c71d59851",
}
RAW_BEFORE_TOOLS = {
    "train.json": "590773dc8ed6e96e1e730c5d0653bb377bfeb2510dfb4b8f43ae4b7db810c221",
    "eval.json": "2f94bc8ba3749f94cda1036d13348ea44229227fd5bd7773945a042620bc156f",
}
OLD_SAMPLE = (
    *("alpaca_array.json", "belle_alpaca.json", "belle_conversations.jsonl", "belle_multiturn.json"),
    *("belle_target.json", "blossom_chat.json", "blossom_math.json", "blossom_v6.jsonl", "openai_messages.jsonl.gz"),
    *("prompt_completion.jsonl", "query_response.jsonl", "sharegpt.json"),
)


@pytest.mark.parametrize(("rules_left_out", "expected"), [((), BEFORE_TOOLS), (RULES, RAW_BEFORE_TOOLS)])
def test_records_without_tools_and_thoughts_give_the_bytes_that_they_gave_before(tmp_path, rules_left_out, expected):
    inputs = [str(ROOT / "data_proj/sample" / name) for name in OLD_SAMPLE]
    build(inputs, tmp_path / "out", eval_share=0.02, reasoning="drop", without=rules_left_out)
    found = digests(tmp_path / "out")
    assert {name: found[name] for name in expected} == expected


def test_one_conversation_is_trained_on_even_if_its_question_belongs_to_the_held_out(tmp_path, capsys):
    path = write(tmp_path / "a.json", [record(1)])
    ledger = build(path, tmp_path / "out", eval_share=0.999)
    assert (ledger["total"]["train"], ledger["total"]["eval"]) == (1, 0)
    assert texts(tmp_path / "out") == [["question 1", "answer 1."]]
    assert texts(tmp_path / "out", "eval.json") == []
    assert ledger["outputs"]["train.json"]["sha256"] == digests(tmp_path / "out")["train.json"]
    print_ledger(ledger)
    assert capsys.readouterr().out.splitlines()[-1] == "too few conversations to hold any out: eval.json is empty"


def test_probable_mistakes_of_the_user_are_printed_last(tmp_path, capsys):
    claims = [record(number, output="I am ChatGPT.") for number in range(3)]
    write(tmp_path / "in/identity.json", [*claims, *map(record, range(10))])
    (tmp_path / "in/empty.json").touch()
    (tmp_path / "in/notes.txt").write_text("not data")
    ledger = build(str(tmp_path / "in"), tmp_path / "out")
    assert ledger["skipped_files"] == [str(tmp_path / "in/notes.txt")]
    print_ledger(ledger)
    lines = " ".join(capsys.readouterr().out.split())
    assert lines.endswith(
        "empty.json: holds no record identity.json: self_identity dropped 3 of 13 records (23%); "
        "--no_drop_self_identity keeps them not read, as their names are not those of data files: "
        f"{tmp_path}/in/notes.txt"
    )


def test_duplicates_are_equal_after_nfc_and_without_edge_whitespace_and_nothing_else(tmp_path):
    def talk(question, **more):
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "a."} | more]}

    call = {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    different = [talk(q) for q in ("Cafe\u0301", "cafe\u0301", "Ｃafé", "Caf é", "Caf  é")]
    different += [talk("Café", train=False), talk("Café", reasoning_content="r"), talk("Café", **call)]
    different[5]["messages"] += talk("q")["messages"]
    rows = [*different, talk(" Café\n"), talk("Café ", reasoning_content="r "), talk("Café", **call)]
    total = build(write(tmp_path / "a.json", rows), tmp_path / "out")["total"]
    assert (total["train"], total["duplicates"]) == (8, 3)
