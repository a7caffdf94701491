"""The models behind the page: one in this process, or one on an OpenAI-compatible server.

A server renders the prompt itself, so that its ids can't be checked here: in text that is sent to it, a text that looks
like a control token is broken by an invisible character. Sizes and times of a server's answers are limited.
"""

import asyncio
import json
import logging
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import ClassVar

from sft.chat.batching import MAX_ACTIVE, MAX_CACHED_TOKENS, MAX_WAITING, BusyError
from sft.chat.reply import Chat, encodable, split_thought
from sft.chat.rows import Request
from sft.chat.sampling import Sampling
from sft.opendata.fields import check_json
from sft.web.turns import num_questions, without_oldest

MAX_CONTEXT = MAX_CACHED_TOKENS // 4  # tokens of a prompt: no conversation may fill the batch that all share
SECONDS_BETWEEN_UPDATES = 0.05
READ_TIMEOUT_SECONDS = 120.0  # without a byte; a prompt may wait in the server's own queue
CONNECT_TIMEOUT_SECONDS = 10.0
NUM_RETRIES = 1  # of a request that a server didn't begin to answer
MAX_REPLY_SECONDS = 1800.0
MAX_REPLY = 200_000  # characters
MAX_LINE_BYTES = 1 << 20  # of a stream
MAX_STREAM_BYTES = 1 << 26
# Texts that templates write around messages: <|im_start|>, </s>, [INST], <<SYS>>, <start_of_turn>, <｜User｜> ...
CONTROL = re.compile(
    r"<(?=[|｜][^<>\s]{0,60}[|｜]>|/?(?:s|unk|pad|bos|eos|think|tool_call|tool_response)>|(?:start|end)_of_\w+>|<?/?SYS>>)"
    r"|\[(?=/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\])"
)
JOINER = "\u2060"  # invisible


# --- in this process ----------------------------------------------------------------------------------------------


@dataclass
class LocalReply:
    """A reply that the decoder is making."""

    chat: Chat
    request: Request
    tools: list[dict] | None = None

    @property
    def done(self) -> bool:
        return self.request.done

    @property
    def error(self) -> BaseException | None:
        return self.request.error

    @property
    def queue_position(self) -> int:
        return self.chat.decoder.queue_position(self.request)

    def cancel(self) -> None:
        self.request.cancel()

    def read(self) -> tuple[dict, bool, int]:
        """Return the message up to now, whether the model ended it, and its number of tokens."""
        request = self.request
        reply = self.chat.to_reply(list(request.ids), request.prompt, growing=not request.done, tools=self.tools)
        return {key: reply.message[key] for key in reply.message if key != "role"}, reply.ended, reply.num_tokens


class LocalModel:
    """A model in this process."""

    def __init__(self, chat: Chat, *, max_active: int = MAX_ACTIVE, max_waiting: int = MAX_WAITING):
        self.chat = chat
        chat.decoder.max_active = max_active
        chat.decoder.max_waiting = max_waiting

    @property
    def has_thinking_switch(self) -> bool:
        return bool(self.chat.renderer.thinking_switch)

    @property
    def can_use_tools(self) -> bool:
        return self.chat.renderer.can_use_tools

    @property
    def thinks_by_default(self) -> bool:
        """Whether the switch is on at first: as in the trained replies, else as the template leaves it."""
        renderer = self.chat.renderer
        if renderer.thinking is not None or not renderer.thinking_switch:
            return renderer.thinking is not False
        question = [{"role": "user", "content": "x"}]
        return renderer.prompt(question) == renderer.prompt(question, thinking=True)

    @property
    def is_full(self) -> bool:
        return len(self.chat.decoder.waiting) >= self.chat.decoder.max_waiting

    def fit(self, messages: list[dict], sampling: Sampling, *, tools: list[dict] | None = None) -> list[dict]:
        """Drop the oldest turns until the prompt and some of the reply fit; ValueError where the last alone doesn't."""
        messages = self.chat.history(messages)
        window = min(self.chat.context_window or MAX_CONTEXT, MAX_CONTEXT)
        room = min(sampling.max_new_tokens, window // 4)
        while num_questions(messages) > 1:
            if len(self.chat.renderer.prompt(messages, tools=tools)) + room <= window:
                break
            messages = without_oldest(messages)
        if len(self.chat.prompt_ids({"messages": messages, "tools": tools})) >= window:
            raise ValueError(f"the last message alone has more than {window:,} tokens")
        return messages

    def start(
        self,
        messages: list[dict],
        sampling: Sampling,
        *,
        thinking: bool | None = None,
        tools: list[dict] | None = None,
    ) -> LocalReply:
        prompt = self.chat.prompt_ids({"messages": messages, "tools": tools}, thinking=thinking)
        request = self.chat.decoder.add(prompt, sampling)
        self.chat.decoder.start()
        return LocalReply(self.chat, request, tools)


# --- on a server --------------------------------------------------------------------------------------------------


class RemoteError(Exception):
    """An error in one line that may be shown: no address, no key, none of the server's own text."""


@dataclass(eq=False)
class RemoteReply:
    """A reply that a server is making; those before it in the queue `waiting` come first."""

    waiting: list["RemoteReply"]
    thought: str = ""
    text: str = ""
    calls: list[dict] = field(default_factory=list)
    num_tokens: int = 0
    ended: bool = False
    done: bool = False
    error: BaseException | None = None
    task: asyncio.Task | None = None

    def read(self) -> tuple[dict, bool, int]:
        """Return the message up to now, whether the model ended it, and its number of tokens."""
        message = {"content": self.text, "reasoning_content": self.thought}
        if not self.thought:  # a server without a reasoning parser sends the thought as text
            message = split_thought(self.text)
            del message["role"]
        if self.calls:
            message["tool_calls"] = [_read_call(call) for call in self.calls]
        return message, self.ended, self.num_tokens

    @property
    def queue_position(self) -> int:
        """How many requests are before it in the queue; -1 when it is not in the queue."""
        return self.waiting.index(self) if self in self.waiting else -1

    def cancel(self) -> None:
        """Close the connection, at which the server stops."""
        self.done = True
        if self.task:
            self.task.cancel()

    def add(self, event: dict) -> bool:
        """Add an event of the stream; return whether the reply has reached its largest size."""
        self.num_tokens = int((event.get("usage") or {}).get("completion_tokens") or self.num_tokens)
        for choice in (event.get("choices") or [])[:1]:
            delta = choice.get("delta") or {}
            thought = delta.get("reasoning_content") or delta.get("reasoning") or ""
            text = delta.get("content") or ""
            calls = delta.get("tool_calls") or []
            self.thought += encodable(thought)
            self.text += encodable(text)
            for call in calls:
                self._add_call(call)
            # One event counts as one token until the server sends its count.
            self.num_tokens += bool(thought or text or calls)
            self.ended |= choice.get("finish_reason") in ("stop", "tool_calls")
        size_of_calls = sum(100 + len(call["name"]) + len(call["arguments"]) for call in self.calls)
        return len(self.thought) + len(self.text) + size_of_calls > MAX_REPLY

    def _add_call(self, delta: dict) -> None:
        """Add a part of a call: the first has its id and name, the others more of the arguments' text."""
        function = delta.get("function") or {}
        index = int(delta.get("index") or 0)
        known = self.calls[index] if 0 <= index < len(self.calls) else None
        if known is None or (delta.get("id") or known["id"]) != known["id"]:
            known = {"id": "", "name": "", "arguments": ""}
            self.calls.append(known)
        known["id"] = encodable(delta.get("id") or known["id"])
        known["name"] = encodable(function.get("name") or known["name"])
        known["arguments"] += encodable(function.get("arguments") or "")


@dataclass(eq=False)
class RemoteModel:
    """A model on a server. `max_active` replies are requested at a time, `max_waiting` more wait here."""

    base_url: str
    _: KW_ONLY
    model: str | None = None
    key: str | None = field(default=None, repr=False)
    max_active: int = MAX_ACTIVE
    max_waiting: int = MAX_WAITING
    has_thinking_switch: ClassVar = False
    can_use_tools: ClassVar = True
    thinks_by_default: ClassVar = True

    def __post_init__(self):
        from sft.chat import openai_client

        if problem := openai_client.find_url_problem("--base_url", self.base_url):
            raise ValueError(problem)
        self.base_url = self.base_url.rstrip("/")
        self.model = self.model or self._first_model()
        self.active: set[RemoteReply] = set()
        self.waiting: list[RemoteReply] = []
        self._takes_extras = True

    @property
    def is_full(self) -> bool:
        return len(self.waiting) >= self.max_waiting

    def fit(self, messages: list[dict], _sampling: Sampling, **_tools) -> list[dict]:
        """Return the messages as they are: the server cuts to its own context window."""
        return messages

    def _first_model(self) -> str:
        from sft.chat import openai_client

        limits = openai_client.ResponseLimits(CONNECT_TIMEOUT_SECONDS, MAX_LINE_BYTES)
        client = openai_client.new_client(self.base_url, key=self.key, timeout=CONNECT_TIMEOUT_SECONDS, limits=limits)
        try:
            return openai_client.read_first_model(client)
        except ValueError as error:
            raise ValueError(f"--base_url {self.base_url}: {error}; is the server up? (or name one: --model)") from None

    def start(
        self, messages: Sequence[dict], sampling: Sampling, *, tools: list[dict] | None = None, **_of_local_models
    ) -> RemoteReply:
        """Request a reply; called in an event loop. Raises BusyError when too many wait."""
        if self.is_full:
            raise BusyError(f"{len(self.waiting)} requests are waiting")
        reply = RemoteReply(self.waiting)
        self.waiting.append(reply)
        reply.task = asyncio.create_task(self._work(reply, partial(self._body, messages, sampling, tools)))
        reply.task.add_done_callback(lambda _task: self._leave_queue(reply))  # also of one cancelled before it runs
        return reply

    def _leave_queue(self, reply: RemoteReply) -> None:
        self.active.discard(reply)
        with suppress(ValueError):
            self.waiting.remove(reply)
        reply.done = True

    async def _work(self, reply: RemoteReply, body: Callable[..., dict]) -> None:
        try:
            while self.waiting[0] is not reply or len(self.active) >= self.max_active:
                await asyncio.sleep(SECONDS_BETWEEN_UPDATES)
            self.waiting.remove(reply)
            self.active.add(reply)
            await asyncio.wait_for(self._stream(reply, body), MAX_REPLY_SECONDS)
        except Exception as error:
            from sft.chat.openai_client import describe_error

            reply.error = RemoteError(f"the model's server {describe_error(error)}")
            logging.warning("%s: %s", self.base_url, type(error).__name__)

    async def _stream(self, reply: RemoteReply, body: Callable[..., dict]) -> None:
        from sft.chat import openai_client

        limits = openai_client.ResponseLimits(MAX_REPLY_SECONDS, MAX_STREAM_BYTES, MAX_LINE_BYTES)
        timeout = (CONNECT_TIMEOUT_SECONDS, READ_TIMEOUT_SECONDS)
        options = {"key": self.key, "timeout": timeout, "limits": limits, "retries": NUM_RETRIES}
        async with openai_client.new_async_client(self.base_url, **options) as client:
            try:
                stream = await openai_client.open_stream(client, body(extras=self._takes_extras))
            except openai_client.REFUSALS:
                if not self._takes_extras:
                    raise
                stream = await openai_client.open_stream(client, body(extras=False))
                self._takes_extras = False  # it takes only OpenAI's own fields
            async with stream:
                async for event in stream:
                    if reply.add(event):
                        return

    def _body(self, messages: Sequence[dict], sampling: Sampling, tools: list[dict] | None, *, extras: bool) -> dict:
        """Return a request; `extras` are fields of vLLM and llama.cpp that OpenAI has not.

        The thoughts of earlier replies are left out, as templates do, but for those since the last question.
        """
        last = max((index for index, message in enumerate(messages) if message["role"] == "user"), default=0)
        sent = [_to_server(message, thought=extras and index > last) for index, message in enumerate(messages)]
        body = {"model": self.model, "messages": sent, "stream": True}
        body |= {"max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p}
        if tools:
            body["tools"] = json.loads(break_control_tokens(json.dumps(tools, ensure_ascii=False)))
        if extras:
            penalty = sampling.repetition_penalty
            body |= {"top_k": sampling.top_k, "repetition_penalty": penalty, "repeat_penalty": penalty}
            body |= {"stream_options": {"include_usage": True}}
        return body


def _to_server(message: dict, *, thought: bool) -> dict:
    """Return a message in OpenAI's form, in which the arguments of calls are JSON text; `thought`: with its thought."""
    sent = {"role": message["role"], "content": break_control_tokens(message["content"])}
    if thought and message.get("reasoning_content"):
        sent["reasoning_content"] = break_control_tokens(message["reasoning_content"])
    if message.get("tool_call_id"):
        sent["tool_call_id"] = message["tool_call_id"]
    if message.get("tool_calls"):
        sent["tool_calls"] = [_call_to_server(call) for call in message["tool_calls"]]
    return sent


def _call_to_server(call: dict) -> dict:
    function = call["function"]
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": break_control_tokens(text)}}


def _read_call(call: dict) -> dict:
    """Return a call in the canonical form; arguments that are no JSON object (yet) stay the server's text."""
    arguments = call["arguments"]
    try:
        found = json.loads(arguments or "{}")
        check_json(found, "arguments")
        arguments = found if isinstance(found, dict) else arguments
    except (ValueError, RecursionError):
        pass
    read = {"type": "function", "function": {"name": call["name"], "arguments": arguments}}
    return {"id": call["id"], **read} if call["id"] else read


def break_control_tokens(text: str) -> str:
    """Break a text that looks like a control token, so that the server's tokenizer reads it as text."""
    return CONTROL.sub(lambda found: found[0] + JOINER, text)
