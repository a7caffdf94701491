"""Ask an OpenAI-compatible endpoint many questions at once; each answer is kept, so that none is paid for twice.

Every answer is appended to a file of JSON Lines under the hash of its request. Rerun the same command to resume: only
requests without an answer are sent. A last line that was cut off by a kill is left out.
"""

import hashlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from sft.files import LineLog
from sft.opendata.cleaning import count_han

MAX_BYTES = 16 << 20  # of a response
MAX_FAILURES_IN_A_ROW = 20  # of requests, each after its retries: then the endpoint is down
FATAL_STATUSES = (401, 402, 403, 404, 405)  # the next request would get the same answer


class Unanswered(Exception):
    """A request without an answer, for this reason; `is_fatal` when every other request would fail too."""

    def __init__(self, reason: str, *, is_fatal: bool = False):
        super().__init__(reason)
        self.is_fatal = is_fatal


class Calls:
    """Requests and their answers, by hash, in a file that survives a kill at any byte."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._log = LineLog(path, busy=f"{path}: another evaluation is writing into it; wait for it, or stop it")
        self.found = read_calls(self.path)

    def close(self) -> None:
        self._log.close()

    def keep(self, key: str, asked: dict, answer: dict) -> None:
        self._log.append(json.dumps({"key": key, "asked": asked, "answer": answer}).encode() + b"\n")
        self.found[key] = answer


def read_calls(path: Path) -> dict[str, dict]:
    """Return the answers that a file of calls holds, by key; lines that are no whole call are left out."""
    found = {}
    if not Path(path).exists():
        return found
    with open(path, "rb") as stream:
        for line in stream:
            try:
                call = json.loads(line)
                if line.endswith(b"\n") and isinstance(call["answer"]["text"], str):
                    found[call["key"]] = call["answer"]
            except (ValueError, KeyError, TypeError):
                continue
    return found


def key_of(asked: dict) -> str:
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def api_key(base_url: str, name: str) -> str | None:
    """Return the key from the environment: NAME, or for OpenAI's own host OPENAI_API_KEY, which goes nowhere else."""
    host = urlsplit(base_url).hostname
    key = os.environ.get(name) or (os.environ.get("OPENAI_API_KEY") if host == "api.openai.com" else None)
    if key and not re.fullmatch(r"[!-~]+", key.strip()):  # an error about such a header would show it
        raise ValueError(f"the API key in the environment ({name}) holds characters that no header may hold")
    return key.strip() if key else None


def find_url_problem(flag: str, base_url: str) -> str | None:
    """Return what is wrong with the address of an endpoint, or None."""
    from sft.chat import openai_client

    return openai_client.find_url_problem(flag, base_url)


@dataclass(eq=False)
class Endpoint:
    """A chat model behind `base_url`/chat/completions; `model` is its name there. Times are in seconds."""

    base_url: str
    model: str
    _: KW_ONLY
    key: str | None = field(default=None, repr=False)
    concurrency: int
    requests_per_minute: float | None
    timeout: float
    retries: int
    backoff: float

    def __post_init__(self):
        self.base_url = self.base_url.rstrip("/")
        self.interval = 60 / self.requests_per_minute if self.requests_per_minute else 0.0
        self.num_retries = 0
        self._next = 0.0  # the moment at which the next request may be sent
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._client = None

    def asked(self, messages: Sequence[dict], attempt: int = 0, **parameters) -> dict:
        """Return a request as it is hashed and kept; `attempt` tells a repeated question from the first one."""
        payload = {"model": self.model, "messages": list(messages), **parameters}
        return {"url": self.base_url, "payload": payload} | ({"attempt": attempt} if attempt else {})

    def ask_all(self, requests: Sequence[dict], calls: Calls, what: str = "requests") -> list[dict | None]:
        """Return {"text", "finish", "tokens"} of each request, from `calls` where it is there, None if there is none.

        Equal requests are sent once. Raises ValueError when the endpoint refuses them all, as with a wrong key.
        """
        keys = [key_of(request) for request in requests]
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in calls.found}
        if missing and not self._client:
            self._client = self._new_client()
        reasons: dict[str, int] = {}
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = [pool.submit(self._answer, key, request, calls) for key, request in missing.items()]
            try:
                self._collect(futures, what, reasons)
            finally:
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                self._stop.clear()
        if futures:
            print(file=sys.stderr)
        for reason, count in reasons.items():
            print(f"{count} of {len(futures)} {what} have no answer: {reason}", file=sys.stderr, flush=True)
        return [calls.found.get(key) for key in keys]

    def _collect(self, futures: Sequence[Future], what: str, reasons: dict[str, int]) -> None:
        """Wait for all answers and count why some are missing; ValueError when the endpoint is down."""
        failures_in_a_row = 0
        for number, future in enumerate(as_completed(futures), 1):
            try:
                future.result()
                failures_in_a_row = 0
            except Unanswered as error:
                failures_in_a_row += 1
                if error.is_fatal or failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
                    again = "" if error.is_fatal else "; rerun the same command to resume, answers are not asked again"
                    raise ValueError(f"{self.base_url}: {error}{again}") from None
                reasons[str(error)] = reasons.get(str(error), 0) + 1
            print(f"\r{number} of {len(futures)} {what}", end="", file=sys.stderr, flush=True)

    def _answer(self, key: str, request: dict, calls: Calls) -> None:
        calls.keep(key, request, self._complete(request["payload"]))

    def _new_client(self):
        from sft.chat.openai_client import ResponseLimits, new_client

        return new_client(
            self.base_url,
            key=self.key,
            limits=ResponseLimits(self.timeout, MAX_BYTES),
            stop=self._stop,
            before=self._wait_for_turn,
            check=self._check_response,
            num_connections=self.concurrency,
            timeout=self.timeout,
            retries=self.retries,
            backoff=self.backoff,
        )

    def _complete(self, payload: dict) -> dict:
        """Return the answer to a request; raises Unanswered after the client's retries."""
        import httpx2
        import openai

        try:
            response = self._client.post("/chat/completions", body=payload, cast_to=httpx2.Response)
            return read_answer(response.content)
        except openai.APIStatusError as error:
            raise self._refused(error.status_code, error.response.content) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            reason = f"{type(cause).__name__}: {cause}" if str(cause) else type(cause).__name__
            raise Unanswered(self._without_key(reason), is_fatal=isinstance(cause, httpx2.ConnectError)) from None

    def _refused(self, status: int, body: bytes) -> Unanswered:
        reason = f"HTTP {status}: {self._message(body)}"
        return Unanswered(reason, is_fatal=status in FATAL_STATUSES or "insufficient_quota" in reason)

    def _check_response(self, response) -> None:
        """Have the client retry a response that is no chat completion, and share a Retry-After with all threads."""
        from sft.chat.openai_client import LimitError, retry_after

        if response.status_code == 200:
            try:
                read_answer(response.content)
            except ValueError as error:
                raise LimitError(str(error)) from None
        elif response.status_code == 429 and b"insufficient_quota" in response.content:
            raise self._refused(response.status_code, response.content)
        else:
            with self._lock:
                self._next = max(self._next, time.monotonic() + retry_after(response))

    def _wait_for_turn(self, request) -> None:
        """Wait until the rate limit allows another request."""
        with self._lock:
            self.num_retries += request.headers.get("x-stainless-retry-count", "0") != "0"
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self.interval
        if self._stop.wait(turn - now):
            raise Unanswered("the evaluation was stopped")

    def _message(self, body: bytes) -> str:
        try:
            error = json.loads(body)["error"]
            text = f"{error.get('code') or ''} {error.get('message') or ''}" if isinstance(error, dict) else str(error)
        except (ValueError, KeyError, TypeError, RecursionError):
            text = body.decode(errors="replace")
        return self._without_key(" ".join(text.split()))[:300]

    def _without_key(self, text: str) -> str:
        return text.replace(self.key, "***") if self.key else text


def read_answer(body: bytes) -> dict:
    """Return {"text", "finish", "tokens": [prompt, completion]} of a response; ValueError if it is none."""
    try:
        response = json.loads(body)
        choice = response["choices"][0]
        content = choice["message"].get("content")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"no chat completion: {body[:100].decode(errors='replace')!r}") from None
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    if content is not None and not isinstance(content, str):
        raise ValueError(f"no chat completion: content is {type(content).__name__}")
    usage = response.get("usage")
    counts = [(usage if isinstance(usage, dict) else {}).get(f"{kind}_tokens") for kind in ("prompt", "completion")]
    tokens = counts if all(isinstance(count, int) for count in counts) else None
    text = (content or "").encode(errors="replace").decode()  # half of a surrogate pair can't be sent on
    return {"text": text, "finish": choice.get("finish_reason"), "tokens": tokens}


# --- what it will cost ----------------------------------------------------------------------------------------------


def guess_tokens(text: str) -> int:
    """Guess the tokens of a text: one for each Chinese character, one for four others."""
    num_han = count_han(text)
    return num_han + -(-(len(text) - num_han) // 4)


def estimate_cost(requests: Sequence[dict], known: Callable[[str], bool], *, reply: int) -> dict:
    """Return what is still to send: {"requests", "in", "out", "at_most"} in tokens, `reply` for each answer."""
    missing = {key: asked["payload"] for asked in requests if not known(key := key_of(asked))}
    return {
        "requests": len(missing),
        "in": sum(guess_tokens(m["content"]) for payload in missing.values() for m in payload["messages"]),
        "out": reply * len(missing),
        "at_most": sum(payload.get("max_tokens", 4096) for payload in missing.values()),
    }
