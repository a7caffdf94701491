"""The page's server: replies that stream and stop, clients that leave, limits and closed routes."""

import html
import json
import re
import socket
import time
from contextlib import closing

import httpx
import pytest

from sft.chat.sampling import GREEDY, Sampling
from sft.web import handlers as handlers_module
from sft.web import models, security
from sft.web.handlers import Handlers
from sft.web.layout import build_page, serve_page
from sft.web.models import LocalModel
from sft.web.security import Limits
from sft.web.turns import SLIDERS


class SlowModel:
    """Counts the tokens that a model makes, keeps it from stopping by itself, and takes its time for each."""

    def __init__(self, chat, seconds: float):
        self.made, self.seconds, self.stop_ids = 0, seconds, chat.renderer.stop_ids
        self.handle = chat.model.register_forward_hook(self)

    def __call__(self, _model, _inputs, output) -> None:
        self.made += 1
        output.logits[..., self.stop_ids] = -1e9
        time.sleep(self.seconds)

    def close(self) -> None:
        self.handle.remove()


@pytest.fixture(scope="module")
def made(chat):
    return Handlers({"tiny": LocalModel(chat)}, limits=Limits(1000))


@pytest.fixture(scope="module")
def url(made):
    page = build_page(made)
    serve_page(page, made, host="127.0.0.1", port=free_port(), block=False)
    yield page.local_url
    page.close(verbose=False)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def client(url: str):
    from gradio_client import Client

    return Client(url, verbose=False)


def values(sampling: Sampling) -> list[float]:
    return [getattr(sampling, name) for name in SLIDERS]


LONG = values(Sampling(max_new_tokens=400))


def wait_until_free(chat) -> None:
    """Wait until no request runs or waits."""
    end = time.monotonic() + 60
    while chat.decoder.num_active or chat.decoder.waiting:
        assert time.monotonic() < end
        time.sleep(0.02)


def ask(url: str, text: str, sampling: Sampling) -> str:
    """Ask as a client without a browser does; return the reply."""
    user = client(url)
    user.predict(text, "", api_name="/say")
    return said(user.predict("", *values(sampling), api_name="/reply"))


def said(update: tuple) -> str:
    """Return the last reply of an update as the model wrote it; it is complete."""
    return html.unescape(re.findall(r'<div class="message bot"[^>]* data-text="([^"]*)"', update[0][-1])[-1])


def num_shown(update: tuple) -> int:
    """Count the characters of the growing reply that a reader sees."""
    body = re.search(r'data-testid="bot">(.*)', update[0][-1], re.S)
    return len(re.sub(r"<[^>]*>", "", body[1])) if body else 0


@pytest.mark.slow
def test_the_reply_streams_and_is_what_chat_says(url, chat, monkeypatch):
    monkeypatch.setattr(models, "SECONDS_BETWEEN_UPDATES", 0.005)
    user = client(url)
    sampling = Sampling(**{**vars(GREEDY), "max_new_tokens": 12})
    with closing(SlowModel(chat, 0.02)):
        expected = chat.reply([{"role": "user", "content": "你好"}], sampling)
        user.predict("你好", "", api_name="/say")
        updates = list(user.submit("", *values(sampling), api_name="/reply"))
    counts = [num_shown(update) for update in updates]
    assert all(">你好</span>" in update[0][0] for update in updates)
    assert said(updates[-1]) == expected.text
    assert len(set(counts)) > 3 and counts[:-1] == sorted(counts[:-1])
    status = r"12 个词元 · 每秒 [\d.]+ 个 · 到了长度上限 · 12 tokens · [\d.]+ tokens/s · the length limit was reached"
    assert re.fullmatch(status, updates[-1][1])


@pytest.mark.slow
def test_a_second_turn_sees_the_first(url, chat, monkeypatch):
    seen = []
    prompt = type(chat.renderer).prompt
    monkeypatch.setattr(
        type(chat.renderer),
        "prompt",
        lambda self, messages, **given: seen.append(messages) or prompt(self, messages, **given),
    )
    user = client(url)
    with closing(SlowModel(chat, 0)):
        user.predict("一", "简短", api_name="/say")
        first = said(user.predict("简短", *values(Sampling(max_new_tokens=4)), api_name="/reply"))
        user.predict("二", "简短", api_name="/say")
        user.predict("简短", *values(Sampling(max_new_tokens=4)), api_name="/reply")
    assert seen[-1][0] == {"role": "system", "content": "简短"}
    assert [message["content"] for message in seen[-1][1:]] == ["一", first, "二"]


@pytest.mark.slow
def test_stop_ends_the_model_within_two_tokens(url, chat):
    user = client(url)
    with closing(SlowModel(chat, 0.3)) as model:
        user.predict("你好", "", api_name="/say")
        job = user.submit("", *LONG, api_name="/reply")
        next(iter(job))
        job.cancel()
        made = model.made
        wait_until_free(chat)
        assert model.made <= made + 2


def join(url: str, name: str, data: list, session: str) -> None:
    names = [function.get("api_name") for function in httpx.get(f"{url}config").json()["dependencies"]]
    body = {"data": data, "fn_index": names.index(name), "session_hash": session}
    httpx.post(f"{url}gradio_api/queue/join", json=body).raise_for_status()


def listen(url: str, session: str, num_messages: int) -> list[str]:
    """Read up to so many messages of the session's stream, then hang up."""
    kinds = []
    with httpx.stream("GET", f"{url}gradio_api/queue/data", params={"session_hash": session}, timeout=60) as stream:
        for line in stream.iter_lines():
            if line.startswith("data:"):
                kinds.append(json.loads(line[5:])["msg"])
                if len(kinds) == num_messages:
                    break
    return kinds


@pytest.mark.slow
def test_a_closed_connection_ends_the_model_and_the_next_user_is_served(url, chat):
    with closing(SlowModel(chat, 0.3)) as model:
        join(url, "say", ["你好", None, "", ""], "leaver")
        assert listen(url, "leaver", 100)[-2:] == ["process_completed", "close_stream"]
        join(url, "reply", [None, "", *LONG, True, ""], "leaver")
        assert "process_generating" in listen(url, "leaver", 5)
        made = model.made
        wait_until_free(chat)
        assert model.made <= made + 2
        assert ask(url, "你好", Sampling(max_new_tokens=2))


@pytest.mark.slow
def test_a_client_that_never_listens_takes_no_turn(url, chat, monkeypatch):
    monkeypatch.setattr(handlers_module, "SECONDS_TO_LISTEN", 1)
    with closing(SlowModel(chat, 0)) as model:
        join(url, "say", ["你好", None, "", ""], "deaf")
        listen(url, "deaf", 100)
        join(url, "reply", [None, "", *LONG, True, ""], "deaf")
        time.sleep(1.5)
        assert model.made == 0
        assert ask(url, "你好", Sampling(max_new_tokens=1))
        assert model.made == 1


@pytest.mark.slow
def test_many_clients_that_never_listen_delay_no_reply(url, chat, monkeypatch):
    monkeypatch.setattr(handlers_module, "SECONDS_TO_LISTEN", 600)
    with closing(SlowModel(chat, 0)):
        for index in range(60):
            join(url, "say", ["你好", None, "", ""], f"deaf {index}")
        for index in range(60):
            join(url, "reply", [None, "", *LONG, True, ""], f"deaf {index}")
        begun = time.monotonic()
        assert ask(url, "你好", Sampling(max_new_tokens=1))
        assert time.monotonic() - begun < 300


@pytest.mark.slow
def test_a_question_asked_again_while_a_reply_streams_gets_the_new_reply_alone(url, chat):
    user = client(url)
    with closing(SlowModel(chat, 0.1)):
        user.predict("你好", "", api_name="/say")
        first = user.submit("", *LONG, api_name="/reply")
        next(iter(first))
        join(url, "ask_again", [None, "", ""], user.session_hash)
        time.sleep(0.5)
        second = list(user.submit("", *values(Sampling(max_new_tokens=3)), api_name="/reply"))
        assert second and second[-1][1].startswith("3 个词元")
        assert second[-1][0][0].count('data-testid="bot"') == 1 and len(second[-1][0]) == 1
        wait_until_free(chat)


@pytest.mark.slow
def test_many_ask_at_once_some_wait_and_the_rest_are_refused(url, chat, monkeypatch):
    from gradio_client.exceptions import AppError

    monkeypatch.setattr(chat.decoder, "max_active", 2)
    monkeypatch.setattr(chat.decoder, "max_waiting", 2)
    users = [client(url) for _ in range(6)]
    with closing(SlowModel(chat, 0.05)):
        for user in users:
            user.predict("你好", "", api_name="/say")
        jobs = [user.submit("", *values(Sampling(max_new_tokens=40)), api_name="/reply") for user in users]
        outcomes = []
        for job in jobs:
            try:
                job.result()
                outcomes.append([update[1] for update in job.outputs()])
            except AppError as error:
                outcomes.append(str(error))
    busy = [outcome for outcome in outcomes if isinstance(outcome, str)]
    waited = [any("排队中" in status for status in outcome) for outcome in outcomes if outcome not in busy]
    assert len(busy) == 2 and all("too many are waiting" in text for text in busy)
    assert len(waited) == 4 and sum(waited) >= 2


@pytest.mark.slow
def test_a_tab_that_asks_too_often_is_refused(url, made, monkeypatch):
    from gradio_client.exceptions import AppError

    monkeypatch.setattr(made.limits, "per_minute", 1)
    made.limits.asked.clear()
    user = client(url)
    short = values(Sampling(max_new_tokens=1))
    user.predict("你好", "", api_name="/say")
    user.predict("", *short, api_name="/reply")
    user.predict("你好", "", api_name="/say")
    with pytest.raises(AppError, match="too many requests; wait a minute"):
        user.predict("", *short, api_name="/reply")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.test"}, 403),
        ({"Host": "evil.test:7860"}, 403),
        ({"Host": "127.0.0.1.evil.test"}, 403),
        ({"Host": "localhost:9999"}, 200),
        ({"Host": "192.168.0.7"}, 200),
        ({"Origin": "http://evil.test"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 200),
    ],
)
def test_another_site_or_another_name_is_not_answered(url, headers, status):
    assert httpx.get(f"{url}config", headers=headers).status_code == status


@pytest.mark.slow
def test_a_message_that_is_too_long_is_refused_by_the_server(url):
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError, match="8,000 characters"):
        client(url).predict("字" * 8001, "", api_name="/say")
    large = httpx.post(f"{url}gradio_api/queue/join", content=b"x" * (security.MAX_BODY_BYTES + 1))
    unmeasured = httpx.post(f"{url}gradio_api/queue/join", content=iter([b"x"]))
    assert (large.status_code, unmeasured.status_code) == (413, 413)


@pytest.mark.slow
def test_a_setting_out_of_its_bounds_is_refused(url):
    from gradio_client.exceptions import AppError

    user = client(url)
    user.predict("你好", "", api_name="/say")
    with pytest.raises(AppError):
        user.predict("", *values(Sampling(max_new_tokens=10**9)), api_name="/reply")


@pytest.mark.slow
def test_an_error_shows_no_path(url, chat, monkeypatch):
    from gradio_client.exceptions import AppError

    def fail(*_arguments, **_options):
        raise RuntimeError("/secret/path")

    user = client(url)
    user.predict("你好", "", api_name="/say")
    monkeypatch.setattr(type(chat.model), "forward", fail)
    with pytest.raises(AppError, match="出错了，请重试 · something went wrong; try again") as caught:
        user.predict("", *LONG, api_name="/reply")
    assert "secret" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "gradio_api/upload"),
        ("GET", "gradio_api/file=/etc/hostname"),
        ("GET", "gradio_api/file=https://example.org"),
        ("GET", "gradio_api/file/etc/hostname"),
        ("GET", "gradio_api/proxy=https://example.org"),
        ("POST", "gradio_api/component_server"),
        ("POST", "gradio_api/stream/x"),
        ("POST", "gradio_api/call/say"),
        ("POST", "gradio_api/run/say"),
        ("GET", "monitoring"),
        ("GET", "docs"),
        ("GET", "openapi.json"),
        ("GET", "gradio_api/runs"),
    ],
)
def test_routes_that_the_page_does_not_use_are_closed(url, method, path):
    answer = httpx.request(method, url + path, files={"files": b"x"} if method == "POST" else None)
    assert (answer.status_code, answer.text) == (404, "closed")


@pytest.mark.slow
def test_the_page_loads_from_its_own_host_alone(url):
    answer = httpx.get(url)
    assert answer.status_code == 200
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "https:" not in answer.headers["content-security-policy"]


@pytest.mark.slow
def test_the_calls_and_the_open_connections_of_an_address_are_counted(url, made, monkeypatch):
    made.limits.asked.clear()
    monkeypatch.setattr(made.limits, "per_minute", 1)
    calls = [
        httpx.post(f"{url}gradio_api/queue/join", json={"data": []}) for _ in range(10 * security.CALLS_PER_REQUEST + 1)
    ]
    assert {call.status_code for call in calls[:-1]} == {400}
    assert calls[-1].status_code == 429 and "too many requests; wait a minute" in calls[-1].json()["detail"]
    made.limits.asked.clear()
    monkeypatch.setattr(security, "MAX_OPEN", 2)
    with httpx.stream("GET", f"{url}gradio_api/heartbeat/a"), httpx.stream("GET", f"{url}gradio_api/heartbeat/b"):
        assert httpx.get(url).status_code == 429


@pytest.mark.slow
def test_a_login_comes_before_the_page_and_guessing_locks_out(chat):
    made = Handlers({"tiny": LocalModel(chat)})
    page = build_page(made)
    logins = {"anna": "secret", "ben": "other"}
    serve_page(page, made, host="127.0.0.1", port=free_port(), auth=logins, block=False)

    def log_in(name: str, password: str) -> httpx.Response:
        return httpx.post(f"{page.local_url}login", data={"username": name, "password": password})

    try:
        assert httpx.get(f"{page.local_url}config").status_code == 401
        body = {"data": ["你好", None, "", ""], "fn_index": 0, "session_hash": "x"}
        assert httpx.post(f"{page.local_url}gradio_api/queue/join", json=body).status_code == 401
        for _ in range(security.MAX_LOGINS + 1):
            login = log_in("anna", "secret")
            assert login.status_code == 200
        assert httpx.get(f"{page.local_url}config", cookies=login.cookies).status_code == 200
        assert httpx.get(f"{page.local_url}config", headers={"Host": "chat.example"}).status_code == 401
        wrong = [log_in("anna", "ben").status_code for _ in range(security.MAX_LOGINS)]
        assert wrong == [400] * security.MAX_LOGINS
        assert log_in("anna", "secret").status_code == 429
        # An earlier login stays valid.
        assert httpx.get(f"{page.local_url}config", cookies=login.cookies).status_code == 200
    finally:
        page.close(verbose=False)
