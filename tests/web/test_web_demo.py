"""The chat page: what it shows, what it refuses, and that stopping it stops the model."""

import asyncio
import base64
import json
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import httpx
import pytest

import web_demo
from sft.chat.reply import load_chat, newest_run
from sft.chat.sampling import GREEDY, Sampling
from sft.opendata.__main__ import main as build_opendata
from sft.web import security as gate
from web_demo import Handlers, Local, Turn, answered, check, to_messages, to_page

ROOT = Path(web_demo.__file__).parent
JOINER = "\u2060"
TURNS = [Turn("一", ("二",)), Turn("三")]
ANSWERED = [TURNS[0], Turn("三", ("四",))]
MESSAGES = [
    {"role": "user", "content": "一"},
    {"role": "assistant", "content": "二"},
    {"role": "user", "content": "三"},
]


@pytest.fixture(scope="module")
def chat(tiny_base):
    return load_chat(str(tiny_base("qwen2")))


def shown(text: str, role: str = "assistant") -> list[str]:
    turn = Turn(text) if role == "user" else Turn("?", (text,))
    return [message["content"][0]["text"] for message in to_page([turn]) if message["role"] == role]


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
    assert to_page([Turn("?", ("<think>\n想 <b>\n</think>\n\n好",))])[1:] == [
        {
            "role": "assistant",
            "content": [{"type": "text", "text": f"想 <{JOINER}b>"}],
            "metadata": {"title": "思考 · Thinking", "status": "done"},
        },
        {"role": "assistant", "content": [{"type": "text", "text": "好"}]},
    ]
    still = to_page([Turn("?", ("<think>想",))])[1:]
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
    assert answered(TURNS) == TURNS[:1]
    assert answered([TURNS[0], Turn("三", ("",))]) == TURNS[:1]
    assert answered(ANSWERED) == ANSWERED
    assert answered(TURNS[1:]) == []


def test_each_pane_has_its_own_conversation_and_knows_no_question_that_it_did_not_answer():
    turns = [Turn("一", ("a", "b")), Turn("二", ("c", "")), Turn("三")]
    assert [message["content"] for message in to_messages(turns, 0, "s")] == ["s", "一", "a", "二", "c", "三"]
    assert [message["content"] for message in to_messages(turns, 1)] == ["一", "b", "三"]
    assert [message["content"][0]["text"] for message in to_page(turns, 1)] == ["一", "b", "二", "", "三"]


def test_a_question_that_was_stopped_goes_back_into_the_box(chat):
    box, turns, page = handlers(chat).settle(TURNS)
    assert (box.value, len(page), turns) == ("三", 2, TURNS[:1])
    assert handlers(chat).settle(ANSWERED)[1] == ANSWERED


def test_undo_takes_the_last_exchange_back(chat):
    box, turns, page = handlers(chat).undo(None, ANSWERED)
    assert (box.value, len(page), turns) == ("三", 2, TURNS[:1])
    assert handlers(chat).undo(None, [])[1] == []


def test_saying_again_drops_the_last_reply(chat):
    assert handlers(chat).say_again(None, ANSWERED, "")[1] == TURNS


@pytest.mark.parametrize("reply", ["二", "<think>想</think>二"])
def test_an_edited_question_replaces_what_followed_it(chat, reply):
    turns = [Turn("一", (reply,)), ANSWERED[1]]
    index = len(to_page(turns)) - 2
    change = gr.EditData(None, {"index": index, "previous_value": "三", "value": f"a <{JOINER}b>"})
    assert handlers(chat).editor(0)(None, turns, "", change)[1] == [turns[0], Turn("a <b>")]
    change.index = 99
    with pytest.raises(gr.Error, match="no such message"):
        handlers(chat).editor(0)(None, turns, "", change)


def handlers(chat, **options) -> Handlers:
    made = Handlers({"tiny": Local(chat)}, **options)
    made.page = SimpleNamespace()
    return made


def test_the_system_prompt_leads_the_messages():
    assert check(TURNS, " Be brief. ") == "Be brief."
    assert to_messages(TURNS, 0, "Be brief.") == [{"role": "system", "content": "Be brief."}, *MESSAGES]
    assert check(TURNS, " ") == "" and to_messages(TURNS, 0) == MESSAGES


@pytest.mark.parametrize(
    ("turns", "system", "what"),
    [
        ([Turn("a" * 8001)], "", "8,000 个字符.*8,000 characters"),
        (TURNS, "a" * 8001, "8,000 characters"),
        (ANSWERED * 25 + TURNS[1:], "", "超过 50 轮.*more than 50 turns"),
    ],
)
def test_what_is_too_long_is_refused_in_both_languages(turns, system, what):
    with pytest.raises(gr.Error, match=what):
        check(turns, system)


def test_a_browser_that_names_its_language_is_answered_in_it():
    for language, text in (("zh-CN,zh;q=0.9,en", "好"), ("en-US,en", "good"), ("", "好 · good")):
        request = SimpleNamespace(headers={"accept-language": language})
        assert web_demo.say(request, "好", "good") == text


def test_characters_are_counted_before_anything_is_tokenised(chat, monkeypatch):
    monkeypatch.setattr(type(chat), "prompt_ids", lambda *_: pytest.fail("tokenised"))
    with pytest.raises(gr.Error, match="8,000 characters"):
        handlers(chat).say(None, "a" * 1_000_000, [], "")


def test_a_full_context_loses_its_oldest_turns_and_the_page_says_so(chat, monkeypatch):
    turns = [Turn(f"{index} " + "字词" * 300, ("好",)) for index in range(6)]
    messages = to_messages([*turns, Turn("完")], 0, "系统")
    kept = Local(chat).fit(messages, Sampling(max_new_tokens=100))
    assert kept[0] == messages[0] and kept[1]["role"] == "user" and kept[-1] == messages[-1]
    assert 1 < web_demo.num_questions(kept) < 7
    assert len(chat.prompt_ids(kept)) + 100 <= 2048
    with pytest.raises(ValueError, match="context window"):
        Local(chat).fit([{"role": "user", "content": "字词" * 2000}], Sampling())

    answer = asyncio.run(handlers(chat)._start(None, messages, 0, (), Sampling(max_new_tokens=1)))
    answer.started.cancel()
    left = 7 - web_demo.num_questions(kept)
    assert answer.note == (f"上下文已满，最早的 {left} 轮已略去", f"context full, oldest {left} turns left out")


def test_no_conversation_may_fill_the_batch_that_all_share(chat, monkeypatch):
    monkeypatch.setattr(web_demo, "MAX_CONTEXT", 400)
    turns = [Turn("字词" * 50, ("好",))] * 6
    kept = Local(chat).fit(to_messages([*turns, Turn("完")], 0), Sampling())
    assert len(chat.prompt_ids(kept)) + 100 <= 400 and kept[-1]["content"] == "完"
    with pytest.raises(ValueError, match="more than 400 tokens"):
        Local(chat).fit([{"role": "user", "content": "字词" * 400}], Sampling())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, 10**9, True, "1", None, [1]])
@pytest.mark.parametrize("name", web_demo.SLIDERS)
def test_a_setting_that_no_slider_gives_is_refused(name, value):
    given = values(Sampling(**{name: value}))
    with pytest.raises(gr.Error, match=f"{name} must be between"):
        web_demo.to_sampling(given)
    assert web_demo.to_sampling(values(Sampling())) == Sampling()


def test_a_lone_surrogate_is_replaced(chat):
    assert handlers(chat).say(None, "a\ud800b", [], "")[1] == [Turn("a?b")]


def test_an_empty_message_is_refused(chat):
    for empty in (" \n", None):
        with pytest.raises(gr.Error, match="type a message first"):
            handlers(chat).say(None, empty, [], "")


# --- what leaves the page -----------------------------------------------------------------------------------------


def test_an_export_holds_the_conversation_as_canonical_json_and_as_markdown():
    links = web_demo.export_links([Turn("一<b>", ("二",)), TURNS[1]])
    files = [base64.b64decode(text).decode() for text in re.findall(r"base64,([^\"]*)", links)]
    record = json.loads(files[0])
    assert record["messages"] == [{"role": "user", "content": "一<b>"}, {"role": "assistant", "content": "二"}]
    assert (record["source"], set(record)) == ("web_demo", {"id", "source", "messages"})
    assert files[1] == "## User · 用户\n\n一<b>\n\n## Assistant · 助手\n\n二\n\n"
    assert web_demo.export_links(TURNS[1:]) == ""


def test_likes_are_training_data_and_dislikes_are_kept_apart(chat, tmp_path):
    page = handlers(chat, feedback=tmp_path / "likes.jsonl")
    request = SimpleNamespace(session_hash="s", client=SimpleNamespace(host="127.0.0.1"), headers={})
    like = page.liker(0)
    for index, liked in ((3, True), (1, False), (3, "other")):
        like(request, ANSWERED, "系统", gr.LikeData(None, {"index": index, "value": "x", "liked": liked}))
    [line] = (tmp_path / "likes.jsonl").read_text().splitlines()
    assert json.loads(line)["messages"] == [
        {"role": "system", "content": "系统"},
        {"role": "user", "content": "一"},
        {"role": "assistant", "content": "二", "train": False},
        {"role": "user", "content": "三"},
        {"role": "assistant", "content": "四"},
    ]
    [line] = (tmp_path / "likes.disliked.jsonl").read_text().splitlines()
    assert json.loads(line)["messages"][-1] == {"role": "assistant", "content": "二", "train": False}
    build_opendata([str(tmp_path / "likes.jsonl"), "--output", str(tmp_path / "data"), "--eval_share", "0"])
    kept = [json.loads(line) for line in (tmp_path / "data" / "train.json").read_text().splitlines()]
    assert [message["content"] for record in kept for message in record["messages"]] == ["系统", "一", "二", "三", "四"]
    _ids, labels = chat.renderer.render(kept[0]["messages"])[:2]
    assert chat.renderer.tokenizer.decode([label for label in labels if label >= 0]).strip().startswith("四")


def test_the_file_of_likes_has_an_end(chat, tmp_path, monkeypatch):
    monkeypatch.setattr(web_demo, "MAX_FEEDBACK", 10)
    page = handlers(chat, feedback=tmp_path / "likes.jsonl")
    for _ in range(3):
        page._write([{"role": "user", "content": "一"}, {"role": "assistant", "content": "二"}], True)
    assert len((tmp_path / "likes.jsonl").read_text().splitlines()) == 1


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
        (["--host", "0.0.0.0", "--auth_file", "/no/such"], "--auth_file /no/such: No such file or directory"),
        (["--model_path", str(ROOT / "sft"), "--compare"], "--compare needs two --model_path"),
        (["--model", "x"], "--model goes with --base_url"),
        (["--base_url", "http://h/v1", "--compare"], "--base_url goes without --model_path"),
        (["--base_url", "http://me:secret@h/v1", "--model", "x", "--port", "0"], "--port 0: use 1 to 65535"),
        (["--base_url", "file:///etc", "--model", "x", "--port", "{port}"], "use http://HOST:PORT/v1"),
        (["--base_url", "http://127.0.0.1:9/v1", "--port", "{port}"], "is the server up? (or name one: --model)"),
        (["--model_path", "a/b", "--feedback", "/no/such/file", "--port", "{port}"], "--feedback /no/such/file"),
        (["--model_path", "a/b", "--max_active", "0"], "must be at least 1"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, problem, capsys, monkeypatch):
    monkeypatch.delenv("WEB_DEMO_AUTH", raising=False)
    monkeypatch.setattr(web_demo, "load_chat", lambda *_, **__: pytest.fail("loaded a model"))
    assert problem in refusal([argument.replace("{port}", str(free_port())) for argument in arguments], capsys)


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
    assert gate.read_logins("0.0.0.0", None) == {"anna": "a:b"}
    assert "WEB_DEMO_AUTH" not in os.environ


def test_a_file_may_hold_several_logins(tmp_path):
    (tmp_path / "logins").write_text("anna:a:b\n\nben:c\n")
    logins = gate.read_logins("0.0.0.0", str(tmp_path / "logins"))
    assert logins == {"anna": "a:b", "ben": "c"}
    tries = (("anna", "a:b"), ("ben", "a:b"), ("carl", ""), ("carl", "c"), ("ben", "ü"))
    assert [gate.knows(logins, *pair) for pair in tries] == [True, False, False, False, False]


def test_requests_of_a_tab_and_of_an_address_are_counted():
    limits = gate.Limits(per_minute=2)
    assert [limits.admit("a", "1.2.3.4") for _ in range(3)] == [True, True, False]
    assert limits.admit("b", "1.2.3.4")
    assert sum(limits.admit(f"tab {index}", "1.2.3.4") for index in range(40)) == 20 - 3
    assert limits.admit("c", "1.2.3.5")
    assert gate.network("2001:db8::1") == gate.network("2001:db8::ffff") != gate.network("2001:db8:1::1")


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
def made(chat):
    return Handlers({"tiny": Local(chat)}, limits=gate.Limits(1000))


@pytest.fixture(scope="module")
def url(made):
    page = web_demo.build_page(made)
    web_demo.serve(page, made, host="127.0.0.1", port=free_port(), block=False)
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
    return update[0][-1]["content"][0]["text"].replace(JOINER, "")


@pytest.mark.slow
def test_the_reply_streams_and_is_what_chat_says(url, chat, monkeypatch):
    monkeypatch.setattr(web_demo, "SECONDS_BETWEEN_UPDATES", 0.005)
    user = client(url)
    sampling = Sampling(**{**vars(GREEDY), "max_new_tokens": 12})
    with closing(SlowModel(chat, 0.02)):
        expected = chat.reply([{"role": "user", "content": "你好"}], sampling)
        user.predict("你好", "", api_name="/say")
        updates = list(user.submit("", *values(sampling), api_name="/reply"))
    texts = [said(update) for update in updates if len(update[0]) > 1]
    assert [update[0][0]["content"][0]["text"] for update in updates] == ["你好"] * len(updates)
    assert texts[-1] == expected.text
    assert len(set(texts)) > 3
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    status = r"12 个词元 · 每秒 [\d.]+ 个 · 到了长度上限 · 12 tokens · [\d.]+ tokens/s · the length limit was reached"
    status = r"12 个词元 · 每秒 [\d.]+ 个 · 到了长度上限 · 12 tokens · [\d.]+ tokens/s · the length limit was reached"
    assert re.fullmatch(status, updates[-1][1])


@pytest.mark.slow
def test_a_second_turn_sees_the_first(url, chat, monkeypatch):
    seen = []
    prompt = type(chat.renderer).prompt
    monkeypatch.setattr(
        type(chat.renderer), "prompt", lambda self, messages: seen.append(messages) or prompt(self, messages)
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
        join(url, "say", ["你好", None, ""], "leaver")
        assert listen(url, "leaver", 100)[-2:] == ["process_completed", "close_stream"]
        join(url, "reply", [None, "", *LONG], "leaver")
        assert "process_generating" in listen(url, "leaver", 5)
        made = model.made
        wait_until_free(chat)
        assert model.made <= made + 2
        assert ask(url, "你好", Sampling(max_new_tokens=2))


@pytest.mark.slow
def test_a_client_that_never_listens_takes_no_turn(url, chat, monkeypatch):
    monkeypatch.setattr(web_demo, "SECONDS_TO_LISTEN", 1)
    with closing(SlowModel(chat, 0)) as model:
        join(url, "say", ["你好", None, ""], "deaf")
        listen(url, "deaf", 100)
        join(url, "reply", [None, "", *LONG], "deaf")
        time.sleep(1.5)
        assert model.made == 0
        assert ask(url, "你好", Sampling(max_new_tokens=1))
        assert model.made == 1


@pytest.mark.slow
def test_many_who_never_listen_hold_nobody_up(url, chat, monkeypatch):
    monkeypatch.setattr(web_demo, "SECONDS_TO_LISTEN", 30)
    with closing(SlowModel(chat, 0)):
        for index in range(60):
            join(url, "say", ["你好", None, ""], f"deaf {index}")
        for index in range(60):
            join(url, "reply", [None, "", *LONG], f"deaf {index}")
        begun = time.monotonic()
        assert ask(url, "你好", Sampling(max_new_tokens=1))
        assert time.monotonic() - begun < 20


@pytest.mark.slow
def test_who_asks_again_while_a_reply_streams_gets_the_new_one_alone(url, chat):
    user = client(url)
    with closing(SlowModel(chat, 0.1)):
        user.predict("你好", "", api_name="/say")
        first = user.submit("", *LONG, api_name="/reply")
        next(iter(first))
        join(url, "say_again", [None, ""], user.session_hash)
        time.sleep(0.5)
        second = list(user.submit("", *values(Sampling(max_new_tokens=3)), api_name="/reply"))
        assert second and second[-1][1].startswith("3 个词元")
        assert len(second[-1][0]) == 2
        wait_until_free(chat)


@pytest.mark.slow
def test_many_ask_at_once_some_wait_and_the_rest_are_told_so(url, chat, monkeypatch):
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
def test_a_tab_that_asks_too_often_is_told_to_wait(url, made, monkeypatch):
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
    large = httpx.post(f"{url}gradio_api/queue/join", content=b"x" * (gate.MAX_BODY + 1))
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
def test_the_page_may_load_nothing_from_elsewhere(url):
    answer = httpx.get(url)
    assert answer.status_code == 200
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "https:" not in answer.headers["content-security-policy"]


@pytest.mark.slow
def test_the_calls_and_the_open_connections_of_an_address_are_counted(url, made, monkeypatch):
    made.limits.asked.clear()
    monkeypatch.setattr(made.limits, "per_minute", 1)
    calls = [httpx.post(f"{url}gradio_api/queue/join", json={"data": []}) for _ in range(10 * gate.CALLS + 1)]
    assert {call.status_code for call in calls[:-1]} == {400}
    assert calls[-1].status_code == 429 and "too many requests; wait a minute" in calls[-1].json()["detail"]
    made.limits.asked.clear()
    monkeypatch.setattr(gate, "MAX_OPEN", 2)
    with httpx.stream("GET", f"{url}gradio_api/heartbeat/a"), httpx.stream("GET", f"{url}gradio_api/heartbeat/b"):
        assert httpx.get(url).status_code == 429


@pytest.mark.slow
def test_with_a_login_nothing_is_shown_before_it_and_guessing_locks_out(chat):
    made = Handlers({"tiny": Local(chat)})
    page = web_demo.build_page(made)
    logins = {"anna": "secret", "ben": "other"}
    web_demo.serve(page, made, host="127.0.0.1", port=free_port(), auth=logins, block=False)

    def log_in(name: str, password: str) -> httpx.Response:
        return httpx.post(f"{page.local_url}login", data={"username": name, "password": password})

    try:
        assert httpx.get(f"{page.local_url}config").status_code == 401
        body = {"data": ["你好", None, ""], "fn_index": 0, "session_hash": "x"}
        assert httpx.post(f"{page.local_url}gradio_api/queue/join", json=body).status_code == 401
        for _ in range(gate.MAX_LOGINS + 1):
            login = log_in("anna", "secret")
            assert login.status_code == 200
        assert httpx.get(f"{page.local_url}config", cookies=login.cookies).status_code == 200
        assert httpx.get(f"{page.local_url}config", headers={"Host": "chat.example"}).status_code == 401
        wrong = [log_in("anna", "ben").status_code for _ in range(gate.MAX_LOGINS)]
        assert wrong == [400] * gate.MAX_LOGINS
        assert log_in("anna", "secret").status_code == 429
        # Who is in stays in.
        assert httpx.get(f"{page.local_url}config", cookies=login.cookies).status_code == 200
    finally:
        page.close(verbose=False)
