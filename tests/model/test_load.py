"""Loading of models and tokenizers, and the files saved with them."""

import json
import shutil
import sys
import types

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from sft.chat.reply import load_chat
from sft.format.render import Renderer
from sft.model.adapters import untrained_ids
from sft.model.load import (
    _liger_options,
    absolute,
    check_dtype,
    check_model_path,
    check_rows,
    check_weights,
    check_window,
    choose_compute,
    count_parameters,
    has_liger,
    load_model,
    load_tokenizer,
    set_generation_config,
    use_liger_kernels,
)


@pytest.mark.parametrize(("family", "pad"), [("bloom", "<pad>"), ("falcon", "<|endoftext|>"), ("mistral", "<unk>")])
def test_an_existing_token_pads_and_no_row_is_added(family, pad, tiny_base):
    tokenizer = load_tokenizer(str(tiny_base(family)))
    rows = load_model(str(tiny_base(family))).get_input_embeddings().num_embeddings
    assert tokenizer.pad_token == pad
    assert len(tokenizer) <= rows


def test_contradictory_sampling_settings_of_a_base_do_not_make_saving_fail(tiny_base, tmp_path):
    model, tokenizer = load_model(str(tiny_base("qwen2"))), load_tokenizer(str(tiny_base("qwen2")))
    model.generation_config.temperature, model.generation_config.do_sample = 0.9, False
    set_generation_config(model, tokenizer, [7, 8])
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [7, 8]
    assert "temperature" not in saved


def test_sound_sampling_settings_are_kept_and_length_caps_are_not(tiny_base, tmp_path):
    model, tokenizer = load_model(str(tiny_base("qwen2"))), load_tokenizer(str(tiny_base("qwen2")))
    model.generation_config.update(do_sample=True, temperature=0.7, max_new_tokens=2048, max_length=100)
    model.generation_config.update(min_new_tokens=50, min_length=60)
    set_generation_config(model, tokenizer, [7])
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert (saved["temperature"], saved["do_sample"]) == (0.7, True)
    limits = ("max_new_tokens", "max_length", "min_new_tokens", "min_length")
    assert [saved.get(name) for name in limits] == [None] * 4


def test_full_fine_tuning_loads_fp32_masters_for_every_computing_type(tiny_base):
    import torch

    model = load_model(str(tiny_base("bloom")), compute="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    frozen = load_model(str(tiny_base("bloom")), compute="bfloat16", lora=True)
    assert {parameter.dtype for parameter in frozen.parameters()} == {torch.bfloat16}


def test_a_token_without_an_embedding_row_is_named_before_training(tiny_base):
    model, tokenizer = load_model(str(tiny_base("yi"))), load_tokenizer(str(tiny_base("yi")))
    rows = model.get_input_embeddings().num_embeddings
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": ["<|mystop|>"]})
    assert tokenizer.pad_token_id == rows
    check_rows(model, tokenizer, "base", used_ids=[2], largest_id=rows - 1)
    assert tokenizer.pad_token == "<unk>"
    stop = tokenizer.convert_tokens_to_ids("<|mystop|>")
    with pytest.raises(ValueError, match=rf"base: token '<\|mystop\|>' has id {stop}, but the model has {rows}"):
        check_rows(model, tokenizer, "base", used_ids=[stop], largest_id=0)


def test_rows_longer_than_the_models_positions_are_refused(tiny_base):
    check_window(str(tiny_base("qwen2")), 2048)
    with pytest.raises(ValueError, match=r"--max_length 2049: .* has 2048 positions; use at most that"):
        check_window(str(tiny_base("qwen2")), 2049)
    check_window(str(tiny_base("bloom")), 10**6)
    check_window(str(tiny_base("falcon-rw")), 10**6)


def test_half_precision_masters_are_refused_and_a_frozen_half_precision_base_is_not():
    assert check_dtype("auto", lora=False) is check_dtype("bfloat16", lora=True) is None
    assert "rounds AdamW's updates away" in check_dtype("bfloat16", lora=False)
    assert check_dtype("float8", lora=True).startswith("--dtype float8: use one of auto, float32")


def test_without_a_gpu_the_computing_is_fp32_unless_bf16_is_asked_for():
    assert choose_compute(bf16=False, fp16=False, use_cpu=True) == {"bf16": False, "fp16": False}
    assert choose_compute(bf16=True, fp16=False, use_cpu=True) == {"bf16": True, "fp16": False}
    with pytest.raises(ValueError, match="--fp16 needs a GPU"):
        choose_compute(bf16=False, fp16=True, use_cpu=True)


def test_only_control_tokens_that_a_base_never_saw_count_as_untrained(tokenizer_of):
    qwen = tokenizer_of("qwen2")
    expected = sorted(qwen.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]))
    assert untrained_ids(qwen, Renderer(qwen, "chatml")) == expected
    assert untrained_ids(qwen, Renderer(qwen, "blossom")) == []
    assert untrained_ids(tokenizer_of("mistral"), Renderer(tokenizer_of("mistral"), "mistral")) == []


def test_a_model_path_is_a_folder_with_a_config_or_looks_like_a_hub_name(tmp_path, tiny_base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    assert check_model_path("Qwen/Qwen2.5-0.5B") is check_model_path(str(tiny_base("yi"))) is None
    assert check_model_path(str(tmp_path)).endswith("no config.json in this folder; name a model folder")
    for missing in ("out/typo", "./typo", "a/b/c", "typo/"):
        assert "no such folder" in check_model_path(missing)
    assert absolute("out") == str(tmp_path / "out")
    assert absolute("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"


def test_a_broken_model_is_one_line_that_names_the_path(tmp_path, tiny_base):
    for file in tiny_base("qwen2").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=f"{tmp_path}: the model can't be loaded: ") as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=f"{tmp_path}: the tokenizer can't be loaded: "):
        load_tokenizer(str(tmp_path))


def test_a_base_or_adapter_of_which_weights_are_missing_is_refused(tmp_path, tiny_base):
    """transformers makes the weights up, and peft leaves the layer as it was; both only warn."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(tiny_base("qwen2"), base)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["up_proj"])
    peft.get_peft_model(load_model(str(base)), lora).save_pretrained(adapter)
    load_tokenizer(str(base)).save_pretrained(adapter)
    load_chat(str(adapter))
    _remove_weight(adapter / "adapter_model.safetensors", "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight")
    with pytest.raises(ValueError, match=rf"{adapter}: the model can't be loaded: Found missing adapter keys .*1\.mlp"):
        load_chat(str(adapter))
    _remove_weight(base / "model.safetensors", "model.layers.1.mlp.up_proj.weight")
    missing = f"{base}: the model can't be loaded: 1 of its weights are not in its files, model.layers.1.mlp.up_proj"
    for load, path in ((load_model, base), (load_chat, base), (load_chat, adapter), (check_weights, base)):
        with pytest.raises(ValueError, match=missing):
            load(str(path))


def _remove_weight(file, name: str) -> None:
    weights = load_file(file)
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})


def test_weights_of_other_sizes_than_the_configs_are_found_without_reading_them(tmp_path, tiny_base):
    shutil.copytree(tiny_base("qwen2"), tmp_path / "base")
    check_weights(str(tmp_path / "base"))
    check_weights("hub/name")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"intermediate_size": 99}))
    with pytest.raises(ValueError, match=f"{tmp_path / 'base'}: the model can't be loaded: You set `ignore_mismatched"):
        check_weights(str(tmp_path / "base"))


def test_parameters_are_counted_once_where_they_are_tied(tiny_base):
    model = load_model(str(tiny_base("qwen2")))
    trainable, total = count_parameters(model)
    assert (
        trainable == total == sum(tensor.numel() for tensor in {p.data_ptr(): p for p in model.parameters()}.values())
    )


def test_liger_kernels_are_used_for_supported_families_and_others_are_named(tiny_base, monkeypatch):
    calls = []
    patch = types.SimpleNamespace(
        MODEL_TYPE_TO_APPLY_LIGER_FN={"qwen2": None},
        _apply_liger_kernel_to_instance=lambda **options: calls.append(options),
    )
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", types.SimpleNamespace(monkey_patch=patch))
    qwen2, bloom = (load_model(tiny_base(family)) for family in ("qwen2", "bloom"))
    assert use_liger_kernels(qwen2) == "Liger's for qwen2"
    assert use_liger_kernels(bloom) == "no Liger kernels: there are none for bloom"
    assert calls == [{"model": qwen2, "cross_entropy": False, "fused_linear_cross_entropy": False, "geglu": False}]


@pytest.mark.parametrize(
    ("settings", "left_out"),
    [
        ({}, {"geglu"}),
        ({"hidden_act": "gelu_pytorch_tanh"}, {"swiglu"}),
        ({"hidden_act": "gelu"}, {"swiglu", "geglu"}),
        ({"num_experts": 8}, {"swiglu", "geglu"}),
    ],
)
def test_liger_computes_no_other_activation_and_no_experts(settings, left_out):
    from transformers import Qwen2Config

    losses = {"cross_entropy": False, "fused_linear_cross_entropy": False}  # Liger's for granite replaces torch's own
    assert _liger_options(Qwen2Config(**settings)) == losses | dict.fromkeys(left_out, False)


def test_a_liger_that_cannot_be_imported_is_found_when_it_is_used(monkeypatch):
    from sft.model import load

    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    assert has_liger(None)


def test_liger_kernels_stay_in_their_model(tiny_base, monkeypatch):
    """Liger replaces names in transformers' module; a model that is loaded later is the plain one again."""
    from transformers.models.qwen2 import modeling_qwen2

    rotate, norm, rotated = modeling_qwen2.apply_rotary_pos_emb, modeling_qwen2.Qwen2RMSNorm, []

    def apply_liger(**options):
        modeling_qwen2.Qwen2RMSNorm = None
        modeling_qwen2.apply_rotary_pos_emb = lambda *states: rotated.append(1) or rotate(*states)

    patch = types.SimpleNamespace(
        MODEL_TYPE_TO_APPLY_LIGER_FN={"qwen2": None}, _apply_liger_kernel_to_instance=apply_liger
    )
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", types.SimpleNamespace(monkey_patch=patch))
    model, other = load_model(str(tiny_base("qwen2"))), load_model(str(tiny_base("qwen2")))
    use_liger_kernels(model)
    assert (modeling_qwen2.apply_rotary_pos_emb, modeling_qwen2.Qwen2RMSNorm) == (rotate, norm)
    tokens = torch.arange(3, 9)[None]
    expected = other(input_ids=tokens).logits
    assert rotated == []
    assert torch.equal(model(input_ids=tokens).logits, expected)
    assert rotated == [1, 1]  # one of each layer


def test_liger_kernels_that_are_not_installed_are_named(tiny_base, monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ValueError, match=r"pip install -r requirements-gpu\.txt"):
        use_liger_kernels(load_model(tiny_base("qwen2")))


def test_packed_weights_of_gpt_oss_are_loaded_unpacked(monkeypatch):
    given = []
    monkeypatch.setattr(
        "sft.model.load.from_pretrained", lambda _class, path, **options: given.append(options) or model
    )
    monkeypatch.setattr("sft.model.load.load_config", lambda path, **options: configs[path])
    model = types.SimpleNamespace(config=types.SimpleNamespace())
    configs = {"packed": types.SimpleNamespace(quantization_config={"quant_method": "mxfp4"}), "plain": object()}
    for path in configs:
        load_model(path)
    assert given[0].pop("quantization_config").dequantize is True
    assert given[0] == given[1] == {"dtype": torch.float32, "trust_remote_code": False, "output_loading_info": True}
