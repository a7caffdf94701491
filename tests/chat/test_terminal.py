"""The command and its dialogue: flags, files, several turns, Ctrl-C."""

import gc
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


def test_a_missing_device_is_one_line(tiny_base):
    arguments = ["--model_path", str(tiny_base("qwen2")), "--message", "a"]
    for flags, text in (
        (["--load_in_4bit"], "--load_in_4bit needs a CUDA GPU and bitsandbytes"),
        (["--device", "cuda"], "--device cuda: this machine shows 0 CUDA GPUs"),
        (["--device", "gpu"], "--device gpu: no such device; use cpu, cuda or cuda:1"),
        (["--device", "meta"], "--device meta: no such device; use cpu, cuda or cuda:1"),
    ):
        with pytest.raises(SystemExit, match=text):
            terminal.main([*arguments, *flags])


def test_garbage_is_collected_once_the_model_is_loaded(tiny_base, capsys):
    gc.disable()  # as `python -m sft.chat` does
    try:
        terminal.main(["--model_path", str(tiny_base("qwen2")), "--message", "你好", "--max_new_tokens", "1"])
        assert gc.isenabled()
    finally:
        gc.enable()


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
    command = [sys.executable, "-m", "sft.chat", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, preexec_fn=take_interrupts, **options)


def take_interrupts() -> None:
    """Give a new process the SIGINT of a foreground job. The tests' own process may ignore or block it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@pytest.mark.slow
def test_a_batch_that_was_killed_resumes_and_answers_everything_once(tiny_base, tmp_path):
    questions = [f"{question} {number}" for number in range(40) for question in QUESTIONS]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions))
    arguments = ["--model_path", str(tiny_base("qwen2")), "--input", str(tmp_path / "in.jsonl")]
    arguments += ["--temperature", "1", "--max_new_tokens", "24", "--batch_size", "4", "--output"]
    whole = start(*arguments, str(tmp_path / "whole.jsonl"), stderr=subprocess.DEVNULL)  # beside the others
    partial, kept = tmp_path / "out.jsonl.partial", []
    for wanted in (5, 30):
        with start(*arguments, str(tmp_path / "out.jsonl"), stderr=subprocess.PIPE) as process:
            while process.stderr.read1() and (not partial.exists() or partial.read_bytes().count(b"\n") <= wanted):
                pass  # until the progress line is written again
            process.kill()
        lines = partial.read_bytes().splitlines(keepends=True)
        assert not (tmp_path / "out.jsonl").exists() and wanted < len(lines) < len(questions)
        assert lines[: len(kept)] == kept
        kept = [line for line in lines if line.endswith(b"\n")]
    done = start(*arguments, str(tmp_path / "out.jsonl"), stderr=subprocess.PIPE)
    _, progress = done.communicate()
    assert done.returncode == 0 and f" {len(kept) - 1}/120 ".encode() in progress
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer["messages"][0]["content"] for answer in answers] == questions
    for line in kept[1:]:
        answer = json.loads(line)
        assert answers[answer.pop("position")] == answer
    assert whole.wait() == 0
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
    ("error", "reason"),
    [(KeyboardInterrupt(), "stopped"), (RuntimeError("CUDA out of memory"), "out of memory; lower --batch_size")],
)
def test_a_batch_that_ends_early_says_how_to_resume(error, reason, tiny_base, tmp_path, monkeypatch):
    def ended(*_arguments, **_options):
        raise error

    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    arguments = ["--model_path", str(tiny_base("qwen2")), "--input", str(tmp_path / "in.jsonl"), "--output"]
    with (
        monkeypatch.context() as patched,
        pytest.raises(SystemExit, match=f"{reason}.*; rerun the same command to resume"),
    ):
        patched.setattr(Chat, "reply_each", ended)
        terminal.main([*arguments, str(tmp_path / "out.jsonl")])
    terminal.main([*arguments, str(tmp_path / "out.jsonl"), "--max_new_tokens", "512"])
    assert (tmp_path / "out.jsonl").exists()


WEATHER = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "北京"}}}


class Scripted:
    """Stands for a chat that gives the next of its replies, a character at a time; keeps the messages it gets."""

    def __init__(self, *replies: dict, tools: object = None):
        self.replies, self.asked, self.tools = list(replies), [], tools

    def history(self, messages: list[dict]) -> list[dict]:
        return messages

    def stream_reply(self, messages: list[dict], _sampling):
        self.asked.append(messages)
        message = {"role": "assistant", **self.replies.pop(0)}
        content = message["content"]
        for end in range(len(content)):
            yield Reply(content[:end], False, end, {**message, "content": content[:end], "tool_calls": None})
        yield Reply(content, True, len(content), message)


def test_a_call_is_shown_as_a_call_and_its_result_is_typed(monkeypatch, capsys):
    call = {"content": "", "tool_calls": [CALL, {"function": {"name": "f", "arguments": {}}}]}
    chat = Scripted(call, {"content": "晴"}, tools=[WEATHER])
    shown = []
    typed = iter(["天气？", "25 度", "ok", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": shown.append(prompt) or next(typed))
    dialogue = terminal.Dialogue({"": chat}, interruptible=True)
    terminal.talk(dialogue)
    assert shown == ["? ", "result of get_weather? ", "result of f? ", "? "]
    assert '[call] get_weather {"city": "北京"}\n[call] f {}\n' in capsys.readouterr().out
    assert [message["role"] for message in dialogue.messages("")] == ["user", "assistant", "tool", "tool", "assistant"]
    assert chat.asked[1][2] == {"role": "tool", "name": "get_weather", "content": "25 度"}
    assert dialogue.messages("")[1]["tool_calls"] == call["tool_calls"]


def test_the_text_of_a_call_is_not_printed_while_it_grows(capsys):
    text = 'I look. <tool_call>{"name": "f"}</tool_call>'

    class Growing(Scripted):
        def stream_reply(self, messages, _sampling):
            for end in (4, 12, 30, len(text)):
                yield Reply(text[:end], False, end, {"role": "assistant", "content": text[:end]})
            message = {"role": "assistant", "content": "I look.", "tool_calls": [CALL]}
            yield Reply(text, True, 9, message)

    terminal.Dialogue({"": Growing(tools=[WEATHER])}).ask("?")
    assert capsys.readouterr().out == 'I look. \n[call] get_weather {"city": "北京"}\n'


def test_a_thought_is_folded_and_shown_on_demand(monkeypatch, capsys):
    typed = iter(["/thought", "一", "/thought", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _prompt="": next(typed))
    chat = Scripted({"content": "好的", "reasoning_content": "想一想"})
    dialogue = terminal.Dialogue({"": chat}, interruptible=True)
    terminal.talk(dialogue)
    assert capsys.readouterr().out == "[no thought]\n[thinking; /thought shows it]\n好的\n想一想\n"
    assert dialogue.messages("")[1] == {"role": "assistant", "content": "好的", "reasoning_content": "想一想"}


def test_tools_are_read_from_a_file(tmp_path):
    path = tmp_path / "tools.json"
    for written in ([WEATHER], {"tools": [{"type": "function", "function": WEATHER}]}, WEATHER):
        path.write_text(json.dumps(written))
        assert terminal.load_tools(str(path)) == [{"type": "function", "function": WEATHER}]
    for written in ("[", "[]", '[{"type": "function"}]', "3", "[" * 100_000):
        path.write_text(written)
        with pytest.raises(ValueError, match=rf"--tools {path}: "):
            terminal.load_tools(str(path))


def test_tools_and_the_switch_need_a_format_that_has_them(tiny_base, tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps([WEATHER]))
    arguments = ["--model_path", str(tiny_base("qwen2")), "--message", "a", "--max_new_tokens", "2"]
    with pytest.raises(SystemExit, match=r"--tools: chat format 'blossom' has no place for tools; use chatml or base"):
        terminal.main([*arguments, "--tools", str(tmp_path / "tools.json")])
    with pytest.raises(SystemExit, match=r"--thinking: the chat format of .* \(blossom\) has no such switch"):
        terminal.main([*arguments, "--thinking", "on"])
    with pytest.raises(SystemExit, match=r"--tools /no/file: no such file"):
        terminal.main([*arguments, "--tools", "/no/file"])


TOOL_TEMPLATE = """{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_a_prompt_holds_the_tools(tiny_base, tmp_path, monkeypatch):
    (tmp_path / "tools.json").write_text(json.dumps([WEATHER]))
    prompts = []
    prompt_ids = Chat.prompt_ids
    monkeypatch.setattr(
        Chat,
        "prompt_ids",
        lambda self, *given, **more: prompts.append((self, prompt_ids(self, *given, **more))) or prompts[-1][1],
    )
    folder = shutil.copytree(tiny_base("qwen2"), tmp_path / "model")
    (folder / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    arguments = ["--model_path", str(folder), "--message", "天气？", "--max_new_tokens", "2"]
    terminal.main([*arguments, "--chat_format", "base", "--tools", str(tmp_path / "tools.json")])
    [(chat, ids)] = prompts
    assert ids == chat.renderer.prompt(asked("天气？"), tools=[{"type": "function", "function": WEATHER}])
    assert "get_weather" in chat.renderer.tokenizer.decode(ids)
