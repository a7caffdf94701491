"""The command web_demo.py: its flags, its mistakes, its start."""

import os
import socket
import subprocess
import sys

import pytest

import web_demo
from sft.chat.reply import find_newest_run
from tests.conftest import ROOT


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


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
        (["--base_url", "file:///etc", "--model", "x", "--port", "{port}"], "use an address such as"),
        (["--base_url", "http://me:secret@h/v1", "--model", "x", "--port", "{port}"], "keys come from the environment"),
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


def test_the_newest_finished_run_is_the_default(tmp_path):
    assert find_newest_run(tmp_path) is None
    for name, age in (("b", 30), ("a", 10), ("unfinished", None)):
        (tmp_path / name / "model").mkdir(parents=True)
        if age is not None:
            run = tmp_path / name / "model" / "run.json"
            run.write_text("{}")
            os.utime(run, (1e9 - age, 1e9 - age))
    assert find_newest_run(tmp_path) == str(tmp_path / "a" / "model")


@pytest.mark.slow
def test_importing_the_page_loads_no_model_and_no_torch():
    code = "import sys, web_demo; print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_flags_reach_the_page(tiny_base, monkeypatch):
    opened = {}
    monkeypatch.setattr(
        web_demo, "serve_page", lambda page, handlers, **options: opened.update(options, handlers=handlers)
    )
    path = str(tiny_base("qwen2"))
    flags = ["--max_waiting", "100", "--max_active", "3", "--requests_per_minute", "7", "--port", str(free_port())]
    web_demo.main(["--model_path", path, "--model_path", path, "--compare", "--chat_format", "chatml", *flags])
    handlers = opened["handlers"]
    first, second = handlers.models.values()
    assert list(handlers.models) == [web_demo.name_model(path), f"{web_demo.name_model(path)} (2)"]
    assert (first.chat.decoder.max_waiting, first.chat.decoder.max_active) == (100, 3)
    assert (second.chat.renderer.name, handlers.num_panes, handlers.limits.per_minute) == ("chatml", 2, 7)
    assert (opened["host"], opened["auth"], handlers.feedback) == ("127.0.0.1", None, None)


def test_a_model_is_named_by_its_run():
    assert web_demo.name_model("/somewhere/runs/my_run/model") == "my_run"
    assert web_demo.name_model("Qwen/Qwen3-0.6B") == "Qwen3-0.6B"
