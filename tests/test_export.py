"""An export is checked against what it was made from."""

import pytest

from sft import export
from sft.export import export_merged


def test_only_an_adapter_can_be_merged_and_nothing_is_overwritten(tiny_base, tmp_path):
    with pytest.raises(ValueError, match="holds no LoRA adapter; a full model needs no merging"):
        export_merged(str(tiny_base("qwen2")), str(tmp_path / "new"))
    with pytest.raises(ValueError, match="exists; name a new folder"):
        export_merged(str(tiny_base("qwen2")), str(tmp_path))


def test_a_merge_that_changes_the_logits_is_an_error(tiny_base, tmp_path, monkeypatch):
    from sft.chat_format import Renderer
    from sft.model import add_lora, load_model, load_tokenizer

    base = str(tiny_base("qwen2"))
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = Renderer(tokenizer, "blossom").chat_template
    add_lora(load_model(base), rank=2, alpha=4, dropout=0.0).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    assert export_merged(str(tmp_path / "adapter"), str(tmp_path / "merged")) == tmp_path / "merged"
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="the merged model's logits differ by"):
        export_merged(str(tmp_path / "adapter"), str(tmp_path / "again"))
    assert not (tmp_path / "again").exists()
