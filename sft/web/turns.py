"""The conversation on the server: turns, their limits, and the files that it is exported to."""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import gradio as gr

from sft.chat.reply import encodable, parse_tools, tool_result
from sft.chat.sampling import Sampling
from sft.report.markdown import fence
from sft.web.text import refusal

MAX_MESSAGE = 8_000  # characters of a message or of the system prompt
MAX_CONVERSATION = 32_000  # characters of the messages for a model, counted before anything is tokenised
MAX_TURNS = 50
MAX_TOOLS = 16_000  # characters of the definitions
SLIDERS = {  # lowest, highest, step; the defaults are Sampling's
    "temperature": (0.0, 2.0, 0.05),
    "top_p": (0.05, 1.0, 0.05),
    "top_k": (1, 200, 1),
    "repetition_penalty": (1.0, 2.0, 0.01),
    "max_new_tokens": (1, 4096, 1),
}
EXAMPLES = ("写一首关于春天的诗", "一年有几个季节？", "What is the capital of France?", "What is 8+9?")


@dataclass(frozen=True)
class Turn:
    """A question and its replies, one for each pane: assistant messages without a role, {} where there is none."""

    question: str
    replies: tuple[dict, ...] = ()

    def reply(self, pane: int) -> dict:
        return self.replies[pane] if pane < len(self.replies) else {}


def drop_unanswered(turns: Sequence[Turn]) -> list[Turn]:
    """Leave out a trailing question without an answer."""
    return list(turns[:-1] if turns and not any(map(has_text, turns[-1].replies)) else turns)


def has_text(reply: dict) -> bool:
    return any(reply.get(key) for key in ("content", "reasoning_content", "tool_calls"))


def to_messages(turns: Sequence[Turn], pane: int, system: str = "") -> list[dict]:
    """Return the messages of a pane's model; a question without its answer counts only as the last one.

    A question that follows calls is their result: of several, a line for each.
    """
    messages = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        reply = turn.reply(pane)
        if has_text(reply) or turn is turns[-1]:
            calls = messages[-1].get("tool_calls") if messages else None
            messages += to_results(calls, turn.question) if calls else [{"role": "user", "content": turn.question}]
        if has_text(reply):
            messages.append({"role": "assistant", "content": "", **reply})
    return messages


def to_results(calls: Sequence[dict], text: str) -> list[dict]:
    """Return the result of each call as a message."""
    lines = [text] if len(calls) == 1 else text.splitlines()
    return [tool_result(call, line.strip()) for call, line in zip_longest(calls, lines[: len(calls)], fillvalue="")]


def open_calls(turns: Sequence[Turn], pane: int) -> Sequence[dict]:
    """Return the calls that a pane's next message is the result of."""
    return (turns[-1].reply(pane).get("tool_calls") if turns else None) or ()


def check_conversation(turns: Sequence[Turn], system: str, request: gr.Request | None = None) -> str:
    """Return the system prompt; raise gr.Error when something is too long. The text is not tokenised here."""
    system = clean_text(system or "")
    if max(len(turns[-1].question), len(system)) > MAX_MESSAGE:
        raise refusal(request, "too_long", limit=MAX_MESSAGE)
    if len(turns) > MAX_TURNS:
        raise refusal(request, "too_many_turns", limit=MAX_TURNS)
    before = turns[:-1]
    answer = turns[-1].question
    counts = [len(open_calls(before, pane)) for pane in range(max((len(turn.replies) for turn in before), default=0))]
    if max(counts, default=0) > 1 and len(answer.splitlines()) != max(counts):
        raise refusal(request, "results", count=max(counts))
    return system


def to_tools(text: str, request: gr.Request | None = None) -> list[dict] | None:
    """Return the tool definitions that the page's box holds; raise gr.Error for what is none."""
    text = clean_text(str(text or ""))
    if not text:
        return None
    if len(text) > MAX_TOOLS:
        raise refusal(request, "too_long", limit=MAX_TOOLS)
    try:
        return parse_tools(text) or None
    except ValueError as error:
        line = str(error).splitlines()[0][:200]
        raise refusal(request, "bad_tools", error=line) from None


def to_sampling(values: Sequence, request: gr.Request | None = None) -> Sampling:
    """Return the sliders' settings; raise gr.Error for a value that no slider gives, such as NaN."""
    settings = dict(zip(SLIDERS, values, strict=False))
    for name, (low, high, _step) in SLIDERS.items():
        value = settings.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise refusal(request, "out_of_range", name=name, low=low, high=high)
    return Sampling(**settings)


def clean_text(text: str) -> str:
    return encodable(text).strip()


def without_oldest(messages: list[dict]) -> list[dict]:
    """Leave out the oldest question and the messages up to the next one."""
    system = messages[:1] if messages[0]["role"] == "system" else []
    rest = messages[len(system) + 1 :]
    while rest and rest[0]["role"] != "user":
        rest = rest[1:]
    return system + rest


def num_questions(messages: Sequence[dict]) -> int:
    return sum(message["role"] == "user" for message in messages)


def num_characters(messages: Sequence[dict]) -> int:
    """Count the characters of contents, thoughts and calls."""
    texts = ("".join(str(message[key]) for key in message if key != "role") for message in messages)
    return sum(map(len, texts))


# --- export -------------------------------------------------------------------------------------------------------


def export_links(turns: Sequence[Turn], system: str = "", tools: str = "") -> str:
    """Return links that hold the conversation as data: JSON (canonical, a record for each pane) and Markdown."""
    turns = drop_unanswered(turns)
    if not turns:
        return ""
    panes = range(max(len(turn.replies) for turn in turns))
    definitions = to_tools(tools)
    records = [to_record(to_messages(turns, pane, clean_text(system or "")), definitions) for pane in panes]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    text = "\n---\n\n".join("".join(map(_to_markdown, record["messages"])) for record in records)
    return " · ".join([_data_link("json", "application/json", lines), _data_link("md", "text/markdown", text)])


def _data_link(name: str, kind: str, body: str) -> str:
    data = base64.b64encode(body.encode()).decode()
    return f'<a download="conversation.{name}" href="data:{kind};base64,{data}">{name}</a>'


HEADINGS = {
    "system": "System · 系统",
    "user": "User · 用户",
    "assistant": "Assistant · 助手",
    "tool": "Result · 结果",
}


def _to_markdown(message: dict) -> str:
    parts = [f"## {HEADINGS[message['role']]}"]
    if thought := message.get("reasoning_content"):  # a quotation ends what the thought leaves open, such as a fence
        parts.append("\n".join(f"> {line}".rstrip() for line in ["**Thought · 思考**", "", *thought.splitlines()]))
    for call in message.get("tool_calls") or ():
        parts.append(fence(json.dumps(call, ensure_ascii=False, indent=2), "json"))
    parts += [message["content"]] if message["content"] else []
    return "\n\n".join(parts) + "\n\n"


def to_record(messages: list[dict], tools: list[dict] | None = None) -> dict:
    """Return the canonical record that sft.opendata and train.py read."""
    hashed = messages if tools is None else [*messages, tools]
    name = hashlib.sha256(json.dumps(hashed, ensure_ascii=False).encode()).hexdigest()[:16]
    record = {"id": f"web_demo-{name}", "source": "web_demo", "messages": messages}
    return record | ({"tools": tools} if tools else {})
