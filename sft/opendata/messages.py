"""From the messages of a record to canonical messages: roles, contents in parts, thoughts, tools, calls, results.

Tools and calls are read in the spellings of OpenAI, ShareGPT, ms-swift, Anthropic and others, and become objects of one
shape. Arguments are an object, also where a file has them as JSON text.
"""

import json
import re
from collections import Counter
from typing import Any, NamedTuple

from sft.opendata.fields import (
    ASSISTANT_KEYS,
    MESSAGE_KEYS,
    THOUGHT_KEYS,
    TOOL_KEYS,
    TOOL_MESSAGE_KEYS,
    FieldCounts,
    RecordError,
    check_json,
    check_media,
    count_unread,
    drop_nulls,
    is_empty,
    name_type,
    parse_json,
    read_call_id,
    read_learned,
    read_result,
    read_text,
)

CALL = "call"
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "tool_response", "function", "function_response", "observation", "ipython"), "tool"),
    **dict.fromkeys(("tool_call", "function_call"), CALL),
}


class Parts(NamedTuple):
    """Parts of one message's content; `results` are tool messages."""

    text: str
    thought: str | None = None
    calls: tuple[dict, ...] = ()
    results: tuple[dict, ...] = ()


def list_messages(value: Any, key: str) -> list:
    """Messages as a list of objects: also from JSON text, and from an object of columns."""
    value = _from_text(value, key, "not_list")
    if isinstance(value, dict):
        columns = {name: column for name, column in value.items() if not is_empty(column)}
        if len({isinstance(column, list) and len(column) for column in columns.values()}) != 1:
            raise RecordError(
                "not_list", f"{key} is an object of more than lists of one length; write a list of messages"
            )
        value = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return value


def read_messages(items: list, where: str, counts: FieldCounts, mask: object = None) -> list[dict]:
    """Read each message; calls in messages of their own join the reply before them."""
    if not is_empty(mask) and (not isinstance(mask, list) or len(mask) != len(items)):
        raise RecordError("loss_switch", f"loss_mask must be a list of 0 or 1 for each of the {len(items)} messages")
    messages: list[dict] = []
    for number, item in enumerate(items):
        for message in _read_message(item, f"{where}[{number}]", counts, mask[number] if mask else None):
            if message["role"] == CALL and messages and messages[-1]["role"] == "assistant":
                messages[-1] = _join_calls(messages[-1], message, f"{where}[{number}]")
            else:
                messages.append(message | {"role": "assistant"} if message["role"] == CALL else message)
    return messages


def _join_calls(reply: dict, calls: dict, where: str) -> dict:
    if reply.get("train") != calls.get("train"):
        raise RecordError("loss_switch", f"{where} belongs to the reply before it, which has another switch")
    if calls.get("reasoning_content"):
        raise RecordError("two_thoughts", f"{where} has a thought in the middle of a reply; write it before the text")
    return reply | {"tool_calls": [*reply.get("tool_calls", ()), *calls["tool_calls"]]}


_KEYS = {"assistant": ASSISTANT_KEYS, CALL: ASSISTANT_KEYS, "tool": TOOL_MESSAGE_KEYS}


def _read_message(item: object, where: str, counts: FieldCounts, mask: object) -> list[dict]:
    """One message; more where its content holds results of calls."""
    if not isinstance(item, dict):
        raise RecordError(
            "not_object", f'{where} is {name_type(item)}; write it as an object with "role" and "content"'
        )
    given = item.get("role") if item.get("role") is not None else item.get("from")
    role = ROLES.get(given.strip().lower()) if isinstance(given, str) else None
    if role is None:
        raise RecordError("unknown_role", f"{where} has role {json.dumps(given)[:80]}; use system, user or assistant")
    if not is_empty(item.get("value")) and item.get("content", item["value"]) not in (None, item["value"]):
        raise RecordError("two_contents", f"{where} has a content and a value that differ; keep one")
    check_media(item, f"{where}.")
    count_unread(item, _KEYS.get(role, MESSAGE_KEYS), generalise_place(where), counts.unread)
    key = "content" if item.get("content") is not None or "value" not in item else "value"
    learned = read_learned(item, mask, role in ("assistant", CALL), where)
    if role == "tool":
        return [_read_tool_message(item, key, where, counts)]
    if role == CALL:
        return [_read_call_message(item, key, where, counts) | learned]
    parts = _read_content(item, key, where, counts)
    if role != "assistant":
        if parts.calls or parts.thought is not None:
            raise RecordError("content_part", f"{where}.{key} holds a call or a thought, which only a reply may have")
        return [*parts.results, *([{"role": role, "content": parts.text}] if parts.text or not parts.results else [])]
    return [read_reply(item, parts, where, counts) | learned]


def _read_content(item: dict, key: str, where: str, counts: FieldCounts) -> Parts:
    """A text, or a list of parts; null in a reply that has calls."""
    value = item.get(key)
    if isinstance(value, list):
        return read_parts(value, f"{where}.{key}", counts.unread)
    if value is None and not (is_empty(item.get("tool_calls")) and is_empty(item.get("function_call"))):
        return Parts("")
    if key not in item:
        other = next((name for name, text in item.items() if isinstance(text, str) and name not in ASSISTANT_KEYS), "")
        if other:
            raise RecordError("no_content", f"{where} has no `content`, but `{other}`; name it `content`")
        raise RecordError("no_content", f"{where} has no `content`")
    return Parts(read_text(value, f"{where}.{key}"))


def read_reply(item: dict, parts: Parts, where: str, counts: FieldCounts) -> dict:
    """The message of an assistant: its text, and its thought and calls where it has them."""
    in_text, text = split_thought(parts.text, counts.notes)
    in_parts = join_thoughts(parts.thought, in_text, where)
    thought = join_thoughts(read_thought(item, f"{where}."), in_parts, where)
    calls = [*parts.calls, *read_calls(item, where, counts.unread)]
    thoughts = {} if thought is None else {"reasoning_content": thought}
    message = {"role": "assistant", "content": text, **thoughts}
    return message | {"tool_calls": calls} if calls else message


def _read_call_message(item: dict, key: str, where: str, counts: FieldCounts) -> dict:
    """A message that holds nothing but calls, as JSON, maybe after a thought."""
    value = item.get(key)
    thought = None
    if isinstance(value, str):
        thought, value = split_thought(read_text(value, f"{where}.{key}"), counts.notes)
    thought = join_thoughts(read_thought(item, f"{where}."), thought, where)
    in_text = [] if is_empty(value) else parse_calls(value, f"{where}.{key}", counts.unread)
    beside = read_calls(item, where, counts.unread)
    calls = _choose_calls(in_text, beside, f"{where} has other calls beside {key} than in it; keep one")
    if not calls:
        raise RecordError("tool_call", f"{where}.{key} holds no call; write it as JSON with name and arguments")
    thoughts = {} if thought is None else {"reasoning_content": thought}
    return {"role": CALL, "content": "", "tool_calls": calls, **thoughts}


def _read_tool_message(item: dict, key: str, where: str, counts: FieldCounts) -> dict:
    message: dict = {"role": "tool", "content": read_result(item.get(key), f"{where}.{key}")}
    if number := read_call_id(item.get("tool_call_id"), f"{where}.tool_call_id"):
        message["tool_call_id"] = number
        counts.notes["number_as_tool_call_id"] += item["tool_call_id"] != number
    if item.get("name") not in (None, ""):
        message["name"] = read_text(item["name"], f"{where}.name")
    return message


# --- Content in parts


def read_parts(parts: list, where: str, unread: Counter[str]) -> Parts:
    """Read the parts of OpenAI, LLaMA-Factory v1 (key `value`) and Anthropic; texts are joined. Raises RecordError."""
    texts = []
    thoughts = []
    calls = []
    results = []
    for number, part in enumerate(parts):
        place = f"{where}[{number}]"
        kind = part.get("type", "text") if isinstance(part, dict) else name_type(part)
        key = _PART_KEYS.get(kind) if isinstance(kind, str) and isinstance(part, dict) else None
        if key is None and not (kind is None and isinstance(part.get("text"), str)):
            raise RecordError("content_part", f"{place} is of type {json.dumps(kind)[:80]}; only text is read")
        if read_learned(part, None, True, place):
            raise RecordError("loss_switch", f"{place} has a switch, and only a whole reply can; give it to the reply")
        keys = key or ("text",)
        name = next((name for name in keys if part.get(name) is not None), keys[0])
        count_unread(part, frozenset({"type", name, *_MORE_PART_KEYS.get(kind, ())}), generalise_place(place), unread)
        if kind in ("reasoning", "thinking"):
            thoughts.append(read_text(part.get(name), f"{place}.{name}"))
        elif kind == "tool_call":
            calls += parse_calls(part.get(name), f"{place}.{name}", unread)
        elif kind == "tool_use":
            calls += parse_calls({key: part.get(key) for key in ("id", "name", "input")}, place, unread)
        elif kind == "tool_result":
            results.append(_read_tool_result(part, place, unread))
        else:
            texts.append(read_text(part.get(name), f"{place}.{name}"))
    return Parts("".join(texts), "\n".join(thoughts) if thoughts else None, tuple(calls), tuple(results))


# The key that holds a part's content, by its type; the first that is not null.
_PART_KEYS = {
    **dict.fromkeys(("text", "input_text", "output_text"), ("text", "value")),
    "reasoning": ("value", "text", "reasoning"),
    "thinking": ("thinking", "value", "text"),
    "tool_call": ("value",),
    "tool_use": ("input",),
    "tool_result": ("content",),
}
_MORE_PART_KEYS = {"tool_use": ("id", "name"), "tool_result": ("tool_use_id",)}


def _read_tool_result(part: dict, where: str, unread: Counter[str]) -> dict:
    content = part.get("content")
    is_parts = isinstance(content, list) and all(isinstance(inner, dict) and "type" in inner for inner in content)
    text = read_parts(content, f"{where}.content", unread).text if is_parts else read_result(content or "", where)
    number = read_call_id(part.get("tool_use_id"), f"{where}.tool_use_id")
    return {"role": "tool", "content": text} | ({"tool_call_id": number} if number else {})


# --- Thoughts


def split_thought(text: str, notes: Counter[str]) -> tuple[str | None, str]:
    """Split `<think>…</think>` off the head of a reply, also without its opening tag; (None, text) if there is none.

    Without the opening tag, the only closing tag must end its line, else it is taken for a word of the text. Tags that
    stay in the text are counted.
    """
    head = text.lstrip()
    if "</think>" not in head and not head.startswith("<think>"):
        return None, text
    before, closing, after = head.partition("</think>")
    opened = before.startswith("<think>")
    thought = before.removeprefix("<think>")
    is_alone = not opened and "<think>" not in head and "</think>" not in after and "`" not in before[-1:]
    if closing and (opened or (is_alone and (not after.strip(" ") or after.lstrip(" ")[0] in "\r\n"))):
        return thought.strip("\r\n"), after.lstrip("\r\n")
    notes["think_tag_left_in_the_text"] += 1
    return None, text


def read_thought(item: dict, where: str) -> str | None:
    """Return the thought in one of THOUGHT_KEYS, None where there is none. Raises RecordError for two of them."""
    found = {key: read_text(item[key], f"{where}{key}") for key in THOUGHT_KEYS if item.get(key) is not None}
    filled = {text for text in found.values() if text}
    if len(filled) > 1:
        raise RecordError("two_thoughts", f"{where}{' and '.join(found)} differ; keep one")
    return next(iter(filled or found.values()), None)


def join_thoughts(field: str | None, from_text: str | None, where: str) -> str | None:
    """The thought of a reply, given in a field, in the text, or in both alike."""
    if field and from_text and field.strip() != from_text.strip():
        raise RecordError("two_thoughts", f"{where} has one thought in a field and another in its text; keep one")
    return field or from_text if from_text is not None else field


# --- Tools and calls


def read_tools(record: dict) -> list[dict]:
    """Return the tool definitions of a record, whole, each as {"type": "function", "function": {"name", ...}}."""
    found = {key: record[key] for key in TOOL_KEYS if not is_empty(record.get(key))}
    tools = [tool for key, value in found.items() for tool in read_definitions(value, key)]
    names = [tool["function"]["name"] for tool in tools]
    if len(found) == 2 and tools[: len(names) // 2] == tools[len(names) // 2 :]:
        return tools[: len(names) // 2]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise RecordError("tool_definition", f'{" and ".join(found)} define "{twice[0]}" twice; keep one')
    return tools


def read_definitions(value: object, where: str) -> list[dict]:
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


def read_calls(item: dict, where: str, unread: Counter[str]) -> list[dict]:
    """Return the calls of an assistant message, from `tool_calls` or the older `function_call`."""
    keys = ("tool_calls", "function_call")
    calls = [[] if is_empty(item.get(key)) else parse_calls(item[key], f"{where}.{key}", unread) for key in keys]
    return _choose_calls(*calls, f"{where} has other calls in tool_calls than in function_call; keep one")


def _choose_calls(calls: list[dict], same: list[dict], problem: str) -> list[dict]:
    if calls and same and [call["function"] for call in calls] != [call["function"] for call in same]:
        raise RecordError("tool_call", problem)
    return calls or same


def parse_calls(value: object, where: str, unread: Counter[str]) -> list[dict]:
    """Return calls given as an object, a list of objects, or JSON text of either. Raises RecordError."""
    value = _from_text(value, where, "tool_call")
    if not isinstance(value, list):
        return [_read_call(value, where, unread)]
    return [_read_call(item, f"{where}[{n}]", unread) for n, item in enumerate(value)]


def _read_call(item: object, where: str, unread: Counter[str]) -> dict:
    item = _from_text(item, where, "tool_call")
    if not isinstance(item, dict):
        raise RecordError("tool_call", f"{where} is {name_type(item)}; write it as an object with name and arguments")
    if item.get("type") not in (None, "function", "tool_use", "tool_call"):
        raise RecordError("tool_call", f"{where} has type {json.dumps(item['type'])[:80]}; only functions are read")
    function = item["function"] if isinstance(item.get("function"), dict) else item
    key = next((key for key in ("arguments", "parameters", "input") if function.get(key) is not None), "arguments")
    if function is not item:
        count_unread(item, frozenset(("id", "type", "function")), generalise_place(where), unread)
        count_unread(function, frozenset(("name", key)), generalise_place(where) + "function.", unread)
    else:
        count_unread(item, frozenset(("id", "type", "name", key)), generalise_place(where), unread)
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise RecordError("tool_call", f"{where} has no name; give the function's")
    inner = where if function is item else f"{where}.function"
    arguments = _read_arguments(function.get(key), f"{inner}.{key}")
    call = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    check_json(call, where)
    number = read_call_id(item.get("id"), f"{where}.id")
    return {"id": number, **call} if number else call


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


def generalise_place(where: str) -> str:
    """`messages[3].tool_calls[0]` -> `messages[].tool_calls[].`: the same for all records."""
    return re.sub(r"\[\d+\]", "[]", where) + "."


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
