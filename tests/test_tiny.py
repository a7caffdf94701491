"""The tiny bases carry the quirks of their families."""

import json

import pytest

from sft import tiny
from tests.families import FAMILIES, build_tiny

QUIRKS = {
    "bloom": {"class": "BloomForCausalLM", "bos": 1, "eos": 2, "pad": 3, "adds_bos": False, "more_rows": True},
    "falcon": {"class": "FalconForCausalLM", "bos": None, "eos": 11, "adds_bos": False, "more_rows": False},
    "falcon-rw": {"class": "FalconForCausalLM", "adds_bos": False, "more_rows": False},
    "qwen2": {"class": "Qwen2ForCausalLM", "bos": None, "adds_bos": False, "more_rows": True},
    "qwen3": {"class": "Qwen3ForCausalLM", "bos": None, "adds_bos": False, "more_rows": True},
    "yi": {"class": "LlamaForCausalLM", "bos": 1, "eos": 2, "pad": 0, "adds_bos": False, "more_rows": False},
    "mistral": {"class": "MistralForCausalLM", "bos": 1, "eos": 2, "pad": None, "adds_bos": True, "more_rows": False},
}


def test_each_base_has_its_familys_class_special_ids_and_rows(family, tiny_base):
    from transformers import AutoConfig, AutoTokenizer

    folder, expected = tiny_base(family), QUIRKS[family]
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    found = {
        "class": config.architectures[0],
        "adds_bos": tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id,
        "more_rows": config.vocab_size > len(tokenizer),
        **{name: value for name, value in ids.items() if name in expected},
    }
    assert found == expected


def test_the_configs_carry_the_quirks_that_break_other_tools(tiny_base):
    def config(family):
        return json.loads((tiny_base(family) / "config.json").read_text())

    assert (config("falcon")["multi_query"], config("falcon")["alibi"]) == (True, False)
    assert (config("falcon-rw")["alibi"], config("falcon-rw")["eos_token_id"]) == (True, 2)
    assert config("mistral")["sliding_window"] == 256
    assert config("bloom")["dtype"] == "float16"


@pytest.mark.parametrize("family", ["yi", "mistral"])
def test_the_sentencepiece_families_split_as_sentencepiece_itself(family, tiny_base, tokenizer_of):
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(tiny_base(family) / "tokenizer.model"))
    for text in ("你好 Hello\n\nworld", "  two  spaces", "𠀀 rare", " \n x", "123 4.5"):
        assert tokenizer_of(family)(text, add_special_tokens=False)["input_ids"] == model.encode(text)


def test_the_same_seed_builds_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        build_tiny("qwen2", tmp_path / name, hidden_size=16, num_layers=1, texts=["你好 Hello"] * 9)
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        build_tiny("bloom", tmp_path)
    with pytest.raises(ValueError, match="unknown family 'gpt9'; use one of bloom, falcon"):
        build_tiny("gpt9", tmp_path / "new")
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_every_family_of_the_design_is_there():
    assert list(FAMILIES) == list(QUIRKS)
    assert set(tiny.FAMILY_NAMES) == set(QUIRKS)


def test_the_command_builds_the_families_of_the_clone_and_refuses_them_without_one(tmp_path, monkeypatch, capsys):
    options = ["--family", "falcon-rw", "--hidden_size", "16", "--num_layers", "1", "--vocab_size", "300"]
    tiny.main([*options, "--output_dir", str(tmp_path / "base")])
    assert capsys.readouterr().out == f"wrote {tmp_path / 'base'}\n"
    assert json.loads((tmp_path / "base" / "config.json").read_text())["alibi"] is True
    monkeypatch.setattr(tiny, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="--family yi: is built in a clone of the repository only; use qwen2"):
        tiny.main(["--family", "yi", "--output_dir", str(tmp_path / "other")])
