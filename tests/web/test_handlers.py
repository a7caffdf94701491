"""The event handlers: the effect of a question, an edit, an undo and a like on the conversation."""

import asyncio
import json
import shutil
from types import SimpleNamespace

import gradio as gr
import pytest

from sft.chat.reply import load_chat
from sft.chat.sampling import Sampling
from sft.opendata import __main__ as opendata
from sft.opendata.conversation import check_messages
from sft.web import handlers as handlers_module
from sft.web.handlers import Handlers
from sft.web.models import LocalModel
from sft.web.panes import PendingReply
from sft.web.turns import Turn, num_questions, to_messages, to_record, to_tools

TURNS = [Turn("一", ({"content": "二"},)), Turn("三")]
ANSWERED = [TURNS[0], Turn("三", ({"content": "四"},))]


def test_a_question_that_was_stopped_goes_back_into_the_box(new_handlers):
    box, turns, page = new_handlers().end_reply(None, TURNS)
    assert (box.value, len(page), turns) == ("三", 1, TURNS[:1])
    assert new_handlers().end_reply(None, ANSWERED)[1] == ANSWERED


def test_undo_takes_the_last_exchange_back(new_handlers):
    box, turns, page = new_handlers().undo(None, ANSWERED)
    assert (box.value, len(page), turns) == ("三", 1, TURNS[:1])
    assert new_handlers().undo(None, [])[1] == []


def test_saying_again_drops_the_last_reply(new_handlers):
    assert new_handlers().ask_again(None, ANSWERED, "")[1] == TURNS


def edit(index: object, value: object):
    return gr.EventData(None, {"index": index, "value": value})


def test_an_edited_question_replaces_the_turns_after_it(new_handlers):
    made = new_handlers()
    assert made.ask_edited(None, ANSWERED, "", edit(1, "a <b>"))[1] == [TURNS[0], Turn("a <b>")]
    assert made.ask_edited(None, ANSWERED, "", edit(0, "new"))[1] == [Turn("new")]
    for index in (99, -1, "0", None, True, 1.0):
        with pytest.raises(gr.Error, match="no such message"):
            made.ask_edited(None, ANSWERED, "", edit(index, "x"))


def test_an_example_is_asked(new_handlers):
    assert new_handlers().ask_example(None, [], "", edit(3, None))[1] == [Turn("What is 8+9?")]


def test_a_full_queue_refuses_at_its_own_limit(chat, new_handlers):
    made = new_handlers()
    model = made.models["tiny"] = LocalModel(chat, max_waiting=30)
    try:
        chat.decoder.waiting.extend([None] * 29)
        assert made.ask(None, "一", [], "")[1] == [Turn("一")]
        chat.decoder.waiting.append(None)
        assert model.is_full
        with pytest.raises(gr.Error, match="too many are waiting"):
            made.ask(None, "一", [], "")
    finally:
        chat.decoder.waiting.clear()


def test_characters_are_counted_before_anything_is_tokenised(chat, new_handlers, monkeypatch):
    monkeypatch.setattr(type(chat), "prompt_ids", lambda *_: pytest.fail("tokenised"))
    with pytest.raises(gr.Error, match="8,000 characters"):
        new_handlers().ask(None, "a" * 1_000_000, [], "")


def test_a_full_context_loses_its_oldest_turns_and_the_page_says_so(chat, new_handlers, monkeypatch):
    turns = [Turn(f"{index} " + "字词" * 300, ({"content": "好"},)) for index in range(6)]
    messages = to_messages([*turns, Turn("完")], 0, "系统")
    kept = LocalModel(chat).fit(messages, Sampling(max_new_tokens=100))
    assert kept[0] == messages[0] and kept[1]["role"] == "user" and kept[-1] == messages[-1]
    assert 1 < num_questions(kept) < 7
    assert len(chat.prompt_ids(kept)) + 100 <= 2048
    with pytest.raises(ValueError, match="context window"):
        LocalModel(chat).fit([{"role": "user", "content": "字词" * 2000}], Sampling())

    made = new_handlers()
    settings = {"sampling": Sampling(max_new_tokens=1), "thinking": None, "tools": None}
    pending = asyncio.run(made._start(None, made.models["tiny"], messages, **settings))
    chat.decoder.wait(pending.started.request)
    pending.update()
    left = 7 - num_questions(kept)
    assert f"context full, oldest {left} turns left out" in pending.status(False)
    assert f"上下文已满，最早的 {left} 轮已略去" in pending.status(True)


CALLED = Turn("热吗", ({"tool_calls": [{"type": "function", "function": {"name": "t", "arguments": {"c": "巴黎"}}}]},))
TOOLS = '[{"name": "t", "parameters": {"type": "object", "properties": {"c": {"type": "string"}}}}]'


def test_a_message_behind_a_call_is_its_result(new_handlers):
    _box, turns, page = new_handlers().ask(None, "18 度", [CALLED], "", TOOLS)
    assert to_messages(turns, 0)[-1] == {"role": "tool", "name": "t", "content": "18 度"}
    assert "<small>结果 · Result · t</small>" in page[-1]


def test_results_of_several_calls_are_typed_one_on_a_line(new_handlers):
    both = Turn(
        "热吗",
        ({"tool_calls": [{**call, "id": str(n)} for n, call in enumerate(2 * CALLED.replies[0]["tool_calls"])]},),
    )
    with pytest.raises(gr.Error, match="waits for the results of 2 calls"):
        new_handlers().ask(None, "18", [both], "", TOOLS)
    turns = new_handlers().ask(None, "18\n 20", [both], "", TOOLS)[1]
    assert [(m["content"], m["tool_call_id"]) for m in to_messages(turns, 0)[2:]] == [("18", "0"), ("20", "1")]


@pytest.mark.parametrize("text", ["{", "[1]", '[{"description": "no name"}]', '"t"'])
def test_tools_that_are_none_are_refused_in_one_line(text, new_handlers):
    with pytest.raises(gr.Error, match=r"tools: [^\n]+$"):
        new_handlers().ask(None, "a", [], "", text)


def test_the_pages_tools_are_in_the_prompt_and_in_the_export(tiny_base, new_handlers):
    chat = load_chat(str(tiny_base("qwen2")), chat_format="chatml")
    model = LocalModel(chat)
    tools = to_tools(TOOLS)
    started = model.start([{"role": "user", "content": "热吗"}], Sampling(max_new_tokens=1), tools=tools)
    chat.decoder.wait(started.request)
    assert '{"type": "function", "function": {"name": "t"' in chat.renderer.tokenizer.decode(started.request.prompt)
    record = to_record(to_messages([CALLED, Turn("18", ({"content": "十八度"},))], 0), tools)
    assert record["tools"] == tools
    assert [message["role"] for message in record["messages"]] == ["user", "assistant", "tool", "assistant"]
    check_messages(record["messages"])


def test_a_lone_surrogate_is_replaced(new_handlers):
    assert new_handlers().ask(None, "a\ud800b", [], "")[1] == [Turn("a?b")]


def test_an_empty_message_is_refused(new_handlers):
    for empty in (" \n", None):
        with pytest.raises(gr.Error, match="type a message first"):
            new_handlers().ask(None, empty, [], "")


def test_likes_are_training_data_and_dislikes_are_kept_apart(chat, new_handlers, tmp_path):
    page = new_handlers(feedback=tmp_path / "likes.jsonl")
    request = SimpleNamespace(session_hash="s", client=SimpleNamespace(host="127.0.0.1"), headers={})
    like = page.like_in(0)
    for index, liked in ((1, True), (0, False), (1, "other")):
        like(request, ANSWERED, "系统", gr.EventData(None, {"index": index, "liked": liked}))
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
    opendata.main([str(tmp_path / "likes.jsonl"), "--output", str(tmp_path / "data"), "--eval_share", "0"])
    kept = [json.loads(line) for line in (tmp_path / "data" / "train.json").read_text().splitlines()]
    assert [message["content"] for record in kept for message in record["messages"]] == ["系统", "一", "二", "三", "四"]
    _ids, labels = chat.renderer.render(kept[0]["messages"])[:2]
    assert chat.renderer.tokenizer.decode([label for label in labels if label >= 0]).strip().startswith("四")


def test_a_reply_that_was_cut_or_stopped_is_not_trained(new_handlers, tmp_path):
    """Its end would be learned as the end of a whole reply."""
    read = lambda ended: lambda: ({"content": "四"}, ended, 1)  # noqa: E731
    started = [SimpleNamespace(error=None, done=True, queue_position=-1, read=read(ended)) for ended in (False, True)]
    cut, whole = (PendingReply(reply).update() for reply in started)
    assert (cut, whole) == ({"content": "四", "train": False}, {"content": "四"})
    turns = [TURNS[0], Turn("三", (cut,))]
    assert to_record(to_messages(turns, 0))["messages"][-1] == {"role": "assistant", **cut}
    page = new_handlers(feedback=tmp_path / "likes.jsonl")
    request = SimpleNamespace(session_hash="s", client=SimpleNamespace(host="127.0.0.1"), headers={})
    with pytest.raises(gr.Error, match="not noted: the reply was cut or stopped"):
        page.like_in(0)(request, turns, "", gr.EventData(None, {"index": 1, "liked": True}))
    assert not (tmp_path / "likes.jsonl").exists()


def test_the_file_of_likes_has_an_end(chat, new_handlers, tmp_path, monkeypatch):
    monkeypatch.setattr(handlers_module, "MAX_FEEDBACK_BYTES", 10)
    page = new_handlers(feedback=tmp_path / "likes.jsonl")
    for _ in range(3):
        page.write_feedback([{"role": "user", "content": "一"}, {"role": "assistant", "content": "二"}], True)
    assert len((tmp_path / "likes.jsonl").read_text().splitlines()) == 1


def test_the_words_of_a_chat_template_that_refuses_are_shown(tiny_base, tmp_path):
    folder = shutil.copytree(tiny_base("qwen2"), tmp_path / "model")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    model = LocalModel(load_chat(str(folder), chat_format="base"))
    messages = [{"role": "system", "content": "简短"}, {"role": "user", "content": "一"}]
    settings = {"sampling": Sampling(max_new_tokens=1), "thinking": None, "tools": None}
    with pytest.raises(gr.Error, match="the chat template refuses it: no system role"):
        asyncio.run(Handlers({"tiny": model})._start(None, model, messages, **settings))
