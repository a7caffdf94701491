"""The shell scripts, under dash, for real."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file

from sft.base import identify_base
from sft.launch.workers import bind_port
from tests.scripts import sh

SHARED = ("per_device_train_batch_size", "gradient_accumulation_steps")
SHOW_ARGUMENTS = "import json, sys; print(json.dumps(sys.argv[1:]))"


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
        *("--per_device_train_batch_size", "5", "--per_device_eval_batch_size", "5"),
        *("--gradient_accumulation_steps", "6", "--num_train_epochs", "2", "--learning_rate", "3e-4"),
        *("--max_length", "99", "--seed", "a b"),
    ]


@pytest.mark.parametrize("offload", ["0", "1"])
def test_the_two_launchers_differ_only_in_the_launcher(offload, show, tmp_path):
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\n[ "$3" = --processes ] && echo 1 && exit\nexec {show} "$@"\n')
    fake.chmod(0o755)
    knobs = {"MODEL": "m", "OUTPUT": "o", "PYTHON": str(fake)}
    plain = json.loads(sh("base_run.sh", "--seed", "1", **knobs).stdout)
    launched = json.loads(sh("ds_all.sh", "--seed", "1", ZERO="2", OFFLOAD=offload, **knobs).stdout)
    flags = ["--deepspeed", "ds_zero2.json", *["--offload"] * int(offload), "--seed", "1"]
    assert launched == ["-m", "sft.launch", *plain[:-2], *flags]


@pytest.mark.parametrize(
    ("processes", "rows", "shared", "said"),
    [
        ("1", ("4", "8"), ("4", "8"), ""),
        ("2", ("4", "8"), ("4", "4"), ""),
        ("8", ("4", "8"), ("4", "1"), ""),
        ("16", ("4", "8"), ("2", "1"), ""),
        ("2", ("2", "1"), ("1", "1"), ""),
        ("4", ("6", "6"), ("3", "3"), ""),
        ("3", ("4", "8"), ("4", "3"), "base_run.sh: 3 processes can't share 32 rows per update evenly: it takes 36\n"),
        (
            "64",
            ("4", "8"),
            ("1", "1"),
            "base_run.sh: 64 processes can't share 32 rows per update evenly: it takes 64\n",
        ),
    ],
)
def test_processes_share_the_rows_of_an_update(processes, rows, shared, said, show):
    knobs = {"MODEL": "m", "OUTPUT": "o", "LAUNCHER": show, "NUM_PROCESSES": processes}
    done = sh("base_run.sh", BATCH_SIZE=rows[0], ACCUMULATION=rows[1], **knobs)
    flags = json.loads(done.stdout)
    found = [flags[flags.index(f"--{name}") + 1] for name in SHARED]
    assert (tuple(found), done.stderr) == (shared, said)


def test_processes_that_share_rows_take_them_once(show, tmp_path):
    """8 processes in groups of 4 are two that share an update of 4 x 8 rows."""
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\n[ "$3" = --processes ] && echo 8 && exit\nexec {show} "$@"\n')
    fake.chmod(0o755)
    knobs = {"MODEL": "m", "OUTPUT": "o", "PYTHON": str(fake), "BATCH_SIZE": "4", "ACCUMULATION": "8"}
    for done in (
        sh("ds_all.sh", SEQUENCE_PARALLEL="4", **knobs),
        sh("ds_all.sh", "--sequence_parallel_size", "4", **knobs),
        sh("ds_all.sh", "--sequence_parallel_size=4", **knobs),
    ):
        flags = json.loads(done.stdout)
        assert [flags[flags.index(f"--{name}") + 1] for name in SHARED] == ["4", "4"]
        assert flags[flags.index("--sequence_parallel_size") + 1] == "4"


@pytest.mark.parametrize("bad", [{"BATCH_SIZE": "x"}, {"ACCUMULATION": "0"}, {"BATCH_SIZE": "-2"}])
def test_rows_that_are_no_number_are_one_line(bad, show):
    done = sh("base_run.sh", MODEL="m", LAUNCHER=show, NUM_PROCESSES="2", **bad)
    knobs = {"BATCH_SIZE": "4", "ACCUMULATION": "8"} | bad
    said = " ".join(f"{name}={value}" for name, value in knobs.items())
    assert (done.returncode, done.stderr) == (2, f"base_run.sh: {said}: use whole numbers from 1\n")


@pytest.mark.parametrize(
    ("knob", "said"),
    [
        ({"ZERO": "5"}, "ZERO=5: use 2 or 3"),
        ({"OFFLOAD": "yes"}, "OFFLOAD=yes: use 0 or 1"),
        ({"SEQUENCE_PARALLEL": "0"}, "SEQUENCE_PARALLEL=0: use a whole number from 1"),
        (
            {"SEQUENCE_PARALLEL": "2", "NUM_GPUS": "3"},
            "SEQUENCE_PARALLEL=2: 3 processes can't be divided by it",
        ),
        ({"NUM_GPUS": "0"}, "NUM_GPUS=0: use a whole number, 1 or more"),
        ({"HOSTFILE": "/nowhere"}, "HOSTFILE=/nowhere: no such file; a line for each machine: name slots=8"),
        ({"NNODES": "2"}, "several machines: name OUTPUT, one folder that all of them see"),
    ],
)
def test_a_wrong_knob_is_one_line(knob, said):
    done = sh("ds_all.sh", MODEL="m", **knob)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"ds_all.sh: {said}\n")


@pytest.mark.parametrize("value", ["2", "x"])
def test_rows_that_base_run_can_not_share_are_one_line(value):
    done = sh("base_run.sh", MODEL="m", SEQUENCE_PARALLEL=value)
    line = f"base_run.sh: SEQUENCE_PARALLEL={value}: one process can't share rows; use ds_all.sh\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


def test_under_slurm_the_output_folder_is_the_jobs(show, tmp_path):
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\n[ "$3" = --processes ] && echo 16 && exit\nexec {show} "$@"\n')
    fake.chmod(0o755)
    flags = json.loads(sh("ds_all.sh", MODEL="m", PYTHON=str(fake), SLURM_JOB_ID="77").stdout)
    assert flags[flags.index("--output_dir") + 1] == "runs/slurm-77/model"


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
def test_two_machines_train_what_one_does_to_the_bit(tmp_path, tiny_base):
    """Two launchers with their own rank meet on this machine; each has one of the two processes."""
    flags = ("--max_steps", "2", "--logging_steps", "1", "--max_new_tokens", "4", "--num_reply_prompts", "1")
    flags += ("--reasoning", "drop", "--max_lost", "0.1")  # blossom has no place for the tools of 14
    knobs = {"MODEL": str(tiny_base("qwen2")), "DATA": "data_proj/sample", "MAX_LENGTH": "512", "BATCH_SIZE": "2"}
    knobs |= {"ACCUMULATION": "2", "NUM_GPUS": "2"}
    done = sh("ds_all.sh", *flags, **knobs, OUTPUT=str(tmp_path / "one"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "steps: 2 of 4 rows (2 x 1 x 2 processes)" in done.stdout
    with bind_port(0) as free:
        port = str(free.getsockname()[1])
    knobs |= {"NUM_GPUS": "1", "NNODES": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    knobs |= {"OUTPUT": str(tmp_path / "two")}
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda rank: sh("ds_all.sh", *flags, **knobs, NODE_RANK=rank), "01"))
    assert [d.returncode for d in done] == [0, 0], done[0].stderr[-3000:] + done[1].stderr[-3000:]
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_lora_with_rows_of_control_tokens_trains_in_bf16_under_zero_3(tmp_path, tiny_base):
    knobs = {"MODEL": str(tiny_base("qwen2")), "DATA": "data_proj/sample", "MAX_LENGTH": "512", "BATCH_SIZE": "2"}
    knobs |= {"ACCUMULATION": "2", "NUM_GPUS": "2", "ZERO": "3", "OUTPUT": str(tmp_path)}
    flags = ["--max_steps", "2", "--learning_rate", "1e-3", "--bf16", "true"]
    flags += ["--lora", "true", "--chat_format", "chatml", "--reasoning", "drop", "--max_lost", "0.1"]
    done = sh("ds_all.sh", *flags, **knobs)
    assert done.returncode == 0, done.stderr[-3000:]
    adapter = load_file(tmp_path / "model" / "adapter_model.safetensors")
    assert json.loads((tmp_path / "model" / "base.json").read_text()) == identify_base(knobs["MODEL"])
    (name,) = [name for name in adapter if "trainable_tokens" in name]
    rows = load_file(tiny_base("qwen2") / "model.safetensors")["model.embed_tokens.weight"]
    assert adapter[name].shape == (2, rows.shape[1])
    assert not any(torch.equal(row, base.to(row.dtype)) for row in adapter[name] for base in rows)


def test_a_dry_run_starts_no_launcher(show):
    done = sh("base_run.sh", "--gpu", "80GBx8", DRY_RUN="1", MODEL="m", OUTPUT="o", LAUNCHER="false", PYTHON=show)
    words = json.loads(done.stdout)
    assert (words[0], words[-3:]) == ("train.py", ["--dry_run", "--gpu", "80GBx8"])
    for knob, flags in (({"PROBE_STEPS": "3"}, ()), ({}, ("--probe_steps", "3"))):
        done = sh("base_run.sh", *flags, DRY_RUN="1", MODEL="m", OUTPUT="o", LAUNCHER=show, PYTHON="false", **knob)
        assert json.loads(done.stdout)[-3:] == ["--dry_run", "--probe_steps", "3"], "a probe needs the launcher"
    refused = sh("base_run.sh", DRY_RUN="yes", MODEL="m", OUTPUT="o", LAUNCHER=show)
    assert (refused.returncode, refused.stderr) == (2, "base_run.sh: DRY_RUN=yes: use 0 or 1\n")
