"""A run that was stopped, killed or moved resumes with equal results, or names the difference."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import train
from sft.checkpoint.consolidate import consolidate
from sft.checkpoint.manifest import find_checkpoint, hash_files, write_manifest
from sft.checkpoint.resume import check_unchanged, compare_fingerprints, describe_resume, has_other_layout
from sft.checkpoint.save import list_files
from sft.launch.processes import Guard, UserError
from sft.train import trainer
from sft.train.losses import RouterLosses
from sft.train.summary import last_evaluation
from sft.train.trainer import Trainer
from tests.conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Thirty conversations of different lengths and three sources, five of them held out as well."""
    folder, lines = tmp_path_factory.mktemp("resume"), []
    for i in range(30):
        asked, said = f"question {i}", "answer " * (1 + i * 7 % 23)
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        lines.append(json.dumps({"id": str(i), "source": f"s{i % 3}", "messages": messages}) + "\n")
    for name, chosen in (("train.json", lines), ("eval.json", lines[:5])):
        (folder / name).write_text("".join(chosen))
    return folder


def words_of(base, data, output, **flags) -> list[str]:
    """Return the flags of train.py for a short run."""
    settings = {"max_length": 128, "max_steps": 8, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    settings |= {"learning_rate": 1e-3, "logging_steps": 3, "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    settings |= {
        "max_new_tokens": 4,
        "num_reply_prompts": 1,
        "disable_tqdm": True,
        "cache_dir": f"{output.parent}/cache",
    }
    words = [str(word) for name, value in (settings | flags).items() for word in (f"--{name}", value)]
    return ["--model_name_or_path", str(base), "--data_path", str(data), "--output_dir", str(output), *words]


def run(base, data, output, **flags) -> Path:
    """Call train.py's main."""
    train.main(words_of(base, data, output, **flags))
    return output


def stop_at(monkeypatch, step: int, *, method: str = "training_step") -> None:
    """Let a SIGTERM arrive while that update is computed, or in the evaluation after it."""
    original, sent = getattr(Trainer, method), []

    def with_signal(self, *arguments, **options):
        if self.state.global_step == step and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
            while self.guard.requested is None:
                time.sleep(0.001)
        return original(self, *arguments, **options)

    monkeypatch.setattr(Trainer, method, with_signal)


def logs_of(output: Path) -> list[dict]:
    kept = ("loss", "grad_norm", "learning_rate", "eval_loss", "train_loss", "step", "epoch", "num_input_tokens_seen")
    history = json.loads((output / "run.json").read_text())["log_history"]
    lines = [{name: entry[name] for name in entry if name in kept or "loss/" in name} for entry in history]
    return [line for line in lines if not line.keys().isdisjoint(("loss", "eval_loss", "train_loss"))]


def weights_of(output: Path) -> dict[str, torch.Tensor]:
    return load_file(next(output.glob("*model.safetensors")))


def assert_same(first: Path, second: Path) -> None:
    ours, theirs = weights_of(first), weights_of(second)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert logs_of(first) == logs_of(second)


@pytest.mark.parametrize("flags", [{}, {"packing": False}, {"lora": True}], ids=["packed", "padded", "lora"])
def test_a_run_stopped_by_a_signal_saves_that_step_and_resumes_to_the_same_bits(
    flags, tiny_base, data, tmp_path, monkeypatch, capsys, caplog
):
    """Step 5 is no step that is logged or saved; the signal comes in the first half of its accumulation."""
    whole = run(tiny_base("qwen2"), data, tmp_path / "whole", **flags)
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as exit_:
        stop_at(patched, 4)
        run(tiny_base("qwen2"), data, tmp_path / "stopped", **flags)
    assert exit_.value.code == 75
    left = sorted(path.name for path in (tmp_path / "stopped").iterdir())
    assert left == ["checkpoint-4", "checkpoint-5", "report.html"]
    assert re.search(r"stopped at step 5; continue with: cd .* --resume_from_checkpoint auto", capsys.readouterr().out)
    caplog.clear()
    run(tiny_base("qwen2"), data, tmp_path / "stopped", resume_from_checkpoint="auto", **flags)
    assert_same(whole, tmp_path / "stopped")
    assert "missing keys" not in caplog.text  # the head is tied, and saved once


@pytest.mark.parametrize("lora", [True, False], ids=["adapter", "full"])
def test_a_run_resumes_with_its_moved_base_and_with_another_one_only_if_allowed(
    lora, tiny_base, data, tmp_path, capsys
):
    base = shutil.copytree(tiny_base("qwen2"), tmp_path / "base")
    flags = {"lora": lora, "max_steps": 2, "save_steps": 1}
    run(base, data, tmp_path / "run", **flags)
    base = base.rename(tmp_path / "moved")
    again = {**flags, "max_steps": 3, "resume_from_checkpoint": "auto", "allow_changed": "max_steps"}
    assert run(base, data, tmp_path / "run", **again)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    for more in ({}, {"dry_run": True}):
        with pytest.raises((SystemExit, ValueError)) as refused:
            run(base, data, tmp_path / "run", **{**again, "max_steps": 4}, **more)
        said = f"{refused.value} {capsys.readouterr().err}"
        assert f"{tmp_path}/run/checkpoint-3: was trained from {tmp_path}/moved" in said
        assert "the weights in model.safetensors differ; put that base back, or name it with --model_name" in said
    again |= {"max_steps": 4, "allow_changed": "max_steps,base"}
    assert run(base, data, tmp_path / "run", **again)
    assert f"allowed: {tmp_path}/run/checkpoint-3: was trained from {tmp_path}/moved" in capsys.readouterr().out


@pytest.mark.parametrize("packing", [True, False])
def test_a_mixture_resumes_to_the_same_bits_and_another_one_is_refused(
    packing, tiny_base, data, tmp_path, monkeypatch, capsys
):
    """Updates of one row, so that the run is stopped in its second epoch and resumed into a third."""
    old, base = tmp_path / "old.json", tiny_base("qwen2")
    old.write_text("".join(json.dumps({"prompt": f"old {i}", "completion": "reply " * i}) + "\n" for i in range(1, 9)))
    flags = {"replay_path": old, "replay_share": 0.2, "packing": packing, "max_steps": -1, "num_train_epochs": 3}
    flags |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "save_steps": 100}
    mixed = f"{data / 'train.json'}@0.7x"
    whole = run(base, mixed, tmp_path / "whole", **flags)
    table = json.loads((whole / "run.json").read_text())["mixture"]
    assert [row[1:4] for row in table[1:]] == [["30", "0.7", "21"], ["8", table[2][2], table[2][3]]]
    assert 0.17 < float(table[2][5].rstrip("%")) / 100 < 0.23
    steps = json.loads((whole / "run.json").read_text())["metrics"]["steps"]
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        stop_at(patched, steps // 2)
        run(base, mixed, tmp_path / "stopped", **flags)
    again = {**flags, "resume_from_checkpoint": "auto"}
    for path, changes in ((mixed, {"replay_share": 0.3}), (data / "train.json", {})):
        with pytest.raises(ValueError, match=r"replay_share was 0\.2 and is 0\.3|times_per_epoch was .*0\.7"):
            run(base, path, tmp_path / "stopped", **again | changes)
    run(base, mixed, tmp_path / "stopped", **again)
    assert_same(whole, tmp_path / "stopped")


def test_a_signal_in_an_evaluation_stops_it_and_it_is_done_when_the_run_resumes(tiny_base, data, tmp_path, monkeypatch):
    flags = {"per_device_eval_batch_size": 1, "max_steps": 6}
    flags |= {"metric_for_best_model": "loss", "greater_is_better": True}
    whole = run(tiny_base("qwen2"), data, tmp_path / "whole", **flags)
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        stop_at(patched, 4, method="prediction_step")
        run(tiny_base("qwen2"), data, tmp_path / "stopped", **flags)
    assert sorted(path.name for path in (tmp_path / "stopped").iterdir()) == ["checkpoint-4", "report.html"]
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as exit_:
        stop_at(patched, 4, method="prediction_step")
        run(tiny_base("qwen2"), data, tmp_path / "stopped", resume_from_checkpoint="auto", **flags)
    assert exit_.value.code == 75
    run(tiny_base("qwen2"), data, tmp_path / "stopped", resume_from_checkpoint="auto", **flags)
    assert_same(whole, tmp_path / "stopped")
    states = [
        json.loads((tmp_path / of / "checkpoint-6/trainer_state.json").read_text()) for of in ("whole", "stopped")
    ]
    assert [state["best_global_step"] for state in states] == [4, 4]
    assert states[0]["best_metric"] == states[1]["best_metric"]


def test_the_best_checkpoint_is_kept_and_loaded_also_after_the_folder_was_moved(tiny_base, data, tmp_path, monkeypatch):
    flags = {"learning_rate": 0.3, "eval_steps": 2, "save_steps": 2, "save_total_limit": 1}
    flags |= {"load_best_model_at_end": True, "warmup_steps": 0, "max_steps": 5}
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        stop_at(patched, 2)
        run(tiny_base("qwen2"), data, tmp_path / "stopped", **flags)
    moved = (tmp_path / "stopped").rename(tmp_path / "moved")
    run(tiny_base("qwen2"), data, moved, resume_from_checkpoint="auto", **flags)
    held_out = [line["eval_loss"] for line in logs_of(moved) if "eval_loss" in line]
    assert len(held_out) == 3 and held_out[0] == min(held_out)
    assert json.loads((moved / "run.json").read_text())["metrics"]["eval_loss"] == held_out[0]
    best, last = load_file(moved / "checkpoint-2" / "model.safetensors"), weights_of(moved)
    assert all(torch.equal(best[name], last[name]) for name in best)


def test_a_best_checkpoint_that_was_damaged_becomes_no_model(tiny_base, data, tmp_path, monkeypatch):
    flags = {"learning_rate": 0.3, "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True, "warmup_steps": 0}
    check = trainer.check_best_checkpoint

    def damage_and_check(of):
        weights = Path(of.state.best_model_checkpoint) / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        check(of)

    monkeypatch.setattr(trainer, "check_best_checkpoint", damage_and_check)
    problem = r"checkpoint-2: is the best checkpoint, but model.safetensors differs from its checksum .*; no model was"
    with pytest.raises(UserError, match=problem):
        run(tiny_base("qwen2"), data, tmp_path / "run", **flags, max_steps=4)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_best_evaluation_without_a_checkpoint_is_named(capsys):
    logs = [{"step": step, "eval_loss": loss} for step, loss in ((2, 1.0), (4, 2.0), (6, 3.0))]
    state = SimpleNamespace(global_step=6, best_global_step=2, best_model_checkpoint=None, log_history=logs)
    args = SimpleNamespace(eval_strategy="steps", load_best_model_at_end=True)
    of = SimpleNamespace(eval_dataset=[1], args=args, state=state)
    assert last_evaluation(of) == logs[2]
    state.best_global_step, state.best_model_checkpoint = 4, "runs/a/checkpoint-4"
    assert last_evaluation(of) == logs[1]
    assert capsys.readouterr().out.splitlines() == [
        "the model is that of step 6",
        "the best evaluation was at step 2, of which no checkpoint was saved",
        "the model is that of step 4",
    ]


def test_every_rank_learns_the_path_of_the_best_checkpoint(tmp_path):
    staged = tmp_path / ".saving" / "checkpoint-2"
    rank_1 = SimpleNamespace(
        guard=Guard(),
        state=SimpleNamespace(best_model_checkpoint=str(staged)),
        args=SimpleNamespace(should_save=False, output_dir=str(tmp_path)),
        source_losses=None,
        router_losses=RouterLosses(),
        _tr_loss=torch.zeros(()),
        _total_loss_scalar=0.0,
        _globalstep_last_logged=0,
    )
    Trainer._write_progress(rank_1, staged)
    assert rank_1.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")


@pytest.mark.parametrize("named", ["auto", "checkpoint-4"])
def test_a_checkpoint_without_optimizer_states_is_not_resumed(named, tiny_base, data, tmp_path):
    output = run(tiny_base("qwen2"), data, tmp_path / "run", save_only_model=True, max_steps=4)
    assert not (output / "checkpoint-4" / "optimizer.pt").exists()
    named = named if named == "auto" else output / named
    with pytest.raises(ValueError, match=r"checkpoint-4 has no optimizer states \(--save_only_model\)"):
        run(tiny_base("qwen2"), data, tmp_path / "run", resume_from_checkpoint=named)


def test_a_broken_checkpoint_is_named_and_the_one_before_it_leads_to_the_same_bits(tiny_base, data, tmp_path, capsys):
    whole = run(tiny_base("qwen2"), data, tmp_path / "whole", save_steps=3)
    shutil.copytree(whole / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    broken = shutil.copytree(whole / "checkpoint-6", tmp_path / "again" / "checkpoint-6") / "optimizer.pt"
    broken.write_bytes(broken.read_bytes()[:-1] + b"\xff")
    (tmp_path / "again" / "checkpoint-999").mkdir()
    (tmp_path / "again" / "checkpoint-999" / "thesis.txt").write_text("precious")
    run(tiny_base("qwen2"), data, tmp_path / "again", save_steps=3, save_total_limit=1, resume_from_checkpoint="auto")
    lines = capsys.readouterr().out.splitlines()
    assert f"{tmp_path}/again/checkpoint-6: skipped, optimizer.pt differs from its checksum in manifest.json" in lines
    assert f"resuming from {tmp_path}/again/checkpoint-3" in lines
    assert sorted(p.name for p in (tmp_path / "again").glob("checkpoint-*")) == ["checkpoint-8", "checkpoint-999"]
    assert (tmp_path / "again" / "checkpoint-999" / "thesis.txt").read_text() == "precious"
    assert_same(whole, tmp_path / "again")


def test_a_changed_field_is_refused_with_both_values_until_it_is_allowed(tiny_base, data, tmp_path, capsys):
    whole = run(tiny_base("qwen2"), data, tmp_path / "whole")
    shutil.copytree(whole / "checkpoint-4", tmp_path / "again" / "checkpoint-4")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.json").write_text("".join((data / "train.json").read_text().splitlines(True)[1:]))
    flags = {"learning_rate": 2e-3, "resume_from_checkpoint": "auto", "logging_steps": 1, "save_steps": 7}
    with pytest.raises(ValueError) as error:
        run(tiny_base("qwen2"), tmp_path / "other", tmp_path / "again", **flags)
    first, second = str(error.value).splitlines()
    assert re.search(r"checkpoint-4: data was .*train.json.* and is .*add --allow_changed data$", first)
    assert "checkpoint-4: learning_rate was 0.001 and is 0.002; give the old one again, or add" in second
    run(tiny_base("qwen2"), tmp_path / "other", tmp_path / "again", allow_changed="data,learning_rate", **flags)
    assert "allowed: learning_rate was 0.001 and is 0.002; from here on" in capsys.readouterr().out
    rates = [line["learning_rate"] for line in logs_of(tmp_path / "again") if line["step"] == 6 and "loss" in line]
    whole_rates = [line["learning_rate"] for line in logs_of(whole) if line["step"] == 6 and "loss" in line]
    assert rates == [pytest.approx(2 * whole_rates[0])]


def test_another_batch_resumes_without_repeating_or_losing_a_row(tiny_base, data, tmp_path):
    """One epoch of 30 rows by 4, stopped after 12 of them, resumes by 6: the tokens seen are those of the epoch."""
    flags = {"max_steps": -1, "num_train_epochs": 2, "packing": False, "logging_steps": 1, "save_steps": 3}
    flags |= {"save_total_limit": 9}
    whole = run(tiny_base("qwen2"), data, tmp_path / "whole", **flags)
    shutil.copytree(whole / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    flags |= {"per_device_train_batch_size": 3, "allow_changed": "per_device_train_batch_size"}
    again = run(tiny_base("qwen2"), data, tmp_path / "again", resume_from_checkpoint="auto", **flags)
    first, second = logs_of(whole), logs_of(again)
    assert [line["step"] for line in second if "loss" in line] == list(range(1, 12))  # 3 + 18 / 6 + 30 / 6
    assert first[-1]["num_input_tokens_seen"] == second[-1]["num_input_tokens_seen"]
    assert [line["epoch"] for line in second if "loss" in line][5] == 1.0
    last, expected = ([line["learning_rate"] for line in lines if "loss" in line][-1] for lines in (second, first))
    assert last == pytest.approx(expected, abs=5e-5)


def test_a_run_killed_before_its_model_was_saved_saves_it(tiny_base, data, tmp_path):
    whole = run(tiny_base("qwen2"), data, tmp_path / "whole")
    again = tmp_path / "again"
    shutil.copytree(whole / "checkpoint-8", again / "checkpoint-8")
    (again / ".saving" / "model").mkdir(parents=True)
    (again / ".saving" / "run.json").write_text("{}")
    run(tiny_base("qwen2"), data, again, resume_from_checkpoint="auto")
    assert all(torch.equal(weights_of(whole)[name], tensor) for name, tensor in weights_of(again).items())
    assert not (again / ".saving").exists()


def test_a_disk_that_is_full_ends_the_run_before_the_save_and_leaves_the_last_checkpoint(
    tiny_base, data, tmp_path, monkeypatch
):
    real = shutil.disk_usage

    def usage(path):
        full = (tmp_path / "run" / "checkpoint-4").is_dir()
        return shutil._ntuple_diskusage(10**12, 10**12, 1000) if full else real(path)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(ValueError, match=r"has 1,000 bytes free, and checkpoint-8 needs [\d,]+; nothing was removed"):
        run(tiny_base("qwen2"), data, tmp_path / "run")
    assert find_checkpoint(str(tmp_path / "run")) == (str(tmp_path / "run" / "checkpoint-4"), [])


def test_an_order_of_rows_that_could_not_be_resumed_is_refused(tiny_base, data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tiny_base("qwen2"), data, tmp_path / "run", train_sampling_strategy="group_by_length")
    assert capsys.readouterr().err == "train.py: --train_sampling_strategy group_by_length: use random or sequential\n"


def test_a_change_is_named_with_both_values_and_refused_unless_allowed():
    old = {"exact": {"seed": 1, "data": {"a": "x", "b": "y"}, "world_size": 2}, "told": {"torch": "2.12"}}
    new = {"exact": {"seed": 1, "data": {"a": "x", "b": "z"}, "world_size": 1}, "told": {"torch": "2.13"}}
    told = "torch was 2.12 and is 2.13; results may differ in the last bits"
    assert compare_fingerprints(old, new, []) == (
        [
            'data was {"b": "y"} and is {"b": "z"}; give the old one again, or add --allow_changed data',
            "world_size was 2 and is 1; give the old one again, or add --allow_changed world_size",
        ],
        [told],
    )
    refused, said = compare_fingerprints(old, new, ["data", "world_size"])
    assert refused == []
    assert said[0].startswith('allowed: data was {"b": "y"} and is {"b": "z"}; from here on')
    assert compare_fingerprints(old, new, ["sed"]) == (
        ["--allow_changed sed: no such field; there are data, seed, world_size"],
        [],
    )
    assert compare_fingerprints(old, old, []) == ([], [])


def test_another_number_of_gpus_to_a_row_is_refused_and_allowed_with_its_batch(tmp_path, capsys):
    """Two processes take 1 x 4 rows each; as a group that shares its rows they take 1 x 8."""
    sizes = {"world_size": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    shared = sizes | {"gradient_accumulation_steps": 8, "sequence_parallel_size": 2}
    old, new = ({"exact": exact, "told": {}} for exact in (sizes, shared))
    (tmp_path / "fingerprint.json").write_text(json.dumps(old))
    with pytest.raises(
        ValueError, match="sequence_parallel_size was not given and is 2; give the old one again, or add"
    ):
        check_unchanged(str(tmp_path), new, None, print)
    changed = check_unchanged(str(tmp_path), new, "sequence_parallel_size", print)
    assert sorted(changed) == ["gradient_accumulation_steps", "sequence_parallel_size"]


# --- two processes, for real --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("then", "now", "is_other"),
    [
        *(((2, 2), (2, 2), False), ((2, 2), (2, 4), True), ((2, 2), (3, 2), True), ((2, 2), (0, 1), True)),
        *(((0, 1), (2, 1), True), ((0, 1), (0, 2), False)),
    ],
)
def test_slices_of_zero_are_others_with_another_stage_or_number_of_processes(then, now, is_other, tmp_path):
    found, expected = ({"exact": dict(zip(("zero_stage", "world_size"), of, strict=True))} for of in (then, now))
    (tmp_path / "fingerprint.json").write_text(json.dumps(found))
    assert has_other_layout(str(tmp_path), expected) is is_other


def start(output: Path, base: Path, data: Path, *flags: str, zero: str, **knobs: str) -> subprocess.Popen:
    """Start ds_all.sh, or with zero="" plain processes, its lines in OUTPUT.log."""
    script = ["ds_all.sh"] if zero else ["base_run.sh"]
    settings = {"MODEL": str(base), "DATA": str(data), "OUTPUT": str(output), "MAX_LENGTH": "128", "BATCH_SIZE": "2"}
    settings |= {"ACCUMULATION": "2", "LEARNING_RATE": "1e-3", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    settings |= {"ZERO": zero, "NUM_GPUS": "2"} if zero else {"LAUNCHER": f"{sys.executable} -m sft.launch"}
    settings |= {} if zero else {"NUM_GPUS": "2", "NUM_PROCESSES": "2"}
    common = ["--max_steps", "30", "--save_steps", "5", "--logging_steps", "3", "--max_new_tokens", "4"]
    common += ["--num_reply_prompts", "1", "--cache_dir", f"{output.parent}/cache", "--eval_strategy", "no"]
    with open(f"{output}.log", "a") as log:
        command = ["dash", *script, *common, *flags]
        return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **settings, **knobs}, stdout=log, stderr=log)


def wait_until(sign, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not sign():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


def pid_of(output: Path, rank: int) -> int:
    return json.loads((output / "model" / ".ranks" / str(rank)).read_text())["pid"]


@pytest.fixture(scope="session")
def whole_runs(tiny_base, data, tmp_path_factory):
    """Return a function that gives a run of 30 steps under a ZeRO stage, never touched."""
    folder, done = tmp_path_factory.mktemp("whole"), {}

    def whole(zero: str) -> Path:
        if zero not in done:
            process = start(folder / f"zero{zero}", tiny_base("qwen2"), data, zero=zero)
            assert process.wait(timeout=300) == 0, (folder / f"zero{zero}.log").read_text()[-3000:]
            done[zero] = folder / f"zero{zero}" / "model"
        return done[zero]

    return whole


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["2", "3", ""], ids=["ZeRO-2", "ZeRO-3", "DDP"])
def test_two_processes_stopped_by_a_signal_to_one_and_killed_in_a_save_end_in_the_same_bits(
    zero, whole_runs, tiny_base, data, tmp_path
):
    whole, output, log = whole_runs(zero), tmp_path / "run", tmp_path / "run.log"
    process = start(output, tiny_base("qwen2"), data, zero=zero)
    wait_until(lambda: "'loss'" in log.read_text(), process)
    os.kill(pid_of(output, 1), signal.SIGTERM)
    assert process.wait(timeout=200) == 75
    assert not (output / "model" / "model.safetensors").exists()
    command = re.findall(r"stopped at step \d+; continue with: (.*)", log.read_text())[0]
    assert shlex.split(command)[-2:] == ["--resume_from_checkpoint", "auto"]
    process = start(output, tiny_base("qwen2"), data, "--resume_from_checkpoint", "auto", zero=zero)
    wait_until(lambda: any((output / "model" / ".saving").glob("checkpoint-*")), process)
    process.kill()
    process.wait()
    with open(log, "a") as stream:
        settings = {**os.environ, "OMP_NUM_THREADS": "1"}
        again = subprocess.run(
            ["sh", "-c", command], env=settings, stdout=stream, stderr=stream, timeout=300, check=False
        )
    assert again.returncode == 0, log.read_text()[-3000:]
    assert_same(whole, output / "model")


@pytest.mark.slow
def test_a_zero_2_run_resumes_under_zero_3_or_in_one_plain_process_with_the_same_losses(
    whole_runs, tiny_base, data, tmp_path
):
    expected = [line["loss"] for line in logs_of(whole_runs("2")) if "loss" in line]
    for zero, allowed in (("3", "zero_stage"), ("", "zero_stage,world_size")):
        output = tmp_path / f"zero{zero}"
        shutil.copytree(whole_runs("2") / "checkpoint-20", output / "model" / "checkpoint-20")
        knobs = {} if zero else {"NUM_GPUS": "1", "NUM_PROCESSES": "1"}
        flags = ("--resume_from_checkpoint", "auto", "--allow_changed", allowed)
        process = start(output, tiny_base("qwen2"), data, *flags, zero=zero, **knobs)
        assert process.wait(timeout=300) == 0, Path(f"{output}.log").read_text()[-3000:]
        found = [line["loss"] for line in logs_of(output / "model") if "loss" in line]
        assert found == pytest.approx(expected, abs=1e-4)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/sft_was_run",)


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["2", "3"])
def test_a_model_is_rebuilt_from_the_shards_and_hostile_ones_are_refused(zero, whole_runs, tmp_path):
    whole = whole_runs(zero)
    rebuilt = consolidate(str(whole), str(tmp_path / "rebuilt"), max_shard_size="300KB")
    assert len(list(rebuilt.glob("*.safetensors"))) == 4
    tensors = {name: tensor for file in rebuilt.glob("*.safetensors") for name, tensor in load_file(file).items()}
    expected = weights_of(whole)
    assert expected.keys() - tensors.keys() <= {"lm_head.weight"}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    with pytest.raises(ValueError, match=r"rebuilt: is not empty"):
        consolidate(str(whole), str(tmp_path / "rebuilt"))

    hostile = shutil.copytree(whole / "checkpoint-30", tmp_path / "run" / "checkpoint-30")
    shard = next(hostile.glob("global_step30/*rank_1*optim_states.pt"))
    torch.save({"optimizer_state_dict": Evil()}, shard)
    with pytest.raises(ValueError, match=r"rank_1.*has \S+ bytes, not"):
        consolidate(str(hostile))
    write_manifest(hostile, hash_files(hostile, list_files(hostile)), step=30, run="forged")
    with pytest.raises(ValueError, match=r"rank_1.*holds more than tensors and numbers; no code of it was run"):
        consolidate(str(hostile))
    assert not Path("/tmp/sft_was_run").exists()


def test_equal_bits_are_promised_where_they_are_given():
    to_the_bit = "the resumed run will equal one that never stopped to the bit"
    assert describe_resume([], on_gpu=False, deterministic=False) == to_the_bit
    assert describe_resume([], on_gpu=True, deterministic=True) == to_the_bit
    assert "but for rounding" in describe_resume([], on_gpu=True, deterministic=False)
    changed = describe_resume(["world_size"], on_gpu=False, deterministic=False)
    assert changed == "the resumed run will differ from one that never stopped: changed world_size"
