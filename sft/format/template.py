"""A Jinja chat template: the one that a format saves, and any, compiled as transformers 5.23 does, its date fixed."""

import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, datetime
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, NamedTuple

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sft.format.table import ChatFormat
from sft.format.tokens import any_of
from sft.opendata.fields import RecordError

OF_A_CONVERSATION = {"messages", "tools", "documents", "add_generation_prompt"}  # variables
LENGTH_FILTERS = {"length", "count", "wordcount"}
MAY_BE_TEXT = re.compile(r"\A\Z|content|text|reason|think|thought|\Am\Z|\Ac\Z")  # names of what is measured


@lru_cache
def load_marked_template(path: Path) -> jinja2.Template:
    """Load a Jinja template with the marks [[ ]], [% %] and [# #], which writes a template with marks of its own."""
    own_marks = {"variable_start_string": "[[", "variable_end_string": "]]"}
    own_marks |= {"block_start_string": "[%", "block_end_string": "%]"}
    own_marks |= {"comment_start_string": "[#", "comment_end_string": "#]"}
    environment = jinja2.Environment(**own_marks)
    environment.filters["quote"] = lambda text: json.dumps(text, ensure_ascii=False)
    return environment.from_string(path.read_text(encoding="utf-8"))


def jinja_template(chat_format: ChatFormat, bos: str = "", *, with_tools: bool = False) -> str:
    """Write the bound format as the Jinja chat template that is saved with the tokenizer.

    `generation` marks the trained text, so `apply_chat_template(return_assistant_tokens_mask=True)` gives our labels.
    `with_tools` adds definitions, calls, results and thoughts in Qwen's form; without them the text is the same.
    """
    template = load_marked_template(Path(__file__).with_name("chat.jinja"))
    written = template.render(row=chat_format, bos=bos, with_tools=with_tools)
    return "".join(map(str.strip, written.split("\n")))


class GenerationTag(Extension):
    """`{% generation %}` marks the assistant's text for transformers; here it only renders its body."""

    tags: ClassVar = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render_body"), [], [], body).set_lineno(line)

    def _render_body(self, caller: Callable[[], str]) -> str:
        return caller()


class TemplateNamespace(jinja2.utils.Namespace):
    """As in transformers: a template can't reach Python's internals through a namespace."""

    def __setitem__(self, name: str, value) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a chat template can't set {name!r} on a namespace")
        super().__setitem__(name, value)


class TemplateDict:
    """As in transformers: `dict` without the methods of the class."""

    def __call__(self, *args, **kwargs) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args, **kwargs) -> dict:
        return dict.fromkeys(*args, **kwargs)


class ChatTemplate:
    """A compiled chat template with the tokenizer's special tokens and the run's `variables` bound.

    `render` gives the string that `tokenizer.apply_chat_template(tokenize=False)` gives on the day `today`.
    `undeclared` are the variables that the template reads and doesn't set. `writes_date` says that it asks for a date.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], variables: Mapping, today: date):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": self._format_today,
            "dict": TemplateDict(),
            "namespace": TemplateNamespace,
        }
        self.source = source
        self.today = today
        self.writes_date = False
        self._variables = {**special_tokens, **variables}
        try:
            self._tree = environment.parse(source)
            self._compiled = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is not valid Jinja: {error}") from None
        self.undeclared = meta.find_undeclared_variables(self._tree)

    def render(
        self, messages: Sequence[dict], /, *, tools: Sequence[dict] | None, add_generation_prompt: bool, **variables
    ) -> str:
        """Render as a string; raises RecordError with the template's own words where it refuses the messages."""
        try:
            return self._compiled.render(
                messages=[_as_the_template_sees(message) for message in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{**self._variables, **variables},
            )
        except Exception as error:  # a template may raise anything
            words = str(error) or type(error).__name__
            raise RecordError("template", f"the chat template refuses it: {words}") from None

    def _format_today(self, pattern: str) -> str:
        self.writes_date = True
        return datetime.combine(self.today, datetime.min.time()).strftime(pattern)

    def compared_texts(self) -> tuple[set[str], set[str]]:
        """Return the texts that the template looks for: (inside a string, as a whole string)."""
        inside = set()
        whole = set()
        for node in self._tree.find_all((nodes.Compare, nodes.Call, nodes.Filter)):
            if isinstance(node, nodes.Compare):
                is_membership = any(operand.op in ("in", "notin") for operand in node.ops)
                found = [node.expr, *(operand.expr for operand in node.ops)]
                (inside if is_membership else whole).update(_texts(found))
            elif getattr(node, "name", "") not in ("join", "default"):
                inside.update(_texts(node.args))
        return {text for text in inside if text.strip()}, {text for text in whole if text.strip()}

    def measures_texts(self) -> bool:
        """Say whether a length above 1 is compared with: then the layout may depend on how long a text is."""
        for node in self._tree.find_all(nodes.Compare):
            measured = [found.node for found in node.find_all(nodes.Filter) if found.name in LENGTH_FILTERS]
            has_length = any(MAY_BE_TEXT.search(_last_name(found)) for found in measured)
            numbers = [found.value for found in node.find_all(nodes.Const) if isinstance(found.value, int)]
            if has_length and any(number > 1 for number in numbers):
                return True
        return False


def _last_name(node: nodes.Node | None) -> str:
    """Return the name that an expression ends in: `id` for `call.id`."""
    if isinstance(node, nodes.Getattr):
        return node.attr
    return node.name if isinstance(node, nodes.Name) else ""


def _texts(expressions: Sequence[nodes.Node]) -> set[str]:
    constants = [found for node in expressions for found in [node, *node.find_all(nodes.Const)]]
    return {found.value for found in constants if isinstance(found, nodes.Const) and isinstance(found.value, str)}


def _as_the_template_sees(message: dict) -> dict:
    """Drop keys without a value and name a thought as transformers 5.23 does: gpt-oss reads `thinking`."""
    message = {key: value for key, value in message.items() if value is not None}
    thought = message.get("reasoning_content")
    return message if thought is None else {"thinking": thought, **message}


class CallForm(NamedTuple):
    """How a template takes calls: arguments as an object or as JSON text, and whether calls and results need ids."""

    as_text: bool
    needs_ids: bool


def in_call_form(messages: list[dict], form: CallForm) -> list[dict]:
    """Give calls and their results the form that a template takes; `messages` are copies."""
    waiting: list[tuple[str | None, str | None]] = []  # for results: the ids of calls as given and as written
    number = 0
    for message in messages:
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [_call_in_form(call, form, number + place) for place, call in enumerate(calls)]
            number += len(calls)
            waiting = [(old.get("id"), new.get("id")) for old, new in zip(calls, message["tool_calls"], strict=True)]
        elif message["role"] == "tool" and form.needs_ids and waiting:
            given = message.get("tool_call_id")
            place = next((place for place, (old, _new) in enumerate(waiting) if old is not None and old == given), 0)
            message["tool_call_id"] = waiting.pop(place)[1]
    return messages


def _call_in_form(call: dict, form: CallForm, number: int) -> dict:
    function = call["function"]
    if form.as_text and not isinstance(function["arguments"], str):
        function = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
    new_id = {"id": f"call{number:05}"} if form.needs_ids and not call.get("id") else {}
    return {**call, "function": function, **new_id}


class Escaper:
    """Replaces control tokens that are written out in contents by letters and digits while a template renders.

    A template can't take them for structure then, and afterwards every control token of the rendered text is its own.
    """

    def __init__(self, texts: Iterable[str]):
        self._names = sorted({text for text in texts if text.strip()}, key=len, reverse=True)
        self._numbers = {name: number for number, name in enumerate(self._names)}
        self.pattern = any_of(self._names)
        self._nonce = secrets.token_hex(6)
        self._written = re.compile(rf"q{self._nonce}x(\d+)q")

    def escape(self, value):
        """Escape a text, or every text and key of a JSON value."""
        if isinstance(value, str):
            return self.pattern.sub(lambda match: f"q{self._nonce}x{self._numbers[match.group()]}q", value)
        if isinstance(value, dict):
            return {self.escape(key): self.escape(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.escape(item) for item in value]
        return value

    def unescape(self, text: str) -> str:
        return self._written.sub(lambda match: self._names[int(match.group(1))], text)


def texts_in(value) -> Iterable[str]:
    """Yield every text and key of a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        yield from texts_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_in(item)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)
