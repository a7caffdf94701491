"""From raw records to canonical conversations.

A record is read by what it holds, never by its file's name. A record that can't be read is an error with line and
reason. No text is changed here.
"""

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from sft.opendata.fields import (
    MEANING_KEYS,
    MESSAGE_LISTS,
    PAIRS,
    SYSTEM_KEYS,
    Conversation,
    FieldCounts,
    Form,
    Message,
    RecordError,
    check_media,
    count_unread,
    find_form,
    has_lone_surrogate,
    is_blank,
    is_empty,
    name_type,
    read_switch,
    read_text,
    take_chosen,
)
from sft.opendata.messages import (
    Parts,
    check_calls,
    list_messages,
    note_calls,
    parse_calls,
    read_definitions,
    read_messages,
    read_reply,
    read_tools,
)
from sft.opendata.records import split_file

NO_INPUT = {"", "<noinput>", "<no input>", "noinput", "no input", "n/a", "none", "null", "nan", "无", "无输入"}


def read_conversations(
    paths: Iterable[str | os.PathLike],
    *,
    encoding: str = "utf-8",
    reasoning: str = "keep",
    preference: str | None = None,
    counts: dict[str, FieldCounts] | None = None,
) -> Iterator[tuple[Conversation | None, RecordError | None, str, int]]:
    """Read files of any known form as valid conversations; nothing is cleaned.

    Yields (conversation, None, file, line) or (None, error, file, line). `counts` gets an entry for each file. Raises
    ValueError for a file as a whole.
    """
    counts = {} if counts is None else counts
    for path in map(os.fspath, paths):
        options = {"source": os.path.basename(path), "reasoning": reasoning, "preference": preference}
        options["counts"] = counts.setdefault(path, FieldCounts())
        for raw in split_file(path, encoding=encoding, parse=True):
            try:
                conversation = read_record(raw.parse(), line=raw.place, **options)
                check_messages(conversation["messages"])
                yield conversation, None, path, raw.line
            except RecordError as error:
                yield None, error, path, raw.line


def read_record(
    record: object,
    *,
    source: str,
    line: int | str,
    reasoning: str = "keep",
    preference: str | None = None,
    counts: FieldCounts | None = None,
) -> Conversation:
    """Read a record of any known form, chosen by the keys that are not null and what they hold. Raises RecordError.

    Its own id is kept, else it is `source:line`. `reasoning` "drop" leaves out the thoughts. `preference` "chosen"
    takes the chosen replies of preference data, which is refused without it. Contents may still be empty and roles out
    of order: that is for `check_messages`, or for cleaning.
    """
    if not isinstance(record, dict):
        raise RecordError("not_object", f"the record is {name_type(record)}; write it as an object with named fields")
    if record.keys() == _OWN_KEYS and (messages := _own_messages(record["messages"])):
        own = _own_source(record["source"]) or source
        return {"id": _read_id(record["id"]) or f"{source}:{line}", "source": own, "messages": messages}
    counts = FieldCounts() if counts is None else counts
    learned = None
    if not MEANING_KEYS.isdisjoint(record):
        check_media(record, "")
        learned = read_switch(record, "")
        record = take_chosen(record, preference)
    form = find_form(record)
    if form is None:
        raise _unknown_form(record)
    is_own = _OWN_KEYS <= record.keys() <= _OWN_KEYS | {"tools"}
    holds_lists = form.keys[-1] == "answers" or (form not in MESSAGE_LISTS and isinstance(record[form.keys[0]], list))
    read = form.read_beside_lists if holds_lists else form.read
    count_unread(record, read | {"source"} if is_own else read, "", counts.unread)
    messages = _read_system(record) + _read_form(record, form, counts)
    if learned is False:
        messages = [m | {"train": False} if m["role"] == "assistant" else m for m in messages]
    messages, tools = _finish_messages(messages, read_tools(record), reasoning, counts.notes)
    own = is_own and _own_source(record["source"])
    conversation = {"id": _read_id(record.get("id")) or f"{source}:{line}", "source": own or source}
    return conversation | ({"messages": messages, "tools": tools} if tools else {"messages": messages})


# Only our own files have exactly these keys, maybe with tools; theirs is the source that counts.
_OWN_KEYS = {"id", "source", "messages"}
_OWN_ROLES = {"system", "user", "assistant"}


def _own_source(source: object) -> str:
    return source if isinstance(source, str) and not has_lone_surrogate(source) else ""


def _own_messages(messages: object) -> list[Message] | None:
    """The messages as they are if all have just a known role and a plain text, or None: then each is read with care."""
    if type(messages) is not list or not messages:
        return None
    for message in messages:
        if type(message) is not dict or len(message) != 2:
            return None
        role = message.get("role")
        text = message.get("content")
        if type(role) is not str or role not in _OWN_ROLES or type(text) is not str:
            return None
        if "think>" in text or "<tool" in text or has_lone_surrogate(text):
            return None
    return messages if messages[0]["role"] != "assistant" else None


def _read_id(value: object) -> str:
    usable = isinstance(value, int | str) and not isinstance(value, bool)
    return str(value) if usable and not has_lone_surrogate(str(value)) else ""


def _unknown_form(record: dict) -> RecordError:
    """Say why no form fits: a null, records nested in a field, or other names."""
    for form in MESSAGE_LISTS:
        if not is_empty(value := record.get(form.keys[0])):
            return RecordError("not_list", f"{form.keys[0]} is {name_type(value)}; write it as a list of messages")
    for form in PAIRS:
        if form.keys[0] in record and form.keys[-1] in record:
            null = next(key for key in form.keys if record.get(key) is None)
            return RecordError("null_field", f"{null} is null; give a text or leave the record out")
    for key, value in record.items():
        if isinstance(value, list) and value and find_form(value[0]) is not None:
            advice = f"write its elements as an array or as JSON Lines, e.g. jq -c '.{key}[]'"
            return RecordError("nested", f'the records are inside "{key}"; {advice}')
    keys = ", ".join(f'"{key}"' for key, value in list(record.items())[:8] if value is not None) or "no values"
    known = ", ".join("/".join(form.keys) for form in (*MESSAGE_LISTS, *PAIRS))
    return RecordError("unknown_form", f"no known form has {keys[:200]}; use one of {known}")


def _finish_messages(
    messages: list[Message], tools: list[dict], reasoning: str, notes: Counter[str]
) -> tuple[list[Message], list[dict]]:
    """Take tagged tools apart, leave out a greeting and maybe the thoughts, and count what is worth knowing."""
    if has_tool_tags(messages):
        messages, tools = take_tagged_tools(messages, tools, notes)
    first = next((i for i, message in enumerate(messages) if message["role"] != "system"), 0)
    if messages and messages[first]["role"] == "assistant" and "tool_calls" not in messages[first]:
        notes["greeting_left_out"] += 1
        messages = messages[:first] + messages[first + 1 :]
    thoughts = [message for message in messages if message.get("reasoning_content")]
    if thoughts:
        notes["reasoning_dropped" if reasoning == "drop" else "reasoning_kept"] += len(thoughts)
    if reasoning == "drop":
        messages = [{key: message[key] for key in message if key != "reasoning_content"} for message in messages]
    if any("tool_calls" in message for message in messages):
        note_calls(messages, tools, notes)
    return messages, tools


def check_messages(messages: list[Message]) -> None:
    """Raise RecordError unless user and assistant take turns and each result answers a call.

    A system message may come first; the results of a reply's calls come before the next reply; the last message is a
    reply; some reply is learned. Only a reply with calls and a result may be empty.
    """
    if not messages:
        raise RecordError("empty", "messages is empty; give at least one user and one assistant message")
    if "tool" in [message["role"] for message in messages]:
        check_calls(messages)
    _check_order(messages)
    for number, message in enumerate(messages):
        if is_blank(message):
            raise RecordError("empty", f"messages[{number}].content is empty; give a text or leave the record out")
    if not any([message["role"] == "assistant" and message.get("train") is not False for message in messages]):
        raise RecordError("nothing_learned", "no reply is to be learned; set train for one, or leave the record out")


_FOLLOWING = {"user": "assistant", "tool": "assistant", "assistant": "user", "system": "user"}


def _check_order(messages: list[Message]) -> None:
    before = "system"
    for number, message in enumerate(messages):
        role = message["role"]
        is_first_system = role == "system" and number == 0
        is_result = role == "tool" and before in ("assistant", "tool")
        if role != _FOLLOWING[before] and not is_first_system and not is_result:
            expected = f"{_FOLLOWING[before]} should come next; user and assistant take turns"
            raise RecordError("role_order", f'messages[{number}] has role "{role}" where {expected}')
        before = role
    if before != "assistant":
        raise RecordError("role_order", "the last message is not the assistant's; end with a reply")


# --- The forms


def _read_system(record: dict) -> list[Message]:
    filled = [key for key in SYSTEM_KEYS if record.get(key) not in (None, "")]
    return [{"role": "system", "content": read_text(record[key], key)} for key in filled]


def _read_form(record: dict, form: Form, counts: FieldCounts) -> list[Message]:
    """The messages that the keys of a form hold."""
    if form in MESSAGE_LISTS:
        key = form.keys[0]
        return read_messages(list_messages(record[key], key), key, counts, record.get("loss_mask"))
    if not is_empty(record.get("loss_mask")):
        raise RecordError("loss_switch", "loss_mask can't be honoured here; write messages, and a 0 or 1 for each")
    if form.keys[-1] == "answers":
        return _read_query_and_calls(record, counts)
    if isinstance(record[form.keys[0]], list):
        return _read_prompt_and_completion(record, form, counts)
    return _read_pair(record, form, counts)


def _read_query_and_calls(record: dict, counts: FieldCounts) -> list[Message]:
    calls = parse_calls(record["answers"], "answers", counts.unread)
    if not calls:
        raise RecordError("tool_call", "answers holds no call; give one or leave the record out")
    question = {"role": "user", "content": read_text(record["query"], "query")}
    return [question, {"role": "assistant", "content": "", "tool_calls": calls}]


def _read_prompt_and_completion(record: dict, form: Form, counts: FieldCounts) -> list[Message]:
    """TRL's conversational form: both are lists of messages, and only the completion is learned."""
    question, answer = form.keys
    if not isinstance(record[answer], list):
        raise RecordError("not_text", f"{question} is a list of messages and {answer} is not; write both alike")
    if all(isinstance(text, str) for text in record[question] + record[answer]):
        raise RecordError("file_of_columns", "the record is a whole file of columns; write an object for each row")
    prompt = read_messages(record[question], question, counts)
    prompt = [message | {"train": False} if message["role"] == "assistant" else message for message in prompt]
    return prompt + read_messages(record[answer], answer, counts)


def _read_pair(record: dict, form: Form, counts: FieldCounts) -> list[Message]:
    question, answer = form.keys
    if isinstance(record[question], dict) and isinstance(record[answer], dict):
        raise RecordError("file_of_columns", "the record is a whole file of columns; write an object for each row")
    asked = read_text(record[question], question)
    context = next((key for key in form.optional if key != "history" and record.get(key) is not None), None)
    extra = read_text(record[context], context) if context else ""
    if extra.strip().casefold() not in NO_INPUT:
        asked = f"{asked}\n{extra}" if asked else extra
    elif extra.strip():
        counts.notes["input_placeholder"] += 1
    turns = _read_belle_turns(asked, question, counts.notes)
    reply = read_reply({**record, "content": ""}, Parts(read_text(record[answer], answer)), answer, counts)
    return [*_read_history(record.get("history")), *turns, reply]


def _read_history(history: object) -> list[Message]:
    """LLaMA-Factory's alpaca: earlier turns as [[question, answer], ...]."""
    messages: list[Message] = []
    if is_empty(history):
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
    markers = parts[::2]
    bodies = parts[1::2]
    if markers != ["Human", "Assistant"] * (len(markers) // 2):
        order = ", ".join(markers[:8])
        raise RecordError(
            "belle_alternation", f"{where} has the markers {order}; Human: and Assistant: must take turns"
        )
    roles = [{"Human": "user", "Assistant": "assistant"}[marker] for marker in markers]
    # The line breaks and blanks around a body belong to the markers.
    return [{"role": role, "content": body.strip(" \r\n")} for role, body in zip(roles[:-1], bodies[:-1], strict=True)]


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
        return _results_as_text(messages), tools
    return [m for m in parts if m["role"] != "system" or m["content"].strip()], tools or defined


def _results_as_text(messages: list[dict]) -> list[dict]:
    """Make results user's text, in tags, where the calls before them stay text; those of one reply are one message."""
    if any(message.get("tool_calls") for message in messages):
        return messages
    kept = []
    for is_result, group in itertools.groupby(messages, lambda message: message["role"] == "tool"):
        if is_result:
            texts = [_RESULT_BLOCK.sub(r"\1", message["content"]).strip() for message in group]
            group = [{"role": "user", "content": "\n".join(f"<tool_response>\n{t}\n</tool_response>" for t in texts)}]
        kept += group
    return kept


def _take_definitions(message: dict) -> tuple[dict, list[dict]]:
    text = message["content"]
    blocks = [block for block in _TOOLS_BLOCK.finditer(text) if block.group(1).strip()]
    if not blocks:
        return message, []
    tools = [tool for block in blocks for tool in _parse_block(block.group(1), read_definitions, "tools")]
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
        if text.count("<tool_call>") != len(blocks) or not all(map(str.strip, blocks)):
            raise ValueError("a block is not closed")  # or is empty, as in a text about the tags
        parsed = [
            _parse_block(block, lambda value, where: parse_calls(value, where, Counter()), "") for block in blocks
        ]
        content = _CALL_BLOCK.sub("", text).strip()
        return [message | {"content": content, "tool_calls": [call for calls in parsed for call in calls]}]
    if message["role"] in ("tool", "user") and _RESULT_BLOCK.match(text) and not _RESULT_BLOCK.sub("", text):
        return [message | {"role": "tool", "content": block.strip("\n")} for block in _RESULT_BLOCK.findall(text)]
    return [message]
