"""Replies: batched as alone, streamed as whole, stopped when told."""

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
from typing import ClassVar

import pytest
import torch

from sft.chat import reply as chat_module
from sft.chat.reply import GREEDY, Chat, Reply, Sampling, load_chat
from sft.format.render import Renderer
from tests.conftest import ROOT

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
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n{"prompt": "%s"}\n' % ("字" * 3000))
    with pytest.raises(SystemExit, match=r"in\.jsonl line 2: the conversation has \d,\d+ tokens"):
        chat_module.main(arguments)
    with pytest.raises(SystemExit, match=r"--batch_size and --max_new_tokens must be at least 1; --top_p 0\.0: must"):
        chat_module.main([*arguments, "--batch_size", "0", "--top_p", "0"])
    with pytest.raises(SystemExit, match="--input goes without --message; --device and --device_map: give one"):
        chat_module.main([*arguments, "--message", "a", "--device", "cpu", "--device_map", "auto"])
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


def test_replies_of_a_file_are_the_same_alone_and_drawn_by_seed_and_place(tiny_chat):
    warm = Sampling(temperature=1.0, max_new_tokens=6)
    asked_all = [(place, asked(question)) for place, question in enumerate(QUESTIONS * 3)]
    together = dict(tiny_chat.reply_each(asked_all, warm, at_once=4, seed=1))
    assert together == {k: r for one in asked_all for k, r in tiny_chat.reply_each([one], warm, at_once=4, seed=1)}
    assert together != dict(tiny_chat.reply_each(asked_all, warm, at_once=4, seed=2))
    assert together[0] != together[3]


def test_another_checkpoint_is_known_by_its_weights(tiny_base):
    chat = load_chat(str(tiny_base("qwen2")))
    before = chat_module.identity(chat.model)
    assert before == chat_module.identity(load_chat(str(tiny_base("qwen2"))).model)
    with torch.no_grad():
        chat.model.lm_head.weight *= 1.001
    assert chat_module.identity(chat.model) != before


def test_a_stopped_file_is_not_gone_on_with_by_another_model_or_sampling(tiny_chat, tiny_base, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": question}) + "\n" for question in QUESTIONS))
    source, output = str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")

    def broken(questions, *_arguments, **_options):
        raise KeyboardInterrupt

    stopped = Chat(tiny_chat.model, tiny_chat.renderer)
    stopped.reply_each = broken
    with pytest.raises(KeyboardInterrupt):
        chat_module.reply_to_file(stopped, source, output, sampling=SHORT)
    with pytest.raises(ValueError, match="of a run with another sampling; go on with that run's own command"):
        chat_module.reply_to_file(tiny_chat, source, output, sampling=GREEDY)
    retrained = load_chat(str(tiny_base("qwen2")))
    with torch.no_grad():
        retrained.model.lm_head.weight *= 1.001
    with pytest.raises(ValueError, match="of a run with another model; go on with that run's own command"):
        chat_module.reply_to_file(retrained, source, output, sampling=SHORT)
    assert chat_module.reply_to_file(tiny_chat, source, output, sampling=SHORT) == 3
    with pytest.raises(ValueError, match="is the file of questions"):
        chat_module.reply_to_file(tiny_chat, output, output, sampling=SHORT, overwrite=True)


class Loaded:
    """Stands for a model class; tells what it was asked for."""

    asked: ClassVar[dict] = {}

    def eval(self):
        return self

    def to(self, place):
        return Loaded.asked.update(to=place) or self

    @classmethod
    def from_pretrained(cls, path, **options):
        cls.asked = options
        return cls()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"dtype": torch.float32, "to": "cpu"}),
        ({"dtype": "bfloat16"}, {"dtype": torch.bfloat16, "to": "cpu"}),
        ({"device_map": "auto"}, {"dtype": torch.float32, "device_map": "auto"}),
    ],
)
def test_where_and_how_a_model_is_loaded_reaches_transformers(options, expected, tiny_base, monkeypatch):
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


def test_what_this_machine_has_not_is_one_line(tiny_base):
    arguments = ["--model_path", str(tiny_base("qwen2")), "--message", "a"]
    for flags, text in (
        (["--load_in_4bit"], "--load_in_4bit needs a CUDA GPU and bitsandbytes"),
        (["--device", "cuda"], "--device cuda: this machine shows 0 CUDA GPUs"),
        (["--device", "gpu"], "--device gpu: no such device; use cpu, cuda or cuda:1"),
    ):
        with pytest.raises(SystemExit, match=text):
            chat_module.main([*arguments, *flags])


def test_a_model_spread_by_device_map_replies_as_one_loaded_at_once(tiny_base, tiny_chat):
    spread = load_chat(str(tiny_base("qwen2")), device_map="auto")
    assert spread.reply_batch([asked(q) for q in QUESTIONS], SHORT) == tiny_chat.reply_batch(
        [asked(q) for q in QUESTIONS], SHORT
    )


def test_the_base_is_found_by_run_json_or_adapter_and_shown_beside_the_tuned(tiny_base, tmp_path, capsys):
    tuned = shutil.copytree(tiny_base("qwen2"), tmp_path / "model")
    with pytest.raises(ValueError, match=r"no run\.json or adapter_config\.json in it names the base"):
        chat_module.base_of(str(tuned))
    (tuned / "adapter_config.json").write_text('{"base_model_name_or_path": "from/adapter"}')
    assert chat_module.base_of(str(tuned)) == "from/adapter"
    (tuned / "adapter_config.json").unlink()
    (tuned / "run.json").write_text(json.dumps({"model": str(tiny_base("qwen2"))}))
    arguments = ["--model_path", str(tuned), "--base_path", "auto", "--message", "你好", "--message", "Hello"]
    chat_module.main([*arguments, "--max_new_tokens", "3", "--temperature", "0"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith(("> ", "[base]", "[tuned]"))] == [
        *("> 你好", "[base]", "[tuned]", "> Hello", "[base]", "[tuned]")
    ]


def test_probabilities_are_shown_without_colour_in_a_pipe(tiny_base, capsys):
    arguments = ["--model_path", str(tiny_base("qwen2")), "--message", "你好", "--show_probabilities"]
    chat_module.main([*arguments, "--max_new_tokens", "12"])
    shown = capsys.readouterr().out
    assert "> 你好\n" in shown and "⟦" in shown and shown.count("; else ") == 3 and "\033" not in shown


def test_commands_of_the_terminal_are_no_questions(tiny_chat, monkeypatch, capsys):
    typed = iter(["Hello", "/system Be brief.", "字" * 3000, "/clear", "/etc/passwd?", "/quit", "never"])
    monkeypatch.setattr("builtins.input", lambda _prompt="": next(typed))
    dialogue = chat_module.Dialogue({"": tiny_chat}, sampling=SHORT, interruptible=True)
    chat_module.talk(dialogue)
    system, question, reply = dialogue.messages("")
    assert system == {"role": "system", "content": "Be brief."}
    assert question == {"role": "user", "content": "/etc/passwd?"} and reply["role"] == "assistant"
    assert "the model's context window 2,048; shorten it; /clear begins anew]" in capsys.readouterr().out
    assert next(typed) == "never"


def test_control_c_stops_a_reply_and_keeps_what_was_said(tiny_chat, monkeypatch, capsys):
    def interrupted(_self, _messages, _sampling):
        yield Reply("Hel", False, 1)
        raise KeyboardInterrupt

    monkeypatch.setattr(Chat, "stream_reply", interrupted)
    dialogue = chat_module.Dialogue({"": tiny_chat}, interruptible=True)
    dialogue.ask("你好")
    assert capsys.readouterr().out == "Hel\n[stopped]\n"
    assert dialogue.messages("") == [*asked("你好"), {"role": "assistant", "content": "Hel"}]
    with pytest.raises(KeyboardInterrupt):
        chat_module.Dialogue({"": tiny_chat}).ask("你好")


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


def start(*arguments: str, **options) -> subprocess.Popen:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "INPUTRC": "/dev/null"}
    return subprocess.Popen([sys.executable, "-m", "sft.chat", *arguments], cwd=ROOT, env=environment, **options)


@pytest.mark.slow
def test_a_batch_that_was_killed_goes_on_and_answers_everything_once(tiny_base, tmp_path):
    questions = [f"{question} {number}" for number in range(40) for question in QUESTIONS]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions))
    arguments = ["--model_path", str(tiny_base("qwen2")), "--input", str(tmp_path / "in.jsonl")]
    arguments += ["--temperature", "1", "--max_new_tokens", "24", "--batch_size", "4", "--output"]
    partial, kept = tmp_path / "out.jsonl.partial", []
    for wanted in (5, 30):
        process = start(*arguments, str(tmp_path / "out.jsonl"), stderr=subprocess.DEVNULL)
        while process.poll() is None and (not partial.exists() or partial.read_bytes().count(b"\n") <= wanted):
            os.sched_yield()
        process.kill()
        process.wait()
        lines = partial.read_bytes().splitlines(keepends=True)
        assert not (tmp_path / "out.jsonl").exists() and wanted < len(lines) < len(questions)
        assert lines[: len(kept)] == kept
        kept = [line for line in lines if line.endswith(b"\n")]
    done = start(*arguments, str(tmp_path / "out.jsonl"), stderr=subprocess.PIPE)
    _, told = done.communicate()
    assert done.returncode == 0 and f" {len(kept) - 1}/120 ".encode() in told
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer["messages"][0]["content"] for answer in answers] == questions
    for line in kept[1:]:
        answer = json.loads(line)
        assert answers[answer.pop("position")] == answer
    assert start(*arguments, str(tmp_path / "whole.jsonl"), stderr=subprocess.DEVNULL).wait() == 0
    assert (tmp_path / "whole.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "whole.jsonl"]


class Terminal:
    """A process of sft.chat in a terminal of its own."""

    def __init__(self, *arguments: str):
        ours, theirs = pty.openpty()
        self.process = start(*arguments, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
        os.close(theirs)
        self.ours, self.text = ours, ""

    def wait_for(self, text: str) -> str:
        """Read until `text` was shown; return what came before it."""
        while text not in self.text:
            self.read()
        before, _, self.text = self.text.partition(text)
        return before

    def read(self) -> None:
        """Wait until something more is shown."""
        assert select.select([self.ours], [], [], 120)[0], self.text
        self.text += os.read(self.ours, 4096).decode(errors="replace").replace("\r\n", "\n")

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())


@pytest.mark.slow
def test_a_terminal_takes_a_paste_as_one_message_and_survives_control_c(tiny_base):
    terminal = Terminal("--model_path", str(tiny_base("qwen2")), "--max_new_tokens", "1900", "--temperature", "0")
    terminal.wait_for("? ")
    terminal.type("one\ntwo\nthree\n")
    terminal.wait_for("three\n")
    terminal.read()  # the reply has begun
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait_for("\n[stopped]\n")
    terminal.wait_for("? ")
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait_for("/clear begins anew")
    terminal.wait_for("? ")
    terminal.type("\x04")
    assert terminal.process.wait() == 0
    os.close(terminal.ours)


@pytest.mark.parametrize(
    ("error", "told"),
    [(KeyboardInterrupt(), "stopped"), (RuntimeError("CUDA out of memory"), "out of memory; lower --batch_size")],
)
def test_whatever_ends_a_batch_says_that_the_same_command_goes_on(error, told, tiny_base, tmp_path, monkeypatch):
    def ended(*_arguments, **_options):
        raise error

    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    arguments = ["--model_path", str(tiny_base("qwen2")), "--input", str(tmp_path / "in.jsonl"), "--output"]
    with monkeypatch.context() as patched, pytest.raises(SystemExit, match=f"{told}.*, and the same command goes on"):
        patched.setattr(Chat, "reply_each", ended)
        chat_module.main([*arguments, str(tmp_path / "out.jsonl")])
    chat_module.main([*arguments, str(tmp_path / "out.jsonl"), "--max_new_tokens", "512"])
    assert (tmp_path / "out.jsonl").exists()
