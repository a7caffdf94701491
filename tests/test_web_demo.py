"""The chat page: what it shows, what it refuses, and that stopping it stops the model."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import gradio as gr
import httpx
import pytest

import web_demo
from sft.chat import GREEDY, Sampling, load_chat, newest_run
from web_demo import Handlers, answered, check, settle, to_page, undo

ROOT = Path(web_demo.__file__).parent
JOINER = "\u2060"
ASKED = [{"role": "user", "content": "一"}, {"role": "assistant", "content": "二"}, {"role": "user", "content": "三"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "四"}]


@pytest.fixture(scope="module")
def chat(tiny_base):
    return load_chat(str(tiny_base("qwen2")))


def shown(text: str, role: str = "assistant") -> list[str]:
    return [message["content"][0]["text"] for message in to_page([{"role": role, "content": text}])]


# --- what the page shows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_html_is_shown_as_text(role):
    assert shown('<img src=x onerror="alert(1)"><script>', role) == [
        f'<{JOINER}img src=x onerror="alert(1)"><{JOINER}script>'
    ]
    assert shown("</div><!-- a --><?x", role) == [f"<{JOINER}/div><{JOINER}!-- a --><{JOINER}?x"]


def test_images_are_shown_as_text():
    assert shown("![i](http://evil.test/a.png)") == [f"!{JOINER}[i](http://evil.test/a.png)"]


def test_what_is_no_markup_is_left_as_it_is():
    text = "1 < 2, a <- b, x<3！ **粗** `code` [link](https://example.org)\n- 一\n- 二 😀"
    assert shown(text) == [text]


def test_fenced_code_is_left_as_it_is_for_copying():
    code = "```html\n<b>x</b>\n```"
    assert shown(f"<i>\n{code}\n<i>") == [f"<{JOINER}i>\n{code}\n<{JOINER}i>"]
    for code in ("~~~\n<b>\n~~~", "```\n```", "```\n<b>", "````\n```\n<b>", "```c++\nstd::map<a, b> x;\n```\n好"):
        assert shown(code) == [code]


@pytest.mark.parametrize(
    "text",
    [
        "a ``` <b>",
        "``` `\n<b>\n```",
        "- a\n  ```\n<b>",
        "> ```\n<b>",
        "```\n```\n<b>",
        "```\r\n```\r\n<b>",
        "$$\n```\n$$\n<b>\n```",
        "\\(\n```\n\\)\n<b>\n```",
    ],
)
def test_what_only_looks_like_code_is_no_way_around(text):
    assert f"<{JOINER}b>" in shown(text)[0]


def test_thinking_is_folded_away():
    reply = {"role": "assistant", "content": "<think>\n想 <b>\n</think>\n\n好"}
    assert to_page([reply]) == [
        {
            "role": "assistant",
            "content": [{"type": "text", "text": f"想 <{JOINER}b>"}],
            "metadata": {"title": "思考 · Thinking", "status": "done"},
        },
        {"role": "assistant", "content": [{"type": "text", "text": "好"}]},
    ]
    still = to_page([{"role": "assistant", "content": "<think>想"}])
    assert [message["metadata"]["status"] for message in still] == ["pending"]
    assert shown("<think>x</think>", "user") == [f"<{JOINER}think>x<{JOINER}/think>"]


def test_every_text_of_the_page_is_in_both_languages():
    assert web_demo.ENGLISH.keys() == web_demo.CHINESE.keys()
    assert all(web_demo.ENGLISH.values()) and all(web_demo.CHINESE.values())


def test_sliders_start_at_the_defaults_of_sampling_and_hold_each_of_its_fields():
    assert tuple(web_demo.SLIDERS) == tuple(Sampling.__dataclass_fields__)
    for name, (low, high, _step) in web_demo.SLIDERS.items():
        assert low <= getattr(Sampling(), name) <= high


# --- the conversation ---------------------------------------------------------------------------------------------


def test_a_question_without_an_answer_is_left_out():
    assert answered(ASKED) == ASKED[:2]
    assert answered([*ASKED, {"role": "assistant", "content": ""}]) == ASKED[:2]
    assert answered(ANSWERED) == ANSWERED
    assert answered(ASKED[:1]) == []


def test_a_question_that_was_stopped_goes_back_into_the_box():
    box, page, conversation = settle(ASKED)
    assert (box.value, len(page), conversation) == ("三", 2, ASKED[:2])
    assert settle(ANSWERED)[2] == ANSWERED


def test_undo_takes_the_last_exchange_back():
    box, page, conversation = undo(ANSWERED)
    assert (box.value, len(page), conversation) == ("三", 2, ASKED[:2])


def test_saying_again_drops_the_last_reply(chat):
    assert handlers(chat).say_again(ANSWERED, "")[2] == ASKED


@pytest.mark.parametrize("reply", ["二", "<think>想</think>二"])
def test_an_edited_question_replaces_what_followed_it(chat, reply):
    conversation = [ASKED[0], {"role": "assistant", "content": reply}, *ANSWERED[2:]]
    index = len(to_page(conversation)) - 2
    change = gr.EditData(None, {"index": index, "previous_value": "三", "value": f"a <{JOINER}b>"})
    assert handlers(chat).say_edited(conversation, "", change)[2] == [
        *conversation[:2],
        {"role": "user", "content": "a <b>"},
    ]


def handlers(chat) -> Handlers:
    return Handlers(chat, web_demo.build_page(chat))


def test_the_system_prompt_leads_the_messages(chat):
    assert check(chat, ASKED, " Be brief. ") == [{"role": "system", "content": "Be brief."}, *ASKED]
    assert check(chat, ASKED, " ") == ASKED


@pytest.mark.parametrize(
    ("conversation", "system", "what"),
    [
        ([{"role": "user", "content": "a" * 8001}], "", "8,000 个字符.*8,000 characters"),
        (ASKED, "a" * 8001, "8,000 characters"),
        (ANSWERED * 25 + ASKED[:1], "", "对话太长.*conversation is too long"),
        ([ASKED[0], {"role": "assistant", "content": "a" * 32_000}, ASKED[2]], "", "conversation is too long"),
        (
            [{"role": "user", "content": "字词" * 2000}],
            "",
            r"上下文窗口（2048 个词元）.*context window \(2048 tokens\)",
        ),
    ],
)
def test_what_is_too_long_is_refused_in_both_languages(chat, conversation, system, what):
    with pytest.raises(gr.Error, match=what):
        check(chat, conversation, system)


def test_characters_are_counted_before_anything_is_tokenised(chat, monkeypatch):
    monkeypatch.setattr(type(chat), "prompt_ids", lambda *_: pytest.fail("tokenised"))
    with pytest.raises(gr.Error, match="8,000 characters"):
        check(chat, [{"role": "user", "content": "a" * 1_000_000}], "")


def test_a_lone_surrogate_is_replaced(chat):
    assert handlers(chat).say("a\ud800b", [], "")[2] == [{"role": "user", "content": "a?b"}]


def test_an_empty_message_is_refused(chat):
    with pytest.raises(gr.Error, match="type a message first"):
        handlers(chat).say(" \n", [], "")


def test_replies_to_new_edited_and_repeated_questions_wait_in_one_queue(chat):
    replies = [function for function in web_demo.build_page(chat).fns.values() if function.name == "reply"]
    assert [function.concurrency_id for function in replies] == ["model"] * 4


# --- the command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--nope"], "unrecognized arguments: --nope"),
        (["--model_path", "/no/such/folder"], "/no/such/folder: no such folder"),
        (["--host", "0.0.0.0"], "WEB_DEMO_AUTH=name:password"),
        (["--host", "192.168.0.7"], "WEB_DEMO_AUTH=name:password"),
        (["--model_path", "a/b", "--port", "99999"], "--port 99999"),
        (["--chat_format", "none"], "invalid choice: 'none'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, problem, capsys, monkeypatch):
    monkeypatch.delenv("WEB_DEMO_AUTH", raising=False)
    monkeypatch.setattr(web_demo, "load_chat", lambda *_, **__: pytest.fail("loaded a model"))
    assert problem in refusal(arguments, capsys)


def refusal(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        web_demo.main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("web_demo.py: ") and error.count("\n") == 1
    return error


def test_without_a_run_it_says_how_to_make_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(web_demo, "RUNS", tmp_path)
    assert "sh base_run.sh" in refusal([], capsys)


def test_a_login_without_a_password_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("WEB_DEMO_AUTH", "anna:")
    assert "WEB_DEMO_AUTH must be name:password" in refusal([], capsys)


def test_a_password_may_hold_colons(monkeypatch):
    monkeypatch.setenv("WEB_DEMO_AUTH", "anna:a:b")
    assert web_demo._auth("0.0.0.0") == ("anna", "a:b")


def test_the_newest_finished_run_is_the_default(tmp_path):
    assert newest_run(tmp_path) is None
    for name, age in (("b", 30), ("a", 10), ("unfinished", None)):
        (tmp_path / name / "model").mkdir(parents=True)
        if age is not None:
            run = tmp_path / name / "model" / "run.json"
            run.write_text("{}")
            os.utime(run, (1e9 - age, 1e9 - age))
    assert newest_run(tmp_path) == str(tmp_path / "a" / "model")


def test_importing_the_page_loads_no_model_and_no_torch():
    code = "import sys, web_demo; print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --- the server ---------------------------------------------------------------------------------------------------


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
def url(chat):
    page = web_demo.build_page(chat)
    web_demo.serve(page, host="127.0.0.1", port=free_port(), block=False)
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
    return [getattr(sampling, name) for name in web_demo.SLIDERS]


LONG = values(Sampling(max_new_tokens=400))


def wait_for_workers() -> None:
    """Wait until no thread generates."""
    for thread in threading.enumerate():
        if "(work)" in thread.name:
            thread.join(60)
            assert not thread.is_alive()


@pytest.mark.slow
def test_the_reply_streams_and_is_what_chat_says(url, chat, monkeypatch):
    monkeypatch.setattr(web_demo, "SECONDS_BETWEEN_UPDATES", 0)
    user = client(url)
    with closing(SlowModel(chat, 0)):
        expected = chat.reply([{"role": "user", "content": "你好"}], Sampling(**{**vars(GREEDY), "max_new_tokens": 12}))
        user.predict("你好", "", api_name="/say")
        sampling = Sampling(**{**vars(GREEDY), "max_new_tokens": 12})
        updates = list(user.submit("", *values(sampling), api_name="/reply"))
    texts = [update[-1]["content"][0]["text"] for update in updates]
    assert [update[0]["content"][0]["text"] for update in updates] == ["你好"] * len(updates)
    assert texts[-1].replace(JOINER, "") == expected.text
    assert len(set(texts)) > 3
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))


@pytest.mark.slow
def test_a_second_turn_sees_the_first(url, chat, monkeypatch):
    seen = []
    prompt = type(chat.renderer).prompt
    monkeypatch.setattr(
        type(chat.renderer), "prompt", lambda self, messages: seen.append(messages) or prompt(self, messages)
    )
    user = client(url)
    user.predict("一", "简短", api_name="/say")
    first = user.predict("简短", *values(Sampling(max_new_tokens=4)), api_name="/reply")[-1]["content"][0]["text"]
    user.predict("二", "简短", api_name="/say")
    assert seen[-1][0] == {"role": "system", "content": "简短"}
    assert [message["content"] for message in seen[-1][1:]] == (
        ["一", first.replace(JOINER, ""), "二"] if first else ["二"]
    )


@pytest.mark.slow
def test_stop_ends_the_model(url, chat):
    user = client(url)
    with closing(SlowModel(chat, 0.05)) as model:
        user.predict("你好", "", api_name="/say")
        job = user.submit("", *LONG, api_name="/reply")
        next(iter(job))
        job.cancel()
        wait_for_workers()
        assert model.made < 100


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
    with closing(SlowModel(chat, 0.05)) as model:
        join(url, "say", ["你好", None, ""], "leaver")
        assert listen(url, "leaver", 100)[-2:] == ["process_completed", "close_stream"]
        join(url, "reply", [None, "", *LONG], "leaver")
        assert "process_generating" in listen(url, "leaver", 5)
        wait_for_workers()
        assert model.made < 100
        user = client(url)
        user.predict("你好", "", api_name="/say")
        assert user.predict("", *values(Sampling(max_new_tokens=2)), api_name="/reply")


@pytest.mark.slow
def test_a_client_that_never_listens_gets_no_reply(url, chat):
    with closing(SlowModel(chat, 0.06)) as model:
        join(url, "say", ["你好", None, ""], "deaf")
        listen(url, "deaf", 100)
        join(url, "reply", [None, "", *LONG], "deaf")
        join(url, "say", ["你好", None, ""], "next")  # served although the deaf one holds the model
        assert "process_completed" in listen(url, "next", 100)
        join(url, "reply", [None, "", *values(Sampling(max_new_tokens=1))], "next")
        assert "process_completed" in listen(url, "next", 1000)
        wait_for_workers()
        assert model.made < 100


@pytest.mark.slow
def test_a_message_that_is_too_long_is_refused_by_the_server(url):
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError, match="8,000 characters"):
        client(url).predict("字" * 8001, "", api_name="/say")
    large = httpx.post(f"{url}gradio_api/queue/join", content=b"x" * (web_demo.MAX_BODY + 1))
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
def test_the_page_may_load_nothing_from_elsewhere(url):
    answer = httpx.get(url)
    assert answer.status_code == 200
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "https:" not in answer.headers["content-security-policy"]


@pytest.mark.slow
def test_with_a_login_nothing_is_shown_before_it(chat):
    page = web_demo.build_page(chat)
    web_demo.serve(page, host="127.0.0.1", port=free_port(), auth=("anna", "secret"), block=False)
    try:
        assert httpx.get(f"{page.local_url}config").status_code == 401
        body = {"data": ["你好", None, ""], "fn_index": 0, "session_hash": "x"}
        assert httpx.post(f"{page.local_url}gradio_api/queue/join", json=body).status_code == 401
        login = httpx.post(f"{page.local_url}login", data={"username": "anna", "password": "secret"})
        assert login.status_code == 200
        assert httpx.get(f"{page.local_url}config", cookies=login.cookies).status_code == 200
    finally:
        page.close(verbose=False)
