"""Clients of OpenAI-compatible servers: the `openai` package with limits on time and size.

The package does connections, timeouts, retries and Retry-After. Added here: a deadline and a size for each response,
the key that a host gets, and retries that end with the command. Import this module where a client is made:
`openai` takes a second to load.
"""

import random
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from threading import Event

import httpx2  # the HTTP library of openai 3
import openai

# Refusals of a request, which may have fields that only other servers read.
REFUSALS = (openai.BadRequestError, openai.UnprocessableEntityError)
MAX_BACKOFF_SECONDS = 60.0
MAX_RETRY_AFTER_SECONDS = 120.0  # openai 3.54 doesn't retry a response that asks for more


@dataclass(frozen=True)
class ResponseLimits:
    """The limits of a response; without them a broken or hostile server could hold the client for ever."""

    seconds: float
    num_bytes: int
    line_bytes: int | None = None


class LimitError(httpx2.DecodingError):
    """A response beyond its limits, or without the form that it must have. The client retries it."""


class _LimitedStream(httpx2.SyncByteStream, httpx2.AsyncByteStream):
    """The body of a response; counts its bytes and raises at its limits."""

    def __init__(self, stream, limits: ResponseLimits):
        self.stream = stream
        self.limits = limits
        self.deadline = time.monotonic() + limits.seconds
        self.num_bytes = 0
        self.line_bytes = 0

    def _count(self, part: bytes) -> bytes:
        self.num_bytes += len(part)
        newline = part.rfind(b"\n")
        self.line_bytes = self.line_bytes + len(part) if newline < 0 else len(part) - newline - 1
        if self.num_bytes > self.limits.num_bytes:
            raise LimitError(f"more than {self.limits.num_bytes >> 20} MiB")
        if self.limits.line_bytes and self.line_bytes > self.limits.line_bytes:
            raise LimitError("a line without an end")
        if time.monotonic() > self.deadline:
            raise httpx2.ReadTimeout(f"not all there after {self.limits.seconds:.0f} seconds")
        return part

    def __iter__(self) -> Iterator[bytes]:
        for part in self.stream:
            yield self._count(part)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self.stream:
            yield self._count(part)

    def close(self) -> None:
        self.stream.close()

    async def aclose(self) -> None:
        await self.stream.aclose()


def _limit_body(response: httpx2.Response, limits: ResponseLimits) -> None:
    """Limit a response before its body is read; a compressed one, which may unpack to any size, is refused."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise LimitError("a compressed response")
    response.stream = _LimitedStream(response.stream, limits)


def _clean_headers(request: httpx2.Request, key: str | None) -> None:
    """Send no header that tells the server of this machine: only the key that is meant for it."""
    request.headers["accept-encoding"] = "identity"
    for name in list(request.headers):
        if name.startswith(("x-stainless", "openai-")) and name != "x-stainless-retry-count":
            del request.headers[name]
    if not key:
        request.headers.pop("authorization", None)


class PatientClient(openai.OpenAI):
    """An `openai.OpenAI` whose first retry comes after `backoff` seconds and that stops waiting when `stop` is set."""

    def __init__(self, *, backoff: float, stop: Event, **options):
        super().__init__(**options)
        self.backoff = backoff
        self.stop = stop

    def _sleep_for_retry(self, *, retries_taken: int, max_retries: int, options, response) -> None:
        """Wait before a retry (openai 3.54 sleeps here, which Ctrl-C can't end)."""
        asked_for = retry_after(response) if response is not None else 0.0
        own = min(MAX_BACKOFF_SECONDS, self.backoff * 2**retries_taken) * random.uniform(0.5, 1.5)
        if self.stop.wait(max(own, asked_for)):
            raise openai.APIConnectionError(message="the command was stopped", request=None)


def retry_after(response: httpx2.Response) -> float:
    """Return the seconds that a Retry-After header asks for, as a number or a date; 0 where the client ignores it."""
    value = response.headers.get("retry-after", "")
    try:
        seconds = float(value) if value[:1].isdigit() else parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return seconds if 0 < seconds <= MAX_RETRY_AFTER_SECONDS else 0.0


def new_client(
    base_url: str,
    *,
    key: str | None,
    timeout: float,
    limits: ResponseLimits,
    retries: int = 0,
    backoff: float = 1.0,
    stop: Event | None = None,
    before: Callable[[httpx2.Request], None] | None = None,
    check: Callable[[httpx2.Response], None] | None = None,
    num_connections: int | None = None,
) -> PatientClient:
    """Return a client; it calls `before` at each try, and `check` on each whole response (LimitError: send again)."""

    def on_request(request: httpx2.Request) -> None:
        _clean_headers(request, key)
        if before:
            before(request)

    def on_response(response: httpx2.Response) -> None:
        _limit_body(response, limits)
        if check:
            response.read()
            check(response)

    http_client = httpx2.Client(
        timeout=httpx2.Timeout(timeout, pool=None),
        limits=httpx2.Limits(max_connections=num_connections),
        event_hooks={"request": [on_request], "response": [on_response]},
    )
    options = {"base_url": base_url, "api_key": key or "none", "max_retries": retries, "http_client": http_client}
    return PatientClient(backoff=backoff, stop=stop or Event(), **options)


def new_async_client(
    base_url: str, *, key: str | None, timeout: tuple[float, float], limits: ResponseLimits, retries: int
) -> openai.AsyncOpenAI:
    """Return a client for streams in an event loop; `timeout` is that of a connection, and that without a byte."""

    async def on_request(request: httpx2.Request) -> None:
        _clean_headers(request, key)

    async def on_response(response: httpx2.Response) -> None:
        _limit_body(response, limits)

    connect, read = timeout
    http_client = httpx2.AsyncClient(
        timeout=httpx2.Timeout(read, connect=connect),
        event_hooks={"request": [on_request], "response": [on_response]},
    )
    return openai.AsyncOpenAI(base_url=base_url, api_key=key or "none", max_retries=retries, http_client=http_client)


async def open_stream(client: openai.AsyncOpenAI, body: dict) -> openai.AsyncStream:
    """Post a request to chat/completions; return the stream of its events, each an object as the server sent it."""
    return await client.post(
        "/chat/completions", body=body, cast_to=object, stream=True, stream_cls=openai.AsyncStream[object]
    )


def read_first_model(client: PatientClient) -> str:
    """Return the first model that a server lists; ValueError for a server without such a list."""
    try:
        return client.get("/models", cast_to=httpx2.Response).json()["data"][0]["id"]
    except (openai.OpenAIError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{type(error).__name__}: no list of models") from None


def describe_error(error: Exception) -> str:
    """Return what a server did, in a few words without its own text."""
    if isinstance(error, openai.APITimeoutError | TimeoutError):
        return "took too long"
    if isinstance(error, openai.APIStatusError):
        return f"answers with status {error.status_code}"
    if isinstance(error, openai.APIConnectionError):
        return "is unclear" if isinstance(error.__cause__, LimitError) else "can't be reached"
    if isinstance(error, openai.APIError):
        return "stopped with an error"
    return "is unclear" if isinstance(error, ValueError | TypeError | AttributeError) else "can't be reached"


def find_url_problem(flag: str, base_url: str) -> str | None:
    """Return what is wrong with the address of a server, or None."""
    if not re.match(r"https?://[^/\s]", base_url):
        return f"{flag} {base_url}: use an address such as https://api.openai.com/v1"
    if re.match(r"https?://[^/]*@", base_url) or "?" in base_url:
        return f"{flag}: keys come from the environment, not in the address"
    return None
