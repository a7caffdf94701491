"""From raw records to canonical conversations.

A record is read by what it holds, never by its file's name. A record that can't be read is an error with line and
reason. No text is changed here.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NotRequired, TypedDict

from sft.opendata.fields import (
    MESSAGE_LISTS,
    PAIRS,
    SYSTEM_KEYS,
    RecordError,
    find_form,
    has_lone_surrogate,
    name_type,
    read_text,
)
from sft.opendata.records import read_file

ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard"), "assistant"),
}
NO_INPUT = {"", "<noinput>", "<no input>", "noinput", "no input", "n/a", "none", "null", "nan", "无", "无输入"}


class Function(TypedDict):
    """The function of a call; `arguments` is an object, never JSON text."""

    name: str
    arguments: dict[str, Any]


class ToolCall(TypedDict):
    """One call in an assistant message."""

    id: NotRequired[str]
    type: Literal["function"]
    function: Function


class FunctionDefinition(TypedDict):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str
    description: NotRequired[str]
    parameters: NotRequired[dict[str, Any]]


class Tool(TypedDict):
    """A tool definition of a conversation."""

    type: Literal["function"]
    function: FunctionDefinition


class Message(TypedDict):
    """A message. Role is system, user, assistant or tool; keys that don't apply to the role are absent.

    assistant: `content` may be "" beside `tool_calls`; `train` is absent (trained) or False.
    tool: `content` is the result of the call `tool_call_id`, or of the next call without a result if that is absent.
    """

    role: str
    content: str
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    train: NotRequired[bool]


class Conversation(TypedDict):
    """The canonical record: maybe a system message, then user and assistant take turns; the last turn is a reply.

    The results of a reply's calls, one tool message each, come between it and the next reply. `tools` are the
    definitions offered, absent where there are none.
    """

    id: str
    source: str
    messages: list[Message]
    tools: NotRequired[list[Tool]]


def read_conversations(
    paths: Iterable[str | os.PathLike], *, encoding: str = "utf-8", reasoning: str = "drop"
) -> Iterator[tuple[Conversation | None, RecordError | None, str, int]]:
    """Read files of any known form as valid conversations; nothing is cleaned.

    Yields (conversation, None, file, line) or (None, error, file, line). Raises ValueError for a file as a whole.
    """
    for path in map(os.fspath, paths):
        source = os.path.basename(path)
        for raw in read_file(path, encoding=encoding):
            try:
                if raw.error:
                    raise raw.error
                conversation = read_record(raw.record, source=source, line=raw.place, reasoning=reasoning)
                validate(conversation)
                yield conversation, None, path, raw.line
            except RecordError as error:
                yield None, error, path, raw.line


def read_record(
    record: object, *, source: str, line: int | str, reasoning: str = "drop", notes: Counter[str] | None = None
) -> Conversation:
    """Read a record of any known form, chosen by the keys that are not null and what they hold. Raises RecordError.

    Its own id is kept, else it is `source:line`. `reasoning` is what to do with `reasoning_content`: "drop" it, or
    "keep" it as `<think>` text before the reply. What is worth knowing but no error is counted in `notes`. Contents may
    still be empty and roles out of order: that is for `validate`, or for cleaning.
    """
    if not isinstance(record, dict):
        raise RecordError("not_object", f"the record is {name_type(record)}; write it as an object with named fields")
    if record.keys() == _OWN_KEYS and (messages := _own_messages(record["messages"])):
        return {
            "id": _read_id(record["id"]) or f"{source}:{line}",
            "source": _own_source(record["source"]) or source,
            "messages": messages,
        }
    notes = Counter() if notes is None else notes
    form = find_form(record)
    if form is None:
        raise _unknown_form(record)
    messages = [
        {"role": "system", "content": read_text(record[key], key)}
        for key in SYSTEM_KEYS
        if record.get(key) not in (None, "")
    ]
    if isinstance(form, str):
        messages += _read_messages(record[form], form, reasoning, notes)
    elif isinstance(record[form[0]], list):
        messages += _read_prompt_and_completion(record, form, reasoning, notes)
    else:
        messages += _read_pair(record, form, notes)
    own = record.keys() == _OWN_KEYS and _own_source(record["source"])
    return {"id": _read_id(record.get("id")) or f"{source}:{line}", "source": own or source, "messages": messages}


# Only our own files have exactly these keys; theirs is the source that counts.
_OWN_KEYS = {"id", "source", "messages"}
_OWN_ROLES = {"system", "user", "assistant"}


def _own_source(source: object) -> str:
    return source if isinstance(source, str) and not has_lone_surrogate(source) else ""


def _own_messages(messages: object) -> list[Message] | None:
    """The messages as they are if all have just a known role and a text, or None: then each is read with care."""
    usual = type(messages) is list and all(
        type(message) is dict
        and message.keys() == {"role", "content"}
        and type(message["role"]) is type(message["content"]) is str
        and message["role"] in _OWN_ROLES
        and not has_lone_surrogate(message["content"])
        for message in messages
    )
    return messages if usual else None


def validate(conversation: Conversation) -> None:
    """Raise RecordError unless user and assistant take turns after an optional system message, with no text empty."""
    messages = conversation["messages"]
    if not messages:
        raise RecordError("empty", "messages is empty; give at least one user and one assistant message")
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    for number, message in enumerate(turns, start=len(messages) - len(turns)):
        expected = "assistant" if (number - len(messages) + len(turns)) % 2 else "user"
        if message["role"] != expected:
            found = f'messages[{number}] has role "{message["role"]}"'
            raise RecordError("role_order", f"{found} where {expected} should speak; user and assistant take turns")
    if len(turns) % 2 or not turns:
        raise RecordError("role_order", "the last message is not the assistant's; end with a reply")
    for number, message in enumerate(messages):
        if not read_text(message["content"], f"messages[{number}].content").strip():
            raise RecordError("empty", f"messages[{number}].content is empty; give a text or leave the record out")


def _unknown_form(record: dict) -> RecordError:
    for question, _, answer in PAIRS:
        if question in record and answer in record:
            null = question if record[question] is None else answer
            return RecordError("null_field", f"{null} is null; give a text or leave the record out")
    for key, value in record.items():
        if isinstance(value, list) and value and find_form(value[0]) is not None:
            advice = f"write its elements as an array or as JSON Lines, e.g. jq -c '.{key}[]'"
            return RecordError("nested", f'the records are inside "{key}"; {advice}')
    keys = ", ".join(f'"{key}"' for key, value in list(record.items())[:8] if value is not None) or "no values"
    known = ", ".join([*MESSAGE_LISTS, *dict.fromkeys(f"{pair[0]}/{pair[2]}" for pair in PAIRS)])
    return RecordError("unknown_form", f"no known form has {keys[:200]}; use one of {known}")


def _read_id(value: object) -> str:
    usable = isinstance(value, int | str) and not isinstance(value, bool)
    return str(value) if usable and not has_lone_surrogate(str(value)) else ""


def _read_messages(items: list, where: str, reasoning: str, notes: Counter[str]) -> list[Message]:
    return [_read_message(item, f"{where}[{number}]", reasoning, notes) for number, item in enumerate(items)]


def _read_message(item: object, where: str, reasoning: str, notes: Counter[str]) -> Message:
    if not isinstance(item, dict):
        raise RecordError(
            "not_object", f'{where} is {name_type(item)}; write it as an object with "role" and "content"'
        )
    role = item.get("role") if item.get("role") is not None else item.get("from")
    if not isinstance(role, str) or role not in ROLES:
        shown = json.dumps(role)[:80]
        raise RecordError("unknown_role", f"{where} has role {shown}; use system, user or assistant")
    key = "content" if item.get("content") is not None or "value" not in item else "value"
    content = _read_content(item.get(key), f"{where}.{key}")
    thoughts = item.get("reasoning_content")
    if ROLES[role] == "assistant" and thoughts not in (None, ""):
        notes["reasoning_dropped" if reasoning == "drop" else "reasoning_kept"] += 1
        if reasoning == "keep":
            content = f"<think>\n{read_text(thoughts, f'{where}.reasoning_content')}\n</think>\n\n{content}"
    message: Message = {"role": ROLES[role], "content": content}
    if item.get("train") is False or item.get("weight") == 0:
        message["train"] = False
    return message


def _read_content(value: object, where: str) -> str:
    """A text, or a list of text parts, joined."""
    if not isinstance(value, list):
        return read_text(value, where)
    texts = []
    for number, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else name_type(part)
            raise RecordError(
                "content_part", f"{where}[{number}] is of type {json.dumps(kind)[:80]}; only text is read"
            )
        texts.append(read_text(part.get("text"), f"{where}[{number}].text"))
    return "".join(texts)


def _read_prompt_and_completion(record: dict, form: tuple, reasoning: str, notes: Counter[str]) -> list[Message]:
    """TRL's conversational form: both are lists of messages, and only the completion is learned."""
    question, _, answer = form
    if not isinstance(record[answer], list):
        raise RecordError("not_text", f"{question} is a list of messages and {answer} is not; write both alike")
    prompt = _read_messages(record[question], question, reasoning, notes)
    prompt = [message | {"train": False} if message["role"] == "assistant" else message for message in prompt]
    return prompt + _read_messages(record[answer], answer, reasoning, notes)


def _read_pair(record: dict, form: tuple, notes: Counter[str]) -> list[Message]:
    question, context, answer = form
    asked, reply = read_text(record[question], question), read_text(record[answer], answer)
    extra = read_text(record[context], context) if context and record.get(context) is not None else ""
    if extra.strip().casefold() not in NO_INPUT:
        asked = f"{asked}\n{extra}" if asked else extra
    elif extra.strip():
        notes["input_placeholder"] += 1
    turns = _read_belle_turns(asked, question, notes)
    return [*_read_history(record.get("history")), *turns, {"role": "assistant", "content": reply}]


def _read_history(history: object) -> list[Message]:
    """LLaMA-Factory's alpaca: earlier turns as [[question, answer], ...]."""
    messages: list[Message] = []
    if history is None:
        return messages
    if not isinstance(history, list):
        raise RecordError("not_text", f"history is {name_type(history)}; write it as a list of [question, answer]")
    for number, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RecordError("not_text", f"history[{number}] is not a list of two strings; write [question, answer]")
        for role, text, index in zip(("user", "assistant"), pair, (0, 1), strict=True):
            messages.append({"role": role, "content": read_text(text, f"history[{number}][{index}]")})
    return messages


_BELLE_MARKER = re.compile(r"^(Human|Assistant):", re.MULTILINE)


def _read_belle_turns(text: str, where: str, notes: Counter[str]) -> list[Message]:
    r"""Belle's turns in one text, "Human:问\nAssistant:答\nHuman:问\nAssistant:", as messages; else one user message.

    Markers count at the start of a line and must strictly take turns; a text that begins with Human: but does not end
    in a bare Assistant: is left alone, and noted.
    """
    whole = text.strip()
    if not whole.startswith("Human:"):
        return [{"role": "user", "content": text}]
    if not whole.endswith("\nAssistant:"):
        notes["belle_lookalike"] += 1
        return [{"role": "user", "content": text}]
    _, *parts = _BELLE_MARKER.split(whole)
    markers, bodies = parts[::2], parts[1::2]
    if markers != ["Human", "Assistant"] * (len(markers) // 2):
        order = ", ".join(markers[:8])
        raise RecordError(
            "belle_alternation", f"{where} has the markers {order}; Human: and Assistant: must take turns"
        )
    roles = [{"Human": "user", "Assistant": "assistant"}[marker] for marker in markers]
    # The line breaks and blanks around a body belong to the markers.
    return [{"role": role, "content": body.strip(" \r\n")} for role, body in zip(roles[:-1], bodies[:-1], strict=True)]
