"""Settings of other launchers reach train.py as its own flags, or are refused by name."""

import signal
import subprocess
import sys

import pytest

from sft.launch import environment as launched
from sft.launch.environment import complete_single_process, find_launcher_problems, read_launcher_flags
from tests.conftest import ROOT

ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_CPU": "False"}

START = """
import gc
from sft.launch import environment
environment.prepare_imports()
print(gc.isenabled(), "datasets" in environment.sys.modules)
environment.finish_imports()
print(gc.isenabled(), gc.get_freeze_count() > 1000)
"""


def test_garbage_is_collected_again_after_the_imports():
    done = subprocess.run([sys.executable, "-c", START], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False True\nTrue True\n"


def test_the_defaults_of_accelerate_launch_are_no_problem_and_no_flag():
    for environment in ({}, ACCELERATE, {"RANK": "0", "WORLD_SIZE": "2"}):
        assert find_launcher_problems(environment, deepspeed=False) == []
        assert read_launcher_flags(environment) == {}


@pytest.mark.parametrize(
    ("name", "value", "start"),
    [
        ("ACCELERATE_USE_FSDP", "true", "accelerate launch --use_fsdp: checkpoints here are DeepSpeed's or plain;"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "accelerate launch --use_megatron_lm: use --deepspeed ds_zero3.json"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "accelerate launch --use_parallelism_config: is not read;"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "accelerate launch --dynamo_backend inductor: is not read;"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "accelerate launch --mixed_precision fp8: use no, bf16 or fp16"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "accelerate launch --use_deepspeed: its own DeepSpeed settings are not"),
    ],
)
def test_a_setting_that_train_py_does_not_read_is_refused_by_name(name, value, start):
    (problem,) = find_launcher_problems({**ACCELERATE, name: value}, deepspeed=False)
    assert problem.startswith(start)


def test_deepspeed_of_accelerate_launch_is_fine_with_a_file_of_ours():
    assert find_launcher_problems({"ACCELERATE_USE_DEEPSPEED": "true"}, deepspeed=True) == []


def test_flags_typed_to_accelerate_launch_are_taken_over():
    assert read_launcher_flags({"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "bf16"}) == {
        "use_cpu": True,
        "bf16": True,
    }


def test_a_process_without_a_launcher_becomes_a_group_of_one():
    environment = {"MASTER_PORT": "29500"}
    complete_single_process(environment)
    port = environment.pop("MASTER_PORT")
    assert port != "29500" and 1024 <= int(port) <= 65535
    assert environment == {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
    }
    launched = {"RANK": "1", "MASTER_PORT": "29500"}
    complete_single_process(launched)
    assert launched == {"RANK": "1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("name", ["TORCHELASTIC_RUN_ID", "LOCAL_SIZE"])
def test_a_rank_waits_where_the_launcher_would_kill_the_first_one_before_it_prints_its_error(name, monkeypatch):
    done = []
    monkeypatch.setattr(launched.signal, "signal", lambda *arguments: done.append(arguments))
    monkeypatch.setattr(launched.time, "sleep", done.append)
    assert not launched.wait_for_first_rank({"RANK": "1", "LOCAL_WORLD_SIZE": "2"})
    assert done == []
    assert launched.wait_for_first_rank({"RANK": "1", name: "2"})
    assert done == [(signal.SIGTERM, signal.SIG_DFL), launched.FIRST_RANK_SECONDS]
