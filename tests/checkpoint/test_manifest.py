"""The manifest: which checkpoint is resumed, and every difference from it is found."""

import os
import shutil
from pathlib import Path

import pytest

from sft.checkpoint.manifest import find_checkpoint, find_damage, find_incomplete, hash_files, write_manifest
from sft.checkpoint.save import list_files


def saved_checkpoint(folder: Path, step: int, run: str = "a", text: str = "weights") -> Path:
    """A small checkpoint, as it is when it is saved: a file, and one in a folder."""
    path = folder / f"checkpoint-{step}"
    (path / "global_step").mkdir(parents=True)
    (path / "model.safetensors").write_text(f"{text} of step {step}")
    (path / "global_step" / "optimizer.pt").write_text(f"optimizer of step {step}")
    write_manifest(path, hash_files(path, list_files(path), sync=True), step=step, run=run)
    return path


def test_the_newest_checkpoint_that_equals_its_manifest_is_found_and_newer_ones_are_named(tmp_path):
    saved_checkpoint(tmp_path, 9)
    good = saved_checkpoint(tmp_path, 10)
    (saved_checkpoint(tmp_path, 20) / "global_step" / "optimizer.pt").unlink()
    (tmp_path / "checkpoint-100").mkdir()
    (tmp_path / "checkpoint-tmp").mkdir()
    assert find_checkpoint(str(tmp_path)) == (
        str(good),
        [
            f"{tmp_path}/checkpoint-100: skipped, it has no manifest.json, so it was not saved to the end",
            f"{tmp_path}/checkpoint-20: skipped, global_step/optimizer.pt is missing",
        ],
    )


def test_a_folder_without_a_checkpoint_has_none_to_resume(tmp_path):
    assert find_checkpoint(str(tmp_path / "new")) == (None, [])


def test_every_flipped_bit_of_every_file_is_found(tmp_path):
    path = saved_checkpoint(tmp_path, 3)
    assert find_damage(path) is None
    for name in (*list_files(path), "manifest.json"):
        data = (path / name).read_bytes()
        for place in range(len(data)):
            (path / name).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            problem = find_damage(path)
            assert problem and name in problem, (name, place, problem)
        (path / name).write_bytes(data)
    assert find_damage(path) is None


@pytest.mark.parametrize("name", ["model.safetensors", "global_step/optimizer.pt", "manifest.json"])
@pytest.mark.parametrize("size", [0, 9])
def test_a_cut_file_is_found_by_its_size(tmp_path, name, size):
    path = saved_checkpoint(tmp_path, 3)
    os.truncate(path / name, size)
    assert name in find_incomplete(path)


def test_files_and_folders_that_changed_places_are_found(tmp_path):
    three, four = saved_checkpoint(tmp_path, 3), saved_checkpoint(tmp_path, 4)
    shutil.copytree(three, tmp_path / "checkpoint-9")
    assert find_damage(tmp_path / "checkpoint-9") == "its manifest is that of checkpoint-3"
    shutil.copytree(three, tmp_path / "best")
    assert find_damage(tmp_path / "best") is None
    shutil.copy(three / "model.safetensors", four / "model.safetensors")
    assert find_damage(four) == "model.safetensors differs from its checksum in manifest.json"


def test_a_loadable_file_outside_the_manifest_is_refused_and_a_note_is_not(tmp_path):
    path = saved_checkpoint(tmp_path, 3)
    (path / "notes.txt").write_text("good one")
    assert find_damage(path) is None
    (path / "optimizer.bin").write_text("pickle")
    assert find_damage(path) == "optimizer.bin is not in its manifest"


def test_a_link_instead_of_a_file_and_names_outside_are_refused(tmp_path):
    path = saved_checkpoint(tmp_path, 3)
    (tmp_path / "elsewhere").write_bytes((path / "model.safetensors").read_bytes())
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    assert find_damage(path) == "model.safetensors is missing"
    write_manifest(path, {"../elsewhere": [1, "0"]}, step=3, run="a")
    assert find_damage(path) == "manifest.json names files outside of the checkpoint"
