"""An endpoint with faults: it is asked again where that helps, and no answer is paid for twice."""

import datetime
import json
import time

import httpx2
import pytest

from sft.chat.openai_client import retry_after
from sft.evaluate.endpoint import (
    Calls,
    Endpoint,
    api_key,
    estimate_cost,
    find_url_problem,
    guess_tokens,
    key_of,
    read_answer,
)
from tests.endpoint_server import completion

USER = [{"role": "user", "content": "你好"}]
# A tiny back-off, so that no test sleeps.
OPTIONS = {"concurrency": 8, "requests_per_minute": None, "timeout": 5.0, "retries": 3, "backoff": 0.001}


def ask(server, calls, *texts: str, **options):
    endpoint = Endpoint(server.url, "m", **OPTIONS | options)
    requests = [endpoint.asked([{"role": "user", "content": text}], temperature=0) for text in texts]
    return [answer and answer["text"] for answer in endpoint.ask_all(requests, calls)], endpoint


@pytest.fixture
def calls(tmp_path):
    return Calls(tmp_path / "calls.jsonl")


FAULTS = {
    "429": {"status": 429, "body": b'{"error": {"message": "slow down"}}'},
    "500": {"status": 500, "body": b"<html>oops</html>"},
    "503 without a body": {"status": 503, "body": b""},
    "cut JSON": {"body": completion("not this")[:30]},
    "JSON of another kind": {"body": b'{"choices": []}'},
    "nested too deep": {"body": b"[" * 100_000},
    "content that is no text": {"body": b'{"choices": [{"message": {"content": 7}}]}'},
    "not UTF-8": {"body": b'{"choices": [{"message": {"content": "\xff"}}]}'},
    "closed at once": {"raw": b""},
    "closed in the headers": {"raw": b"HTTP/1.1 200 OK\r\nContent-Le"},
    "closed in the body": {"raw": b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n" + completion("not this")[:40]},
    "half-open": {"hang": 30},
    "a drip": {"drip": 0.1},
    "no HTTP": {"raw": b"SSH-2.0-OpenSSH_9.6\r\n"},
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_tried_again_and_the_answer_that_comes_then_is_taken(name, serve, calls):
    server = serve(lambda body, times: FAULTS[name] if times == 0 else "好")
    seconds = 1.5 if name in ("half-open", "a drip") else 60
    found, endpoint = ask(server, calls, "你好", timeout=seconds)
    assert found == ["好"]
    assert len(server.requests) == 2 and endpoint.num_retries == 1
    assert len(calls.path.read_text().splitlines()) == 1


def test_an_endpoint_that_stays_broken_is_left_after_the_tries_and_the_rest_is_asked(serve, calls, capsys):
    server = serve(lambda body, times: FAULTS["500"] if body["messages"][0]["content"] == "bad" else "fine")
    assert ask(server, calls, "a", "bad", "b", retries=2)[0] == ["fine", None, "fine"]
    assert len(server.requests) == 5
    assert "1 of 3 requests have no answer: HTTP 500: <html>oops</html>" in capsys.readouterr().err
    server.script = lambda body, times: "well again"
    assert ask(server, calls, "a", "bad", "b")[0] == ["fine", "well again", "fine"]
    assert len(server.requests) == 6


def test_a_request_that_is_wrong_is_not_sent_again(serve, calls, capsys):
    server = serve(lambda body, times: {"status": 400, "body": b'{"error": {"message": "too long"}}'})
    assert ask(server, calls, "a")[0] == [None]
    assert len(server.requests) == 1 and "HTTP 400: too long" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (401, {"message": "Incorrect API key: sk-secret"}),
        (404, {"message": "no model"}),
        (429, {"code": "insufficient_quota"}),
    ],
)
def test_a_refusal_of_everything_ends_at_once_and_never_shows_the_key(status, body, serve, calls):
    server = serve(lambda _body, times: {"status": status, "body": json.dumps({"error": body}).encode()})
    with pytest.raises(ValueError, match=f"HTTP {status}") as caught:
        ask(server, calls, *map(str, range(50)), key="sk-secret", concurrency=2)
    assert "sk-secret" not in str(caught.value) and len(server.requests) <= 4
    assert server.headers[0]["Authorization"] == "Bearer sk-secret"
    assert b"sk-secret" not in calls.path.read_bytes()


def test_an_endpoint_that_is_down_is_left_soon(serve, calls):
    server = serve(lambda body, times: FAULTS["500"])
    with pytest.raises(ValueError, match=r"HTTP 500: .*; rerun the same command to resume"):
        ask(server, calls, *map(str, range(200)), retries=0, concurrency=2)
    assert len(server.requests) < 40
    server.close()
    with pytest.raises(ValueError, match="ConnectError"):
        ask(server, calls, "a", "b", retries=1)


def test_retry_after_holds_back_every_request(serve, calls):
    began = {}

    def script(body, times):
        began.setdefault(len(began), time.monotonic())
        return {"status": 429, "headers": {"Retry-After": "0.3"}, "body": b"{}"} if len(began) == 1 else "ok"

    server = serve(script)
    assert ask(server, calls, "a", "b", "c", concurrency=1)[0] == ["ok"] * 3
    assert began[1] - began[0] >= 0.3


def test_retry_after_is_seconds_or_a_date_and_too_long_a_wait_is_no_wait(serve, calls):
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=30)
    date = later.strftime("%a, %d %b %Y %H:%M:%S GMT")
    values = ("7", "1.5", date, "soon", "-3", "", "86400")
    seconds = [retry_after(httpx2.Response(429, headers={"retry-after": value})) for value in values]
    assert seconds[:2] == [7, 1.5] and 28 <= seconds[2] <= 30 and seconds[3:] == [0, 0, 0, 0]
    server = serve(lambda body, times: {"status": 429, "headers": {"Retry-After": "86400"}, "body": b"{}"})
    assert ask(server, calls, "a")[0] == [None]
    assert len(server.requests) == 1


def test_requests_keep_to_the_rate_and_to_the_number_at_a_time(serve, calls):
    server = serve(lambda body, times: "ok")
    began = time.monotonic()
    ask(server, calls, *"abcdef", requests_per_minute=1200, concurrency=2)
    assert time.monotonic() - began >= 5 * 60 / 1200
    assert server.most_busy <= 2


def test_equal_requests_are_paid_once_in_a_run_and_in_the_next(serve, calls):
    server = serve(lambda body, times: "ok")
    assert ask(server, calls, "a", "a", "b", "a")[0] == ["ok"] * 4
    assert ask(server, calls, "b", "a")[0] == ["ok"] * 2
    assert len(server.requests) == 2
    ask(server, calls, "a", retries=0)
    endpoint = Endpoint(server.url, "m", **OPTIONS)
    endpoint.ask_all([endpoint.asked([{"role": "user", "content": "a"}], 1, temperature=0)], calls)
    assert len(server.requests) == 3  # asked again on purpose
    assert server.requests[2] == {**server.requests[2], "messages": [{"role": "user", "content": "a"}]}
    assert "attempt" not in server.requests[2]


def test_a_file_of_calls_cut_at_any_byte_loses_at_most_its_last_line(tmp_path):
    path = tmp_path / "calls.jsonl"
    whole = Calls(path)
    for number in range(3):
        whole.keep(str(number), {"q": number}, {"text": f"答{number}", "finish": "stop", "tokens": None})
    whole.close()
    data = path.read_bytes()
    ends = [place + 1 for place, byte in enumerate(data) if byte == 10]
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        calls = Calls(path)
        assert sorted(calls.found) == [str(n) for n, end in enumerate(ends) if end <= size]
        calls.keep("new", {}, {"text": "x", "finish": None, "tokens": None})
        calls.close()
        again = Calls(path)
        assert sorted(again.found) == sorted({*calls.found, "new"})
        again.close()


def test_a_file_of_calls_with_foreign_lines_is_read_around_them_and_has_one_writer(tmp_path):
    path = tmp_path / "calls.jsonl"
    good = json.dumps({"key": "k", "asked": {}, "answer": {"text": "t"}})
    path.write_text(f'\x00\x00\n[1]\n{{"key": 1}}\n{{"key": "z", "answer": {{"text": 5}}}}\n{good}\n')
    calls = Calls(path)
    assert calls.found == {"k": {"text": "t"}}
    with pytest.raises(ValueError, match="another evaluation is writing into it"):
        Calls(path)


def test_fields_of_an_answer():
    parts = b'{"choices": [{"message": {"content": [{"type": "text", "text": "a"}, {"text": "b"}, {"type": "x"}]}}]}'
    assert read_answer(parts) == {"text": "ab", "finish": None, "tokens": None}
    assert read_answer(completion(None)) == {"text": "", "finish": "stop", "tokens": [10, 5]}


def test_keys_come_from_the_environment_and_openais_goes_to_openai_alone(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    assert api_key("https://api.openai.com/v1", "JUDGE_API_KEY") == "sk-openai"
    assert api_key("https://api.openai.com.evil.example/v1", "JUDGE_API_KEY") is None
    monkeypatch.setenv("JUDGE_API_KEY", "mine")
    assert api_key("http://127.0.0.1/v1", "JUDGE_API_KEY") == "mine"
    monkeypatch.setenv("JUDGE_API_KEY", " mine\n")  # as `export KEY=$(cat file)` may leave it
    assert api_key("http://127.0.0.1/v1", "JUDGE_API_KEY") == "mine"
    monkeypatch.setenv("JUDGE_API_KEY", "my\nkey")
    with pytest.raises(ValueError, match="JUDGE_API_KEY") as caught:
        api_key("http://127.0.0.1/v1", "JUDGE_API_KEY")
    assert "key" not in str(caught.value).replace("API key", "")
    assert "use an address such as" in find_url_problem("--base_url", "localhost:8000/v1")
    assert "keys come from the environment" in find_url_problem("--base_url", "https://user:pw@host/v1")
    assert "pw" not in find_url_problem("--base_url", "https://user:pw@host/v1")
    assert find_url_problem("--base_url", "http://localhost:8000/v1") is None


def test_the_estimate_counts_what_is_not_there_yet():
    requests = [{"payload": {"messages": [{"content": text}], "max_tokens": 100}} for text in ("四个汉字", "abcdefgh")]
    assert guess_tokens("四个汉字ab") == 5
    assert estimate_cost(requests, lambda key: False, reply=50) == {
        "requests": 2,
        "in": 6,
        "out": 100,
        "at_most": 200,
    }
    known = key_of(requests[0])
    assert estimate_cost(requests, lambda key: key == known, reply=50)["in"] == 2
