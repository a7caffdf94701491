"""Tools, calls, results and thoughts, in the spellings of OpenAI, ShareGPT, ms-swift, Hermes and others.

Calls and definitions become objects of one shape. Arguments are an object, also where a file has them as JSON text.
"""

import json
import re
from collections import Counter
from typing import Any

from sft.opendata.fields import (
    TOOL_KEYS,
    RecordError,
    check_json,
    count_unread,
    is_empty,
    name_type,
    parse_json,
    read_text,
)

# --- Definitions


def read_tools(record: dict) -> list[dict]:
    """Return the tool definitions of a record, whole, each as {"type": "function", "function": {"name", ...}}."""
    found = {key: record[key] for key in TOOL_KEYS if not is_empty(record.get(key))}
    tools = [tool for key, value in found.items() for tool in _read_definitions(value, key)]
    names = [tool["function"]["name"] for tool in tools]
    if len(found) == 2 and names[: len(names) // 2] == names[len(names) // 2 :]:
        return tools[: len(names) // 2]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise RecordError("tool_definition", f'{" and ".join(found)} define "{twice[0]}" twice; keep one')
    return tools


def _read_definitions(value: object, where: str) -> list[dict]:
    value = _from_text(value, where, "tool_definition")
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise RecordError("tool_definition", f"{where} is {name_type(value)}; write it as a list of definitions")
    return [_read_definition(item, f"{where}[{number}]") for number, item in enumerate(value)]


def _read_definition(item: object, where: str) -> dict:
    item = _from_text(item, where, "tool_definition")
    if not isinstance(item, dict):
        raise RecordError("tool_definition", f"{where} is {name_type(item)}; write it as an object with a name")
    if item.get("type") not in (None, "function"):
        raise RecordError(
            "tool_definition", f"{where} has type {json.dumps(item['type'])[:80]}; only functions are read"
        )
    function = item["function"] if isinstance(item.get("function"), dict) else item
    function = {key: value for key, value in function.items() if function is not item or key != "type"}
    if "input_schema" in function and "parameters" not in function:
        function["parameters"] = function.pop("input_schema")
    if isinstance(function.get("parameters"), str):
        function["parameters"] = _from_text(function["parameters"], f"{where}.parameters", "tool_definition")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise RecordError("tool_definition", f"{where} has no name; give the function's")
    check_json(function, where)
    return {"type": "function", "function": drop_nulls(function)}


def drop_nulls(value: Any) -> Any:
    """Leave out keys whose value is null: padding, where a table gives all rows the keys of all others."""
    if isinstance(value, dict):
        return {key: drop_nulls(inner) for key, inner in value.items() if inner is not None}
    return [drop_nulls(inner) for inner in value] if isinstance(value, list) else value


def _from_text(value: object, where: str, reason: str) -> object:
    """Parse `value` if it is JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value) if value.strip() else []
    except RecordError:
        raise
    except (ValueError, RecursionError) as error:
        raise RecordError(reason, f"{where} is no JSON ({error}); write it as JSON") from error


# --- Calls


def read_calls(item: dict, where: str, unread: Counter[str]) -> list[dict]:
    """Return the calls of an assistant message, from `tool_calls` or the older `function_call`."""
    found = {key: item[key] for key in ("tool_calls", "function_call") if not is_empty(item.get(key))}
    calls = [parse_calls(value, f"{where}.{key}", unread) for key, value in found.items()]
    if len(calls) == 2 and [call["function"] for call in calls[0]] != [call["function"] for call in calls[1]]:
        raise RecordError("tool_call", f"{where} has other calls in tool_calls than in function_call; keep one")
    return calls[0] if calls else []


def parse_calls(value: object, where: str, unread: Counter[str]) -> list[dict]:
    """Return calls given as an object, a list of objects, or JSON text of either. Raises RecordError."""
    value = _from_text(value, where, "tool_call")
    items = value if isinstance(value, list) else [value]
    single = not isinstance(value, list)
    return [_read_call(item, where if single else f"{where}[{n}]", unread) for n, item in enumerate(items)]


def _read_call(item: object, where: str, unread: Counter[str]) -> dict:
    item = _from_text(item, where, "tool_call")
    if not isinstance(item, dict):
        raise RecordError("tool_call", f"{where} is {name_type(item)}; write it as an object with name and arguments")
    if item.get("type") not in (None, "function", "tool_use", "tool_call"):
        raise RecordError("tool_call", f"{where} has type {json.dumps(item['type'])[:80]}; only functions are read")
    function = item["function"] if isinstance(item.get("function"), dict) else item
    key = next((key for key in ("arguments", "parameters", "input") if function.get(key) is not None), "arguments")
    if function is not item:
        count_unread(item, frozenset(("id", "type", "function")), generalise(where), unread)
        count_unread(function, frozenset(("name", key)), generalise(where) + "function.", unread)
    else:
        count_unread(item, frozenset(("id", "type", "name", key)), generalise(where), unread)
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise RecordError("tool_call", f"{where} has no name; give the function's")
    inner = where if function is item else f"{where}.function"
    arguments = _read_arguments(function.get(key), f"{inner}.{key}")
    call = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    check_json(call, where)
    number = item.get("id")
    return call if number in (None, "") else {"id": str(number), **call}


def _read_arguments(value: object, where: str) -> dict:
    value = {} if value is None else value
    if isinstance(value, str):
        try:
            value = parse_json(value) if value.strip() else {}
        except (ValueError, RecursionError) as error:
            raise RecordError("tool_arguments", f"{where} are no JSON object ({error}); fix them") from error
    if not isinstance(value, dict):
        raise RecordError("tool_arguments", f"{where} are {name_type(value)}, not a JSON object; fix them")
    return value


def generalise(where: str) -> str:
    """`messages[3].tool_calls[0]` -> `messages[].tool_calls[].`: the same for all records."""
    return re.sub(r"\[\d+\]", "[]", where) + "."


def read_result(value: object, where: str) -> str:
    """Return the result of a call: a text, or JSON text of an object or list that isn't one."""
    if not isinstance(value, dict | list):
        return read_text(value, where)
    check_json(value, where)
    return json.dumps(value, ensure_ascii=False)


def check_calls(messages: list[dict]) -> None:
    """Raise RecordError if a result answers no call of the turn before it."""
    waiting: list[str | None] = []
    for number, message in enumerate(messages):
        if message["role"] != "tool":
            waiting = [call.get("id") for call in message.get("tool_calls", ())]
            continue
        wanted = message.get("tool_call_id")
        match = next((i for i, id_ in enumerate(waiting) if wanted is None or id_ is None or id_ == wanted), None)
        if match is None:
            raise RecordError("tool_result", f"messages[{number}] is a tool result that answers no call before it")
        waiting.pop(match)


def note_calls(messages: list[dict], tools: list[dict], notes: Counter[str]) -> None:
    """Count calls of a function that isn't among the tools, and calls without a result in the middle."""
    known = {tool["function"]["name"] for tool in tools}
    for number, message in enumerate(messages):
        calls = message.get("tool_calls", ())
        notes["call_of_an_undefined_tool"] += sum(call["function"]["name"] not in known for call in calls)
        if calls and number + 1 < len(messages):
            results = next((i for i, m in enumerate(messages[number + 1 :]) if m["role"] != "tool"), None)
            notes["call_without_a_result"] += max(0, len(calls) - results) if results is not None else 0


# --- Hermes: tools, calls and results as tagged text

_TOOLS_BLOCK = re.compile(r"\s*<tools>(.*?)</tools>", re.DOTALL)
_CALL_BLOCK = re.compile(r"\s*<tool_call>(.*?)</tool_call>", re.DOTALL)
_RESULT_BLOCK = re.compile(r"\s*<tool_response>(.*?)</tool_response>\s*", re.DOTALL)
# How the published prompts begin that only explain the tags; they go with the definitions.
_HERMES_PROMPT = re.compile(r"\s*You are a function calling AI model\. You are provided with function signatures")
_QWEN_PROMPT = re.compile(r"\s*# Tools\s+You may call one or more functions to assist with the user query")


def has_tool_tags(messages: list[dict]) -> bool:
    """Whether a reply or the system text holds the tags of Hermes."""
    return any("<tool_call>" in m["content"] or "<tools>" in m["content"] for m in messages if m["role"] != "user")


def take_tagged_tools(messages: list[dict], tools: list[dict], notes: Counter[str]) -> tuple[list[dict], list[dict]]:
    """Turn tagged text into tools, calls and results if every block can be read; else leave all of it as text."""
    try:
        taken = [_take_definitions(m) if m["role"] == "system" else (m, []) for m in messages]
        defined = [tool for _, found in taken for tool in found]
        if not (defined or tools):
            raise ValueError("no definitions")
        parts = [part for m, _ in taken for part in _take_calls_and_results(m)]
        check_calls(parts)
    except ValueError:
        notes["tool_tags_left_as_text"] += 1
        return messages, tools
    return [m for m in parts if m["role"] != "system" or m["content"].strip()], tools or defined


def _take_definitions(message: dict) -> tuple[dict, list[dict]]:
    text = message["content"]
    blocks = [block for block in _TOOLS_BLOCK.finditer(text) if block.group(1).strip()]
    if not blocks:
        return message, []
    tools = [tool for block in blocks for tool in _parse_block(block.group(1), _read_definitions, "tools")]
    if start := _HERMES_PROMPT.match(text) or _QWEN_PROMPT.search(text):
        return message | {"content": text[: start.start()]}, tools
    rest = _TOOLS_BLOCK.sub(lambda block: "" if block.group(1).strip() else block.group(), text)
    return message | {"content": rest.strip("\n")}, tools


def _parse_block(text: str, read: Any, where: str) -> list[dict]:
    """Read a block that is one JSON value, or one a line."""
    try:
        return read(text, where)
    except ValueError:
        return [found for line in text.strip().splitlines() if line.strip() for found in read(line, where)]


def _take_calls_and_results(message: dict) -> list[dict]:
    text = message["content"]
    if message["role"] == "assistant" and "<tool_call>" in text:
        blocks = _CALL_BLOCK.findall(text)
        if text.count("<tool_call>") != len(blocks):
            raise ValueError("a block is not closed")
        parsed = [
            _parse_block(block, lambda value, where: parse_calls(value, where, Counter()), "") for block in blocks
        ]
        content = _CALL_BLOCK.sub("", text).strip()
        return [message | {"content": content, "tool_calls": [call for calls in parsed for call in calls]}]
    if message["role"] in ("tool", "user") and _RESULT_BLOCK.match(text) and not _RESULT_BLOCK.sub("", text):
        return [message | {"role": "tool", "content": block.strip("\n")} for block in _RESULT_BLOCK.findall(text)]
    return [message]
