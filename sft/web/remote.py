"""Talk to a model behind an OpenAI-compatible server: vLLM, Ollama, llama.cpp, `transformers serve`.

The server renders the prompt, so what a message may forge can't be told from its ids here: text that looks like a
control token is parted by an invisible character. Nothing that the server answers is trusted: sizes and times have
limits.
"""

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Sequence

import httpx

from sft.chat.batching import MAX_ACTIVE, BusyError
from sft.chat.reply import Reply
from sft.chat.sampling import Sampling

TIMEOUT = httpx.Timeout(120, connect=10)  # seconds without a byte; a prompt may wait in the server's own queue
MAX_SECONDS = 1800  # of a reply
MAX_REPLY = 200_000  # characters of a reply
MAX_LINE = 1 << 20  # characters of a line of the stream
MAX_STREAM = 1 << 26  # characters of a stream, with what says nothing
# What templates write around messages: <|im_start|>, </s>, [INST], <<SYS>>, <start_of_turn>, <｜User｜>, <think> ...
CONTROL = re.compile(
    r"<(?=[|｜][^<>\s]{0,60}[|｜]>|/?(?:s|unk|pad|bos|eos|think|tool_call|tool_response)>|(?:start|end)_of_\w+>|<?/?SYS>>)"
    r"|\[(?=/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\])"
)
JOINER = "\u2060"  # invisible


def neutral(text: str) -> str:
    """Part what looks like a control token, so that the server's tokenizer doesn't take it for one."""
    return CONTROL.sub(lambda found: found[0] + JOINER, text)


class RemoteError(Exception):
    """What went wrong, in a line that may be shown: no address, no key, nothing of the server's own text."""


class RemoteReply:
    """A reply in the making; `done` says that it has ended, `error` why it failed."""

    def __init__(self, place):
        self.thinking, self.text, self.num_tokens, self.ended = "", "", 0, False
        self.done, self.error = False, None
        self.task: asyncio.Task | None = None
        self._place = place

    def reply(self) -> Reply:
        thinking = f"<think>{self.thinking}" + "</think>\n\n" * bool(self.text) if self.thinking else ""
        return Reply(thinking + self.text, self.ended, self.num_tokens)

    @property
    def place(self) -> int:
        """How many wait before it; -1 when it doesn't wait."""
        return self._place(self)

    def cancel(self) -> None:
        """Close the connection, at which the server stops."""
        self.done = True
        if self.task:
            self.task.cancel()

    def read(self, data: str) -> bool:
        """Take in one event of the stream; return whether it was the last."""
        if data == "[DONE]":
            return True
        event = json.loads(data)
        if event.get("error"):
            raise RemoteError("the model's server stopped with an error")
        self.num_tokens = int((event.get("usage") or {}).get("completion_tokens") or self.num_tokens)
        for choice in (event.get("choices") or [])[:1]:
            delta = choice.get("delta") or {}
            thinking, text = delta.get("reasoning_content") or delta.get("reasoning") or "", delta.get("content") or ""
            self.thinking, self.text = self.thinking + _whole(thinking), self.text + _whole(text)
            # One event, one token, until the server says how many it were.
            self.num_tokens += bool(thinking or text)
            self.ended |= choice.get("finish_reason") == "stop"
        return len(self.thinking) + len(self.text) > MAX_REPLY


class Remote:
    """A model on a server. `max_active` replies are asked for at a time, `max_waiting` more wait here."""

    def __init__(self, base_url: str, *, model: str | None = None, key: str | None = None):
        if not re.match(r"https?://[^/@\s]+(/|$)", base_url):
            raise ValueError(f"--base_url {base_url}: use http://HOST:PORT/v1, without a name and a password in it")
        self.base_url, self.headers = base_url.rstrip("/"), {"Accept-Encoding": "identity"}
        self.headers |= {"Authorization": f"Bearer {key}"} if key else {}
        self.model = model or self._first_model()
        self.max_active, self.max_waiting = MAX_ACTIVE, None
        self.active: set[RemoteReply] = set()
        self.waiting: list[RemoteReply] = []
        self._extras = True

    def _first_model(self) -> str:
        try:
            answer = httpx.get(f"{self.base_url}/models", headers=self.headers, timeout=10)
            return answer.raise_for_status().json()["data"][0]["id"]
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            problem = f"{type(error).__name__}: no list of models"
            raise ValueError(
                f"--base_url {self.base_url}: {problem}; is the server up? (or name one: --model)"
            ) from None

    def start(self, messages: Sequence[dict], sampling: Sampling) -> RemoteReply:
        """Ask for a reply; called in an event loop. Raises BusyError when too many wait."""
        if self.max_waiting is not None and len(self.waiting) >= self.max_waiting:
            raise BusyError(f"{len(self.waiting)} requests are waiting")
        reply = RemoteReply(lambda reply: self.waiting.index(reply) if reply in self.waiting else -1)
        self.waiting.append(reply)
        reply.task = asyncio.create_task(self._work(reply, messages, sampling))
        return reply

    async def _work(self, reply: RemoteReply, messages: Sequence[dict], sampling: Sampling) -> None:
        try:
            while self.waiting[0] is not reply or len(self.active) >= self.max_active:
                await asyncio.sleep(0.05)
            self.waiting.remove(reply)
            self.active.add(reply)
            await asyncio.wait_for(self._stream(reply, messages, sampling), MAX_SECONDS)
        except RemoteError as error:
            reply.error = error
        except Exception as error:
            logging.warning("%s: %s", self.base_url, type(error).__name__)
            slow = isinstance(error, httpx.TimeoutException | TimeoutError)
            unclear = isinstance(error, ValueError | TypeError | AttributeError)
            what = "took too long" if slow else "is unclear" if unclear else "can't be reached"
            reply.error = RemoteError(f"the model's server {what}")
        finally:
            self.active.discard(reply)
            self.waiting = [other for other in self.waiting if other is not reply]
            reply.done = True

    async def _stream(self, reply: RemoteReply, messages: Sequence[dict], sampling: Sampling) -> None:
        async with httpx.AsyncClient(headers=self.headers, timeout=TIMEOUT) as client:
            for extras in (True, False) if self._extras else (False,):
                body = self._body(messages, sampling, extras)
                async with client.stream("POST", f"{self.base_url}/chat/completions", json=body) as answer:
                    if answer.status_code in (400, 422) and extras:
                        continue
                    self._extras &= extras or answer.status_code != 200
                    if answer.status_code != 200:
                        raise RemoteError(f"the model's server answers with status {answer.status_code}")
                    if answer.headers.get("content-encoding", "identity") != "identity":
                        raise ValueError("a packed stream, which may unpack to anything")
                    async for data in _events(answer):
                        if reply.read(data):
                            return
                    return

    def _body(self, messages: Sequence[dict], sampling: Sampling, extras: bool) -> dict:
        messages = [message | {"content": neutral(message["content"])} for message in messages]
        body = {"model": self.model, "messages": messages, "stream": True, "max_tokens": sampling.max_new_tokens}
        body |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if extras:  # not OpenAI's: vLLM's and llama.cpp's names; a server that refuses them is asked again without
            penalty = sampling.repetition_penalty
            body |= {"top_k": sampling.top_k, "repetition_penalty": penalty, "repeat_penalty": penalty}
            body |= {"stream_options": {"include_usage": True}}
        return body


async def _events(answer: httpx.Response) -> AsyncIterator[str]:
    """Yield the data of each server-sent event."""
    line, length = "", 0
    async for text in answer.aiter_text():
        length += len(text)
        *lines, line = (line + text).split("\n")
        for whole in lines:
            if whole.startswith("data:"):
                yield whole[5:].strip()
        if len(line) > MAX_LINE or length > MAX_STREAM:
            raise ValueError("a line or a stream without an end")


def _whole(text: str) -> str:
    """Replace lone surrogates, which can't be sent on or written down."""
    return text.encode("utf-8", "replace").decode()
