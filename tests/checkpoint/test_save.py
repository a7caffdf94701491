"""Sealed checkpoints: which one a run continues from, what may be removed, and what is trusted after saving."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sft.checkpoint import save as checkpoints
from sft.checkpoint.save import (
    check_output_dir,
    clear_leftovers,
    compare,
    find_checkpoint,
    hash_files,
    incomplete,
    list_files,
    move_into_place,
    open_staging,
    put_in_place,
    rotate,
    seal,
    unsealed,
    verify_saved,
)


def sealed(folder: Path, step: int, run: str = "a", text: str = "weights") -> Path:
    """A small checkpoint, as it is when it is saved: a file, and one in a folder."""
    path = folder / f"checkpoint-{step}"
    (path / "global_step").mkdir(parents=True)
    (path / "model.safetensors").write_text(f"{text} of step {step}")
    (path / "global_step" / "optimizer.pt").write_text(f"optimizer of step {step}")
    seal(path, hash_files(path, list_files(path), to_disk=True), step=step, run=run)
    return path


def test_the_newest_checkpoint_that_is_what_was_sealed_is_taken_and_the_others_are_named(tmp_path):
    sealed(tmp_path, 9)
    good = sealed(tmp_path, 10)
    (sealed(tmp_path, 20) / "global_step" / "optimizer.pt").unlink()
    (tmp_path / "checkpoint-100").mkdir()
    (tmp_path / "checkpoint-tmp").mkdir()
    assert find_checkpoint(str(tmp_path)) == (
        str(good),
        [
            f"{tmp_path}/checkpoint-100: skipped, it has no manifest.json, so it was not saved to the end",
            f"{tmp_path}/checkpoint-20: skipped, global_step/optimizer.pt is missing",
        ],
    )


def test_without_a_checkpoint_there_is_nothing_to_resume(tmp_path):
    assert find_checkpoint(str(tmp_path / "new")) == (None, [])


def test_every_flipped_bit_of_every_file_is_found(tmp_path):
    path = sealed(tmp_path, 3)
    assert unsealed(path) is None
    for name in (*list_files(path), "manifest.json"):
        data = (path / name).read_bytes()
        for place in range(len(data)):
            (path / name).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            problem = unsealed(path)
            assert problem and name in problem, (name, place, problem)
        (path / name).write_bytes(data)
    assert unsealed(path) is None


@pytest.mark.parametrize("name", ["model.safetensors", "global_step/optimizer.pt", "manifest.json"])
@pytest.mark.parametrize("size", [0, 9])
def test_a_cut_file_is_found_by_its_size(tmp_path, name, size):
    path = sealed(tmp_path, 3)
    os.truncate(path / name, size)
    assert name in incomplete(path)


def test_files_and_folders_that_changed_places_are_found(tmp_path):
    three, four = sealed(tmp_path, 3), sealed(tmp_path, 4)
    shutil.copytree(three, tmp_path / "checkpoint-9")
    assert unsealed(tmp_path / "checkpoint-9") == "its manifest is that of checkpoint-3"
    shutil.copytree(three, tmp_path / "best")
    assert unsealed(tmp_path / "best") is None
    shutil.copy(three / "model.safetensors", four / "model.safetensors")
    assert unsealed(four) == "model.safetensors has other bytes than were sealed"


def test_nothing_that_could_be_loaded_slips_in_and_a_note_may_stay(tmp_path):
    path = sealed(tmp_path, 3)
    (path / "notes.txt").write_text("good one")
    assert unsealed(path) is None
    (path / "optimizer.bin").write_text("pickle")
    assert unsealed(path) == "optimizer.bin is not in its manifest"


def test_a_link_in_the_place_of_a_file_and_names_outside_are_refused(tmp_path):
    path = sealed(tmp_path, 3)
    (tmp_path / "elsewhere").write_bytes((path / "model.safetensors").read_bytes())
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    assert unsealed(path) == "model.safetensors is missing"
    seal(path, {"../elsewhere": [1, "0"]}, step=3, run="a")
    assert unsealed(path) == "manifest.json names files outside of the checkpoint"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_rotation_keeps_the_newest_of_this_run_and_all_that_is_not_its_own(tmp_path):
    for step in (5, 10, 15):
        sealed(tmp_path, step)
    sealed(tmp_path, 7, run="another")
    sealed(tmp_path, 999)
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-5" / "notes.txt").write_text("mine")
    rotate(tmp_path, keep=1, step=15, run="a")
    assert names(tmp_path) == ["checkpoint-15", "checkpoint-3", "checkpoint-5", "checkpoint-7", "checkpoint-999"]
    assert names(tmp_path / "checkpoint-5") == ["notes.txt"]
    rotate(tmp_path, keep=None, step=999, run="a")
    assert unsealed(tmp_path / "checkpoint-15") is None


def test_a_checkpoint_that_is_saved_again_takes_the_place_of_this_runs_own_and_sets_others_aside(tmp_path):
    for run, kept in (("a", []), ("another", ["checkpoint-5.set-aside-1"])):
        folder = tmp_path / run
        (sealed(folder, 5, run=run) / "model.safetensors").write_text("broken")
        staged = sealed(open_staging(folder, "a"), 5, text="new weights")
        line = put_in_place(staged, folder / "checkpoint-5", "a")
        assert (folder / "checkpoint-5" / "model.safetensors").read_text() == "new weights of step 5"
        assert unsealed(folder / "checkpoint-5") is None
        assert [name for name in names(folder) if "aside" in name] == kept
        assert (line is None) == (not kept)


def test_what_a_killed_save_left_is_named_and_removed_but_only_with_our_mark(tmp_path):
    staged = open_staging(tmp_path, "a") / "checkpoint-5"
    staged.mkdir()
    (staged / "model.safetensors").write_text("half")
    assert clear_leftovers(tmp_path) == [f"{staged}: skipped and removed, its save was cut off"]
    assert names(tmp_path) == []
    (tmp_path / ".saving").mkdir()
    (tmp_path / ".saving" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="not of a run of ours"):
        open_staging(tmp_path, "a")
    assert names(tmp_path / ".saving") == ["thesis.txt"]


def test_a_removal_that_was_cut_off_is_finished_later(tmp_path):
    os.rename(sealed(tmp_path, 5), tmp_path / ".removed-checkpoint-5")
    (tmp_path / ".removed-checkpoint-5" / "model.safetensors").unlink()
    clear_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_too_little_room_is_said_with_the_disk_and_both_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9_000, 8_000, 1_000))
    checkpoints.check_space(tmp_path, 1_000, "checkpoint-5")
    with pytest.raises(ValueError, match=r"the disk at /\S* has 1,000 bytes free, and checkpoint-5 needs 1,001;"):
        checkpoints.check_space(tmp_path, 1_001, "checkpoint-5")


def test_a_full_disk_is_known_by_what_each_library_says():
    words = ["[enforce fail at inline_container.cc:672] . unexpected pos 2002048 vs 2001940", "IoError: os error 28"]
    assert all(checkpoints.is_full_disk(RuntimeError(text)) for text in words)
    assert checkpoints.is_full_disk(OSError(28, "No space left on device"))
    assert not checkpoints.is_full_disk(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_what_changed_is_named_with_both_values_and_refused_unless_allowed():
    old = {"exact": {"seed": 1, "data": {"a": "x", "b": "y"}, "world_size": 2}, "told": {"torch": "2.12"}}
    new = {"exact": {"seed": 1, "data": {"a": "x", "b": "z"}, "world_size": 1}, "told": {"torch": "2.13"}}
    told = "torch was 2.12 and is 2.13; results may differ in the last bits"
    assert compare(old, new, []) == (
        [
            'data was {"b": "y"} and is {"b": "z"}; give the old one again, or add --allow_changed data',
            "world_size was 2 and is 1; give the old one again, or add --allow_changed world_size",
        ],
        [told],
    )
    refused, said = compare(old, new, ["data", "world_size"])
    assert refused == []
    assert said[0].startswith('allowed: data was {"b": "y"} and is {"b": "z"}; from here on')
    assert compare(old, new, ["sed"]) == (["--allow_changed sed: no such field; there are data, seed, world_size"], [])
    assert compare(old, old, []) == ([], [])


def test_saved_tensors_are_reopened_and_checked(tmp_path):
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert verify_saved(tmp_path, {"a": (2, 3), "b": (1,)}) == 7
    with pytest.raises(ValueError, match=r"tensor a has shape \(2, 3\), expected \(3, 2\)"):
        verify_saved(tmp_path, {"a": (3, 2)})
    with pytest.raises(ValueError, match="1 tensors are missing, c for one"):
        verify_saved(tmp_path, {"c": (1,)})


def test_saved_tensors_that_are_not_finite_or_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no weights were saved"):
        verify_saved(tmp_path)
    save_file({"a": torch.tensor([1.0, float("nan")])}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="tensor a is empty or not finite"):
        verify_saved(tmp_path)
    save_file({"a": torch.zeros(0)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="tensor a is empty or not finite"):
        verify_saved(tmp_path)


def test_files_are_moved_into_place_and_others_stay(tmp_path):
    staged = tmp_path / ".final"
    staged.mkdir()
    (staged / "config.json").write_text(json.dumps({"new": 1}))
    (tmp_path / "notes.txt").write_text("mine")
    move_into_place(staged, tmp_path)
    assert names(tmp_path) == ["config.json", "notes.txt"]


def test_a_folder_in_use_is_only_for_resuming(tmp_path):
    assert check_output_dir(str(tmp_path / "new"), resume=False) is None
    (tmp_path / ".lock").write_text("of a killed run")
    assert check_output_dir(str(tmp_path), resume=False) is None
    (tmp_path / "x").write_text("x")
    assert check_output_dir(str(tmp_path), resume=True) is None
    assert "is not empty" in check_output_dir(str(tmp_path), resume=False)
    assert "can't be written to" in check_output_dir(str(tmp_path / "x" / "run"), resume=False)
