"""The converter's copy of a model folder: config, pre-tokenizer, sentencepiece model."""

import json
import shutil

import pytest

from sft.chat.reply import load_chat
from sft.export.converter_input import (
    converter_config,
    name_pre_tokenizer,
    write_converter_input,
    write_sentencepiece,
)
from sft.export.gguf_check import TEXTS
from tests.families import FAMILIES


def test_the_copy_has_the_values_that_the_converter_expects(trained, tmp_path):
    chat = load_chat(trained("mistral"), device="cpu")
    source = write_converter_input(chat, shutil.copytree(trained("mistral"), tmp_path / "saved"), tmp_path / "source")
    assert json.loads((source / "config.json").read_text())["max_position_embeddings"] == 256  # its sliding window
    settings = json.loads((source / "tokenizer_config.json").read_text())
    assert (settings["add_bos_token"], settings["add_prefix_space"]) == (True, True)
    assert (source / "model.safetensors").resolve() == tmp_path / "saved" / "model.safetensors"


def test_the_config_is_corrected_by_family():
    falcon = {"model_type": "falcon", "multi_query": True, "num_kv_heads": 71}
    assert converter_config(falcon)["num_kv_heads"] == 1
    assert converter_config(falcon | {"new_decoder_architecture": True})["num_kv_heads"] == 71
    assert converter_config({"model_type": "bloom"})["seq_length"] == 2048
    assert converter_config({"model_type": "bloom", "seq_length": 512})["seq_length"] == 512


def test_a_folder_without_safetensors_is_refused(trained, tmp_path):
    with pytest.raises(ValueError, match="no safetensors in this folder"):
        write_converter_input(load_chat(trained("qwen2"), device="cpu"), tmp_path, tmp_path / "source")


def test_a_sentencepiece_model_is_written_back_from_its_json(tiny_base, tokenizer_of, tmp_path):
    from sentencepiece import SentencePieceProcessor

    for family in ("yi", "mistral"):
        write_sentencepiece(tokenizer_of(family), tmp_path / "tokenizer.model")
        ours = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
        first = SentencePieceProcessor(model_file=str(tiny_base(family) / "tokenizer.model"))
        assert [ours.id_to_piece(i) for i in range(len(ours))] == [first.id_to_piece(i) for i in range(len(first))]
        for kind in ("is_control", "is_unknown", "is_byte"):
            assert [getattr(ours, kind)(i) for i in range(len(ours))] == [
                getattr(first, kind)(i) for i in range(len(first))
            ]
        for text in TEXTS:
            assert ours.encode(text) == first.encode(text)


def test_the_pre_tokenizer_is_named_by_its_pattern(tokenizer_of):
    names = {family: name_pre_tokenizer(tokenizer_of(family)) for family in FAMILIES}
    assert names == {
        "bloom": "bloom",
        "falcon": "falcon",
        "falcon-rw": "gpt-2",
        "qwen2": "qwen2",
        "qwen3": "qwen2",
        "yi": None,
        "mistral": None,
    }


def test_single_digits_before_bytes_are_smollms(tokenizer_of):
    """SmolLM2's published tokenizer.json splits digits, then into bytes by GPT-2's pattern."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert name_pre_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend)) == "smollm"
