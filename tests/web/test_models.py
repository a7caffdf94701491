"""The models behind the page: prompts that fit, requests to a server, and the limits of its answers."""

import asyncio
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from sft.chat.batching import BusyError
from sft.chat.reply import load_chat
from sft.chat.sampling import Sampling
from sft.web import models
from sft.web.models import JOINER, LocalModel, LocalReply, RemoteError, RemoteModel, break_control_tokens
from sft.web.panes import PendingReply
from sft.web.turns import Turn, to_messages

HELLO = [{"role": "user", "content": "hi <|im_end|>"}]


def event(text: str = "", **choice) -> str:
    return "data: " + json.dumps({"choices": [{"delta": {"content": text}, **choice}]}) + "\n\n"


@pytest.fixture
def server():
    """A server that answers with `answer` (status, lines); `asked` holds its requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(200, ['{"data": [{"id": "tiny"}]}'])

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked_encoding = self.headers.get("Accept-Encoding")
            server.asked.append((self.headers.get("Authorization"), body))
            self.reply(*server.answer(body))

        def reply(self, status, lines):
            self.send_response(status)
            if server.encoding:
                self.send_header("Content-Encoding", server.encoding)
            self.end_headers()
            try:
                for line in lines:
                    self.wfile.write(line.encode())
                    self.wfile.flush()
            except OSError:
                server.hung_up.set()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.asked, server.hung_up = True, [], threading.Event()
    server.encoding = None
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def talk(remote: RemoteModel, sampling: Sampling = Sampling()):  # noqa: B008
    async def work():
        reply = remote.start(HELLO, sampling)
        while not reply.done:
            await asyncio.sleep(0.01)
        if reply.error:
            raise reply.error
        return reply.read()

    return asyncio.run(work())


def test_a_reply_is_read_from_the_stream_and_the_key_goes_in_the_header(server):
    usage = "data: " + json.dumps({"choices": [], "usage": {"completion_tokens": 7}}) + "\n\n"
    thought = "data: " + json.dumps({"choices": [{"delta": {"reasoning_content": "so"}}]}) + "\n\n"
    lines = [": comment\n", thought, event("春"), event("天", finish_reason="stop"), usage, "data: [DONE]\n\n"]
    server.answer = lambda _body: (200, lines)
    remote = RemoteModel(server.url, key="secret")
    assert talk(remote) == ({"content": "春天", "reasoning_content": "so"}, True, 7)
    [(key, body)] = server.asked
    assert (key, body["model"], body["stream"], body["max_tokens"]) == ("Bearer secret", "tiny", True, 512)
    assert (body["temperature"], body["top_p"], body["top_k"], body["repetition_penalty"]) == (0.5, 0.85, 50, 1.05)
    assert body["messages"] == [{"role": "user", "content": f"hi <{JOINER}|im_end|>"}]


def test_a_thought_that_a_server_sends_as_text_is_apart_and_not_sent_back(server):
    for text in ("so</think>\n\n好", "<think>so</think>\n\n好"):
        server.answer = lambda _body, text=text: (200, [event(text, finish_reason="stop")])
        assert talk(RemoteModel(server.url))[0] == {"content": "好", "reasoning_content": "so"}
    remote = RemoteModel(server.url)
    history = [*HELLO, {"role": "assistant", "content": "好", "reasoning_content": "so"}, *HELLO]
    sent = remote._body(history, Sampling(), None, extras=True)["messages"]
    assert sent[1] == {"role": "assistant", "content": "好"}


def test_a_server_that_refuses_fields_of_others_is_asked_without_them(server):
    server.answer = lambda body: (422, []) if "top_k" in body else (200, [event("好", finish_reason="stop")])
    remote = RemoteModel(server.url)
    assert [talk(remote)[0] for _ in range(2)] == [{"content": "好"}] * 2
    assert ["top_k" in body for _key, body in server.asked] == [True, False, False]


def test_a_refusal_of_something_else_leaves_the_fields_of_others_in_the_next_request(server):
    server.answer = lambda body: (400, []) if len(server.asked) <= 2 else (200, [event("好", finish_reason="stop")])
    remote = RemoteModel(server.url)
    with pytest.raises(RemoteError, match="answers with status 400"):
        talk(remote)
    assert talk(remote)[0] == {"content": "好"}
    assert ["top_k" in body for _key, body in server.asked] == [True, False, True]


def call_part(index: int, **function) -> dict:
    number = {"id": f"c{index}", "type": "function"} if "name" in function else {}
    return {"index": index, **number, "function": function}


def calls_event(*parts: dict, **choice) -> str:
    return "data: " + json.dumps({"choices": [{"delta": {"tool_calls": list(parts)}, **choice}]}) + "\n\n"


def test_calls_of_a_server_are_read_from_the_parts_of_its_stream(server):
    lines = [
        calls_event(call_part(0, name="weather", arguments="")),
        calls_event(call_part(0, arguments='{"city": "Par')),
        calls_event(call_part(0, arguments='is"}'), call_part(1, name="time", arguments="{")),
        calls_event(finish_reason="tool_calls"),
    ]
    server.answer = lambda _body: (200, lines)
    message, ended, num_tokens = talk(RemoteModel(server.url))
    assert message["tool_calls"] == [
        {"id": "c0", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}},
        {"id": "c1", "type": "function", "function": {"name": "time", "arguments": "{"}},  # as the server wrote it
    ]
    assert (message["content"], ended, num_tokens) == ("", True, 3)


@pytest.mark.parametrize("arguments", ['{"a": "\\ud800"}', '{"a": NaN}'])
def test_arguments_that_can_not_be_written_stay_the_servers_text(server, arguments):
    part = call_part(0, name="f", arguments=arguments)
    server.answer = lambda _body: (200, [calls_event(part, finish_reason="tool_calls")])
    (call,) = talk(RemoteModel(server.url))[0]["tool_calls"]
    assert call["function"]["arguments"] == arguments


def test_tools_calls_and_results_are_sent_in_openais_form(server):
    tools = [{"type": "function", "function": {"name": "weather", "description": "</s> it", "parameters": {}}}]
    calls = [{"id": "c0", "type": "function", "function": {"name": "weather", "arguments": {"city": "</s>"}}}]
    history = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "reasoning_content": "so", "tool_calls": calls},
        {"role": "tool", "name": "weather", "content": "18", "tool_call_id": "c0"},
    ]
    remote = RemoteModel(server.url)
    body = remote._body(history, Sampling(), tools, extras=True)
    broken = f"<{JOINER}/s>"
    assert body["tools"][0]["function"] == {"name": "weather", "description": f"{broken} it", "parameters": {}}
    sent = [
        {**calls[0], "function": {"name": "weather", "arguments": json.dumps({"city": "</s>"}).replace("</s>", broken)}}
    ]
    assert body["messages"][1:] == [
        {"role": "assistant", "content": "", "reasoning_content": "so", "tool_calls": sent},
        {"role": "tool", "content": "18", "tool_call_id": "c0"},
    ]
    assert "reasoning_content" not in json.dumps(remote._body(history, Sampling(), tools, extras=False))


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ((500, ["/secret/path sk-key"]), "the model's server answers with status 500"),
        ((302, []), "the model's server answers with status 302"),
        ((200, ["data: {broken\n\n"]), "the model's server is unclear"),
        ((200, ['data: {"error": {"message": "/secret"}}\n\n']), "the model's server stopped with an error"),
        ((200, ["data: " + "x" * 3_000_000]), "the model's server is unclear"),
        ((200, ['data: ["no object"]\n\n']), "the model's server is unclear"),
    ],
)
def test_an_error_is_one_line_without_the_servers_own_words(server, answer, problem):
    server.answer = lambda _body: answer
    with pytest.raises(RemoteError) as caught:
        talk(RemoteModel(server.url))
    assert str(caught.value) == problem


def test_an_absent_server_is_one_line():
    with pytest.raises(RemoteError, match="the model's server can't be reached"):
        talk(RemoteModel("http://127.0.0.1:9/v1", model="x"))


def test_an_endless_stream_of_comments_is_ended(server, monkeypatch):
    monkeypatch.setattr("sft.web.models.MAX_STREAM_BYTES", 10_000)
    server.answer = lambda _body: (200, iter(lambda: ": still here\n", ""))
    with pytest.raises(RemoteError, match="is unclear"):
        talk(RemoteModel(server.url))


def test_a_packed_stream_is_not_unpacked(server):
    server.encoding, server.answer = "gzip", lambda _body: (200, [event("好", finish_reason="stop")])
    with pytest.raises(RemoteError, match="is unclear"):
        talk(RemoteModel(server.url, model="tiny"))
    assert server.asked_encoding == "identity"


@pytest.mark.parametrize("count", ["<b>", [1], {"a": 1}])
def test_a_count_of_tokens_is_a_number(server, count):
    usage = "data: " + json.dumps({"usage": {"completion_tokens": count}}) + "\n\n"
    server.answer = lambda _body: (200, [event("好"), usage])
    with pytest.raises(RemoteError, match="is unclear"):
        talk(RemoteModel(server.url))


def test_half_a_character_of_the_server_is_replaced(server):
    server.answer = lambda _body: (200, [event("a\ud800b", finish_reason="stop")])
    assert ascii(talk(RemoteModel(server.url))[0]["content"]) == "'a?b'"


def test_a_reply_without_end_is_ended(server, monkeypatch):
    monkeypatch.setattr("sft.web.models.MAX_REPLY", 100)
    server.answer = lambda _body: (200, (event("word ") for _ in range(10_000)))
    assert len(talk(RemoteModel(server.url))[0]["content"]) == 105


def test_cancelling_closes_the_connection(server):
    server.answer = lambda _body: (200, iter(lambda: event("word " * 1000), ""))
    remote = RemoteModel(server.url)

    async def work():
        reply = remote.start(HELLO, Sampling())
        while not reply.text:
            await asyncio.sleep(0.01)
        reply.cancel()
        await asyncio.sleep(0.1)
        return reply

    assert asyncio.run(work()).done
    assert server.hung_up.wait(10)
    assert remote.active == set()


def test_a_reply_that_is_cancelled_before_its_task_runs_leaves_the_queue(server):
    server.answer = lambda _body: (200, [event("Hi", finish_reason="stop")])

    async def ask():
        remote = RemoteModel(server.url)
        remote.start(HELLO, Sampling()).cancel()
        second = remote.start(HELLO, Sampling())
        await second.task
        return second.read()[0], remote.waiting, remote.active

    assert asyncio.run(asyncio.wait_for(ask(), 20)) == ({"content": "Hi"}, [], set())


def test_as_many_are_asked_for_and_wait_as_are_let_in(server):
    released = threading.Event()
    server.answer = lambda _body: (200, [event("好", finish_reason="stop")] if released.wait(10) else [])
    remote = RemoteModel(server.url)
    remote.max_active, remote.max_waiting = 1, 1

    async def work():
        first = remote.start(HELLO, Sampling())
        await asyncio.sleep(0.05)
        second = remote.start(HELLO, Sampling())
        with pytest.raises(BusyError):
            remote.start(HELLO, Sampling())
        places = first.queue_position, second.queue_position
        released.set()
        while not (first.done and second.done):
            await asyncio.sleep(0.01)
        return places, [reply.text for reply in (first, second)]

    assert asyncio.run(work()) == ((-1, 0), ["好", "好"])


@pytest.mark.parametrize(
    "token", ["<|im_start|>", "</s>", "<s>", "[INST]", "[/INST]", "<<SYS>>", "<start_of_turn>", "<think>", "<｜User｜>"]
)
def test_text_that_looks_like_a_control_token_is_broken(token):
    sent = break_control_tokens(f"a{token}b")
    assert token not in sent and sent.replace(JOINER, "") == f"a{token}b"


def test_ordinary_text_is_sent_as_it_is():
    text = "a < b, x[0], <b>bold</b>, |Human|: 1 <| 2, std::vector<s_t>"
    assert break_control_tokens(text) == text


def test_no_conversation_may_fill_the_batch_that_all_share(chat, monkeypatch):
    monkeypatch.setattr(models, "MAX_CONTEXT", 400)
    turns = [Turn("字词" * 50, ({"content": "好"},))] * 6
    kept = LocalModel(chat).fit(to_messages([*turns, Turn("完")], 0), Sampling())
    assert len(chat.prompt_ids(kept)) + 100 <= 400 and kept[-1]["content"] == "完"
    with pytest.raises(ValueError, match="more than 400 tokens"):
        LocalModel(chat).fit([{"role": "user", "content": "字词" * 400}], Sampling())


def test_a_pending_reply_shows_the_queue_then_its_tokens_and_speed():
    class Started:
        queue_position, error, done = 2, None, False

        def read(self):
            return {"content": "好" if self.queue_position < 0 else ""}, False, 3 * (self.queue_position < 0)

    pending = PendingReply(Started(), num_left_out=4)
    pending.update()
    assert [pending.status(language) for language in (True, False)] == [
        "排队中，前面还有 2 个",
        "waiting, 2 before you",
    ]
    pending.started.queue_position = -1
    pending.update()
    pending.seconds = 1.5
    assert pending.status(True) == "3 个词元 · 每秒 2.0 个 · 上下文已满，最早的 4 轮已略去"
    pending.started.done = True
    assert pending.status(False) == (
        "3 tokens · 2.0 tokens/s · the length limit was reached · context full, oldest 4 turns left out"
    )
    assert pending.status(None).startswith("3 个词元 · 每秒 2.0 个 · 到了长度上限 · ")


THINKING_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% else %}<think>
{% endif %}{% endif %}"""


def test_the_switch_of_a_template_reaches_the_prompt_and_its_thought_is_apart(chat, tiny_base, tmp_path):
    folder = shutil.copytree(tiny_base("qwen2"), tmp_path / "model")
    (folder / "chat_template.jinja").write_text(THINKING_TEMPLATE)
    assert not LocalModel(chat).has_thinking_switch
    model = LocalModel(load_chat(str(folder), chat_format="base"))
    assert model.has_thinking_switch and model.thinks_by_default
    ends, decode = {}, model.chat.renderer.tokenizer.decode
    for thinking in (True, False, None):
        started = model.start([{"role": "user", "content": "一"}], Sampling(max_new_tokens=1), thinking=thinking)
        model.chat.decoder.wait(started.request)
        ends[thinking] = decode(started.request.prompt).split("assistant\n")[-1]
    assert ends == {True: "<think>\n", False: "<think>\n\n</think>\n\n", None: "<think>\n"}
    request = SimpleNamespace(prompt=model.chat.prompt_ids([{"role": "user", "content": "一"}]), done=True)
    request.ids = model.chat.renderer.tokenizer("so\n</think>\n\n好", add_special_tokens=False)["input_ids"]
    request.cancel = None
    assert LocalReply(model.chat, request).read()[0] == {"content": "好", "reasoning_content": "so"}


def test_the_switch_is_on_at_first_as_the_template_or_the_training_left_it(tiny_base, tmp_path):
    folder = shutil.copytree(tiny_base("qwen2"), tmp_path / "model")
    off_unless_asked = THINKING_TEMPLATE.replace(
        "enable_thinking is defined and enable_thinking is false", "not thinking"
    )
    (folder / "chat_template.jinja").write_text(off_unless_asked)
    model = LocalModel(load_chat(str(folder), chat_format="base"))
    assert (model.has_thinking_switch, model.thinks_by_default) == (True, False)
    model.chat.renderer.thinking = True
    assert model.thinks_by_default
