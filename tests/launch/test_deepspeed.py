"""Settings of DeepSpeed that are refused, what --offload adds to them, and the locks of killed compilations."""

import json
import os
import time

import pytest

from sft.launch.deepspeed import check_deepspeed_config, deepspeed_config, remove_dead_build_locks
from tests.conftest import ROOT

FLAGS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8, "max_grad_norm": 1.0, "offload": False}
FLAGS |= {"bf16": False, "fp16": False}
GOOD = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "zero_optimization": {"stage": 2},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 8,
    "gradient_clipping": "auto",
}


@pytest.mark.parametrize("name", ["ds_zero2.json", "ds_zero3.json"])
@pytest.mark.parametrize("offload", [True, False])
def test_our_own_deepspeed_files_pass(name, offload):
    assert check_deepspeed_config({**FLAGS, "deepspeed": str(ROOT / name), "offload": offload}) == []
    config = json.loads((ROOT / name).read_text())
    assert config["gradient_clipping"] == config["train_batch_size"] == "auto"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"scheduler": {"type": "WarmupLR"}}, "remove the 'scheduler' block"),
        ({"optimizer": {}}, "remove the 'optimizer' block"),
        ({"zero_optimization": {"stage": 3}}, "stage3_gather_16bit_weights_on_model_save must be true"),
        ({"gradient_clipping": 0.5}, 'gradient_clipping is 0.5: write "auto", which takes --max_grad_norm 1.0'),
        ({"gradient_accumulation_steps": 2}, "which takes --gradient_accumulation_steps 8"),
        ({"train_micro_batch_size_per_gpu": 1}, "which takes --per_device_train_batch_size 4"),
        ({"gradient_clipping": None}, 'gradient_clipping is None: write "auto"'),
        ({"bf16": {}}, 'add "bf16": {"enabled": "auto"}, else --bf16 changes nothing'),
        ({"train_batch_size": 7}, 'remove train_batch_size, or write "auto"'),
        ({"zero_optimization": [2]}, 'zero_optimization must be an object with a "stage" of 0, 1, 2 or 3'),
        ({"zero_optimization": {"stage": 7}}, 'zero_optimization must be an object with a "stage" of 0, 1, 2 or 3'),
        ({"zero_optimization": {"stage": "2"}}, 'zero_optimization must be an object with a "stage" of 0, 1, 2 or 3'),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16 and fp16 are both enabled"),
        ({"fp16": "yes"}, 'add "fp16": {"enabled": "auto"}, else --fp16 changes nothing'),
    ],
)
def test_deepspeed_settings_that_fail_late_or_change_the_run_are_refused(tmp_path, changes, problem):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(GOOD | changes))
    found = check_deepspeed_config({**FLAGS, "deepspeed": str(path)})
    assert len(found) == (problem is not None)
    assert all(line.startswith(f"--deepspeed {path}: ") and problem in line for line in found)


@pytest.mark.parametrize(("text", "problem"), [("[1]", "must hold a JSON object"), ("{", "not valid JSON")])
def test_a_deepspeed_file_that_is_none_is_refused(tmp_path, text, problem):
    (tmp_path / "ds.json").write_text(text)
    (line,) = check_deepspeed_config({**FLAGS, "deepspeed": str(tmp_path / "ds.json")})
    assert problem in line


@pytest.mark.parametrize(
    "given", ["ds_zero9.json", '{"zero_optimization": {"stage": 2}}' + " " * 300], ids=["file", "json"]
)
def test_a_missing_deepspeed_file_names_those_there_are(given):
    assert check_deepspeed_config({**FLAGS, "deepspeed": given}) == [
        f"--deepspeed {given}: no such file; use ds_zero2.json or ds_zero3.json"
    ]


def test_offload_puts_the_optimizer_and_in_stage_3_the_weights_on_the_cpu(tmp_path):
    on_cpu = {"device": "cpu", "pin_memory": False}
    for stage, added in ((2, {"offload_optimizer"}), (3, {"offload_optimizer", "offload_param"})):
        path = str(ROOT / f"ds_zero{stage}.json")
        plain = deepspeed_config(path, offload=False, pin_memory=False)
        assert plain == json.loads((ROOT / f"ds_zero{stage}.json").read_text())
        moved = deepspeed_config(path, offload=True, pin_memory=False)
        plain["zero_optimization"] |= dict.fromkeys(added, on_cpu)
        assert moved == plain


def test_offload_without_zero_is_refused(tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(GOOD | {"zero_optimization": {"stage": 1}}))
    for path, problem in (
        (None, "--offload: works with --deepspeed ds_zero2.json or ds_zero3.json only"),
        (
            str(tmp_path / "ds.json"),
            f"--deepspeed {tmp_path}/ds.json: --offload needs zero_optimization with stage 2 or 3",
        ),
    ):
        assert check_deepspeed_config({**FLAGS, "deepspeed": path, "offload": True}) == [problem]


def test_the_lock_of_a_killed_compilation_is_removed_and_that_of_a_living_one_is_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    dead, living, new = (tmp_path / name / "lock" for name in ("py311_cpu/dead", "living", "new"))
    for lock in (dead, living, new):
        lock.parent.mkdir(parents=True)
        lock.touch()
        os.utime(lock, (time.time() - 60, time.time() - 60))
    os.utime(new)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    remove_dead_build_locks()
    assert dead.exists(), "a process of the other machine may have it"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with open(living):
        remove_dead_build_locks()
    assert [dead.exists(), living.exists(), new.exists()] == [False, True, True]
    assert capsys.readouterr().err == f"train.py: {dead}: removed; the compilation that held it was killed\n"
