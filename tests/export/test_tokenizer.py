"""The rewritten tokenizer has the fields that transformers 4 reads, and gives the same ids."""

import json

import pytest

from sft.export.gguf_check import CONVERSATIONS, messages_of
from sft.export.tokenizer import export_tokenizer
from sft.format.render import Renderer
from sft.model.load import load_tokenizer
from tests.families import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_4_gets_the_fields_that_it_reads(trained, family, tmp_path):
    export_tokenizer(trained(family), str(tmp_path / "v4"))
    settings = json.loads((tmp_path / "v4" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in settings
    assert isinstance(settings["additional_special_tokens"], list)
    old, new = load_tokenizer(trained(family)), load_tokenizer(str(tmp_path / "v4"))
    assert {int(key): value["content"] for key, value in settings["added_tokens_decoder"].items()} == {
        token_id: str(token) for token_id, token in old.added_tokens_decoder.items()
    }
    assert (new.chat_template, new.eos_token_id) == (old.chat_template, old.eos_token_id)
    messages = messages_of(CONVERSATIONS[3], "系统")
    assert Renderer(new).render(messages).input_ids.tolist() == Renderer(old).render(messages).input_ids.tolist()


def test_other_ids_are_an_error_and_no_folder_is_left(trained, tmp_path, monkeypatch):
    from sft.export import tokenizer

    def settings_of_another_class(tokenizer_, settings: dict) -> dict:
        return version_4_settings(tokenizer_, settings) | {"add_prefix_space": True, "tokenizer_class": "GPT2Tokenizer"}

    version_4_settings = tokenizer.version_4_settings
    monkeypatch.setattr(tokenizer, "version_4_settings", settings_of_another_class)
    with pytest.raises(ValueError, match="the rewritten tokenizer gives other ids for '你好"):
        export_tokenizer(trained("qwen2"), str(tmp_path / "v4"))
    assert list(tmp_path.iterdir()) == []
