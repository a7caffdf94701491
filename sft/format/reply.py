"""A model's reply as a message: its thought, its calls and its text, in the syntaxes of published models."""

import ast
import itertools
import json
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sft.opendata.fields import RecordError, check_json

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


# A run of whitespace, from its first character: a search from each of them takes time in the square of their number.
SPACES = r"(?<!\s)\s*+"

# Markers of DeepSeek and Kimi around a list of calls.
AROUND_CALLS = re.compile(
    r"<｜tool▁calls▁(?:begin|end)｜>|<\|tool_calls_section_(?:begin|end)\|>|<\|(?:tool_)?calls\|>"
    rf"|(?:<\|eom\|>)?(?:<\|start\|>assistant)?(?:{SPACES})?to=[\w.-]+<\|message\|>"
)


class Call(NamedTuple):
    """The name of a function and its arguments; those without quotes are `Unquoted` texts."""

    name: str
    arguments: dict


class Unquoted(str):
    """An argument that a model writes without quotes: a string, or JSON, as the tool's definition says."""


class Frame(NamedTuple):
    """The marks around a reply: `before` its thought, `between` thought and text, `head` and `tail` around a text."""

    before: str | None
    between: str
    head: str
    tail: str


NO_FRAME = Frame(None, "", "", "")


def find_frame(plain: str, answer: str, thinking: str | None, thought: str) -> Frame:
    """Read a frame off two rendered replies without their stop token, a plain one and one with a thought (or None)."""
    head, found, tail = plain.partition(answer)
    if not found:
        return NO_FRAME
    before, found, rest = (thinking or "").partition(thought)
    between, has_answer, _tail = rest.partition(answer)
    return Frame(before.strip() if found and has_answer else None, between.strip(), head.strip(), tail.strip())


def split_reply(text: str, *, opened: str = "", frame: Frame = NO_FRAME, tools: Sequence[dict] | None = None) -> dict:
    """Return a reply as {"role", "content"}, with "reasoning_content" and "tool_calls" where it has them.

    `text` holds the control tokens that the model wrote, without its stop token. `opened` is the prompt's text or its
    end: a prompt may open the thought, so that the reply has only what ends it. `frame` is what the chat template
    writes around thought and text. Calls are taken out of the text where all of them can be read; else they stay text.
    The definitions of `tools` say which arguments are strings.
    """
    thought, rest = _split_by_frame(text, frame, opened)
    if not thought:
        thought, rest = _split_thought(text, opened)
    calls, content = _split_calls(rest)
    content = HARMONY_HEADER.sub("", content).strip()
    content = content.removeprefix(frame.head).removesuffix(frame.tail)
    message = {"role": "assistant", "content": content.strip()}
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": _typed(call, tools)}} for call in calls
        ]
    return message


def _split_thought(text: str, opened: str) -> tuple[str, str]:
    body = text.lstrip()
    opener, closer = next((pair for pair in OPENERS.items() if body.startswith(pair[0])), ("", ""))
    if not opener and (prompt_opens := OPENED_AT_THE_END.search(opened)):
        closer = OPENERS[prompt_opens.group(1)]
    elif not opener and not opened and "</think>" in body and "<think>" not in body.partition("</think>")[0]:
        closer = "</think>"
    if not closer:
        return "", text
    thought, _closer, rest = body.removeprefix(opener).partition(closer)
    return thought.strip(), rest


def _split_by_frame(text: str, frame: Frame, opened: str) -> tuple[str, str]:
    """Take off the thought by what the template writes around it; before a call the first mark behind it is enough."""
    start = text.strip()
    if frame.before is None or not frame.between or not start.startswith(frame.before):
        return "", text
    if not frame.before and frame.between.startswith(tuple(OPENERS.values())) and not OPENED_AT_THE_END.search(opened):
        return "", text
    body = start[len(frame.before) :]
    mark = re.match(r"<[^<>]+>|\S+", frame.between).group()
    for between in (frame.between, mark if frame.before else frame.between):
        if between in body:
            thought, _between, rest = body.partition(between)
            return thought.strip(), rest
    return "", text


def _split_calls(text: str) -> tuple[list[Call], str]:
    for begin_of_block, end_of_block, read in SYNTAXES:
        calls = []
        rest = []
        place = 0
        while begin := re.compile(begin_of_block).search(text, place):
            rest.append(text[place : begin.start()])
            found, place = _read_block(text, begin.end(), re.compile(end_of_block), read)
            if not found:
                break
            calls += found
        else:
            if calls:
                return calls, AROUND_CALLS.sub("", "".join(rest) + text[place:])
    return [], text


def _read_block(
    text: str, begin: int, end_of_block: re.Pattern, read: Callable[[str], list[Call]]
) -> tuple[list[Call], int]:
    """Read a block up to the first end that makes it whole: an argument may hold the text of an end."""
    for end in itertools.islice(end_of_block.finditer(text, begin), MAX_ENDS):
        try:
            calls = read(text[begin : end.start()])
            check_json(calls, "the reply")
        except (ValueError, KeyError, TypeError, AttributeError, SyntaxError, RecursionError, MemoryError):
            continue
        if calls and all(map(_is_call, calls)):
            return calls, end.end()
    return [], begin


def _is_call(call: Call) -> bool:
    """Say whether the name is a text and the arguments are an object."""
    if not (isinstance(call.name, str) and call.name and isinstance(call.arguments, dict)):
        return False
    return all(isinstance(key, str) for key in call.arguments)


def _typed(call: Call, tools: Sequence[dict] | None) -> dict:
    """Return arguments as values: unquoted ones as JSON, or as text where the tool's definition says "string"."""
    definitions = [tool.get("function", tool) for tool in tools or ()]
    parameters = next((each.get("parameters") for each in definitions if each.get("name") == call.name), None)
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    values = {}
    for key, value in call.arguments.items():
        kind = properties.get(key) if isinstance(properties, dict) else None
        is_text = isinstance(kind, dict) and kind.get("type") == "string"
        if isinstance(value, Unquoted):
            value = str(value) if is_text else _parse_value(value)
        values[key] = value
    return values


# --- syntaxes of calls --------------------------------------------------------------------------------------------


def _from_object(call: dict) -> Call:
    call = call.get("function", call) if isinstance(call.get("function"), dict) else call
    if len(call) == 1 and "name" not in call:  # Apertus
        call = dict(zip(("name", "arguments"), *call.items(), strict=True))
    arguments = call["arguments"] if "arguments" in call else call["parameters"]
    name = call["name"] if "name" in call else call["tool_name"]
    return Call(name, json.loads(arguments) if isinstance(arguments, str) else arguments)


def _read_json(text: str) -> list[Call]:
    """{"name": "f", "arguments": {...}}, or a list of such: Qwen, Hermes, Mistral, Llama 3.1 (`parameters`), Cohere."""
    found = json.loads(text)
    return [_from_object(call) for call in (found if isinstance(found, list) else [found])]


def _read_tags(text: str, name: str, pair: str, end: str = "") -> list[Call]:
    """Read blocks of a name, pairs of key and value, and an end, that must be all of the text.

    The groups are atomic: else a text that doesn't match takes time exponential in its length.
    """
    block = rf"{name}((?>\s*{_without_groups(pair)})*+)\s*+{end}"
    if not re.fullmatch(rf"(?>\s*{_without_groups(block)})++\s*", text, re.DOTALL):
        raise ValueError("no call")
    return [
        Call(function.strip(), {key: Unquoted(value) for key, value in re.findall(pair, body, re.DOTALL)})
        for function, body in re.findall(block, text, re.DOTALL)
    ]


def _read_function_tags(text: str) -> list[Call]:
    """<function=f> <parameter=key> value </parameter> </function>: Qwen3-Coder, Qwen3.5, Nemotron 3."""
    pair = r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>"
    return _read_tags(text, r"<function=([^>\n]+)>", pair, "</function>")


def _read_argument_tags(text: str) -> list[Call]:
    """f <arg_key>key</arg_key> <arg_value>value</arg_value>: GLM 4.5."""
    pair = r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>"
    return _read_tags(text, r"([\w.-]++)", pair)


def _read_named_tags(text: str) -> list[Call]:
    """<invoke name="f"><parameter name="key">value</parameter></invoke>: MiniMax, DeepSeek 3.2, MiniCPM 5, Muse."""
    pair = r'<[^<>"]*?param(?:eter)? name="([^"]+)"[^<>]*>(.*?)</[^<>]*?param(?:eter)?>'
    calls = _read_tags(text, r'<[^<>"]*?(?:invoke|function) name="([^"]+)"[^<>]*>', pair, r"</[^<>]*>")
    return [
        call._replace(arguments={key: Unquoted(CDATA.sub(r"\1", value)) for key, value in call.arguments.items()})
        for call in calls
    ]


def _without_groups(pattern: str) -> str:
    return re.sub(r"(?<!\\)\((?!\?)", "(?:", pattern)


def _parse_value(text: str):
    """Read an argument that has no quotes: JSON, or a word of Python, else a string."""
    if text in PYTHON_WORDS:
        return PYTHON_WORDS[text]
    try:
        found = json.loads(text)
        check_json(found, "the argument")
    except (ValueError, RecursionError):
        return str(text)
    return str(text) if isinstance(found, str) else found


def _read_python_calls(text: str) -> list[Call]:
    """[f(key="value")]: LFM2, Llama 4. A string may hold a newline as it is."""
    calls = []
    for node in ast.parse(text.strip().replace("\n", "\\n"), mode="eval").body.elts:
        arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
        calls.append(Call(ast.unparse(node.func), arguments))
    return calls


def _read_name_and_json(text: str) -> list[Call]:
    """A name, a separator and JSON, as DeepSeek, Kimi, Mistral, Solar and gpt-oss write it."""
    found = re.fullmatch(NAME_AND_JSON, text, re.DOTALL)
    if not found:
        raise ValueError("no name and JSON")
    return [Call(found.group(1), json.loads(found.group(2)))]


def _read_gemma_call(text: str) -> list[Call]:
    """call:f{key:<|"|>text<|"|>,other:[1,true]}: Gemma 4."""
    found = re.fullmatch(r"\s*call:([\w.-]+)(\{.*\})\s*", text, re.DOTALL)
    if not found:
        raise ValueError("no call")
    pieces = found.group(2).split(GEMMA_QUOTE)  # texts are the odd ones
    bare = [re.sub(r"([{,]\s*)([^\s{}\[\],:\"]+)\s*:", r'\1"\2":', piece) for piece in pieces[::2]]
    bare = [re.sub(r"\bNone\b", "null", piece) for piece in bare]
    texts = [json.dumps(piece) for piece in pieces[1::2]]
    written = "".join(itertools.chain.from_iterable(itertools.zip_longest(bare, texts, fillvalue="")))
    return [Call(found.group(1), json.loads(written))]


CDATA = re.compile(r"\A<!\[CDATA\[(.*)\]\]>\Z", re.DOTALL)
GEMMA_QUOTE = '<|"|>'
PYTHON_WORDS = {"True": True, "False": False, "None": None}
MAX_ENDS = 100  # of a block that are tried
NAME_AND_JSON = (
    r"\s*+(?:function<｜tool▁sep｜>)?(?:[\w-]*<\|tool_call:name\|>)?(?:functions\.)?([\w.-]+?)(?::\d+)?"
    r"(?:\[CALL_ID\][\w-]*)?"
    r"(?:\s*\n```json\n|\s*+(?:<｜tool▁sep｜>|<\|tool_call_argument_begin\|>|\[ARGS\]|<\|tool_call:args\|>|>|"
    r"(?:<\|channel\|>commentary\s*+)?(?:<\|constrain\|>)?(?:json)?<\|message\|>))"
    r"\s*+(?:```json\n)?(\{.*\})\s*+(?:```)?\s*+"
)


# How a block of calls begins and ends, and the function that reads it; the first row that can read all blocks is taken.
SYNTAXES = (
    (rf"{SPACES}<tool_call>", r"</tool_call>", _read_json),
    (rf"{SPACES}<tool_call>", r"</tool_call>", _read_function_tags),
    (rf"{SPACES}<tool_call>", r"</tool_call>", _read_argument_tags),
    (rf"{SPACES}<\|tool_call>", r"<tool_call\|>", _read_gemma_call),
    (rf"{SPACES}<｜tool▁call▁begin｜>", r"<｜tool▁call▁end｜>", _read_name_and_json),
    (rf"{SPACES}<\|tool_call_begin\|>", r"<\|tool_call_end\|>", _read_name_and_json),
    (rf"{SPACES}<\|tool_call:begin\|>", r"<\|tool_call:end\|>", _read_name_and_json),
    (rf"{SPACES}<\|tool_call_start\|>", r"<\|tool_call_end\|>", _read_python_calls),
    (rf"{SPACES}<tool_calls>", r"</tool_calls>", _read_json),
    (rf"{SPACES}<\|START_ACTION\|>", r"<\|END_ACTION\|>", _read_json),
    (rf"{SPACES}<\|tools_prefix\|>", r"<\|tools_suffix\|>|\Z", _read_json),
    (rf"{SPACES}<\|function_call\|>", r"<\|function_call\|>|\Z", _read_json),
    (rf"{SPACES}<[^<>\s]*(?:function|tool)_calls>", r"</[^<>\s]*(?:function|tool)_calls>", _read_named_tags),
    (
        rf"(?:<\|start\|>assistant)?(?:{SPACES})?to=(?=functions\.)",
        r"(?=<\|start\|>assistant\s*to=)|\Z",
        _read_name_and_json,
    ),
    (r"\[TOOL_CALLS\]\s*(?=\[)", r"\Z", _read_json),
    (r"\[TOOL_CALLS\]", r"(?=\[TOOL_CALLS\])|\Z", _read_name_and_json),
    (rf"{SPACES}(?=<function name=)", r"(?<=</function>)", _read_named_tags),
    (rf"{SPACES}<function=", r"</function>", _read_name_and_json),
    (r"\A\s*(?:<\|python_tag\|>)?(?=\{\s*\"name\")", rf"{SPACES}\Z", _read_json),
)


def find_trained(messages: Sequence[dict]) -> list[int]:
    """Return the indices of the replies that are trained."""
    return [n for n, message in enumerate(messages) if message["role"] == "assistant" and message.get("train", True)]


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


def _is_in_text(part: str, text: str) -> bool:
    """Say whether a text is in another one without its tags: the thought "think" is not in `</think>`."""
    return _is_in(*(re.sub(r"</?\w+>", " ", each) for each in (part, text)))


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
    if not _is_in(message.get("content") or "", reply):
        where = "a reply beside a call" if message.get("tool_calls") else "a reply"
        raise RecordError("template", f"the chat template drops or changes the text of {where}")
    thought = (message.get("reasoning_content") or "").strip()
    if thought and not (_is_in(thought, reply) and _is_in_text(thought, reply)):
        raise RecordError("template", "the chat template has no place for a thought")
    for call in message.get("tool_calls") or ():
        function = call["function"]
        arguments = function["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        texts = [value for value in arguments.values() if isinstance(value, str)]
        if function["name"] not in reply or not all(_is_in(text, reply) for text in texts):
            raise RecordError("template", f"the chat template drops or changes a call of {function['name']!r}")
