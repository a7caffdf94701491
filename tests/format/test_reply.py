"""A reply taken apart into thought, calls and text."""

import pytest

from sft.format.reply import split_reply


def call(name: str, arguments: dict) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("Paris.", "", {"content": "Paris."}),
        ("<think>\nso\n</think>\n\nParis.", "", {"content": "Paris.", "reasoning_content": "so"}),
        ("so\n</think>\n\nParis.", "assistant\n<think>\n", {"content": "Paris.", "reasoning_content": "so"}),
        ("so\n</think>\n\nParis.", "", {"content": "Paris.", "reasoning_content": "so"}),
        ("so, not yet", "assistant\n<think>\n", {"content": "", "reasoning_content": "so, not yet"}),
        ("Write </think> at the end.", "<|im_start|>assistant\n", {"content": "Write </think> at the end."}),
        ("<think>\n\n</think>\n\nParis.", "", {"content": "Paris."}),
        ("[THINK]so[/THINK]Paris.", "", {"content": "Paris.", "reasoning_content": "so"}),
        ("<|channel>thought\nso\n<channel|>Paris.", "", {"content": "Paris.", "reasoning_content": "so"}),
        (
            "<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>final<|message|>Paris.",
            "<|start|>assistant",
            {"content": "Paris.", "reasoning_content": "so"},
        ),
    ],
)
def test_the_thought_is_separated_from_the_text(text, opened, expected):
    assert split_reply(text, opened=opened) == {"role": "assistant", **expected}


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "f", "arguments": {"a": "b", "n": 3}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": "{\\"a\\": \\"b\\", \\"n\\": 3}"}\n</tool_call>',
        "<tool_call>\n<function=f>\n<parameter=a>\nb\n</parameter>\n<parameter=n>\n3\n</parameter>\n</function>\n"
        "</tool_call>",
        "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>b</arg_value>\n<arg_key>n</arg_key>\n<arg_value>3</arg_value>\n"
        "</tool_call>",
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "b", "n": 3}, "id": "call00000"}]',
        '[TOOL_CALLS]f[ARGS]{"a": "b", "n": 3}',
        '{"name": "f", "parameters": {"a": "b", "n": 3}}',
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a": "b", "n": 3}\n```'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": "b", "n": 3}<｜tool▁call▁end｜>'
        "<｜tool▁calls▁end｜>",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>"
        '{"a": "b", "n": 3}<|tool_call_end|><|tool_calls_section_end|>',
        "<|tool_call_start|>[f(a='b', n=3)]<|tool_call_end|>",
        '<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"a": "b", "n": 3}',
        '<|tool_call>call:f{a:<|"|>b<|"|>,n:3}<tool_call|>',
        '<minimax:tool_calls>\n<invoke name="f">\n<parameter name="a">b</parameter>\n'
        '<parameter name="n">3</parameter>\n'
        "</invoke>\n</minimax:tool_calls>",
        '<function name="f"><param name="a"><![CDATA[b]]></param><param name="n">3</param></function>',
        '<|START_ACTION|>[\n{"tool_call_id": "0", "tool_name": "f", "parameters": {"a": "b", "n": 3}}\n]<|END_ACTION|>',
        '<|tools_prefix|>[{"f": {"a": "b", "n": 3}}]<|tools_suffix|>',
        '[TOOL_CALLS]f[CALL_ID]call00000[ARGS]{"a": "b", "n": 3}',
        '<function=f>{"a": "b", "n": 3}</function>',
    ],
)
def test_a_call_is_read_in_each_published_syntax(text):
    expected = {"role": "assistant", "content": "", "tool_calls": [call("f", {"a": "b", "n": 3})]}
    assert split_reply(text, opened="assistant\n") == expected


def test_an_argument_without_quotes_is_a_text_where_the_definition_says_so():
    text = "<tool_call>\n<function=f>\n<parameter=a>\n12\n</parameter>\n</function>\n</tool_call>"
    tools = [{"function": {"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}}}]
    assert split_reply(text, tools=tools)["tool_calls"] == [call("f", {"a": "12"})]
    assert split_reply(text)["tool_calls"] == [call("f", {"a": 12})]


def test_an_argument_that_holds_the_end_of_a_call_is_read_whole():
    text = '<tool_call>\n{"name": "f", "arguments": {"a": "</tool_call> <tool_call>"}}\n</tool_call>'
    assert split_reply(text)["tool_calls"] == [call("f", {"a": "</tool_call> <tool_call>"})]


def test_text_beside_parallel_calls_stays_and_the_thought_is_folded():
    text = (
        'so\n</think>\n\nLet me look.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {"x": [1]}}\n</tool_call>'
    )
    assert split_reply(text, opened="<think>\n") == {
        "role": "assistant",
        "content": "Let me look.",
        "reasoning_content": "so",
        "tool_calls": [call("f", {}), call("g", {"x": [1]})],
    }


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n<tool_call>\n{"name": broken\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {"a":',
        '{"name": "Paris", "country": "France"}',
        "<|tool_call_start|>[f(a=open('x'))]<|tool_call_end|>",
    ],
)
def test_a_reply_with_one_unreadable_block_stays_text(text):
    assert split_reply(text) == {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>get_current_temperature_of_city {"city": "Paris"}</tool_call>',
        "<tool_call>f" + "<arg_key>a</arg_key><arg_value>b</arg_value>" * 40 + "!</tool_call>",
        "<tool_call><function=f>" + "<parameter=a>x</parameter>" * 40 + "</tool_call>",
        "<tool_call><function=f><parameter=a>x</parameter>y</parameter></function></tool_call>",
        '<function_calls><invoke name="f">' + '<parameter name="a">1</parameter>' * 40 + "x</invoke></function_calls>",
        "<function_calls>" + '<invoke name="f"></invoke>' * 40 + "x</function_calls>",
        "[TOOL_CALLS]f" + " " * 20_000 + "{",
        "a" + "\n" * 100_000 + "b",
        "<tool_call>" + "[" * 100_000 + "</tool_call>",
        "<|tool_call_start|>[" + "-" * 20_000 + "1]<|tool_call_end|>",
    ],
)
def test_a_long_text_that_is_no_call_is_read_in_time_linear_in_its_length(text):
    assert split_reply(text) == {"role": "assistant", "content": text}  # else the test doesn't end, or raises


def test_an_argument_without_quotes_that_is_nested_too_deeply_is_a_text():
    value = "[" * 100_000
    message = split_reply(f"<tool_call><function=f><parameter=a>{value}</parameter></function></tool_call>")
    assert [call["function"]["arguments"] for call in message["tool_calls"]] == [{"a": value}]


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
        "<|tool_call_start|>[f(a={1, 2})]<|tool_call_end|>",
        '<|tool_call_start|>[f(**{"a": 1})]<|tool_call_end|>',
    ],
)
def test_a_call_that_can_not_be_written_as_json_stays_text(text):
    assert split_reply(text) == {"role": "assistant", "content": text}


def test_an_argument_without_quotes_that_is_no_json_number_is_a_text():
    message = split_reply("<tool_call><function=f><parameter=a>NaN</parameter></function></tool_call>")
    assert message["tool_calls"] == [call("f", {"a": "NaN"})]
