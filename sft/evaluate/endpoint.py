"""Ask an OpenAI-compatible endpoint many things at once: patient with its faults, and nothing is paid twice.

Every answer is kept in a file of JSON Lines under the hash of what was asked. The file is only ever appended to, and a
last line that a kill has cut is left out, so whatever stopped the work, the same command goes on where it was.
"""

import datetime
import email.utils
import hashlib
import json
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from sft.files import LineLog

MAX_BYTES = 16 << 20  # of a response
MAX_WAIT, LONGEST_RETRY_AFTER = 60.0, 900.0  # seconds
FAILURES_IN_A_ROW = 20  # of requests, each after its tries: then the endpoint is down
WORTH_ANOTHER_TRY = (408, 409, 425, 429)  # and every 5xx
HOPELESS = (401, 402, 403, 404, 405)  # the next request would fare no better


class Unanswered(Exception):
    """A request that has no answer, for this reason; `hopeless` when no other would get one."""

    def __init__(self, reason: str, *, hopeless: bool = False):
        super().__init__(reason)
        self.hopeless = hopeless


class Calls:
    """What was asked and answered, by hash, in a file that survives a kill at any byte."""

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


def check_url(flag: str, base_url: str) -> str | None:
    """Return what is wrong with the address of an endpoint, or None."""
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return f"{flag} {base_url}: use an address such as https://api.openai.com/v1"
    if parts.username or parts.query:
        return f"{flag}: keys come from the environment, not in the address"
    return None


class Endpoint:
    """A chat model behind `base_url`/chat/completions; `model` is its name there. Times are in seconds."""

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key: str | None = None,
        concurrency: int = 8,
        requests_per_minute: float | None = None,
        timeout: float = 180.0,
        retries: int = 6,
        backoff: float = 1.0,
    ):
        self.base_url, self.model, self.concurrency = base_url.rstrip("/"), model, concurrency
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self.interval = 60 / requests_per_minute if requests_per_minute else 0.0
        self.num_retries = 0
        self._key, self._next, self._lock, self._stop = key, 0.0, threading.Lock(), threading.Event()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        limits = httpx.Limits(max_connections=concurrency)
        self._client = httpx.Client(headers=headers, timeout=httpx.Timeout(timeout, pool=None), limits=limits)

    def asked(self, messages: Sequence[dict], attempt: int = 0, **parameters) -> dict:
        """Return a request as it is hashed and kept; `attempt` tells a question from the same one asked again."""
        payload = {"model": self.model, "messages": list(messages), **parameters}
        return {"url": self.base_url, "payload": payload} | ({"attempt": attempt} if attempt else {})

    def ask_all(self, requests: Sequence[dict], calls: Calls, what: str = "requests") -> list[dict | None]:
        """Return {"text", "finish", "tokens"} of each request, from `calls` where it is there, None if there is none.

        Equal requests are sent once. Raises ValueError when the endpoint refuses them all, as with a wrong key.
        """
        keys = [key_of(request) for request in requests]
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in calls.found}
        reasons: dict[str, int] = {}
        in_a_row = 0
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = [pool.submit(self._answer, key, request, calls) for key, request in missing.items()]
            try:
                for number, future in enumerate(as_completed(futures), 1):
                    try:
                        future.result()
                        in_a_row = 0
                    except Unanswered as error:
                        in_a_row += 1
                        if error.hopeless or in_a_row >= FAILURES_IN_A_ROW:
                            again = "" if error.hopeless else "; the same command goes on, and pays nothing twice"
                            raise ValueError(f"{self.base_url}: {error}{again}") from None
                        reasons[str(error)] = reasons.get(str(error), 0) + 1
                    print(f"\r{number} of {len(futures)} {what}", end="", file=sys.stderr, flush=True)
            finally:
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                self._stop.clear()
        if futures:
            print(file=sys.stderr)
        for reason, count in reasons.items():
            print(f"{count} of {len(futures)} {what} have no answer: {reason}", file=sys.stderr, flush=True)
        return [calls.found.get(key) for key in keys]

    def _answer(self, key: str, request: dict, calls: Calls) -> None:
        calls.keep(key, request, self._complete(request["payload"]))

    def _complete(self, payload: dict) -> dict:
        """Post until there is an answer; raises Unanswered."""
        for attempt in range(self.retries + 1):
            self._wait_for_turn()
            pause = 0.0
            try:
                status, headers, body = self._post(payload)
                if status == 200:
                    return read_answer(body)
                reason = f"HTTP {status}: {self._message(body)}"
                if status in HOPELESS or "insufficient_quota" in reason:
                    raise Unanswered(reason, hopeless=True)
                if status not in WORTH_ANOTHER_TRY and status < 500:
                    raise Unanswered(reason)
                pause = retry_after(headers)
            except httpx.InvalidURL as error:
                raise Unanswered(str(error), hopeless=True) from None
            except (httpx.HTTPError, ValueError) as error:
                reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            if attempt == self.retries or pause > LONGEST_RETRY_AFTER:
                raise Unanswered(self._without_key(reason), hopeless=reason.startswith("ConnectError"))
            self._put_off(pause, min(MAX_WAIT, self.backoff * 2**attempt) * random.uniform(0.5, 1.5))
        raise AssertionError("unreachable")

    def _post(self, payload: dict) -> tuple[int, httpx.Headers, bytes]:
        # A body that comes in drops never times out between two of them, so the whole has a deadline too.
        deadline, body, found = time.monotonic() + self.timeout, json.dumps(payload), b""
        with self._client.stream("POST", f"{self.base_url}/chat/completions", content=body) as response:
            for part in response.iter_bytes():
                found += part
                if len(found) > MAX_BYTES:
                    raise ValueError(f"more than {MAX_BYTES >> 20} MiB")
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout(f"not all there after {self.timeout:.0f} seconds")
        return response.status_code, response.headers, found

    def _wait_for_turn(self) -> None:
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self.interval
        if self._stop.wait(turn - now):
            raise Unanswered("the evaluation was stopped")

    def _put_off(self, pause: float, own: float) -> None:
        """Wait before another try; what the endpoint asks for (Retry-After) holds back all threads."""
        with self._lock:
            self.num_retries += 1
            if pause:
                self._next = max(self._next, time.monotonic() + pause)
        if self._stop.wait(own):
            raise Unanswered("the evaluation was stopped")

    def _message(self, body: bytes) -> str:
        try:
            error = json.loads(body)["error"]
            text = f"{error.get('code') or ''} {error.get('message') or ''}" if isinstance(error, dict) else str(error)
        except (ValueError, KeyError, TypeError, RecursionError):
            text = body.decode(errors="replace")
        return self._without_key(" ".join(text.split()))[:300]

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def retry_after(headers: httpx.Headers) -> float:
    """Return the seconds that a Retry-After header asks for, given as a number or as a date; else 0."""
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d+)?", value):
        return float(value)
    try:
        moment = email.utils.parsedate_to_datetime(value)
    except (ValueError, TypeError):
        return 0.0
    now = datetime.datetime.now(datetime.UTC if moment.tzinfo else None)
    return max(0.0, (moment - now).total_seconds())


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
    han = len(re.findall(r"[\u3400-\u9fff]", text))
    return han + -(-(len(text) - han) // 4)


def estimate(requests: Sequence[dict], known: Callable[[str], bool], *, reply: int) -> dict:
    """Return what is still to send: {"requests", "in", "out", "at_most"} in tokens, `reply` for each answer."""
    missing = {key: asked["payload"] for asked in requests if not known(key := key_of(asked))}
    return {
        "requests": len(missing),
        "in": sum(guess_tokens(m["content"]) for payload in missing.values() for m in payload["messages"]),
        "out": reply * len(missing),
        "at_most": sum(payload.get("max_tokens", 4096) for payload in missing.values()),
    }
