"""Which checkpoint a run continues from, and what is trusted after saving."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sft.checkpoint import check_output_dir, find_checkpoint, incomplete, move_into_place, verify_saved

FILES = ("trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "trainer_state.json").write_text("{}")
    save_file({"a": torch.ones(2)}, path / "model.safetensors")
    for name in FILES[2:]:
        torch.save({"step": step}, path / name)
    return path


def test_the_newest_complete_checkpoint_is_taken_and_the_others_are_named(tmp_path):
    checkpoint(tmp_path, 9)
    good = checkpoint(tmp_path, 10)
    (checkpoint(tmp_path, 20) / "optimizer.pt").unlink()
    (checkpoint(tmp_path, 100) / "trainer_state.json").write_text('{"global')
    (tmp_path / "checkpoint-tmp").mkdir()
    assert find_checkpoint(str(tmp_path)) == (
        str(good),
        [
            f"{tmp_path}/checkpoint-100: skipped, trainer_state.json is missing or cut",
            f"{tmp_path}/checkpoint-20: skipped, optimizer.pt is missing",
        ],
    )


def test_without_a_checkpoint_there_is_nothing_to_resume(tmp_path):
    assert find_checkpoint(str(tmp_path / "new")) == (None, [])


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("trainer_state.json", "trainer_state.json is missing or cut"),
        ("model.safetensors", "the weights are missing"),
        ("optimizer.pt", "optimizer.pt is missing"),
        ("scheduler.pt", "scheduler.pt is missing"),
        ("rng_state.pth", "the random state is missing"),
    ],
)
def test_a_checkpoint_without_any_of_its_parts_is_incomplete(tmp_path, name, problem):
    path = checkpoint(tmp_path, 1)
    assert incomplete(path) is None
    (path / name).unlink()
    assert incomplete(path) == problem


@pytest.mark.parametrize("name", FILES[1:])
@pytest.mark.parametrize("size", [0, 40])
def test_a_checkpoint_with_a_cut_file_is_incomplete(tmp_path, name, size):
    path = checkpoint(tmp_path, 1)
    os.truncate(path / name, size)
    assert incomplete(path) == f"{name} is cut"


def test_deepspeed_checkpoints_hold_their_state_in_a_folder_of_their_own(tmp_path):
    path = checkpoint(tmp_path, 1)
    for name in ("optimizer.pt", "model.safetensors"):
        (path / name).unlink()
    (path / "global_step1").mkdir()
    torch.save({}, path / "global_step1" / "mp_rank_00_model_states.pt")
    assert incomplete(path) is None
    os.truncate(path / "global_step1" / "mp_rank_00_model_states.pt", 9)
    assert incomplete(path) == "global_step1/mp_rank_00_model_states.pt is cut"


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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "notes.txt"]


def test_a_folder_in_use_is_only_for_resuming(tmp_path):
    assert check_output_dir(str(tmp_path / "new"), resume=False) is None
    (tmp_path / "x").write_text("x")
    assert check_output_dir(str(tmp_path), resume=True) is None
    assert "is not empty" in check_output_dir(str(tmp_path), resume=False)
    assert "can't be written to" in check_output_dir(str(tmp_path / "x" / "run"), resume=False)
