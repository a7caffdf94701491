"""Saving: the order of renames, the folders that are deleted, and a full disk."""

import json
import os
import shutil
from pathlib import Path

import pytest

from sft.checkpoint.manifest import find_damage, hash_files, read_manifest
from sft.checkpoint.save import (
    check_disk_space,
    check_output_dir,
    delete_old_checkpoints,
    is_full_disk,
    note_written,
    open_staging,
    publish_checkpoint,
    publish_model,
    read_written,
    recover_checkpoint,
    remove_leftovers,
)
from sft.files import open_whole
from tests.checkpoint.test_manifest import saved_checkpoint


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_only_old_checkpoints_of_this_run_are_deleted(tmp_path):
    for step in (5, 10, 15):
        saved_checkpoint(tmp_path, step)
    saved_checkpoint(tmp_path, 7, run="another")
    saved_checkpoint(tmp_path, 999)
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-5" / "notes.txt").write_text("mine")
    delete_old_checkpoints(tmp_path, keep=1, step=15, run="a", spare=None)
    assert names(tmp_path) == ["checkpoint-15", "checkpoint-3", "checkpoint-5", "checkpoint-7", "checkpoint-999"]
    assert names(tmp_path / "checkpoint-5") == ["notes.txt"]
    delete_old_checkpoints(tmp_path, keep=None, step=999, run="a", spare=None)
    assert find_damage(tmp_path / "checkpoint-15") is None


def test_a_checkpoint_that_is_saved_again_replaces_this_runs_own_and_sets_others_aside(tmp_path):
    for run, kept in (("a", []), ("another", ["checkpoint-5.set-aside-1"])):
        folder = tmp_path / run
        (saved_checkpoint(folder, 5, run=run) / "model.safetensors").write_text("broken")
        staged = saved_checkpoint(open_staging(folder, "a"), 5, text="new weights")
        line = publish_checkpoint(staged, folder / "checkpoint-5", "a")
        assert (folder / "checkpoint-5" / "model.safetensors").read_text() == "new weights of step 5"
        assert find_damage(folder / "checkpoint-5") is None
        assert [name for name in names(folder) if "aside" in name] == kept
        assert (line is None) == (not kept)


@pytest.mark.parametrize("run", ["a", "another"])
@pytest.mark.parametrize("num_renamed", [0, 1, 2])
def test_a_kill_between_the_renames_loses_neither_the_new_checkpoint_nor_files_of_others(
    num_renamed, run, tmp_path, monkeypatch
):
    (saved_checkpoint(tmp_path, 5, run=run, text="old weights") / "notes.txt").write_text("mine")
    staged = saved_checkpoint(open_staging(tmp_path, "a"), 5, text="new weights")
    note_written(staged, hash_files(staged, ["model.safetensors"]), rank=0, world_size=1)
    rename = os.rename
    renamed = []

    def rename_or_die(old, new):
        if len(renamed) == num_renamed:
            raise KeyboardInterrupt
        renamed.append(rename(old, new))

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "rename", rename_or_die)
        publish_checkpoint(staged, tmp_path / "checkpoint-5", "a")
        raise KeyboardInterrupt
    recover_checkpoint(tmp_path)
    assert find_damage(tmp_path / "checkpoint-5") is None
    assert (tmp_path / "checkpoint-5" / "model.safetensors").read_text() == "new weights of step 5"
    assert names(tmp_path) == ["checkpoint-5", "checkpoint-5.set-aside-1"]
    assert (tmp_path / "checkpoint-5.set-aside-1" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "checkpoint-5.set-aside-1" / "model.safetensors").exists() == (run == "another")


def test_a_checkpoint_that_all_ranks_had_written_is_completed_at_the_next_start(tmp_path):
    staged = open_staging(tmp_path, "a") / "checkpoint-5"
    staged.mkdir()
    for name in ("rank_0.pt", "rank_1.pt", "config.json"):
        (staged / name).write_text(name)
    note_written(staged, hash_files(staged, ["rank_1.pt"]), rank=1, world_size=2)
    assert read_written(tmp_path) is None
    assert check_output_dir(str(tmp_path), resume=False) is None
    note_written(staged, hash_files(staged, ["rank_0.pt"]), rank=0, world_size=2)
    assert check_output_dir(str(tmp_path), resume=True) is None
    assert "is not empty" in check_output_dir(str(tmp_path), resume=False)
    (staged / ".manifest.json.0a1b2c3d.partial").write_text("{")
    line = f"{tmp_path}/checkpoint-5: completed; its run ended when its files were written"
    assert recover_checkpoint(tmp_path) == [line]
    assert names(tmp_path) == ["checkpoint-5"]
    assert find_damage(tmp_path / "checkpoint-5") is None
    manifest = read_manifest(tmp_path / "checkpoint-5")
    assert (manifest["step"], manifest["run"]) == (5, "a")
    assert manifest["files"].keys() == {"config.json", "rank_0.pt", "rank_1.pt"}


def test_a_checkpoint_whose_files_were_cut_after_they_were_written_is_not_completed(tmp_path):
    staged = open_staging(tmp_path, "a") / "checkpoint-5"
    staged.mkdir()
    (staged / "rank_0.pt").write_text("whole")
    note_written(staged, hash_files(staged, ["rank_0.pt"]), rank=0, world_size=1)
    noted = staged.parent / "written-0.json"
    for broken in (
        "",
        "[]",
        '{"world_size": 1}',
        '{"world_size": 1, "files": []}',
        '{"world_size": 1, "files": {"a": 1}}',
    ):
        whole = noted.read_text()
        noted.write_text(broken)
        assert read_written(tmp_path) is None
        noted.write_text(whole)
    (staged / "rank_0.pt").write_text("")
    assert recover_checkpoint(tmp_path) == [
        f"{staged}: can't be completed (rank_0.pt has 0 bytes, not 5)",
        f"{staged}: skipped and removed, its save was cut off",
    ]
    assert names(tmp_path) == []


def test_leftovers_of_a_killed_save_are_named_and_removed_but_no_other_folder(tmp_path):
    staged = open_staging(tmp_path, "a") / "checkpoint-5"
    staged.mkdir()
    (staged / "model.safetensors").write_text("half")
    assert remove_leftovers(tmp_path) == [f"{staged}: skipped and removed, its save was cut off"]
    assert names(tmp_path) == []
    (tmp_path / ".saving").mkdir()
    (tmp_path / ".saving" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="not of a run of ours"):
        open_staging(tmp_path, "a")
    assert names(tmp_path / ".saving") == ["thesis.txt"]


@pytest.mark.parametrize("num_deleted", [0, 1, 2, 3, 4])
def test_a_kill_while_leftovers_are_deleted_or_named_does_not_stop_the_next_start(num_deleted, tmp_path, monkeypatch):
    staged = open_staging(tmp_path, "a") / "checkpoint-5"
    staged.mkdir()
    for name in ("a.pt", "b.pt"):
        (staged / name).write_text("half")
    note_written(staged, {}, rank=0, world_size=1)
    (staged.parent / ".run.json.0a1b2c3d.partial").write_text("{")
    unlink = os.unlink
    deleted = []

    def unlink_or_die(path, *arguments, **options):
        if len(deleted) == num_deleted:
            raise KeyboardInterrupt
        deleted.append(unlink(path, *arguments, **options))

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "unlink", unlink_or_die)
        remove_leftovers(tmp_path)
    assert (tmp_path / ".saving" / "run.json").is_file()
    assert num_deleted < 2 or read_written(tmp_path) is None
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_a_kill_before_the_staging_folder_has_its_marker_does_not_stop_the_next_start(tmp_path):
    (tmp_path / ".saving").mkdir()
    (tmp_path / ".saving" / ".run.json.0a1b2c3d.partial").write_text("{")
    assert remove_leftovers(tmp_path) == []
    assert names(open_staging(tmp_path, "a")) == ["run.json"]


def test_a_file_that_another_thread_is_writing_is_no_leftover(tmp_path):
    """As the guard's thread writes the lock when a signal comes, and the main thread saves."""
    (tmp_path / "..lock.0a1b2c3d.partial").write_text("{")
    with open_whole(tmp_path / ".lock") as stream:
        stream.write("{}")
        remove_leftovers(tmp_path)
    assert names(tmp_path) == [".lock"]


def test_a_deletion_that_was_cut_off_is_finished_later(tmp_path):
    os.rename(saved_checkpoint(tmp_path, 5), tmp_path / ".removed-checkpoint-5")
    (tmp_path / ".removed-checkpoint-5" / "model.safetensors").unlink()
    (tmp_path / ".removed-checkpoint-6" / "global_step6").mkdir(parents=True)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_too_little_disk_space_is_an_error_with_the_disk_and_both_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9_000, 8_000, 1_000))
    check_disk_space(tmp_path, 1_000, "checkpoint-5")
    with pytest.raises(ValueError, match=r"the disk at /\S* has 1,000 bytes free, and checkpoint-5 needs 1,001;"):
        check_disk_space(tmp_path, 1_001, "checkpoint-5")


def test_a_full_disk_is_recognised_in_the_errors_of_each_library():
    words = ["[enforce fail at inline_container.cc:672] . unexpected pos 2002048 vs 2001940", "IoError: os error 28"]
    assert all(is_full_disk(RuntimeError(text)) for text in words)
    assert is_full_disk(OSError(28, "No space left on device"))
    assert not is_full_disk(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_files_of_the_model_are_moved_and_others_stay(tmp_path):
    staged = tmp_path / ".final"
    staged.mkdir()
    (staged / "config.json").write_text(json.dumps({"new": 1}))
    (tmp_path / "notes.txt").write_text("mine")
    publish_model(staged, tmp_path)
    assert names(tmp_path) == ["config.json", "notes.txt"]


def test_a_folder_in_use_is_only_for_resuming(tmp_path):
    assert check_output_dir(str(tmp_path / "new"), resume=False) is None
    (tmp_path / ".lock").write_text("of a killed run")
    assert check_output_dir(str(tmp_path), resume=False) is None
    (tmp_path / "x").write_text("x")
    assert check_output_dir(str(tmp_path), resume=True) is None
    assert "is not empty" in check_output_dir(str(tmp_path), resume=False)
    assert "can't be written to" in check_output_dir(str(tmp_path / "x" / "run"), resume=False)
