"""Replies: batched as alone, streamed as whole, stopped when told."""

import json

import pytest
import torch

from sft import chat as chat_module
from sft.chat import GREEDY, Chat, Sampling, load_chat, to_prompt
from sft.chat_format import Renderer
from sft.conversation import RecordError

QUESTIONS = ["你好", "Hello, who are you?", "1+1等于几？"]
SHORT = Sampling(temperature=0.0, repetition_penalty=1.0, max_new_tokens=12)


def asked(question: str) -> list[dict]:
    return [{"role": "user", "content": question}]


@pytest.fixture(scope="module")
def tiny_chat(tiny_base) -> Chat:
    return load_chat(str(tiny_base("qwen2")))


def test_a_batch_replies_as_each_question_alone(family, tiny_base):
    chat = load_chat(str(tiny_base(family)))
    together = chat.reply_batch([asked(question) for question in QUESTIONS], SHORT)
    assert together == [chat.reply(asked(question), SHORT) for question in QUESTIONS]
    assert all(0 < reply.num_tokens <= 12 for reply in together)


def test_the_stream_grows_and_ends_as_the_whole_reply(tiny_chat):
    *growing, last = tiny_chat.stream_reply(asked("你好"), SHORT)
    assert last == tiny_chat.reply(asked("你好"), SHORT)
    counts = [reply.num_tokens for reply in growing]
    assert counts == sorted(set(counts)) and counts[-1] == 12
    assert all("\ufffd" not in reply.text[-1:] for reply in growing)


def test_closing_the_stream_ends_the_models_work_within_two_tokens(tiny_chat, monkeypatch):
    steps = []
    forward = type(tiny_chat.model).forward
    monkeypatch.setattr(
        type(tiny_chat.model),
        "forward",
        lambda self, *args, **kwargs: steps.append(1) or forward(self, *args, **kwargs),
    )
    stream = tiny_chat.stream_reply(asked("你好"), Sampling(temperature=0.0, max_new_tokens=2000))
    for _ in range(3):
        reply = next(stream)
    before = len(steps)
    stream.close()
    assert reply.num_tokens >= 3
    assert before <= len(steps) <= before + 2


def test_an_error_in_the_model_reaches_the_reader_of_the_stream(tiny_chat, monkeypatch):
    def broken(self, *args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(tiny_chat.model), "forward", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(tiny_chat.stream_reply(asked("你好"), SHORT))


def test_a_reply_ends_at_the_stop_token_and_says_so(tiny_chat):
    stop = tiny_chat.renderer.stop_ids[0]
    hello = tiny_chat.renderer.tokenizer("Hello", add_special_tokens=False)["input_ids"]
    assert tiny_chat.to_reply([*hello, stop, *hello]) == ("Hello", True, len(hello))
    assert tiny_chat.to_reply(hello) == ("Hello", False, len(hello))


def test_sampling_is_repeatable_with_a_seed_and_warm_by_default(tiny_chat):
    replies = []
    for _ in range(2):
        torch.manual_seed(1)
        replies.append(tiny_chat.reply(asked("你好"), Sampling(temperature=1.0, max_new_tokens=8)))
    assert replies[0] == replies[1]
    assert Sampling() == Sampling(0.5, 0.85, 50, 1.05, 512)
    assert GREEDY.temperature == 0.0


def test_a_conversation_longer_than_the_context_window_is_refused_with_the_numbers(tiny_chat):
    with pytest.raises(
        ValueError, match=r"the conversation has \d,\d+ tokens, the model's context window 2,048; shorten it"
    ):
        tiny_chat.reply(asked("字" * 3000), SHORT)


def test_what_a_question_file_may_hold():
    assert to_prompt({"prompt": "你好"}) == asked("你好")
    assert to_prompt({"instruction": "你好", "input": "", "output": ""}) == asked("你好")
    assert to_prompt({"instruction": "Sum", "input": "1 2", "output": "3"}) == asked("Sum\n1 2")
    with_reply = {"messages": [*asked("a"), {"role": "assistant", "content": "b"}]}
    assert to_prompt(with_reply) == asked("a")
    with pytest.raises(RecordError):
        to_prompt({"messages": [{"role": "assistant", "content": "b"}]})


def test_the_command_line_answers_a_file_in_batches(tiny_base, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": question}) + "\n" for question in QUESTIONS))
    arguments = ["--model_path", str(tiny_base("qwen2")), "--input", str(tmp_path / "in.jsonl"), "--batch_size", "2"]
    arguments += ["--output", str(tmp_path / "out.jsonl"), "--max_new_tokens", "4", "--temperature", "0"]
    chat_module.main(arguments)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["messages"][0]["content"] for line in lines] == QUESTIONS
    assert all(line["messages"][1]["role"] == "assistant" and line["num_tokens"] <= 4 for line in lines)
    with pytest.raises(SystemExit, match=r"sft\.chat: --output .*out\.jsonl: exists; add --overwrite to replace it"):
        chat_module.main(arguments)


def test_a_bad_line_leaves_no_file_behind_and_a_batch_of_none_is_refused(tiny_base, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n{"nothing": 1}\n')
    arguments = ["--model_path", str(tiny_base("qwen2")), "--input", str(tmp_path / "in.jsonl")]
    arguments += ["--output", str(tmp_path / "out.jsonl"), "--max_new_tokens", "2"]
    with pytest.raises(SystemExit, match=r"in\.jsonl line 2: "):
        chat_module.main(arguments)
    with pytest.raises(SystemExit, match="--batch_size and --max_new_tokens must be at least 1"):
        chat_module.main([*arguments, "--batch_size", "0"])
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_the_command_line_keeps_several_turns_in_one_conversation(tiny_base, capsys):
    arguments = ["--model_path", str(tiny_base("qwen2")), "--message", "你好", "--message", "再说一遍"]
    chat_module.main([*arguments, "--max_new_tokens", "4"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "> 你好"
    assert "> 再说一遍" in lines


def test_a_wrong_model_path_is_one_line(tmp_path):
    with pytest.raises(
        SystemExit, match=r"sft\.chat: .*/nowhere: no such folder; name a local model folder or a hub model"
    ):
        chat_module.main(["--model_path", str(tmp_path / "nowhere"), "--message", "x"])


def test_the_prompt_of_a_chat_is_that_of_training(tiny_chat):
    messages = [*asked("a <|im_end|> b")]
    assert tiny_chat.prompt_ids(messages) == Renderer(tiny_chat.renderer.tokenizer, "blossom").prompt(messages)
