"""A model's own chat template: for each trained turn, the prompt that a server builds and the reply that is learned.

    prompt                                                          reply
    render(messages[:t], add_generation_prompt=True)                the rest of render(messages[:t + 1]), up to its stop

Both come from rendering: no template is edited, and `{% generation %}` isn't read. How a template takes calls, thoughts
and a thinking switch, and how it ends a turn, is found once by rendering probes.
"""

import contextlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sft.format.reply import OPENED_AT_THE_END, OPENERS, Frame, check_prompt, check_reply, find_frame, texts_of
from sft.format.template import CallForm, ChatTemplate, Escaper, in_call_form
from sft.format.tokens import any_of
from sft.opendata.fields import RecordError

# Stop tokens of call turns in published templates: gpt-oss, Llama 3.1.
CALL_STOPS = ("<|call|>", "<|eom_id|>", "<|return|>")
LOOKS_LIKE_END = re.compile(r"end|eot|eom|eos|stop|return|</|\[/", re.IGNORECASE)
SWITCH_NAME = re.compile(r"think|reason", re.IGNORECASE)
AMOUNT_NAME = re.compile(r"budget|effort|strength|level|length|limit|tokens", re.IGNORECASE)
EMPTY_THOUGHT = re.compile("|".join(rf"\A{re.escape(start)}\s*{re.escape(end)}\s*" for start, end in OPENERS.items()))
TAG = re.compile(r"</?[^<>\s]{1,40}>|\[/?[A-Z_]{2,40}\]")


class Turn(NamedTuple):
    """A trained turn: `prompt` and `reply` are escaped texts, `message` its index in the conversation."""

    prompt: str
    reply: str
    message: int


class OwnTemplate:
    """A chat template with what probes found out about it.

    `switch` is the variable that turns thoughts on and off, or None. `thoughts` says where a reply's thought goes:
    "field" (the template writes it), "inline" (at the head of the content), "opened" (the prompt opens it and the
    template never writes it), or "" where it has no place. `call_form` is None where the template has no calls.
    `stop` ends a plain reply, `call_stop` one that calls; the text before the token is what separates it from the reply
    where the next turn's header is the stop.
    """

    def __init__(self, template: ChatTemplate, controls: Iterable[str], eos: str, variables: dict):
        self.template = template
        self._eos = eos
        self._fixed = set(variables)
        controls = set(controls)
        self._controls = any_of(controls)
        inside, whole = template.compared_texts()
        self.escaper = Escaper(controls | {tag for text in inside for tag in TAG.findall(text)})
        looked_for = {text for text in inside if not re.fullmatch(r"[a-z_]+", text)}
        self._looked_for = any_of({*looked_for, *controls})
        self._equal_texts = whole
        self._depends_on_length = template.measures_texts()
        self.probe_tools = self._find_probe_tools()
        self.switch = self._find_switch()
        self.stop, self.stop_is_written = self._find_stop()
        self.header = self._find_header()
        self.thoughts = self._find_thoughts()
        self.can_use_tools = self._writes_definitions()
        self.call_form = self._find_call_form()
        self.call_stop, self.call_stop_is_written = self._find_call_stop() if self.call_form else (self.stop, True)

    # --- rendering ------------------------------------------------------------------------------------------------

    def prompt(self, messages: Sequence[dict], tools, thinking: bool | None, variables: Mapping) -> str:
        """Render up to the start of the reply, as an escaped text; `variables` hold for this prompt alone."""
        tools = self.escaper.escape(tools)
        return self._render(self.prepare(messages), tools, thinking, add_generation_prompt=True, variables=variables)

    def text(self, messages: Sequence[dict], tools: Sequence[dict] | None, thinking: bool | None) -> str:
        """Render as a server does, nothing escaped; with a generation prompt unless the last turn is a reply."""
        escaped = self._render(
            self.prepare(messages),
            self.escaper.escape(tools),
            thinking,
            add_generation_prompt=messages[-1]["role"] != "assistant",
        )
        return self.escaper.unescape(escaped)

    def _render(
        self, messages: list[dict], tools, thinking: bool | None, *, add_generation_prompt: bool, variables=None
    ) -> str:
        options = {"tools": tools, "add_generation_prompt": add_generation_prompt}
        if self.switch is not None and thinking is not None and self.switch not in self._fixed:
            options[self.switch] = thinking
        return self.template.render(messages, **{**options, **(variables or {})})

    def prepare(self, messages: Sequence[dict]) -> list[dict]:
        """Return the messages in the form that the template takes, their texts escaped."""
        form = getattr(self, "call_form", None)
        prepared = [
            {key: self.escaper.escape(value) for key, value in message.items() if key != "train"}
            for message in messages
        ]
        return in_call_form(prepared, form) if form else prepared

    def turns(
        self, messages: Sequence[dict], tools: Sequence[dict] | None = None, *, trained: Sequence[int]
    ) -> list[Turn]:
        """Return prompt and reply of the assistant messages `trained`; RecordError where one can't be trained."""
        if tools and not self.can_use_tools and not self.call_form:
            raise RecordError("template", "the chat template has no place for tools")
        prepared = self.prepare(messages)
        escaped_tools = self.escaper.escape(tools) or None
        found = []
        for index in trained:
            thinking = bool(prepared[index].get("reasoning_content"))
            prompt = self._render(prepared[:index], escaped_tools, thinking, add_generation_prompt=True)
            check_prompt(prompt, prepared[:index], escaped_tools if self.can_use_tools else None)
            reply = self._reply(prepared[: index + 1], escaped_tools, prompt, thinking)
            check_reply(reply, prepared[index])
            found.append(Turn(prompt, reply, index))
        return found

    # --- the reply ------------------------------------------------------------------------------------------------

    def _reply(self, messages: list[dict], tools, prompt: str, thinking: bool) -> str:
        """Return what the model has to write after the prompt, its stop token included."""
        *history, message = messages
        thought = message.get("reasoning_content") or ""
        if message.get("tool_calls") and not self.call_form:
            raise RecordError("template", "the chat template has no place for calls")
        if thought and self.thoughts == "inline":
            opener, closer = next(iter(OPENERS.items()))
            content = f"{opener}\n{thought}\n{closer}\n\n{message.get('content') or ''}"
            message = {key: value for key, value in message.items() if key != "reasoning_content"}
            message["content"] = content
        full = self._render([*history, message], tools, thinking, add_generation_prompt=False)
        rest = self._rest_after(prompt, full, history, tools, thinking, thought)
        if thought and self.thoughts == "inline":  # the template may write an empty thought in front
            rest = EMPTY_THOUGHT.sub("", rest)
        return self._up_to_stop(rest, message)

    def _rest_after(self, prompt: str, full: str, history: list[dict], tools, thinking: bool, thought: str) -> str:
        """Return the part of a rendered conversation that comes after its last prompt."""
        if full.startswith(prompt):
            return full[len(prompt) :]
        closed = self._render(history, tools, thinking, add_generation_prompt=False)
        if prompt.startswith(closed) and prompt != closed:
            start = len(closed)
        else:  # the template always writes a header
            start = prompt.rfind(history[-1].get("content") or prompt) + len(history[-1].get("content") or "")
        for token in reversed(list(self._controls.finditer(prompt, start))):
            head = prompt[: token.start()]
            if full.startswith(head):
                header = "".join(self.header.partition(token.group())[1:])
                return _after_opened(full[len(head) :], prompt[token.start() :], header, thought)
        place = full.rfind(prompt[start:]) if self._controls.search(prompt, start) else -1
        if place < 0:
            raise RecordError("template", "the chat template writes a reply differently from what its prompt begins")
        return full[place + len(prompt) - start :]

    def _up_to_stop(self, rest: str, message: dict) -> str:
        """Cut what follows the reply: its stop is the first one after the last of its texts."""
        is_call = bool(message.get("tool_calls"))
        stop, is_written = (self.call_stop, self.call_stop_is_written) if is_call else (self.stop, self.stop_is_written)
        if not is_written:
            return rest.rstrip() + stop
        last = rest.rfind(stop)
        if last < 0:
            raise RecordError("template", f"the chat template doesn't end a reply with {stop}")
        begin = max((rest.rfind(text, 0, last) for text in texts_of(message)), default=0)
        reply = rest[: rest.find(stop, max(0, begin)) + len(stop)]
        if any(token in reply[: -len(stop)] for token in self.stops()):
            raise RecordError("template", "the chat template ends a reply before all of it is written")
        return reply

    def probe_turn(self) -> Turn:
        """Return a turn of plain texts."""
        return self.turns([PROBE_QUESTION, PROBE_ANSWER], self.probe_tools, trained=[1])[0]

    def stops(self) -> list[str]:
        """Return the control tokens that a reply can end in, a plain reply's first."""
        return list(dict.fromkeys(self._controls.findall(stop)[-1] for stop in (self.stop, self.call_stop)))

    def find_frame(self) -> Frame:
        """Return what the template writes around a reply's thought and text."""
        plain = self._written(PROBE_ANSWER)
        thinking = self._written({**PROBE_ANSWER, "reasoning_content": PROBE_THOUGHT}) if self.thoughts else None
        return find_frame(plain or "", PROBE_ANSWER["content"], thinking, PROBE_THOUGHT)

    def _written(self, message: dict) -> str | None:
        try:
            reply = self.turns([PROBE_QUESTION, message], self.probe_tools, trained=[1])[0].reply
        except RecordError:
            return None
        return reply[: reply.rfind(self.stops()[0])]

    # --- in bulk --------------------------------------------------------------------------------------------------

    def shape_of(self, messages: Sequence[dict]) -> tuple | None:
        """Return what decides the layout of a conversation of plain texts; None where its texts might.

        A template may look at a text only for its edges, for being empty, and for `compared_texts`.
        """
        if self._depends_on_length:
            return None
        shape = []
        texts = []
        for message in messages:
            thought = message.get("reasoning_content")
            if len(message) != 2 and not message.keys() <= {"role", "content", "train", "reasoning_content"}:
                return None
            texts.append(message["content"])
            if thought:
                texts.append(thought)
            shape.append((message["role"], bool(thought), message.get("train", True)))
        if any([not text or text[0].isspace() or text[-1].isspace() for text in texts]):
            return None
        if not self._equal_texts.isdisjoint(texts) or self._looked_for.search("\n".join(texts)):
            return None
        return tuple(shape)

    # --- probes ---------------------------------------------------------------------------------------------------

    def _find_probe_tools(self) -> list[dict] | None:
        """Return the definitions that probes need: none, unless the template can't do without."""
        try:
            self.template.render([PROBE_QUESTION], tools=None, add_generation_prompt=True)
        except RecordError:
            return [PROBE_TOOL]
        return None

    def _find_switch(self) -> str | None:
        """Find the variable that turns thoughts on and off by rendering a prompt both ways; it takes no number."""
        names = [name for name in self.template.undeclared if SWITCH_NAME.search(name) and not AMOUNT_NAME.search(name)]
        for name in sorted(names, key=lambda name: (name != "enable_thinking", name)):
            options = {"tools": self.probe_tools, "add_generation_prompt": True}
            try:
                on, off = (self.template.render([PROBE_QUESTION], **options, **{name: on}) for on in (True, False))
            except RecordError:
                continue
            writes_value = on.lower().count("true") > off.lower().count("true")
            if on != off and (name.startswith("enable") or not writes_value):
                return name
        return None

    def _find_stop(self) -> tuple[str, bool]:
        """Return the text that ends a plain reply, and whether a conversation that ends there holds it."""
        rendered = (self._render_probes(PROBE_ANSWER), self._render_probes(PROBE_ANSWER, PROBE_NEXT_QUESTION))
        after, following = (text.rpartition(PROBE_ANSWER["content"])[2] for text in rendered)
        tokens = list(self._controls.finditer(after))
        if tokens and following.startswith(after.rstrip()):
            return after[tokens[0].start() : tokens[-1].end()], True
        if stop := self._stop_at_start(after):
            return stop, True
        token = self._controls.match(following, len(following) - len(following.lstrip()))
        if token is None:
            raise ValueError("no control token ends a reply in the model's own chat template")
        return following[: token.end()], False

    def _find_header(self) -> str:
        """Return what the template writes between a question and a reply that is history."""
        before = self._render_probes(PROBE_ANSWER).partition(PROBE_ANSWER["content"])[0]
        return before.rpartition(PROBE_QUESTION["content"])[2]

    def _render_probes(self, *replies: dict, thinking: bool = False) -> str:
        """Render a question and what comes after it."""
        return self._render([PROBE_QUESTION, *replies], self.probe_tools, thinking, add_generation_prompt=False)

    def _stop_at_start(self, after: str) -> str:
        """Return the text up to and with the run of control tokens that ends a turn, or "" if none does."""
        token = self._controls.search(after)
        if token is None:
            return ""
        end = token.end()
        if token.group() == self._eos:
            return after[token.start() : end]
        while following := self._controls.match(after, end):
            if not LOOKS_LIKE_END.search(following.group()):
                break
            end = following.end()
            if following.group() == self._eos:
                break
        return after[token.start() : end]

    def _find_thoughts(self) -> str:
        """Say where the thought of a reply goes: "field", "inline", "opened", or "" for nowhere."""
        prompt = self._render([PROBE_QUESTION], self.probe_tools, True, add_generation_prompt=True)
        thinks_inline = f"<think>\n{PROBE_THOUGHT}\n</think>\n\n{PROBE_ANSWER['content']}"
        replies = {"field": {**PROBE_ANSWER, "reasoning_content": PROBE_THOUGHT}}
        if "</think>" in self.template.source:
            replies["inline"] = {**PROBE_ANSWER, "content": thinks_inline}
        for place, reply in replies.items():
            with contextlib.suppress(RecordError):
                if PROBE_THOUGHT in self._render_probes(reply, thinking=True):
                    return place
        return "opened" if OPENED_AT_THE_END.search(prompt) else ""

    def _writes_definitions(self) -> bool:
        try:
            return PROBE_TOOL["function"]["name"] in self._render(
                [PROBE_QUESTION], [PROBE_TOOL], False, add_generation_prompt=True
            )
        except RecordError:
            return False

    def _find_call_form(self) -> CallForm | None:
        """Find the form of calls in which the template writes a call's arguments."""
        for as_text, needs_ids in itertools.product((False, True), repeat=2):
            try:
                full = self._render_call(CallForm(as_text, needs_ids), with_result=True)
            except RecordError:
                continue
            if _has_probe_call(full):
                shows_ids = PROBE_ID in self._render_call(CallForm(as_text, True), with_result=True)
                return CallForm(as_text, needs_ids or shows_ids)
        return None

    def _render_call(self, form: CallForm, *, with_result: bool) -> str:
        messages = [PROBE_QUESTION, PROBE_CALL, *([PROBE_RESULT] if with_result else [])]
        prepared = in_call_form([dict(message) for message in messages], form)
        return self._render(prepared, [PROBE_TOOL], False, add_generation_prompt=False)

    def _find_call_stop(self) -> tuple[str, bool]:
        """Return the text that ends a reply with calls, and whether a conversation that ends there holds it."""
        full = self._render_call(self.call_form, with_result=False)
        after = full[full.rfind(PROBE_VALUE) + len(PROBE_VALUE) :]
        plain = [self.stop, self._controls.findall(self.stop)[-1]] if self.stop_is_written else []
        for stop in (*plain, self._eos, *CALL_STOPS):
            if stop and stop in after:
                return stop, True
        longer = self._render_call(self.call_form, with_result=True)
        if not longer.startswith(full.rstrip()):
            return self.stop, self.stop_is_written
        following = longer[len(full.rstrip()) :]
        if token := self._controls.match(following, len(following) - len(following.lstrip())):
            return following[: token.end()], False
        written = [found for found in self._controls.findall(after) if full.rstrip().endswith(found)]
        return (written[-1], True) if written else (self.stop, self.stop_is_written)


PROBES = json.loads(Path(__file__).with_name("probes.json").read_text(encoding="utf-8"))
PROBE_QUESTION = {"role": "user", "content": "probe of user 0."}
PROBE_NEXT_QUESTION = {"role": "user", "content": "probe of user 1."}
PROBE_ANSWER = {"role": "assistant", "content": "probe of assistant 0."}
PROBE_RESULT = {"role": "tool", "content": "probe of tool 0."}
PROBE_THOUGHT = "probe of thought 0."
PROBE_ID = "call00000"
PROBE_CALL = PROBES["call"]
PROBE_TOOL = PROBES["tool"]
PROBE_VALUE = PROBE_CALL["tool_calls"][0]["function"]["arguments"]["city"]


def _has_probe_call(text: str) -> bool:
    """Say whether the probe's call is in a rendered text, its arguments as JSON or in a form of the template's own."""
    written = [PROBE_VALUE, json.dumps(PROBE_VALUE)[1:-1]]
    is_python = repr(PROBE_CALL["tool_calls"][0]["function"]["arguments"]) in text
    return "probe_weather" in text and any(value in text for value in written) and not is_python


def _after_opened(rest: str, opened: str, header: str, thought: str) -> str:
    """Return the reply to a prompt that ends in `opened`, which a rendered conversation lacks or writes otherwise.

    A thought that was opened is written and closed first; after an empty one, or another header, the text follows.
    The part of a turn's `header` that the prompt has already is not written again.
    """
    found = OPENED_AT_THE_END.search(opened)
    if found is None:
        pairs = zip(header, opened, strict=False)
        shared = header[: sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))]
        return EMPTY_THOUGHT.sub("", rest.removeprefix(shared))
    opener = found.group(1)
    closer = OPENERS[found.group(1)]
    rest = rest.removeprefix(opened[: found.start()])
    if rest.startswith(opener) and thought and thought.strip() in rest:
        return rest[len(opener) :].lstrip("\n")
    rest = EMPTY_THOUGHT.sub("", rest)
    return f"{thought.strip()}{rest}" if rest.startswith(closer) else f"{thought.strip()}\n{closer}\n\n{rest}"
