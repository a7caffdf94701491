"""The shell scripts, under dash, for real."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

SHOW_ARGUMENTS = "import json, sys; print(json.dumps(sys.argv[1:]))"


def sh(script: str, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if name not in ("MODEL", "DATA", "OUTPUT", "ZERO")}
    settings = {**clean, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    command = ["dash", script, *flags]
    return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, check=False, timeout=600)


@pytest.fixture
def show(tmp_path) -> str:
    """A launcher that only prints the command line it was given."""
    (tmp_path / "show.py").write_text(SHOW_ARGUMENTS)
    return f"{sys.executable} {tmp_path}/show.py"


def test_every_knob_reaches_train_py_and_flags_come_last(show):
    knobs = {"MODEL": "a b/c", "DATA": "d e.json", "OUTPUT": "o", "EPOCHS": "2", "LEARNING_RATE": "3e-4"}
    knobs |= {"MAX_LENGTH": "99", "BATCH_SIZE": "5", "ACCUMULATION": "6", "LAUNCHER": show}
    done = sh("base_run.sh", "--seed", "a b", **knobs)
    assert json.loads(done.stdout) == [
        *("train.py", "--model_name_or_path", "a b/c", "--data_path", "d e.json", "--output_dir", "o/model"),
        *("--num_train_epochs", "2", "--learning_rate", "3e-4", "--max_length", "99"),
        *("--per_device_train_batch_size", "5", "--per_device_eval_batch_size", "5"),
        *("--gradient_accumulation_steps", "6", "--seed", "a b"),
    ]


def test_the_two_launchers_differ_only_in_the_launcher(show, tmp_path):
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\nexec {show} "$@"\n')
    fake.chmod(0o755)
    knobs = {"MODEL": "m", "OUTPUT": "o", "PYTHON": str(fake), "NUM_GPUS": "4"}
    plain = json.loads(sh("base_run.sh", "--seed", "1", **knobs).stdout)
    launched = json.loads(sh("ds_all.sh", "--seed", "1", ZERO="2", **knobs).stdout)
    assert launched[:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4"]
    assert launched[5:] == [*plain[:-2], "--deepspeed", "ds_zero2.json", "--seed", "1"]


def test_a_wrong_zero_stage_is_one_line():
    done = sh("ds_all.sh", ZERO="5")
    assert (done.returncode, done.stderr) == (2, "ds_all.sh: ZERO=5: use 2 or 3\n")


@pytest.mark.slow
def test_base_run_without_arguments_prepares_trains_and_replies(tmp_path):
    done = sh("base_run.sh", "--max_steps", "4", "--max_new_tokens", "8", OUTPUT=str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert "chat with it: python -m sft.chat --model_path" in done.stdout
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["base", "model", "opendata"]
    record = json.loads((tmp_path / "run" / "model" / "run.json").read_text())
    assert record["chat_format"] == "chatml"
    assert record["metrics"]["steps"] == 4


@pytest.mark.slow
def test_zero_2_and_zero_3_train_in_two_processes_as_one_process_does(tmp_path, tiny_base):
    flags = ("--max_steps", "3", "--save_steps", "2", "--logging_steps", "1", "--max_new_tokens", "4")
    knobs = {"MODEL": str(tiny_base("qwen2")), "DATA": "data_proj/sample", "LEARNING_RATE": "1e-3"}
    knobs["MAX_LENGTH"] = "512"
    losses = {}
    for zero in ("", "2", "3"):
        output = tmp_path / f"zero{zero}"
        if zero:
            done = sh("ds_all.sh", *flags, **knobs, ZERO=zero, OUTPUT=str(output), BATCH_SIZE="2", ACCUMULATION="2")
        else:
            done = sh("base_run.sh", *flags, **knobs, OUTPUT=str(output), BATCH_SIZE="8", ACCUMULATION="1")
        assert done.returncode == 0, done.stderr[-3000:]
        history = json.loads((output / "model" / "run.json").read_text())["log_history"]
        losses[zero] = [entry["loss"] for entry in history if "loss" in entry]
        if zero:
            assert (output / "model" / "checkpoint-2" / "global_step2").is_dir()
        assert (output / "model" / "model.safetensors").stat().st_size > 1_000_000
    assert len(losses[""]) == 3
    assert losses["2"] == pytest.approx(losses[""], abs=2e-3)
    assert losses["3"] == pytest.approx(losses[""], abs=2e-3)
