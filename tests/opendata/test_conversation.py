"""Record forms: every raw form reads as the same conversation, and what is none is named."""

import subprocess
import sys

import pytest

from sft.opendata.conversation import check_messages, read_conversations, read_record
from sft.opendata.fields import FieldCounts
from tests.opendata.make import ONE_TURN, messages_of, pair, reason_of, write_file


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "q", "input": "", "output": "a"},
        {"instruction": "q", "output": "a"},
        {"instruction": "", "input": "q", "output": "a"},
        {"instruction": "q", "context": "", "response": "a"},
        {"input": "q", "target": "a"},
        {"id": 5, "dataset": "math", "input": "q", "output": "a", "answer": "1"},
        {"instruction": None, "input": "q", "output": "a", "answer": "1", "messages": None},
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "response": "a"},
        {"query": "q", "response": "a"},
        {"question": "q", "answer": "a"},
        {"question": "q", "response": "a"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "assistant", "value": "a"}]},
        {"conversations": [{"from": "user", "value": "q"}, {"from": "bing", "value": "a"}]},
        {"conversations": [{"from": "user", "value": "q"}, {"from": "bard", "value": "a"}]},
        {"conversations": [{"from": "user", "value": "q"}, {"from": "chatgpt", "value": "a"}]},
        {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": "q", "from": None}, {"role": "assistant", "content": "a"}]},
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
        {
            "type": "chat",
            "metadata": {},
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": ""}]},
            ],
        },
    ],
)
def test_every_raw_form_reads_as_the_same_conversation(record):
    assert messages_of(record) == ONE_TURN


def test_a_filled_input_follows_the_instruction_on_a_new_line_and_a_placeholder_does_not():
    assert messages_of({"instruction": "q", "input": "x", "output": "a"})[0] == ("user", "q\nx")
    counts = FieldCounts()
    for placeholder in ("<noinput>", "N/A", "无", "None", None, " "):
        record = {"instruction": "q", "input": placeholder, "output": "a"}
        assert messages_of(record, counts=counts) == ONE_TURN
    assert counts.notes == {"input_placeholder": 4}


def test_system_and_history_come_before_the_question():
    record = {"system": "s", "history": [["q1", "a1"]], "instruction": "q", "output": "a"}
    assert messages_of(record) == [("system", "s"), ("user", "q1"), ("assistant", "a1"), *ONE_TURN]
    assert messages_of({"system_prompt": "s", "question": "q", "response": "a"})[0] == ("system", "s")
    assert messages_of({"system_prompt": "", "question": "q", "response": "a"}) == ONE_TURN


def test_belle_turns_are_split_at_markers_that_begin_a_line():
    text = "Human:你好\nAssistant:说 Human: 的\n第二行\nHuman:再见\nAssistant:"
    assert messages_of({"instruction": text, "input": "", "output": "走好"}) == [
        ("user", "你好"),
        ("assistant", "说 Human: 的\n第二行"),
        ("user", "再见"),
        ("assistant", "走好"),
    ]
    assert messages_of({"input": "Human: 你好\n\nAssistant: ", "target": "好"}) == [
        ("user", "你好"),
        ("assistant", "好"),
    ]


def test_belle_markers_that_do_not_alternate_are_rejected_and_a_lookalike_is_noted():
    reason, message = reason_of(
        read_record, {"instruction": "Human:a\nHuman:b\nAssistant:", "output": "c"}, source="f", line=1
    )
    assert reason == "belle_alternation"
    assert message == "instruction has the markers Human, Human, Assistant; Human: and Assistant: must take turns"
    counts = FieldCounts()
    assert messages_of({"instruction": "Human:a", "output": "b"}, counts=counts) == [
        ("user", "Human:a"),
        ("assistant", "b"),
    ]
    assert counts.notes == {"belle_lookalike": 1}


def test_turns_not_to_be_trained_are_marked():
    prompt = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "q2"},
    ]
    record = {"prompt": prompt, "completion": [{"role": "assistant", "content": "a2"}]}
    assert [m.get("train") for m in read_record(record, source="f", line=1)["messages"]] == [None, False, None, None]
    for mark in ({"weight": 0}, {"train": False}):
        record = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **mark}]}
        assert [m.get("train") for m in read_record(record, source="f", line=1)["messages"]] == [None, False]


def test_a_thought_is_kept_in_its_field_or_dropped_and_both_are_counted():
    record = {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "r"}]
    }
    for reasoning, kept, note in (("keep", "r", "reasoning_kept"), ("drop", None, "reasoning_dropped")):
        counts = FieldCounts()
        read = read_record(record, source="f", line=1, reasoning=reasoning, counts=counts)
        assert read["messages"][1].get("reasoning_content") == kept
        assert counts.notes == {note: 1}


def test_an_id_is_kept_and_a_missing_one_is_the_place():
    record = {"instruction": "q", "output": "a"}
    assert read_record(record, source="f.json", line=3)["id"] == "f.json:3"
    assert read_record(record | {"id": 7}, source="f.json", line=3)["id"] == "7"
    assert read_record(record | {"id": "x"}, source="f.json", line=3)["id"] == "x"
    own = {"id": "x", "source": "belle.json", "messages": [{"role": "user", "content": "q"}]}
    assert read_record(own, source="train.json", line=3)["source"] == "belle.json"


@pytest.mark.parametrize(
    ("record", "reason", "message"),
    [
        (None, "not_object", "the record is null; write it as an object with named fields"),
        ([1], "not_object", "the record is a list; write it as an object with named fields"),
        ({"instruction": "q", "output": 7}, "not_text", "output is a number; write it as a string"),
        ({"instruction": "q", "output": True}, "not_text", "output is a boolean; write it as a string"),
        ({"instruction": "q", "output": ["a"]}, "not_text", "output is a list; write it as a string"),
        ({"instruction": "q", "output": {"a": 1}}, "not_text", "output is an object; write it as a string"),
        ({"instruction": "q", "output": float("inf")}, "not_text", "output is a number; write it as a string"),
        ({"instruction": "q", "output": None}, "null_field", "output is null; give a text or leave the record out"),
        ({"instruction": 1, "output": "a"}, "not_text", "instruction is a number; write it as a string"),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "narrator", "content": "a"}]},
            "unknown_role",
            'messages[1] has role "narrator"; use system, user or assistant',
        ),
        (
            {"messages": [{"role": "user", "content": None}]},
            "null_field",
            "messages[0].content is null; give a text or leave the record out",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "content_part",
            'messages[0].content[0] is of type "image"; only text is read',
        ),
        (
            {"data": [{"instruction": "q", "output": "a"}]},
            "nested",
            "the records are inside \"data\"; write its elements as an array or as JSON Lines, e.g. jq -c '.data[]'",
        ),
        (
            {"instruction": "q\ud800", "output": "a"},
            "lone_surrogate",
            "instruction has a lone surrogate (\\ud800) at character 2, half of a character; fix the text",
        ),
    ],
)
def test_a_record_that_is_no_conversation_is_rejected_with_field_and_advice(record, reason, message):
    assert reason_of(read_record, record, source="f", line=1) == (reason, message)


def test_an_unknown_form_names_its_keys_and_the_known_forms():
    reason, message = reason_of(read_record, {"text": "x", "n": None}, source="f", line=1)
    assert reason == "unknown_form"
    assert message.startswith('no known form has "text"; use one of messages, conversations, instruction/output, ')


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        ("", "empty"),
        ("s", "role_order"),
        ("u", "role_order"),
        ("au", "role_order"),
        ("uu", "role_order"),
        ("uaa", "role_order"),
        ("usa", "role_order"),
        ("ssua", "role_order"),
    ],
)
def test_validate_refuses_roles_out_of_order(roles, reason):
    names = {"s": "system", "u": "user", "a": "assistant"}
    messages = [{"role": names[role], "content": "x"} for role in roles]
    assert reason_of(check_messages, messages)[0] == reason


def test_validate_accepts_turns_with_and_without_system_and_refuses_blank_text():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    check_messages(turns)
    check_messages([{"role": "system", "content": "s"}, *turns, *turns])
    blank = [turns[0], {"role": "assistant", "content": " \n"}]
    assert reason_of(check_messages, blank)[0] == "empty"


def test_read_conversations_gives_file_and_line_for_good_and_bad(tmp_path):
    path = str(write_file(tmp_path, f'{pair(1)}\nno json\n{{"instruction": "q", "output": ""}}'))
    found = [(c and c["id"], e and e.reason, file, line) for c, e, file, line in read_conversations([path])]
    assert found == [
        ("data.json:1", None, path, 1),
        (None, "malformed_json", path, 2),
        (None, "empty", path, 3),
    ]


def test_neither_module_of_the_data_side_loads_a_framework():
    heavy = {"torch", "transformers", "datasets", "numpy", "pyarrow", "huggingface_hub"}
    code = f"import sys; import sft.opendata; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def hermes(*replies: str, result: str = "<tool_response>\n18\n</tool_response>") -> dict:
    """A conversation whose calls are tagged text, with a result after each reply but the last."""
    turns = [{"role": "system", "content": 'Help.\n<tools>\n[{"name": "f", "parameters": {}}]\n</tools>'}]
    turns.append({"role": "user", "content": "q"})
    for reply in replies[:-1]:
        turns += [{"role": "assistant", "content": reply}, {"role": "tool", "content": result}]
    return {"messages": [*turns, {"role": "assistant", "content": replies[-1]}]}


CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


def test_the_tagged_text_of_hermes_becomes_tools_calls_and_results():
    found = read_record(hermes(f"I look.\n{CALL}\n{CALL}", "18."), source="s", line=1)
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert found["tools"] == [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert found["messages"][2] == {"role": "assistant", "content": "I look.", "tool_calls": [call, call]}
    assert [message["role"] for message in found["messages"]] == ["system", "user", "assistant", "tool", "assistant"]
    assert found["messages"][3] == {"role": "tool", "content": "18"}


@pytest.mark.parametrize("result", ["<tool_response>\n18\n</tool_response>", "18"])
def test_one_block_of_hermes_that_cannot_be_read_leaves_all_of_it_as_text(result):
    counts = FieldCounts()
    record = hermes(CALL, "<tool_call>\n{broken\n</tool_call>", "18.", result=result)
    found = read_record(record, source="s", line=1, counts=counts)
    check_messages(found["messages"])
    assert [message["role"] for message in found["messages"]] == ["system", *["user", "assistant"] * 3]
    assert found["messages"][2]["content"] == CALL
    assert found["messages"][3]["content"] == "<tool_response>\n18\n</tool_response>"
    assert counts.notes["tool_tags_left_as_text"] == 1


def test_a_reply_about_the_tags_of_hermes_stays_text():
    found = read_record(hermes("Write <tool_call> </tool_call> around a call."), source="s", line=1)
    assert found["messages"][-1] == {"role": "assistant", "content": "Write <tool_call> </tool_call> around a call."}


def test_content_blocks_of_anthropic_become_calls_and_results():
    counts = FieldCounts()
    record = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "q"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}},
                ],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "no such city", "is_error": True}],
            },
            {"role": "assistant", "content": "Sorry."},
        ],
        "tools": [{"name": "f", "input_schema": {"type": "object", "properties": {"x": {"type": "integer"}}}}],
    }
    found = read_record(record, source="s", line=1, counts=counts)
    check_messages(found["messages"])
    _user, call, result, _reply = found["messages"]
    function = {"name": "f", "arguments": {"x": 1}}
    assert call["content"] == "I look."
    assert call["tool_calls"] == [{"id": "t1", "type": "function", "function": function}]
    assert result == {"role": "tool", "content": "no such city", "tool_call_id": "t1"}
    parameters = {"type": "object", "properties": {"x": {"type": "integer"}}}
    assert found["tools"][0]["function"] == {"name": "f", "parameters": parameters}
    assert any("is_error" in name for name in counts.unread)
