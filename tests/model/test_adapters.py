"""LoRA reaches the matrices that it says it reaches, changes nothing at the start, and merges."""

import copy
import json

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from sft.model import adapters
from sft.model.adapters import add_lora, find_matrices, plan_adapters
from sft.model.shrink import shrink_config, without_dropout

TOKENS = torch.arange(3, 43).view(2, 20)


def model_of(kind: str, **settings):
    """A small random model of a type of transformers, the same in every call."""
    torch.manual_seed(0)
    config = without_dropout(shrink_config(CONFIG_MAPPING[kind](**settings)))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def stir(model) -> None:
    """Give the adapters an effect: fresh ones have none."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))))


def apart(first: torch.Tensor, second: torch.Tensor) -> float:
    return ((first - second).norm() / second.norm()).item()


def test_the_plan_of_a_mixture_names_dense_layers_experts_and_shared_experts_and_leaves_the_router_out():
    plan = plan_adapters(model_of("glm4_moe"))
    found = {group.name.removeprefix("model.layers.*."): group.left_out or "adapted" for group in plan.groups}
    adapted = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    adapted += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted += [f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")]
    assert found == {**dict.fromkeys(adapted, "adapted"), "mlp.gate.weight": "a router; --lora_router adapts it"}
    assert plan.share > 0.99


@pytest.mark.parametrize(
    "kind", ["qwen3_moe", "glm4_moe", "mixtral", "gpt_oss", "qwen2_moe", "qwen3_5_moe_text", "phimoe"]
)
def test_every_matrix_but_the_router_has_an_adapter_and_each_is_counted(kind):
    base = model_of(kind)
    plan = plan_adapters(base)
    expected = {matrix.name for matrix in find_matrices(base) if _state(plan, matrix.name) == "adapted"}
    assert all("gate.weight" in group.name or "router" in group.name for group in plan.groups if group.left_out)
    model = add_lora(base, rank=3, alpha=6, dropout=0.05, plan=plan)
    found = set()
    for path, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            path = path.replace(".base_layer", "")
            found.add(f"{path}.{module.parameter_name}" if hasattr(module, "parameter_name") else path)
    assert found == expected
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert plan.count_parameters(3, "lora") == trained


def _state(plan, name: str) -> str:
    (group,) = (group for group in plan.groups if group.name == adapters.star(name))
    return group.left_out or "adapted"


def test_the_router_is_adapted_when_it_is_asked_for():
    plan = plan_adapters(model_of("qwen3_moe"), router=True)
    assert plan.share == 1.0
    model = add_lora(model_of("qwen3_moe"), rank=2, alpha=4, dropout=0.0, plan=plan)
    assert any("mlp.gate.lora_A" in name for name, _ in model.named_parameters())
    assert apart(logits(model), logits(model_of("qwen3_moe"))) < 1e-6


def test_dropout_falls_to_0_where_experts_are_adapted_and_it_is_said():
    plan = plan_adapters(model_of("qwen3_moe"), dropout=0.05)
    assert plan.lines()[-1] == "LoRA dropout is 0 instead of 0.05: peft has none for fused experts"
    model = add_lora(model_of("qwen3_moe"), rank=2, alpha=4, dropout=0.05, plan=plan)
    assert model.peft_config["default"].lora_dropout == 0.0
    dense = plan_adapters(model_of("qwen3"), dropout=0.05)
    assert dense.notes == ()
    model = add_lora(model_of("qwen3"), rank=2, alpha=4, dropout=0.05, plan=dense)
    assert model.peft_config["default"].lora_dropout == 0.05


# phi and gptj have a head with a bias, inkling an embedding with a norm, gemma3 one with a scale.
@pytest.mark.parametrize("kind", ["qwen2", "qwen3_moe", "phi", "gptj", "inkling_text", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("variant", adapters.VARIANTS)
def test_fresh_adapters_and_token_rows_change_no_logit_and_trained_ones_merge_and_reload(kind, variant, tmp_path):
    from peft import PeftModel

    base = model_of(kind)
    expected = logits(base)
    plan = plan_adapters(base, variant=variant)
    model = add_lora(base, rank=2, alpha=4, dropout=0.0, plan=plan, variant=variant, untrained_ids=[5, 6]).eval()
    assert apart(logits(model), expected) < 1e-6
    assert adapters.self_test(model) < 1e-6
    stir(model)
    with pytest.raises(ValueError, match="fresh adapters change the logits"):
        adapters.self_test(model)
    trained = logits(model)
    model.save_pretrained(tmp_path)
    assert apart(logits(PeftModel.from_pretrained(model_of(kind), tmp_path).eval()), trained) < 1e-5
    assert apart(logits(copy.deepcopy(model).merge_and_unload(safe_merge=True)), trained) < 1e-5


def test_rslora_scales_by_the_root_of_the_rank():
    model = add_lora(model_of("qwen3"), rank=16, alpha=32, dropout=0.0, variant="rslora")
    assert model.base_model.model.model.layers[0].mlp.up_proj.scaling == {"default": 8.0}


def test_dora_counts_its_magnitudes_and_names_the_experts_that_it_leaves_out():
    plan = plan_adapters(model_of("qwen3_moe"), variant="dora")
    assert {group.left_out for group in plan.groups if "experts" in group.name} == {
        "peft has no DoRA for fused experts"
    }
    model = add_lora(model_of("qwen3_moe"), rank=3, alpha=6, dropout=0.0, plan=plan, variant="dora")
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert plan.count_parameters(3, "dora") == trained


@pytest.mark.parametrize(
    ("kind", "name", "reason"),
    [
        ("glm_moe_dsa", "self_attn.indexer.wk", "no gradient reaches an adapter of it"),
        ("recurrent_gemma", "rg_lru.input_gate_weight", "peft can't adapt it: The expanded size of the tensor"),
        ("zamba2", "shared_transformer.self_attn.q_proj", "an adapter of it can't be merged"),
        ("mamba2", "mixer.out_proj", "peft can't adapt it: Module 'out_proj' is incompatible with Mamba-based models"),
    ],
)
def test_a_twin_shows_which_adapters_would_do_nothing_or_not_merge(kind, name, reason):
    plan = plan_adapters(model_of(kind))
    (group,) = (group for group in plan.groups if group.name.endswith(f".{name}"))
    assert group.left_out.startswith(reason)
    assert group.name in "\n".join(plan.lines())
    merged = add_lora(model_of(kind), rank=2, alpha=4, dropout=0.0, plan=plan).eval()
    stir(merged)
    expected = logits(merged)
    assert apart(logits(merged.merge_and_unload()), expected) < 1e-5


def test_a_saved_config_has_short_names_and_an_empty_list_of_parameters(tmp_path):
    model = model_of("qwen3")
    add_lora(model, rank=2, alpha=4, dropout=0.0, plan=plan_adapters(model)).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert (sorted(saved["target_modules"]), saved["target_parameters"]) == (names, [])


def test_embedding_a_token_leaves_the_random_state_alone():
    model = model_of("qwen2")
    model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: output + torch.rand(1))
    state = torch.get_rng_state()
    assert adapters.embed_token(model).shape == (1, 1, model.config.hidden_size)
    assert torch.equal(torch.get_rng_state(), state)
