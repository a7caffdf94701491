"""A model's reply as a message: its thought, its calls and its text, in the syntaxes of published models."""

import ast
import json
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sft.opendata.fields import RecordError

# The start of a thought, and how it ends.
OPENERS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<reasoning>": "</reasoning>",
    "<seed:think>": "</seed:think>",
    "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "<|channel>thought": "<channel|>",
    "<|channel|>analysis<|message|>": "<|end|>",
}
OPENED_AT_THE_END = re.compile(rf"({'|'.join(map(re.escape, OPENERS))})\s*$")
# gpt-oss writes the header of each further message itself.
HARMONY_HEADER = re.compile(r"(?:<\|start\|>assistant)?<\|channel\|>final<\|message\|>")


# Markers of DeepSeek and Kimi around a list of calls.
AROUND_CALLS = re.compile(r"<｜tool▁calls▁(?:begin|end)｜>|<\|tool_calls_section_(?:begin|end)\|>")


class Call(NamedTuple):
    """The name of a function and its arguments, still as the model wrote them."""

    name: str
    arguments: dict


class Syntax(NamedTuple):
    """How calls are written: `block` matches one block, `read` returns the calls in its first group."""

    block: re.Pattern
    read: Callable[[str], list[Call]]


def split_reply(text: str, *, opened: str = "") -> dict:
    """Return a reply as {"role", "content"}, with "reasoning_content" and "tool_calls" where it has them.

    `text` holds the control tokens that the model wrote, without its stop token. `opened` is the prompt's text or its
    end: a prompt may open the thought, so that the reply has only what ends it. Calls are taken out of the text where
    all of them can be read; else they stay text.
    """
    thought, rest = _split_thought(text, opened)
    calls, content = _split_calls(rest)
    message = {"role": "assistant", "content": HARMONY_HEADER.sub("", content).strip()}
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in calls
        ]
    return message


def _split_thought(text: str, opened: str) -> tuple[str, str]:
    prompt_opens = OPENED_AT_THE_END.search(opened)
    for opener, closer in OPENERS.items():
        if text.lstrip().startswith(opener):
            thought, _closer, rest = text.lstrip()[len(opener) :].partition(closer)
            return thought.strip(), rest
    if prompt_opens:
        thought, _closer, rest = text.partition(OPENERS[prompt_opens.group(1)])
        return thought.strip(), rest
    if not opened and "</think>" in text and "<think>" not in text.partition("</think>")[0]:
        thought, _closer, rest = text.partition("</think>")
        return thought.strip(), rest
    return "", text


def _split_calls(text: str) -> tuple[list[Call], str]:
    for syntax in SYNTAXES:
        blocks = list(syntax.block.finditer(text))
        if not blocks:
            continue
        try:
            calls = [call for block in blocks for call in syntax.read(block.group(1))]
        except (ValueError, KeyError, TypeError, AttributeError, SyntaxError):
            continue
        if calls and all(call.name and isinstance(call.arguments, dict) for call in calls):
            return calls, AROUND_CALLS.sub("", syntax.block.sub("", text))
    return [], text


# --- syntaxes of calls --------------------------------------------------------------------------------------------


def _from_object(call: dict) -> Call:
    call = call.get("function", call) if isinstance(call.get("function"), dict) else call
    arguments = call["arguments"] if "arguments" in call else call["parameters"]
    return Call(call["name"], json.loads(arguments) if isinstance(arguments, str) else arguments)


def _read_json(text: str) -> list[Call]:
    """{"name": "f", "arguments": {...}}, or a list of such: Qwen, Hermes, Mistral, Llama 3.1 (`parameters`)."""
    found = json.loads(text)
    return [_from_object(call) for call in (found if isinstance(found, list) else [found])]


def _read_function_tags(text: str) -> list[Call]:
    """<function=f> <parameter=key> value </parameter> </function>: Qwen3-Coder, Qwen3.5, Nemotron 3."""
    blocks = re.findall(r"<function=([^>\n]+)>(.*?)</function>", text, re.DOTALL)
    if not blocks:
        raise ValueError("no function")
    return [
        Call(name, {key: _value(value) for key, value in re.findall(PARAMETER, body, re.DOTALL)})
        for name, body in blocks
    ]


PARAMETER = r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>"
ARGUMENT_PAIR = r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>"


def _read_argument_tags(text: str) -> list[Call]:
    """f <arg_key>key</arg_key> <arg_value>value</arg_value>: GLM 4.5."""
    name = re.match(r"\s*([\w.-]+)\s*(?:<arg_key>|$)", text)
    if not name:
        raise ValueError("no name")
    return [Call(name.group(1), {key: _value(value) for key, value in re.findall(ARGUMENT_PAIR, text, re.DOTALL)})]


def _value(text: str):
    """Read an argument without quotes: a number, a list or an object as JSON, else a string."""
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return text if isinstance(found, str) else found


def _read_python_calls(text: str) -> list[Call]:
    """[f(key="value")]: LFM2, Llama 4."""
    calls = []
    for node in ast.parse(text.strip(), mode="eval").body.elts:
        arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
        calls.append(Call(ast.unparse(node.func), arguments))
    return calls


def _read_name_and_json(text: str) -> list[Call]:
    """A name, a separator and JSON, as DeepSeek, Kimi, Mistral and gpt-oss write it."""
    found = re.fullmatch(NAME_AND_JSON, text, re.DOTALL)
    if not found:
        raise ValueError("no name and JSON")
    return [Call(found.group(1), json.loads(found.group(2)))]


NAME_AND_JSON = (
    r"\s*(?:function<｜tool▁sep｜>)?(?:functions\.)?([\w.-]+?)(?::\d+)?\s*"
    r"(?:<｜tool▁sep｜>|<\|tool_call_argument_begin\|>|\[ARGS\]|\s*(?:<\|channel\|>commentary)?\s*(?:<\|constrain\|>)?"
    r"(?:json)?<\|message\|>|\n```json\n)\s*(?:```json\n)?(\{.*\})\s*(?:```)?\s*"
)

SYNTAXES = (
    *(
        Syntax(re.compile(r"\s*<tool_call>(.*?)</tool_call>", re.DOTALL), read)
        for read in (_read_json, _read_function_tags, _read_argument_tags)
    ),
    Syntax(re.compile(r"\s*<｜tool▁call▁begin｜>(.*?)<｜tool▁call▁end｜>", re.DOTALL), _read_name_and_json),
    Syntax(re.compile(r"\s*<\|tool_call_begin\|>(.*?)<\|tool_call_end\|>", re.DOTALL), _read_name_and_json),
    Syntax(re.compile(r"\s*<\|tool_call_start\|>(.*?)<\|tool_call_end\|>", re.DOTALL), _read_python_calls),
    Syntax(
        re.compile(r"(?:<\|start\|>assistant)?\s*to=(functions\..*?<\|message\|>.*)", re.DOTALL), _read_name_and_json
    ),
    Syntax(re.compile(r"\[TOOL_CALLS\]\s*(\[.*\])\s*$", re.DOTALL), _read_json),
    Syntax(re.compile(r"\[TOOL_CALLS\]\s*([\w.-]+\s*\[ARGS\].*?)(?=\[TOOL_CALLS\]|$)", re.DOTALL), _read_name_and_json),
    Syntax(re.compile(r"^\s*(?:<\|python_tag\|>)?(\{\s*\"name\".*\})\s*$", re.DOTALL), _read_json),
)


def field_beyond_text(message: dict) -> str:
    """Name what a message holds beside text, as a table's layout has no place for it."""
    if len(message) == 2:  # role and content, the common case
        return "tool messages" if message["role"] == "tool" else ""
    if message.get("tool_calls"):
        return "calls"
    if message.get("reasoning_content"):
        return "thoughts"
    return "tool messages" if message["role"] == "tool" else ""


def texts_of(message: dict) -> list[str]:
    """Return the texts of a reply that a template may write: content, thought, and names and strings of calls."""
    texts = [message.get("content") or "", message.get("reasoning_content") or ""]
    for call in message.get("tool_calls") or ():
        arguments = call["function"]["arguments"]
        values = [arguments] if isinstance(arguments, str) else [v for v in arguments.values() if isinstance(v, str)]
        texts += [call["function"]["name"], *values, *(json.dumps(value, ensure_ascii=False)[1:-1] for value in values)]
    return [text.strip() for text in texts if text.strip()]


def _is_in(part: str, text: str) -> bool:
    """Say whether a message's text is in a rendered one, as it is or as a string of JSON or Python."""
    part = part.strip()
    if part in text:
        return True
    written = (json.dumps(part, ensure_ascii=False), json.dumps(part), repr(part))
    return any(string[1:-1] in text for string in written)


def check_prompt(prompt: str, messages: Sequence[dict], tools) -> None:
    """Raise RecordError where a rendered prompt lacks the text of a message or the definition of a tool."""
    for message in messages:
        if message["role"] != "assistant" and not _is_in(message.get("content") or "", prompt):
            raise RecordError("template", f"the chat template drops or changes a message of role {message['role']!r}")
    for tool in tools or ():
        if tool.get("function", tool).get("name", "") not in prompt:
            raise RecordError("template", "the chat template drops a tool's definition")


def check_reply(reply: str, message: dict) -> None:
    """Raise RecordError where a rendered reply lacks its text, its thought or a call."""
    parts = {"the text": message.get("content") or "", "the thought": message.get("reasoning_content") or ""}
    for name, part in parts.items():
        if not _is_in(part, reply):
            if name == "the thought":
                raise RecordError("template", "the chat template has no place for a thought")
            where = "a reply beside a call" if message.get("tool_calls") else "a reply"
            raise RecordError("template", f"the chat template drops or changes {name} of {where}")
    for call in message.get("tool_calls") or ():
        function = call["function"]
        arguments = function["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        texts = [value for value in arguments.values() if isinstance(value, str)]
        if function["name"] not in reply or not all(_is_in(text, reply) for text in texts):
            raise RecordError("template", f"the chat template drops or changes a call of {function['name']!r}")
