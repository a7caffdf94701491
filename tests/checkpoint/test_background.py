"""A checkpoint that is written while training continues is the one of its step, complete or not there."""

import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.integration_utils import WandbLogModel

from sft.checkpoint import background
from sft.checkpoint.background import BackgroundSaves, free_memory_for_copies
from sft.checkpoint.manifest import find_checkpoint, find_damage, read_manifest
from sft.checkpoint.save import open_staging, recover_checkpoint
from sft.checkpoint.writing import CollectedFiles, collect_files
from sft.launch.processes import Guard, UserError
from sft.report.run_page import RunPage
from sft.train import trainer
from sft.train.callbacks import has_checkpoint_upload
from sft.train.trainer import Trainer
from tests.checkpoint.test_resume import assert_same, data, run, words_of  # noqa: F401  data is a fixture
from tests.conftest import ROOT

OF_RUN = {"run": "a", "keep": 1, "spare": None, "began": 0.0}
OUTCOMES = {  # of the save of a rank that ends alone, by whether its files were written
    False: "not complete: this process ended while it was written",
    True: "completed at the next start if all other ranks have written it too",
}


def start_save(saves: BackgroundSaves, output: Path, step: int, *, max_bytes: int = 1 << 20) -> None:
    staged = open_staging(output, "a") / f"checkpoint-{step}"
    staged.mkdir()
    with collect_files(staged, max_bytes) as files:
        torch.save(torch.full((500,), step), staged / "optimizer.pt")
    (staged / "config.json").write_text("{}")
    saves.start(staged, files, step=step, **OF_RUN)


def test_a_checkpoint_appears_when_its_thread_is_done_and_old_ones_are_deleted_then(tmp_path, monkeypatch):
    may_write, write, lines = threading.Event(), CollectedFiles.write, []
    monkeypatch.setattr(CollectedFiles, "write", lambda files: (may_write.wait(60), write(files))[1])
    with BackgroundSaves(tmp_path, Guard(), lines.append) as saves:
        may_write.set()
        start_save(saves, tmp_path, 1)
        saves.finish()
        may_write.clear()
        start_save(saves, tmp_path, 2)
        saves.finish_if_written()
        assert find_checkpoint(str(tmp_path)) == (str(tmp_path / "checkpoint-1"), [])
        assert (tmp_path / ".saving" / "checkpoint-2").is_dir()
        may_write.set()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2"]
    assert read_manifest(tmp_path / "checkpoint-2")["files"].keys() == {"config.json", "optimizer.pt"}
    assert find_damage(tmp_path / "checkpoint-2") is None
    assert [line.split(":")[0] for line in lines] == [f"saved {tmp_path}/checkpoint-{step}" for step in (1, 2)]


def test_too_little_memory_is_said_once_and_the_checkpoints_are_written_at_once(tmp_path):
    lines = []
    with BackgroundSaves(tmp_path, Guard(), lines.append) as saves:
        for step in (1, 2):
            start_save(saves, tmp_path, step, max_bytes=100)
            assert (tmp_path / ".saving" / f"checkpoint-{step}" / "optimizer.pt").is_file()
            saves.finish()
    assert find_damage(tmp_path / "checkpoint-2") is None
    assert [line for line in lines if not line.startswith("saved ")] == [
        "checkpoint-1: too little free memory for a copy; training waits while checkpoints are written"
    ]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), OSError(28, "No space left on device")])
def test_an_error_of_the_thread_is_one_line_for_all_ranks_and_nothing_is_renamed(error, tmp_path, monkeypatch):
    def fail(_files):
        raise error

    with BackgroundSaves(tmp_path, Guard(), print) as saves:
        start_save(saves, tmp_path, 1)
        saves.finish()
        monkeypatch.setattr(CollectedFiles, "write", fail)
        start_save(saves, tmp_path, 2)
        expected = f"{tmp_path}: (checkpoint-2 can't be written|the disk is full) .*{error.strerror}"
        with pytest.raises(UserError, match=expected):
            saves.finish()
    assert find_checkpoint(str(tmp_path)) == (str(tmp_path / "checkpoint-1"), [])


def test_an_error_of_the_training_still_completes_the_checkpoint_before_it(tmp_path):
    with pytest.raises(ZeroDivisionError), BackgroundSaves(tmp_path, Guard(), print) as saves:
        start_save(saves, tmp_path, 1)
        raise ZeroDivisionError
    assert find_damage(tmp_path / "checkpoint-1") is None


@pytest.mark.parametrize("is_written", [False, True])
def test_an_error_of_one_rank_alone_waits_for_its_thread_and_no_other_rank(is_written, tmp_path, monkeypatch, capsys):
    def write_until_given_up(files):
        while True:
            files.check_given_up()

    if not is_written:
        monkeypatch.setattr(CollectedFiles, "write", write_until_given_up)
    guard = Guard()
    with pytest.raises(ZeroDivisionError), BackgroundSaves(tmp_path, guard, print) as saves:
        start_save(saves, tmp_path, 1)
        guard.world_size = 2
        if is_written:
            saves._current._written.result()
        raise ZeroDivisionError
    assert capsys.readouterr().err == f"train.py: rank 0: checkpoint-1 is {OUTCOMES[is_written]}\n"
    assert find_checkpoint(str(tmp_path)) == (None, [])
    assert "_write" not in [thread.name for thread in threading.enumerate()]
    assert saves._current.files.is_given_up


def test_a_checkpoint_whose_run_is_killed_after_its_last_file_is_completed_at_the_next_start(tmp_path):
    saves = BackgroundSaves(tmp_path, Guard(), print)
    start_save(saves, tmp_path, 1)
    saves._current._written.result()
    assert find_checkpoint(str(tmp_path)) == (None, [])
    recover_checkpoint(tmp_path)
    assert find_checkpoint(str(tmp_path)) == (str(tmp_path / "checkpoint-1"), [])
    assert read_manifest(tmp_path / "checkpoint-1")["files"].keys() == {"config.json", "optimizer.pt"}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with 1,000 KiB of free memory, whose cgroups are folders of tmp_path."""
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    1000 kB\nHugePages_Total: 0\n")
    (tmp_path / "status").write_text(
        "Name:\tpython\nVmPeak:\t 900 kB\nVmSize:\t 800 kB\nVmHWM:\t 500 kB\nVmRSS:\t 200 kB\n"
    )
    monkeypatch.setattr(background, "STATUS_OF_PROCESS", tmp_path / "status")
    (tmp_path / "cgroup").write_text("4:memory:/job/step\n9:name=systemd:/\n0::/slice\n")
    monkeypatch.setattr(background, "MEMORY_INFO", tmp_path / "meminfo")
    monkeypatch.setattr(background, "CGROUPS_OF_PROCESS", tmp_path / "cgroup")
    monkeypatch.setattr(background, "CGROUPS", tmp_path)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    return tmp_path


def limit_memory(group: Path, limit: str, used: int, droppable: int, *, version: int) -> None:
    group.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    (group / names[0]).write_text(f"{limit}\n")
    (group / names[1]).write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"cache 7\n{names[2]} {droppable}\n")


def test_copies_may_take_a_share_of_the_memory_that_is_free_and_of_what_a_cgroup_leaves(machine):
    assert free_memory_for_copies() == int(0.7 * 1_024_000) // 2
    limit_memory(machine / "slice", "max", 5, 5, version=2)
    assert free_memory_for_copies() == int(0.7 * 1_024_000) // 2
    limit_memory(machine, "900000", 600_000, 100_000, version=2)
    assert free_memory_for_copies() == int(0.7 * 400_000) // 2
    limit_memory(machine / "memory" / "job", "300000", 200_000, 50_000, version=1)
    assert free_memory_for_copies() == int(0.7 * 150_000) // 2
    limit_memory(machine / "memory" / "job", "300000", 400_000, 50_000, version=1)
    assert free_memory_for_copies() == 0
    (machine / "meminfo").unlink()
    assert free_memory_for_copies() == 0


def test_copies_leave_what_the_process_needs_in_a_step(machine, monkeypatch):
    """At its peak it had 300 KiB more in memory, and 100 KiB more addresses."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    saves = BackgroundSaves(machine, Guard(), print)
    assert saves.bytes_for_copies() == int(0.7 * (512_000 - 300 * 1024))
    (machine / "status").write_text("VmPeak:\t 9900 kB\nVmSize:\t 800 kB\nVmHWM:\t 9500 kB\nVmRSS:\t 200 kB\n")
    assert saves.bytes_for_copies() == int(0.7 * (512_000 - 300 * 1024))
    monkeypatch.setattr(background.resource, "getrlimit", lambda _kind: (1000 * 1024, -1))
    assert saves.bytes_for_copies() == int(0.7 * 100 * 1024)
    (machine / "status").unlink()
    assert saves.bytes_for_copies() == 0


def test_a_file_of_another_rank_that_is_missing_or_cut_is_no_part_of_a_checkpoint(tmp_path, monkeypatch):
    for expected in (r"optimizer\.pt has 3 bytes, not \d", r"No such file.*optimizer\.pt"):
        with BackgroundSaves(tmp_path, Guard(), print) as saves:
            start_save(saves, tmp_path, 1)
            saves._current._written.result()
            written = tmp_path / ".saving" / "checkpoint-1" / "optimizer.pt"
            written.write_text("cut") if "bytes" in expected else written.unlink()
            with pytest.raises(UserError, match=rf"checkpoint-1 can't be written \(.*{expected}"):
                saves.finish()
    assert find_checkpoint(str(tmp_path)) == (None, [])


@pytest.mark.slow
def test_a_tracker_that_uploads_checkpoints_finds_them_in_place(tiny_base, data, tmp_path, monkeypatch):  # noqa: F811
    found = []

    def on_save(_page, args, state, control, **_options):
        found.append(find_damage(Path(args.output_dir) / f"checkpoint-{state.global_step}"))

    monkeypatch.setattr(RunPage, "_log_model", WandbLogModel.CHECKPOINT, raising=False)
    monkeypatch.setattr(RunPage, "on_save", on_save)
    run(tiny_base("qwen2"), data, tmp_path / "run", max_steps=3, save_steps=1, eval_strategy="no")
    assert found == [None, None, None]
    assert not has_checkpoint_upload([SimpleNamespace(_log_model=WandbLogModel.END, _log_artifacts=False)])


@pytest.mark.slow
def test_a_disk_that_is_full_when_the_progress_is_written_is_named(tiny_base, data, tmp_path, monkeypatch):  # noqa: F811
    def fill(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "write_json", fill)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/run: the disk is full .*the checkpoints in it are whole"):
        run(tiny_base("qwen2"), data, tmp_path / "run", max_steps=1, save_steps=1, eval_strategy="no")


@pytest.mark.slow
def test_a_slow_disk_does_not_stop_the_training_and_changes_no_byte(tiny_base, data, tmp_path, monkeypatch):  # noqa: F811
    """The writer of checkpoint-4 waits until step 6 has begun; its files are those of a run that was not disturbed."""
    whole = run(tiny_base("qwen2"), data, tmp_path / "whole")
    may_write, write, step, waited = threading.Event(), CollectedFiles.write, Trainer.training_step, []

    def write_late(files):
        waited.append(may_write.wait(60))
        return write(files)

    def training_step(trainer, *arguments, **options):
        if trainer.state.global_step == 6:
            may_write.set()
        return step(trainer, *arguments, **options)

    monkeypatch.setattr(CollectedFiles, "write", write_late)
    monkeypatch.setattr(Trainer, "training_step", training_step)
    late = run(tiny_base("qwen2"), data, tmp_path / "late")
    assert waited == [True, True]
    assert_same(whole, late)
    for name in ("checkpoint-4", "checkpoint-8"):
        first, second = (read_manifest(output / name)["files"] for output in (whole, late))
        assert first.keys() == second.keys()
        equal = {file for file in first if first[file] == second[file]}
        assert equal >= {"model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "progress.json"}


KILLED_WHILE_WRITING = """
import os, signal, sys, threading
sys.path.insert(0, sys.argv.pop(1))
import train
from sft.checkpoint.writing import CollectedFiles, HashingStream
from sft.train.trainer import Trainer

write_files, write, step = CollectedFiles.write, HashingStream.write, Trainer.training_step
step_5_began = threading.Event()

def write_files_late(files):
    if files._folder.name == "checkpoint-4":
        step_5_began.wait(60)
        HashingStream.write = write_a_part
    return write_files(files)

def write_a_part(stream, data):
    write(stream, memoryview(data).cast("B")[: len(data) // 2])
    if stream._size > 10_000:
        os.kill(os.getpid(), signal.SIGKILL)

def training_step(trainer, *arguments, **options):
    if trainer.state.global_step == 5:
        step_5_began.set()
        threading.Event().wait(60)
    return step(trainer, *arguments, **options)

CollectedFiles.write, Trainer.training_step = write_files_late, training_step
train.main()
"""


@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_file_costs_only_that_checkpoint(tiny_base, data, tmp_path, capsys):  # noqa: F811
    whole = run(tiny_base("qwen2"), data, tmp_path / "whole", save_steps=2)
    words = [
        sys.executable,
        "-c",
        KILLED_WHILE_WRITING,
        str(ROOT),
        *words_of(tiny_base("qwen2"), data, tmp_path / "run", save_steps=2),
    ]
    assert subprocess.run(words, check=False, capture_output=True, timeout=100).returncode == -signal.SIGKILL
    assert (tmp_path / "run" / ".saving" / "checkpoint-4" / "optimizer.pt").stat().st_size > 10_000
    capsys.readouterr()
    run(tiny_base("qwen2"), data, tmp_path / "run", save_steps=2, resume_from_checkpoint="auto")
    lines = capsys.readouterr().out.splitlines()
    assert f"{tmp_path}/run/.saving/checkpoint-4: skipped and removed, its save was cut off" in lines
    assert f"resuming from {tmp_path}/run/checkpoint-2" in lines
    assert_same(whole, tmp_path / "run")
