"""The conversation: its messages, its limits, and the files that it is exported to."""

import base64
import json
import re

import gradio as gr
import pytest

from sft.chat.sampling import Sampling
from sft.web.turns import (
    SLIDERS,
    Turn,
    check_conversation,
    drop_unanswered,
    export_links,
    num_characters,
    num_questions,
    to_messages,
    to_sampling,
    without_oldest,
)

TURNS = [Turn("一", ({"content": "二"},)), Turn("三")]
ANSWERED = [TURNS[0], Turn("三", ({"content": "四"},))]
MESSAGES = [
    {"role": "user", "content": "一"},
    {"role": "assistant", "content": "二"},
    {"role": "user", "content": "三"},
]
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "北京"}}}


def values(sampling: Sampling) -> list[float]:
    return [getattr(sampling, name) for name in SLIDERS]


def test_a_question_without_an_answer_is_left_out():
    assert drop_unanswered(TURNS) == TURNS[:1]
    assert drop_unanswered([TURNS[0], Turn("三", ({},))]) == TURNS[:1]
    assert drop_unanswered([TURNS[0], Turn("三", ({"content": ""},))]) == TURNS[:1]
    assert drop_unanswered(ANSWERED) == ANSWERED
    assert drop_unanswered(TURNS[1:]) == []
    thought = [Turn("一", ({"content": "", "reasoning_content": "想"},))]
    assert drop_unanswered(thought) == thought


def test_each_pane_has_its_own_conversation_without_the_questions_that_it_did_not_answer():
    turns = [Turn("一", ({"content": "a"}, {"content": "b"})), Turn("二", ({"content": "c"}, {})), Turn("三")]
    assert [message["content"] for message in to_messages(turns, 0, "s")] == ["s", "一", "a", "二", "c", "三"]
    assert [message["content"] for message in to_messages(turns, 1)] == ["一", "b", "三"]


def test_thoughts_and_calls_are_part_of_the_messages():
    turns = [Turn("一", ({"content": "", "reasoning_content": "想", "tool_calls": [CALL]},))]
    assert to_messages(turns, 0)[1] == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "想",
        "tool_calls": [CALL],
    }
    assert num_characters(to_messages(turns, 0)) == 2 + len(str([CALL]))


def test_the_oldest_question_goes_with_all_that_belongs_to_it():
    messages = [{"role": "system", "content": "s"}, *MESSAGES]
    assert without_oldest(messages) == [messages[0], messages[3]]
    assert num_questions(messages) == 2


def test_sliders_start_at_the_defaults_of_sampling_and_hold_each_of_its_fields():
    assert tuple(SLIDERS) == tuple(Sampling.__dataclass_fields__)
    for name, (low, high, _step) in SLIDERS.items():
        assert low <= getattr(Sampling(), name) <= high


def test_the_system_prompt_leads_the_messages():
    assert check_conversation(TURNS, " Be brief. ") == "Be brief."
    assert to_messages(TURNS, 0, "Be brief.") == [{"role": "system", "content": "Be brief."}, *MESSAGES]
    assert check_conversation(TURNS, " ") == "" and to_messages(TURNS, 0) == MESSAGES


@pytest.mark.parametrize(
    ("turns", "system", "what"),
    [
        ([Turn("a" * 8001)], "", "8,000 个字符.*8,000 characters"),
        (TURNS, "a" * 8001, "8,000 characters"),
        (ANSWERED * 25 + TURNS[1:], "", "超过 50 轮.*more than 50 turns"),
    ],
)
def test_a_text_that_is_too_long_is_refused_in_both_languages(turns, system, what):
    with pytest.raises(gr.Error, match=what):
        check_conversation(turns, system)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, 10**9, True, "1", None, [1]])
@pytest.mark.parametrize("name", SLIDERS)
def test_a_setting_that_no_slider_gives_is_refused(name, value):
    given = values(Sampling(**{name: value}))
    with pytest.raises(gr.Error, match=f"{name} must be between"):
        to_sampling(given)
    assert to_sampling(values(Sampling())) == Sampling()


def test_an_export_holds_the_conversation_as_canonical_json_and_as_markdown():
    links = export_links([Turn("一<b>", ({"content": "二"},)), TURNS[1]])
    files = [base64.b64decode(text).decode() for text in re.findall(r"base64,([^\"]*)", links)]
    record = json.loads(files[0])
    assert record["messages"] == [{"role": "user", "content": "一<b>"}, {"role": "assistant", "content": "二"}]
    assert (record["source"], set(record)) == ("web_demo", {"id", "source", "messages"})
    assert files[1] == "## User · 用户\n\n一<b>\n\n## Assistant · 助手\n\n二\n\n"
    assert export_links(TURNS[1:]) == ""


def test_an_export_keeps_the_system_prompt_thoughts_and_calls():
    reply = {"content": "晴", "reasoning_content": "想", "tool_calls": [CALL]}
    links = export_links([Turn("天气？", (reply,))], "简短")
    files = [base64.b64decode(text).decode() for text in re.findall(r"base64,([^\"]*)", links)]
    assert json.loads(files[0])["messages"] == [
        {"role": "system", "content": "简短"},
        {"role": "user", "content": "天气？"},
        {"role": "assistant", **reply},
    ]
    assert "> **Thought · 思考**\n>\n> 想\n\n" in files[1]
    assert '"name": "get_weather"' in files[1] and files[1].endswith("晴\n\n")


def test_the_markdown_of_thoughts_and_calls_ends_where_they_end():
    call = {"type": "function", "function": {"name": "run", "arguments": {"code": "```\nx"}}}
    reply = {"content": "好", "reasoning_content": "</details>\n```\nopen", "tool_calls": [call]}
    links = export_links([Turn("问", (reply,))])
    text = [base64.b64decode(text).decode() for text in re.findall(r"base64,([^\"]*)", links)][1]
    assert "\n> </details>\n> ```\n> open\n\n````json\n" in text
    assert text.endswith("\n````\n\n好\n\n")
