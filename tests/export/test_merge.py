"""Merged weights have the logits of their source; otherwise no folder is written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sft.chat.reply import load_chat
from sft.export import merge
from sft.export.merge import compute_logits, export_merged


def logits(folder) -> torch.Tensor:
    return compute_logits(load_chat(str(folder), device="cpu", dtype="float32"))


def test_an_adapter_is_merged_into_shards_with_the_same_logits(adapter, tiny_base, tmp_path):
    merged = export_merged(adapter, str(tmp_path / "merged"), max_shard_size="200KB")
    assert len(list(merged.glob("model-*.safetensors"))) > 1
    assert torch.allclose(logits(merged), logits(adapter), atol=1e-4)
    assert (logits(tiny_base("qwen2")) - logits(adapter)).abs().max() > 0.01
    assert json.loads((merged / "config.json").read_text())["dtype"] == "float32"


def test_a_model_that_attends_by_position_is_written_in_bf16(trained, tmp_path):
    """Rounding the rotary frequencies too moved its logits by more than the check allows."""
    folder = tmp_path / "sharp"
    shutil.copytree(trained("qwen2"), folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: 25 * weight for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    export_merged(str(folder), str(tmp_path / "half"), dtype="bfloat16")
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert {weight.dtype for weight in half.values()} == {torch.bfloat16}


def test_a_full_model_is_written_in_another_precision(trained, tmp_path):
    written = export_merged(trained("qwen2"), str(tmp_path / "half"), dtype="bfloat16")
    assert json.loads((written / "config.json").read_text())["dtype"] == "bfloat16"
    assert (logits(written) - logits(trained("qwen2"))).abs().max() < 0.05
    assert json.loads((written / "generation_config.json").read_text())["eos_token_id"] == [2045]


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_in_a_line(tiny_base, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(tiny_base("qwen2"), folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(1500)
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match=f"{folder}: token .* but the model has 1500 embedding rows; the tokenizer in"):
        export_merged(str(folder), str(tmp_path / "merged"))


def test_the_chat_format_and_its_variables_go_along(trained, tmp_path):
    """Without the run's record, `auto` would give this base model another format than it was trained in."""
    folder = tmp_path / "run"
    shutil.copytree(trained("qwen2"), folder)
    template = (
        "{{ '<|im_start|>system\\n' + mood + '<|im_end|>\\n' }}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content | trim + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    record = {"chat_format": "base", "template_kwargs": {"mood": "glad"}, "model": "base"}
    (folder / "run.json").write_text(json.dumps(record))
    written = export_merged(str(folder), str(tmp_path / "merged"))
    renderer = load_chat(str(written), device="cpu").renderer
    assert (renderer.name, renderer.template_kwargs) == ("base", {"mood": "glad"})
    assert renderer.text([{"role": "user", "content": "a"}]) == (
        "<|im_start|>system\nglad<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    )
    assert json.loads((written / "run.json").read_text()) == record


def test_a_difference_is_an_error_and_no_folder_is_left(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "MAX_LOGIT_DIFFERENCE", -1.0)
    with pytest.raises(ValueError, match="the merged model's logits differ from the adapter's by"):
        export_merged(adapter, str(tmp_path / "merged"))
    assert list(tmp_path.iterdir()) == []
