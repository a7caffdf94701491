"""The client of servers: limits of a response, the headers that are sent, retries that end with the command."""

import threading
import time

import httpx2
import openai
import pytest

from sft.chat.openai_client import LimitError, ResponseLimits, find_url_problem, new_client, retry_after
from tests.endpoint_server import completion

PAYLOAD = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def post(server, **options) -> httpx2.Response:
    options = {"key": None, "timeout": 5.0, "limits": ResponseLimits(5.0, 1 << 20)} | options
    return new_client(server.url, **options).post("/chat/completions", body=PAYLOAD, cast_to=httpx2.Response)


def test_only_the_key_that_is_given_is_sent(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-openai")
    monkeypatch.setenv("OPENAI_ORG_ID", "my-organisation")
    server = serve(lambda body, times: "ok")
    assert post(server).content == completion("ok")
    assert post(server, key="mine").status_code == 200
    assert [headers["authorization"] for headers in server.headers] == [None, "Bearer mine"]
    assert "my-organisation" not in str(server.headers[0]) and server.headers[0]["openai-organization"] is None
    assert server.requests == [PAYLOAD, PAYLOAD]


@pytest.mark.parametrize(
    ("answer", "limits", "problem"),
    [
        ({"body": b"x" * 3_000_000}, ResponseLimits(5.0, 1 << 20), "more than 1 MiB"),
        ({"body": b"\n" + b"x" * 2000}, ResponseLimits(5.0, 1 << 20, line_bytes=1000), "a line without an end"),
        ({"headers": {"Content-Encoding": "gzip"}, "body": b""}, ResponseLimits(5.0, 1 << 20), "a compressed response"),
        ({"drip": 0.05}, ResponseLimits(0.2, 1 << 20), "not all there after 0 seconds"),
    ],
)
def test_a_response_beyond_its_limits_ends(answer, limits, problem, serve):
    server = serve(lambda body, times: answer)
    with pytest.raises(openai.APIConnectionError) as caught:
        post(server, limits=limits)
    assert str(caught.value.__cause__) == problem


def test_a_response_without_the_right_form_is_retried(serve):
    def check(response):
        if response.content == b"{}":
            raise LimitError("empty")

    server = serve(lambda body, times: {"body": b"{}"} if times < 2 else "ok")
    assert post(server, check=check, retries=2, backoff=0.001).content == completion("ok")
    assert len(server.requests) == 3


def test_a_stopped_command_waits_for_no_retry(serve):
    stop = threading.Event()
    server = serve(lambda body, times: stop.set() or {"status": 500, "body": b""})
    begun = time.monotonic()
    with pytest.raises(openai.APIConnectionError, match="the command was stopped"):
        post(server, retries=3, backoff=600.0, stop=stop)
    assert time.monotonic() - begun < 300


def test_a_retry_comes_no_sooner_than_the_server_asks(serve):
    server = serve(
        lambda body, times: "ok" if times else {"status": 503, "headers": {"Retry-After": "0.3"}, "body": b""}
    )
    begun = time.monotonic()
    assert post(server, retries=1, backoff=0.001).status_code == 200
    assert time.monotonic() - begun >= 0.3


def test_a_wait_that_is_too_long_or_unreadable_is_ignored():
    values = ("2", "86400", "-1", "soon", "")
    assert [retry_after(httpx2.Response(429, headers={"retry-after": value})) for value in values] == [2, 0, 0, 0, 0]


def test_an_address_is_checked():
    assert "use an address such as" in find_url_problem("--base_url", "localhost:8000/v1")
    assert "keys come from the environment" in find_url_problem("--base_url", "https://user:pw@host/v1")
    assert "keys come from the environment" in find_url_problem("--base_url", "https://host/v1?key=1")
    assert "pw" not in find_url_problem("--base_url", "https://user:pw@host/v1")
    assert find_url_problem("--base_url", "http://localhost:8000/v1") is None
