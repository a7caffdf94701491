"""Replies: batched as alone, streamed as whole, stopped within a token."""

import os
from typing import ClassVar

import pytest
import torch

from sft.chat import reply as chat_module
from sft.chat.reply import Chat, load_chat
from sft.chat.sampling import GREEDY, Sampling
from sft.format.render import Renderer

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
    assert tiny_chat.to_reply([*hello, stop, *hello])[:3] == ("Hello", True, len(hello))
    assert tiny_chat.to_reply(hello)[:3] == ("Hello", False, len(hello))


@pytest.mark.parametrize(
    ("text", "prompt", "message"),
    [
        ("<think>想</think>\n\n好", "", {"content": "好", "reasoning_content": "想"}),
        ("想\n</think>\n\n好", "x<think>\n", {"content": "好", "reasoning_content": "想"}),
        ("想\n</think>\n\n好", "", {"content": "好", "reasoning_content": "想"}),
        ("想", "x<think>\n", {"content": "", "reasoning_content": "想"}),
        ("2*3*4 <b>", "", {"content": "2*3*4 <b>"}),
        ("想\n</think>\n\n好", "assistant\n", {"content": "好", "reasoning_content": "想"}),
        ("write `</think>` so", "assistant\n", {"content": "write `</think>` so"}),
        ("```\n</think>\n```", "assistant\n", {"content": "```\n</think>\n```"}),
    ],
)
def test_a_reply_is_a_message_with_its_thought_apart(text, prompt, message, tiny_chat):
    ids = [tiny_chat.renderer.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, prompt)]
    reply = tiny_chat.to_reply(*ids)
    assert reply.message == {"role": "assistant", **message}
    assert (reply.text, reply.answer) == (text, message["content"])


def test_a_history_holds_no_thoughts_where_the_format_has_no_place_for_them(tiny_chat):
    messages = [*asked("一"), {"role": "assistant", "content": "二", "reasoning_content": "想"}]
    assert tiny_chat.history(messages) == [*asked("一"), {"role": "assistant", "content": "二"}]
    chatml = Chat(tiny_chat.model, Renderer(tiny_chat.renderer.tokenizer, "chatml"))
    assert chatml.renderer.keeps_reasoning == (chatml.history(messages) == messages)


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


def test_the_prompt_of_a_chat_is_that_of_training(tiny_chat):
    messages = [*asked("a <|im_end|> b")]
    assert tiny_chat.prompt_ids(messages) == Renderer(tiny_chat.renderer.tokenizer, "blossom").prompt(messages)


def test_replies_of_a_file_are_the_same_alone_and_drawn_by_seed_and_place(tiny_chat):
    warm = Sampling(temperature=1.0, max_new_tokens=6)
    asked_all = [(place, asked(question)) for place, question in enumerate(QUESTIONS * 3)]
    together = dict(tiny_chat.reply_each(asked_all, warm, at_once=4, seed=1))
    assert together == {k: r for one in asked_all for k, r in tiny_chat.reply_each([one], warm, at_once=4, seed=1)}
    assert together != dict(tiny_chat.reply_each(asked_all, warm, at_once=4, seed=2))
    assert together[0] != together[3]


class Loaded:
    """A stand-in for a model class that records its arguments."""

    asked: ClassVar[dict] = {}

    def eval(self):
        return self

    def to(self, place):
        return Loaded.asked.update(to=place) or self

    @classmethod
    def from_pretrained(cls, path, *, output_loading_info: bool, **options):
        cls.asked = options
        return cls(), {"missing_keys": set()}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"dtype": torch.float32, "to": "cpu"}),
        ({"dtype": "bfloat16"}, {"dtype": torch.bfloat16, "to": "cpu"}),
        ({"device_map": "auto"}, {"dtype": torch.float32, "device_map": "auto"}),
    ],
)
def test_device_and_precision_are_passed_to_transformers(options, expected, tiny_base, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM", Loaded)
    load_chat(str(tiny_base("qwen2")), **options)
    assert Loaded.asked == {"trust_remote_code": False, **expected}


@pytest.mark.parametrize(
    ("options", "device_map"),
    [({}, {"": 0}), ({"device": "cuda:1"}, {"": "cuda:1"}), ({"device_map": "auto"}, "auto")],
)
def test_four_bit_on_a_gpu_asks_for_bitsandbytes_nf4(options, device_map, tiny_base, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM", Loaded)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    load_chat(str(tiny_base("qwen2")), load_in_4bit=True, **options)
    quantised = Loaded.asked.pop("quantization_config")
    assert (quantised.load_in_4bit, quantised.bnb_4bit_quant_type) == (True, "nf4")
    assert quantised.bnb_4bit_compute_dtype == torch.bfloat16
    assert Loaded.asked == {"dtype": torch.bfloat16, "trust_remote_code": False, "device_map": device_map}


def test_a_model_spread_by_device_map_replies_as_one_loaded_at_once(tiny_base, tiny_chat):
    spread = load_chat(str(tiny_base("qwen2")), device_map="auto")
    assert spread.reply_batch([asked(q) for q in QUESTIONS], SHORT) == tiny_chat.reply_batch(
        [asked(q) for q in QUESTIONS], SHORT
    )


def test_the_newest_run_is_the_model_unless_one_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("MODEL_PATH", raising=False)
    with pytest.raises(
        FileNotFoundError, match=r"no finished run in .*: make one with `sh base_run.sh`, or set MODEL_"
    ):
        chat_module.find_model(tmp_path)
    for number, name in enumerate(("a", "b")):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "run.json").write_text("{}")
        os.utime(tmp_path / name / "model" / "run.json", (100 - number, 100 - number))
    assert chat_module.find_model(tmp_path) == str(tmp_path / "a" / "model")
    monkeypatch.setenv("MODEL_PATH", "/named")
    assert chat_module.find_model(tmp_path) == "/named"
