"""The models behind the page: one in this process, or one on an OpenAI-compatible server.

A server renders the prompt itself, so that its ids can't be checked here: in text that is sent to it, a text that looks
like a control token is broken by an invisible character. Sizes and times of a server's answers are limited.
"""

import asyncio
import logging
import re
import time
from collections.abc import Callable, Sequence

from sft.chat.batching import MAX_ACTIVE, MAX_CACHED_TOKENS, MAX_WAITING, BusyError
from sft.chat.reply import Chat, split_thought
from sft.chat.sampling import Sampling
from sft.web.text import label
from sft.web.turns import has_text, num_questions, without_oldest

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


class LocalReply:
    """A reply that the decoder is making."""

    def __init__(self, chat: Chat, request, tools: list[dict] | None = None):
        self.chat = chat
        self.request = request
        self.tools = tools
        self.cancel = request.cancel

    @property
    def done(self) -> bool:
        return self.request.done

    @property
    def error(self) -> BaseException | None:
        return self.request.error

    @property
    def queue_position(self) -> int:
        return self.chat.decoder.queue_position(self.request)

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
    def takes_tools(self) -> bool:
        return self.chat.renderer.takes_tools

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


class RemoteReply:
    """A reply that a server is making."""

    def __init__(self, queue_position: Callable[["RemoteReply"], int]):
        self.thought = ""
        self.text = ""
        self.num_tokens = 0
        self.ended = False
        self.done = False
        self.error: BaseException | None = None
        self.task: asyncio.Task | None = None
        self._queue_position = queue_position

    def read(self) -> tuple[dict, bool, int]:
        """Return the message up to now, whether the model ended it, and its number of tokens."""
        message = {"content": self.text, "reasoning_content": self.thought}
        if not self.thought:  # a server without a reasoning parser sends the thought as text
            message = split_thought(self.text)
            del message["role"]
        return message, self.ended, self.num_tokens

    @property
    def queue_position(self) -> int:
        """How many requests are before it in the queue; -1 when it is not in the queue."""
        return self._queue_position(self)

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
            self.thought += encodable(thought)
            self.text += encodable(text)
            # One event counts as one token until the server sends its count.
            self.num_tokens += bool(thought or text)
            self.ended |= choice.get("finish_reason") == "stop"
        return len(self.thought) + len(self.text) > MAX_REPLY


class RemoteModel:
    """A model on a server. `max_active` replies are requested at a time, `max_waiting` more wait here."""

    has_thinking_switch = False
    takes_tools = False
    thinks_by_default = True

    def __init__(
        self,
        base_url: str,
        *,
        model: str | None = None,
        key: str | None = None,
        max_active: int = MAX_ACTIVE,
        max_waiting: int = MAX_WAITING,
    ):
        from sft.chat.openai_client import find_url_problem

        if problem := find_url_problem("--base_url", base_url):
            raise ValueError(problem)
        self.base_url = base_url.rstrip("/")
        self.key = key
        self.model = model or self._first_model()
        self.max_active = max_active
        self.max_waiting = max_waiting
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
        import httpx2
        import openai

        from sft.chat.openai_client import ResponseLimits, new_client

        limits = ResponseLimits(CONNECT_TIMEOUT_SECONDS, MAX_LINE_BYTES)
        client = new_client(self.base_url, key=self.key, timeout=CONNECT_TIMEOUT_SECONDS, limits=limits)
        try:
            return client.get("/models", cast_to=httpx2.Response).json()["data"][0]["id"]
        except (openai.OpenAIError, ValueError, KeyError, IndexError, TypeError) as error:
            problem = f"{type(error).__name__}: no list of models"
            raise ValueError(
                f"--base_url {self.base_url}: {problem}; is the server up? (or name one: --model)"
            ) from None

    def start(self, messages: Sequence[dict], sampling: Sampling, **_of_local_models) -> RemoteReply:
        """Request a reply; called in an event loop. Raises BusyError when too many wait."""
        if self.is_full:
            raise BusyError(f"{len(self.waiting)} requests are waiting")
        reply = RemoteReply(lambda reply: self.waiting.index(reply) if reply in self.waiting else -1)
        self.waiting.append(reply)
        reply.task = asyncio.create_task(self._work(reply, messages, sampling))
        return reply

    async def _work(self, reply: RemoteReply, messages: Sequence[dict], sampling: Sampling) -> None:
        try:
            while self.waiting[0] is not reply or len(self.active) >= self.max_active:
                await asyncio.sleep(SECONDS_BETWEEN_UPDATES)
            self.waiting.remove(reply)
            self.active.add(reply)
            await asyncio.wait_for(self._stream(reply, messages, sampling), MAX_REPLY_SECONDS)
        except Exception as error:
            reply.error = RemoteError(f"the model's server {_describe(error)}")
            logging.warning("%s: %s", self.base_url, type(error).__name__)
        finally:
            self.active.discard(reply)
            self.waiting = [other for other in self.waiting if other is not reply]
            reply.done = True

    async def _stream(self, reply: RemoteReply, messages: Sequence[dict], sampling: Sampling) -> None:
        import httpx2
        import openai

        from sft.chat.openai_client import ResponseLimits, new_async_client

        limits = ResponseLimits(MAX_REPLY_SECONDS, MAX_STREAM_BYTES, MAX_LINE_BYTES)
        timeout = httpx2.Timeout(READ_TIMEOUT_SECONDS, connect=CONNECT_TIMEOUT_SECONDS)
        async with new_async_client(
            self.base_url, key=self.key, timeout=timeout, limits=limits, retries=NUM_RETRIES
        ) as client:
            try:
                stream = await self._post(client, messages, sampling)
            except (openai.BadRequestError, openai.UnprocessableEntityError):
                if not self._takes_extras:
                    raise
                self._takes_extras = False  # a server that takes only OpenAI's own fields
                stream = await self._post(client, messages, sampling)
            async with stream:
                async for event in stream:
                    if reply.add(event):
                        return

    async def _post(self, client, messages: Sequence[dict], sampling: Sampling):
        import openai

        body = self._body(messages, sampling)
        stream_type = openai.AsyncStream[object]
        return await client.post("/chat/completions", body=body, cast_to=object, stream=True, stream_cls=stream_type)

    def _body(self, messages: Sequence[dict], sampling: Sampling) -> dict:
        """Return a request; thoughts of earlier replies are left out, as templates do."""
        messages = [{"role": message["role"], "content": neutral(message["content"])} for message in messages]
        body = {"model": self.model, "messages": messages, "stream": True, "max_tokens": sampling.max_new_tokens}
        body |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if self._takes_extras:  # the names of vLLM and llama.cpp
            penalty = sampling.repetition_penalty
            body |= {"top_k": sampling.top_k, "repetition_penalty": penalty, "repeat_penalty": penalty}
            body |= {"stream_options": {"include_usage": True}}
        return body


def _describe(error: Exception) -> str:
    import openai

    from sft.chat.openai_client import LimitError

    if isinstance(error, openai.APITimeoutError | TimeoutError):
        return "took too long"
    if isinstance(error, openai.APIStatusError):
        return f"answers with status {error.status_code}"
    if isinstance(error, openai.APIConnectionError):
        return "is unclear" if isinstance(error.__cause__, LimitError) else "can't be reached"
    if isinstance(error, openai.APIError):
        return "stopped with an error"
    return "is unclear" if isinstance(error, ValueError | TypeError | AttributeError) else "can't be reached"


def neutral(text: str) -> str:
    """Break a text that looks like a control token, so that the server's tokenizer reads it as text."""
    return CONTROL.sub(lambda found: found[0] + JOINER, text)


def encodable(text: str) -> str:
    """Replace lone surrogates, which can't be sent or written."""
    return text.encode("utf-8", "replace").decode()


# --- a reply in the making ----------------------------------------------------------------------------------------


class PendingReply:
    """A pane's reply in the making, and the line below it."""

    def __init__(self, started: LocalReply | RemoteReply, num_left_out: int = 0):
        self.started = started
        self.num_left_out = num_left_out
        self.message: dict = {}
        self.queue_position = -1
        self.ended = False
        self.num_tokens = 0
        self.begun: float | None = None
        self.seconds = 0.0
        self._is_complete = False

    def update(self) -> dict:
        """Read the reply up to now and return its message; raises the model's error."""
        self.queue_position = self.started.queue_position
        if self.started.error:
            raise self.started.error
        if self.queue_position < 0 and not self._is_complete:
            self.begun = self.begun or time.monotonic() - SECONDS_BETWEEN_UPDATES
            self.seconds = time.monotonic() - self.begun
            self._is_complete = self.started.done
        self.message, self.ended, self.num_tokens = self.started.read()
        return self.message

    def status(self, chinese: bool | None) -> str:
        """Return the line below the reply: the queue, or the number of tokens and their speed."""
        if self.queue_position >= 0:
            return label("queued", chinese, count=self.queue_position)
        if not self.num_tokens:
            return "" if self.started.done else label("reading", chinese)
        speed = self.num_tokens / max(self.seconds, 1e-3)
        parts = [("tokens", {"count": self.num_tokens}), ("speed", {"speed": speed})]
        if self.started.done and not self.ended:
            parts.append(("cut", {}))
        if self.num_left_out:
            parts.append(("left_out", {"count": self.num_left_out}))
        languages = (True, False) if chinese is None else (chinese,)
        return " · ".join(label(key, language, **values) for language in languages for key, values in parts)

    def shown(self) -> tuple:
        """Return what an update changes on the page; equal ones are not sent again."""
        return self.message if has_text(self.message) else {}, self.queue_position, self.num_tokens
