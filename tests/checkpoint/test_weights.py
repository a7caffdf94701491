"""Saved weights are read again before they are trusted."""

import pytest
import torch
from safetensors.torch import save_file

from sft.checkpoint.weights import leave_out_tied, saved_shapes, verify_saved


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


def test_fused_experts_are_expected_as_they_are_saved_one_by_one(tmp_path):
    """A full fine-tuning of a mixture would else be refused when it is saved, after the night."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    sizes = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "head_dim": 8, "vocab_size": 32}
    counts = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 4}
    AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes, **counts)).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "saved")
    expected = saved_shapes(model)
    assert expected["model.layers.0.mlp.experts.3.down_proj.weight"] == (16, 8)
    assert not [name for name in expected if name.endswith("experts.down_proj")]
    assert verify_saved(tmp_path / "saved", expected) == model.num_parameters()
    with pytest.raises(ValueError, match=r"1 tensors are missing, model.layers.0.mlp.experts.4.down_proj.weight"):
        verify_saved(tmp_path / "saved", expected | {"model.layers.0.mlp.experts.4.down_proj.weight": (16, 8)})


def test_a_tied_head_is_written_once_and_reopened_equal(tmp_path):
    """Under ZeRO-2 the state dict holds clones, in which transformers no longer sees that two names share a tensor."""
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, Qwen2Config

    sizes = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 32}
    counts = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    for tie in (True, False):
        model = AutoModelForCausalLM.from_config(Qwen2Config(**sizes, **counts, tie_word_embeddings=tie))
        clones = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        folder = tmp_path / str(tie)
        model.save_pretrained(folder, state_dict=leave_out_tied(clones, model))
        with safe_open(folder / "model.safetensors", framework="pt") as saved:
            assert ("lm_head.weight" in saved.keys()) == (not tie)  # noqa: SIM118 (safe_open is no dict)
        reopened = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        assert reopened.keys() == clones.keys()
        assert all(torch.equal(reopened[name], clones[name]) for name in clones)
    assert leave_out_tied({"lm_head.weight": torch.ones(1)}, model) != {}, "its source isn't there"
