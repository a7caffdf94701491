"""Saved weights are read again before they are trusted."""

import pytest
import torch
from safetensors.torch import save_file

from sft.checkpoint.weights import verify_saved


def test_saved_tensors_are_read_again_and_checked(tmp_path):
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
