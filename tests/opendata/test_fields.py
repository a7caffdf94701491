"""Every field is read, honoured, refused by name or counted: the same in sft.opendata and in train.py."""

import json
from pathlib import Path

import pytest

from sft.dataset.ledger import check_losses, ledger_lines
from sft.opendata.conversation import read_conversations, read_record
from sft.opendata.fields import FieldCounts, RecordError
from tests.opendata.make import build, read_lines, write

CASES = [json.loads(line) for line in (Path(__file__).parent / "cases.jsonl").read_text(encoding="utf-8").splitlines()]
KEPT = {
    "CSV": 2,
    "TSV": 1,
    "two records that differ in case": 2,
}
# The words that the message of a refused record must have.
REFUSED = {
    "switch weight 0.5": ("messages[1].weight", "0.5"),
    "KTO label false": ("label", "--preference chosen"),
    "KTO label true": ("label", "--preference chosen"),
    "DPO, ShareGPT": ("chosen and rejected", "--preference chosen"),
    "DPO, strings": ("chosen and rejected", "--preference chosen"),
    "image key": ("images", "only text"),
    "audio key": ("audios", "only text"),
    "call that is no JSON": ("messages[1].tool_calls[0].function.arguments", "no JSON object"),
    "result without a call": ("messages[1]", "answers no call"),
    "key text": ("messages[0]", "`text`", "`content`"),
    "file of columns": ("file of columns",),
}
CHOSEN = {"KTO label true": ["good"], "DPO, ShareGPT": ["a1", "good"], "DPO, strings": ["good"], "KTO label false": []}


def source_of(case, tmp_path):
    path = tmp_path / "case.json"
    path.write_text(case["file"] if "file" in case else json.dumps(case["record"]) + "\n", encoding="utf-8")
    return str(path)


def through_opendata(path, tmp_path, **options):
    """Conversations, messages of lost records, counts of fields that are not read."""
    ledger = build(path, tmp_path / "out", **options)
    rejects = [row["message"] for row in read_lines(tmp_path / "out/rejects.jsonl")]
    return read_lines(tmp_path / "out/train.json"), rejects, ledger["total"]["not_read"], ledger["total"]["notes"]


def through_training(path, **options):
    """The same as `sft.dataset` reads it for train.py."""
    counts: dict[str, FieldCounts] = {}
    read = list(read_conversations([path], counts=counts, **options))
    found = [conversation for conversation, *_ in read if conversation]
    return found, [str(error) for _, error, *_ in read if error], dict(counts[path].unread), dict(+counts[path].notes)


def trained(conversations):
    """The texts with loss, each with its number of calls."""
    return [(reply["content"], len(reply.get("tool_calls", []))) for reply in replies_of(conversations)]


def replies_of(conversations):
    messages = [message for conversation in conversations for message in conversation["messages"]]
    return [message for message in messages if message["role"] == "assistant" and message.get("train") is not False]


def expected(case):
    """The case's `trained` as (text, number of calls)."""
    calls = {"<the call>": ("", 1), "<two calls>": ("", 2), "Let me look. + <the call>": ("Let me look.", 1)}
    return [calls.get(text, (text, 0)) for text in case["expect"]["trained"]]


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_a_case_becomes_the_same_in_sft_opendata_and_in_training(case, tmp_path):
    path, expect = source_of(case, tmp_path), case["expect"]
    found = through_opendata(path, tmp_path)
    assert found == through_training(path)
    kept, lost, not_read, _notes = found
    if words := REFUSED.get(case["name"]):
        assert (kept, len(lost)) == ([], 1)
        assert all(word in lost[0] for word in words), lost
        return
    assert (len(kept), lost) == (KEPT.get(case["name"], 1), [])
    if "trained" in expect:
        assert trained(kept) == expected(case)
    thoughts = [reply["reasoning_content"] for reply in replies_of(kept) if "reasoning_content" in reply]
    assert thoughts == expect.get("thought", [])
    assert sorted(not_read) == sorted(expect.get("counted", []))
    if "tools" in expect:
        assert [len(conversation["tools"]) for conversation in kept] == [expect["tools"]]
        assert sum(len(m.get("tool_calls", [])) for c in kept for m in c["messages"]) == expect["calls"]


@pytest.mark.parametrize("name", CHOSEN)
def test_preference_data_gives_its_chosen_replies_when_asked(name, tmp_path):
    case = next(case for case in CASES if case["name"] == name)
    path = source_of(case, tmp_path)
    found = through_opendata(path, tmp_path, preference="chosen")
    assert found == through_training(path, preference="chosen")
    assert [text for text, _ in trained(found[0])] == CHOSEN[name]
    assert found[1] == ([] if CHOSEN[name] else ["label is false: left out by --preference chosen"])


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def call_message(text, *beside):
    return {"role": "tool_call", "content": text, "tool_calls": list(beside)}


@pytest.mark.parametrize("text", ["", '{"name": "f", "arguments": {}}'])
def test_a_message_of_calls_may_have_them_beside_its_text(text, tmp_path):
    path = write(tmp_path / "a.json", [{"messages": [user("q"), call_message(text, {"id": "c", "name": "f"})]}])
    [(conversation, error, *_)] = read_conversations([path])
    assert error is None
    [call] = conversation["messages"][1]["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": {}}


def test_twenty_unknown_fields_at_every_depth_are_counted_by_name(tmp_path):
    call = {"id": "1", "type": "function", "index": 0, "function": {"name": "f", "arguments": "{}", "parsed": True}}
    parts = [{"type": "text", "text": "q", "cache_control": {"type": "ephemeral"}}]
    record = {f"extra_{number}": number for number in range(15)} | {
        "messages": [
            {"role": "user", "content": parts, "name": "Ann"},
            assistant("", tool_calls=[call], refusal="no", annotations=[1]),
            {"role": "tool", "tool_call_id": "1", "content": "r", "status": "ok"},
            assistant("a", logprobs=0.5),
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }
    nested = {
        *("messages[].name", "messages[].content[].cache_control", "messages[].refusal", "messages[].annotations"),
        *("messages[].status", "messages[].logprobs", "messages[].tool_calls[].index"),
        "messages[].tool_calls[].function.parsed",
    }
    path = write(tmp_path / "a.json", [record, record])
    kept, lost, not_read, _ = through_opendata(path, tmp_path)
    assert (len(kept), lost) == (1, [])
    assert not_read == dict.fromkeys({f"extra_{number}" for number in range(15)} | nested, 2)
    assert through_training(path)[2] == not_read


def test_numbers_as_ids_of_calls_become_text_and_are_counted(tmp_path):
    call = {"id": 7, "type": "function", "function": {"name": "f", "arguments": "{}"}}
    result = {"role": "tool", "tool_call_id": 7, "content": "r"}
    record = {"messages": [user("q"), assistant("", tool_calls=[call]), result, assistant("a")]}
    path = write(tmp_path / "a.json", [record])
    found, lost, _, notes = through_training(path)
    assert lost == []
    assert found[0]["messages"][1]["tool_calls"][0]["id"] == found[0]["messages"][2]["tool_call_id"] == "7"
    assert notes["number_as_tool_call_id"] == 1
    assert through_opendata(path, tmp_path)[3] == notes


def test_an_id_of_a_call_that_is_neither_text_nor_number_is_refused(tmp_path):
    result = {"role": "tool", "tool_call_id": True, "content": "r"}
    record = {"messages": [user("q"), assistant("", tool_calls=[{"name": "f"}]), result, assistant("a")]}
    path = write(tmp_path / "a.json", [record])
    assert through_training(path)[1] == ["messages[2].tool_call_id is a boolean; write it as a string"]


def test_fields_that_hold_nothing_are_not_counted(tmp_path):
    record = {"instruction": "q", "output": "a", "lang": None, "tags": [], "meta": {}, "note": "", "score": 0}
    assert through_training(write(tmp_path / "a.json", [record]))[2] == {"score": 1}


PLAIN_F = {"name": "f", "description": "another"}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [user("q"), assistant("a", train="maybe")]}, "loss_switch"),
        ({"messages": [user("q"), assistant("a", weight=2)]}, "loss_switch"),
        ({"messages": [user("q"), assistant("a", train=True, weight=0)]}, "loss_switch"),
        ({"messages": [user("q"), assistant("a", loss_scale=0.5)]}, "loss_switch"),
        ({"messages": [{**user("q"), "train": True}, assistant("a")]}, "loss_switch"),
        ({"messages": [user("q"), assistant("a")], "loss_mask": [1, 1]}, "loss_switch"),
        ({"messages": [user("q"), assistant("a")], "loss_mask": [1]}, "loss_switch"),
        ({"messages": [user("q"), assistant("a")], "weight": 0.25}, "loss_switch"),
        ({"messages": [user("q"), assistant("a", train=False)]}, "nothing_learned"),
        ({"messages": [user("q"), assistant("a")], "train": False}, "nothing_learned"),
        ({"instruction": "q", "output": "a", "image": "x.png"}, "images"),
        ({"messages": [user("q"), assistant("a", audio={"id": "1"})]}, "audios"),
        ({"messages": [user("q"), assistant("a", reasoning_content="x", thinking="y")]}, "two_thoughts"),
        ({"messages": [user("q"), assistant("<think>x</think>a", reasoning_content="y")]}, "two_thoughts"),
        ({"messages": [user("q"), assistant("a")], "tools": "no json"}, "tool_definition"),
        ({"messages": [user("q"), assistant("a")], "tools": ["f"]}, "tool_definition"),
        ({"messages": [user("q"), assistant("a")], "tools": [{"type": "web_search"}]}, "tool_definition"),
        ({"messages": [user("q"), assistant("", tool_calls=[{"function": {"arguments": "{}"}}])]}, "tool_call"),
        ({"messages": [user("q"), assistant("", function_call={"name": "f", "arguments": "[1]"})]}, "tool_arguments"),
        (
            {"messages": [user("q"), assistant("", function_call={"name": "f", "arguments": '{"a": NaN}'})]},
            "tool_arguments",
        ),
        ({"messages": [user("q"), call_message('{"name": "f", "arguments": {}}', {"name": "g"})]}, "tool_call"),
        ({"messages": "hello"}, "not_list"),
        ({"messages": "[{broken"}, "not_list"),
        ({"messages": {"from": ["human"], "value": ["a", "b"]}}, "not_list"),
        ({"messages": {"from": ["human", "gpt"], "value": ["a", "b"], "system": "s"}}, "not_list"),
        ({"messages": [{**user("q"), "value": "other"}, assistant("a")]}, "two_contents"),
        ({"messages": [user("q"), assistant([{"type": "text", "text": "a", "weight": 0}])]}, "loss_switch"),
        (
            {"messages": [user("q"), assistant("a")], "tools": [{"name": "f"}], "functions": [PLAIN_F]},
            "tool_definition",
        ),
        ({"instruction": {"0": "q"}, "output": {"0": "a"}}, "file_of_columns"),
        ({"chosen": "good", "rejected": "bad"}, "preference"),
        ({"messages": [user("q")], "rejected_response": "bad"}, "preference"),
    ],
)
def test_fields_that_change_the_meaning_and_cannot_be_honoured_reject_the_record(record, reason, tmp_path):
    path = write(tmp_path / "a.json", [record])
    build(path, tmp_path / "out", without=["fix_roles", "cut_at_empty_turn"])
    assert [row["reason"] for row in read_lines(tmp_path / "out/rejects.jsonl")] == [reason]
    assert [error.reason for _, error, *_ in read_conversations([path])] == [reason]


@pytest.mark.parametrize(
    ("record", "unread"),
    [
        ({"prompt": [user("q")], "completion": [assistant("a")], "reasoning": "r", "history": [["b", "c"]]}, 2),
        ({"query": "q", "tools": [PLAIN_F], "answers": [{"name": "f", "arguments": {}}], "thinking": "r"}, 1),
        ({"instruction": "q", "output": "a", "label": "bad"}, 1),
        ({"instruction": "q", "output": "", "tool_calls": [{"name": "f", "arguments": {}}], "tools": [PLAIN_F]}, 0),
    ],
)
def test_fields_that_a_form_has_no_place_for_are_counted(record, unread):
    counts = FieldCounts()
    read_record(record, source="a.json", line=1, counts=counts)
    assert counts.unread.total() == unread


SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("record", "messages", "unread"),
    [
        ({"prompt": [SYSTEM, user("q")], "chosen": [user("q"), assistant("a")]}, 3, {}),
        ({"prompt": [SYSTEM, user("q")], "chosen": [SYSTEM, user("q"), assistant("a")]}, 3, {}),
        ({"prompt": "q", "chosen": [user("q"), assistant("a")]}, 2, {}),
        ({"prompt": "another", "chosen": [user("q"), assistant("a")]}, 2, {"prompt": 1}),
        ({"prompt": [SYSTEM, user("another")], "chosen": [user("q"), assistant("a")]}, 2, {"prompt": 1}),
        ({"instruction": "q", "output": "a", "chosen": "a"}, 2, {}),
    ],
)
def test_fields_beside_a_chosen_reply_are_kept_or_counted(record, messages, unread):
    counts = FieldCounts()
    found = read_record(record | {"rejected": "bad"}, source="a.json", line=1, preference="chosen", counts=counts)
    assert len(found["messages"]) == messages
    assert dict(counts.unread) == unread


@pytest.mark.parametrize("other", [{"chosen_response": "b"}, {"output": "b"}])
def test_two_chosen_replies_are_refused(other):
    record = {"instruction": "q", "chosen": "a", "rejected": "bad"} | other
    with pytest.raises(RecordError, match="differ; keep one"):
        read_record(record, source="a.json", line=1, preference="chosen")


def test_training_says_what_it_did_not_read_and_stops_for_thoughts_without_a_place(tmp_path, tokenizer_of):
    from sft.dataset.dataset import prepare
    from sft.format.render import Renderer

    rows = [
        {"messages": [user("q"), assistant("a", reasoning_content="r")], "lang": "en", "score": 1},
        {"messages": [user("q"), assistant("b")], "lang": "zh"},
        {"messages": [user("q"), assistant("c")], "images": ["x.png"]},
        {"messages": [user("q"), assistant("d")], "label": False},
    ]
    renderer = Renderer(tokenizer_of("bloom"), "blossom")
    assert not renderer.keeps_reasoning
    path = write(tmp_path / "a.json", rows)
    options = {"max_length": 512, "cache_dir": str(tmp_path / "cache"), "say": lambda line: None}
    _, ledger = prepare([path], renderer, **options)
    assert ledger_lines(ledger) == [
        "4 conversations in 1 files, 2 kept",
        f"  lost, not a conversation: 2 (images 1, preference 1; first: {path} line 3: images holds media, and only "
        "text is learned; leave the record out)",
        "  a.json: not read: lang 2, score 1",
        "  notes: reasoning_dropped 1",
    ]
    with pytest.raises(
        ValueError, match=r"^1 replies have a thought, for which the chat format has no place; .*--reasoning drop"
    ):
        check_losses(ledger, max_lost=1.0)
    _, ledger = prepare([path], renderer, reasoning="drop", preference="chosen", **options)
    check_losses(ledger, max_lost=0.3)
    assert ledger["total"] == {"in": 4, "kept": 2, "rejected": 1, "not_chosen": 1}
    assert "  left out by --preference chosen: 1" in "\n".join(ledger_lines(ledger))
