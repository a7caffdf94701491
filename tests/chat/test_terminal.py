"""The command and its dialogue: flags, files, several turns, Ctrl-C."""

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys

import pytest

from sft.chat import terminal
from sft.chat.reply import Chat, Reply, base_of, load_chat
from sft.chat.sampling import Sampling
from tests.conftest import ROOT

QUESTIONS = ["你好", "Hello, who are you?", "1+1等于几？"]
SHORT = Sampling(temperature=0.0, repetition_penalty=1.0, max_new_tokens=12)


def asked(question: str) -> list[dict]:
    return [{"role": "user", "content": question}]


@pytest.fixture(scope="module")
def tiny_chat(tiny_base) -> Chat:
    return load_chat(str(tiny_base("qwen2")))


def test_the_command_line_answers_a_file_in_batches(tiny_base, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": question}) + "\n" for question in QUESTIONS))
    arguments = ["--model_path", str(tiny_base("qwen2")), "--input", str(tmp_path / "in.jsonl"), "--batch_size", "2"]
    arguments += ["--output", str(tmp_path / "out.jsonl"), "--max_new_tokens", "4", "--temperature", "0"]
    terminal.main(arguments)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["messages"][0]["content"] for line in lines] == QUESTIONS
    assert all(line["messages"][1]["role"] == "assistant" and line["num_tokens"] <= 4 for line in lines)
    with pytest.raises(SystemExit, match=r"sft\.chat: --output .*out\.jsonl: exists; add --overwrite to replace it"):
        terminal.main(arguments)


def test_a_bad_line_leaves_no_file_behind_and_a_batch_of_none_is_refused(tiny_base, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n{"nothing": 1}\n')
    arguments = ["--model_path", str(tiny_base("qwen2")), "--input", str(tmp_path / "in.jsonl")]
    arguments += ["--output", str(tmp_path / "out.jsonl"), "--max_new_tokens", "2"]
    with pytest.raises(SystemExit, match=r"in\.jsonl line 2: "):
        terminal.main(arguments)
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n{"prompt": "%s"}\n' % ("字" * 3000))
    with pytest.raises(SystemExit, match=r"in\.jsonl line 2: the conversation has \d,\d+ tokens"):
        terminal.main(arguments)
    with pytest.raises(SystemExit, match=r"--batch_size and --max_new_tokens must be at least 1; --top_p 0\.0: must"):
        terminal.main([*arguments, "--batch_size", "0", "--top_p", "0"])
    with pytest.raises(SystemExit, match="--input goes without --message; --device and --device_map: give one"):
        terminal.main([*arguments, "--message", "a", "--device", "cpu", "--device_map", "auto"])
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_the_command_line_keeps_several_turns_in_one_conversation(tiny_base, capsys):
    arguments = ["--model_path", str(tiny_base("qwen2")), "--message", "你好", "--message", "再说一遍"]
    terminal.main([*arguments, "--max_new_tokens", "4"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "> 你好"
    assert "> 再说一遍" in lines


def test_a_wrong_model_path_is_one_line(tmp_path):
    with pytest.raises(
        SystemExit, match=r"sft\.chat: .*/nowhere: no such folder; name a local model folder or a hub model"
    ):
        terminal.main(["--model_path", str(tmp_path / "nowhere"), "--message", "x"])


def test_what_this_machine_has_not_is_one_line(tiny_base):
    arguments = ["--model_path", str(tiny_base("qwen2")), "--message", "a"]
    for flags, text in (
        (["--load_in_4bit"], "--load_in_4bit needs a CUDA GPU and bitsandbytes"),
        (["--device", "cuda"], "--device cuda: this machine shows 0 CUDA GPUs"),
        (["--device", "gpu"], "--device gpu: no such device; use cpu, cuda or cuda:1"),
    ):
        with pytest.raises(SystemExit, match=text):
            terminal.main([*arguments, *flags])


def test_the_base_is_found_by_run_json_or_adapter_and_shown_beside_the_tuned(tiny_base, tmp_path, capsys):
    tuned = shutil.copytree(tiny_base("qwen2"), tmp_path / "model")
    with pytest.raises(ValueError, match=r"no run\.json or adapter_config\.json in it names the base"):
        base_of(str(tuned))
    (tuned / "adapter_config.json").write_text('{"base_model_name_or_path": "from/adapter"}')
    assert base_of(str(tuned)) == "from/adapter"
    (tuned / "adapter_config.json").unlink()
    (tuned / "run.json").write_text(json.dumps({"model": str(tiny_base("qwen2"))}))
    arguments = ["--model_path", str(tuned), "--base_path", "auto", "--message", "你好", "--message", "Hello"]
    terminal.main([*arguments, "--max_new_tokens", "3", "--temperature", "0"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith(("> ", "[base]", "[tuned]"))] == [
        *("> 你好", "[base]", "[tuned]", "> Hello", "[base]", "[tuned]")
    ]


def test_probabilities_are_shown_without_colour_in_a_pipe(tiny_base, capsys):
    arguments = ["--model_path", str(tiny_base("qwen2")), "--message", "你好", "--show_probabilities"]
    terminal.main([*arguments, "--max_new_tokens", "12"])
    shown = capsys.readouterr().out
    assert "> 你好\n" in shown and "⟦" in shown and shown.count("; else ") == 3 and "\033" not in shown


def test_commands_of_the_terminal_are_no_questions(tiny_chat, monkeypatch, capsys):
    typed = iter(["Hello", "/system Be brief.", "字" * 3000, "/clear", "/etc/passwd?", "/quit", "never"])
    monkeypatch.setattr("builtins.input", lambda _prompt="": next(typed))
    dialogue = terminal.Dialogue({"": tiny_chat}, sampling=SHORT, interruptible=True)
    terminal.talk(dialogue)
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
    dialogue = terminal.Dialogue({"": tiny_chat}, interruptible=True)
    dialogue.ask("你好")
    assert capsys.readouterr().out == "Hel\n[stopped]\n"
    assert dialogue.messages("") == [*asked("你好"), {"role": "assistant", "content": "Hel"}]
    with pytest.raises(KeyboardInterrupt):
        terminal.Dialogue({"": tiny_chat}).ask("你好")


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


class PseudoTerminal:
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
    shell = PseudoTerminal("--model_path", str(tiny_base("qwen2")), "--max_new_tokens", "1900", "--temperature", "0")
    shell.wait_for("? ")
    shell.type("one\ntwo\nthree\n")
    shell.wait_for("three\n")
    shell.read()  # the reply has begun
    shell.process.send_signal(signal.SIGINT)
    shell.wait_for("\n[stopped]\n")
    shell.wait_for("? ")
    shell.process.send_signal(signal.SIGINT)
    shell.wait_for("/clear begins anew")
    shell.wait_for("? ")
    shell.type("\x04")
    assert shell.process.wait() == 0
    os.close(shell.ours)


@pytest.mark.parametrize(
    ("error", "told"),
    [(KeyboardInterrupt(), "stopped"), (RuntimeError("CUDA out of memory"), "out of memory; lower --batch_size")],
)
def test_whatever_ends_a_batch_says_that_the_same_command_goes_on(error, told, tiny_base, tmp_path, monkeypatch):
    def ended(*_arguments, **_options):
        raise error

    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    arguments = ["--model_path", str(tiny_base("qwen2")), "--input", str(tmp_path / "in.jsonl"), "--output"]
    with (
        monkeypatch.context() as patched,
        pytest.raises(SystemExit, match=f"{told}.*; rerun the same command to resume"),
    ):
        patched.setattr(Chat, "reply_each", ended)
        terminal.main([*arguments, str(tmp_path / "out.jsonl")])
    terminal.main([*arguments, str(tmp_path / "out.jsonl"), "--max_new_tokens", "512"])
    assert (tmp_path / "out.jsonl").exists()
