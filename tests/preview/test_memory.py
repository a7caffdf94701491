"""Memory of a step, from published configs and on small models that are measured."""

from dataclasses import replace

import pytest
from transformers import AutoConfig

from sft.model.shrink import choose_layers
from sft.preview import activations, memory
from sft.preview.shape import FULL, LORA, ONE, QLORA, ZERO2, ZERO3, Plan, Shape, Step, read_shape
from sft.train.checks import GIB

BLOOM = {"vocab_size": 250_880, "tie_word_embeddings": True}
FALCON = {"new_decoder_architecture": False, "max_position_embeddings": 2048, "tie_word_embeddings": True}
QWEN = {"vocab_size": 151_936, "tie_word_embeddings": False, "max_position_embeddings": 32_768}
YI = {"vocab_size": 64_000, "tie_word_embeddings": False, "max_position_embeddings": 4096}
YI_6B = {"hidden_size": 4096, "intermediate_size": 11_008, "num_attention_heads": 32, "num_key_value_heads": 4, **YI}
MISTRAL = {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32}
MISTRAL |= {"num_key_value_heads": 8, "tie_word_embeddings": False, "max_position_embeddings": 32_768}
LLAMA_3 = {"vocab_size": 128_256, "max_position_embeddings": 131_072, "num_key_value_heads": 8}
# The seeds' models: type, shape of their public config.json, parameters. No hub is reachable from here: each was read
# where the source beside it repeats that file. The sums agree with the parameters that the model cards name.
PUBLISHED = {
    # Layers, hidden size, parameters: keras-hub, bloom_presets.py. Heads: cli99/llm-analysis; the cards of 1b7, 3b.
    "bloom-560m": ("bloom", {"hidden_size": 1024, "n_layer": 24, "n_head": 16, **BLOOM}, 559_214_592),
    "bloom-1b7": ("bloom", {"hidden_size": 2048, "n_layer": 24, "n_head": 16, **BLOOM}, 1_722_408_960),
    "bloom-3b": ("bloom", {"hidden_size": 2560, "n_layer": 30, "n_head": 32, **BLOOM}, 3_002_557_440),
    "bloom-7b1": ("bloom", {"hidden_size": 4096, "n_layer": 30, "n_head": 32, **BLOOM}, 7_069_016_064),
    # litgpt, config.py; rw: an audit of the hub's falcon configs. The hub counts 7B's head again (7,217,189,760).
    "falcon-rw-1b": (
        "falcon",
        {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "vocab_size": 50_304, **FALCON}
        | {"multi_query": False, "alibi": True, "bias": True, "parallel_attn": False},
        1_311_625_216,
    ),
    "falcon-7b": (
        "falcon",
        {"hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71, "vocab_size": 65_024, **FALCON}
        | {"multi_query": True, "alibi": False, "bias": False, "parallel_attn": True},
        6_921_720_704,
    ),
    # GenZ-LLM-Analyzer, Model_sets/alibaba.py, which names the hub's files.
    "Qwen1.5-4B": (
        "qwen2",
        {"hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 40, "num_attention_heads": 20}
        | {"num_key_value_heads": 20, **QWEN},
        3_950_369_280,
    ),
    "Qwen1.5-14B": (
        "qwen2",
        {"hidden_size": 5120, "intermediate_size": 13_696, "num_hidden_layers": 40, "num_attention_heads": 40}
        | {"num_key_value_heads": 40, **QWEN, "vocab_size": 152_064},
        14_167_290_880,
    ),
    # litgpt, config.py; Qwen3's card: 8.2B, 6.95B of them not in embeddings, 36 layers, 32 heads for Q and 8 for KV.
    "Qwen2.5-7B": (
        "qwen2",
        {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28}
        | {"num_key_value_heads": 4, **QWEN, "vocab_size": 152_064, "max_position_embeddings": 131_072},
        7_615_616_512,
    ),
    "Qwen3-8B-Base": (
        "qwen3",
        {"hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "head_dim": 128, **QWEN},
        8_190_735_360,
    ),
    # Yi's configuration_yi.py; 9B is 6B with 16 layers twice (01-ai.github.io/blog/dive-deeper-into-yi-9b), and 1.5 is
    # trained on from it (card).
    "Yi-6B": ("llama", {"num_hidden_layers": 32, **YI_6B, "rope_theta": 5e6}, 6_061_035_520),
    "Yi-9B": ("llama", {"num_hidden_layers": 48, **YI_6B}, 8_829_407_232),
    "Yi-1.5-9B": ("llama", {"num_hidden_layers": 48, **YI_6B}, 8_829_407_232),
    "Yi-34B": (
        "llama",
        {"hidden_size": 7168, "intermediate_size": 20_480, "num_hidden_layers": 60, "num_attention_heads": 56}
        | {"num_key_value_heads": 8, **YI, "rope_theta": 5e6},
        34_388_917_248,
    ),
    # transformers' own defaults, which its docstrings say are those of Qwen3.5-9B and 35B-A3B, GLM-4-9B-0414 and
    # GLM-4.7-Flash; Qwen3.5-4B: a config.json of a model trained from it.
    "Qwen3-30B-A3B": ("qwen3_moe", {"num_hidden_layers": 48, "head_dim": 128}, 30_532_122_624),
    "Qwen3.5-4B": (
        "qwen3_5_text",
        {"hidden_size": 2560, "intermediate_size": 9216, "tie_word_embeddings": True},
        4_205_751_296,
    ),
    "Qwen3.5-35B-A3B": ("qwen3_5_moe_text", {}, 34_660_610_688),
    "GLM-4-9B-0414": ("glm4", {}, 9_400_279_040),
    "GLM-4.7-Flash": ("glm4_moe_lite", {}, 29_943_390_976),
    "gpt-oss-20b": ("gpt_oss", {"num_hidden_layers": 24, "num_local_experts": 32}, 20_914_757_184),
    # litgpt, config.py.
    "Llama-3.1-8B": ("llama", {"intermediate_size": 14_336, **LLAMA_3}, 8_030_261_248),
    "Llama-3.2-3B": (
        "llama",
        {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24, **LLAMA_3}
        | {"head_dim": 128, "tie_word_embeddings": True},
        3_212_749_824,
    ),
    "gemma-3-1b-it": (
        "gemma3_text",
        {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4}
        | {"num_key_value_heads": 1, "vocab_size": 262_144, "sliding_window": 512},
        999_885_952,
    ),
    "Mistral-7B-v0.1": ("mistral", {**MISTRAL, "vocab_size": 32_000, "sliding_window": 4096}, 7_241_732_096),
    "Mistral-7B-v0.3": ("mistral", {**MISTRAL, "vocab_size": 32_768, "sliding_window": None}, 7_248_023_552),
}

PUBLISHED["Qwen3-8B"] = PUBLISHED["Qwen3-8B-Base"]  # trained from it


def shape_of(name: str) -> Shape:
    kind, shape, _parameters = PUBLISHED[name]
    return read_shape(AutoConfig.for_model(kind, **shape))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_counted_from_the_config_are_the_published_ones(name):
    assert shape_of(name).parameters == PUBLISHED[name][2]


def test_weights_gradients_and_optimizer_are_shared_out_as_zero_does_it():
    shape, step = shape_of("Mistral-7B-v0.1"), Step(accumulation=8)

    def found(plan):
        parts, host = memory.estimate_memory(shape, step, plan)
        names = ("weights", "gradients", "optimizer")
        return {part.name: part.bytes for part in parts if part.name in names}, {p.name: p.bytes for p in host}

    assert found(Plan()) == (
        {"weights": 28_966_928_384, "gradients": 28_966_928_384, "optimizer": 57_933_856_768},
        {},
    )
    shared = {"gradients": 3_620_866_048, "optimizer": 10_862_598_144}
    assert found(Plan(FULL, ZERO2, gpus=8)) == ({"weights": 14_483_464_192, **shared}, {})
    assert found(Plan(FULL, ZERO3, gpus=8)) == ({"weights": 1_810_433_024, **shared}, {})
    assert found(Plan(FULL, ZERO2, True, 8)) == ({"weights": 14_483_464_192}, shared)
    assert found(Plan(FULL, ZERO3, True, 8)) == ({}, {"weights": 1_810_433_024, **shared})
    adapters = 16 * 2_621_440
    assert found(Plan(LORA))[0] == {
        "weights": 2 * 7_241_732_096 + 4 * adapters,
        "gradients": 4 * adapters,
        "optimizer": 8 * adapters,
    }


@pytest.mark.parametrize("kind", ["falcon", "qwen3_moe"])
def test_adapters_and_token_rows_are_counted_as_peft_makes_them(kind, tiny_base):
    import torch
    from transformers import AutoModelForCausalLM

    from sft.model.adapters import add_lora

    config = AutoConfig.from_pretrained(tiny_base("falcon"))
    if kind == "qwen3_moe":
        config = AutoConfig.for_model(kind, **COMMON, **MIXED[kind])
    shape = read_shape(config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = add_lora(model, rank=4, alpha=8, dropout=0.0, plan=shape.adapters, untrained_ids=[3, 5, 7])
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert memory.count_trained(shape, Step(lora_rank=4, lora_token_rows=3), Plan(LORA)) == trained


COMMON = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128}
EXPERTS = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 96}
DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
MIXED = {
    "mixtral": {"num_hidden_layers": 5, "num_local_experts": 4, "intermediate_size": 96},
    "qwen3_moe": {"num_hidden_layers": 5, **EXPERTS, "mlp_only_layers": [0, 3]},
    "gpt_oss": {"num_hidden_layers": 6, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64},
    "qwen3_5_text": {"num_hidden_layers": 8, **DELTA, "intermediate_size": 96},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MIXED)
def test_two_layers_of_each_kind_predict_all_others(kind):
    shape = read_shape(AutoConfig.for_model(kind, **COMMON, **MIXED[kind]))
    assert len(choose_layers(shape.config.to_dict(), 2)) < shape.layers
    for checkpointing, lora in ((True, False), (False, True)):
        step = Step(rows=1, length=96, documents=(64, 32), trained=0, checkpointing=checkpointing)
        walked = activations._trace_layers(shape, range(shape.layers), step, lora, False).add_up(range(shape.layers))
        found = activations._count_activations(shape, step, lora, False)
        for name in ("forward", "backward", "last"):
            assert abs(getattr(found, name) / getattr(walked, name) - 1) < 0.02, (name, found, walked)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3", *MIXED])
def test_the_counted_bytes_are_those_of_a_real_step(kind):
    """The model runs with real weights, tokens and routes in fp32, and its live storages are added up."""
    import torch

    settings = MIXED.get(kind, {"num_hidden_layers": 5, "intermediate_size": 96})
    shape = read_shape(AutoConfig.for_model(kind, **COMMON, **settings))
    step = Step(rows=1, length=96, documents=(64, 32), checkpointing=False, half=False, device="cpu")
    torch.manual_seed(0)
    model = activations._shallow_model(shape, range(shape.layers), torch.float32, step, lora=False)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.02)
    positions = torch.cat([torch.arange(size) for size in step.documents])[None]
    embedded = torch.randn(1, 96, 64, requires_grad=True)
    known = [*model.parameters(), *model.buffers(), embedded, positions]
    with activations.Meter(known) as meter:
        hidden = model(inputs_embeds=embedded, position_ids=positions, logits_to_keep=1).logits
    counted = activations.count_activations(shape, step, Plan()).forward
    assert hidden.requires_grad
    assert abs(counted / meter.live - 1) < 0.08


def test_checkpointing_takes_less_and_packed_rows_on_a_gpu_keep_no_scores(tiny_base):
    shape = read_shape(AutoConfig.from_pretrained(tiny_base("bloom")))

    def kept(**options):
        return activations.count_activations(shape, Step(length=512, **options), Plan()).forward

    assert kept(checkpointing=True) < kept(checkpointing=False) / 2
    assert kept(checkpointing=False, packing=True) < kept(checkpointing=False, packing=False) / 2


def test_checkpointed_layers_keep_outputs_where_the_gpu_has_room():
    """Of Qwen2.5-7B: 3,584 numbers of attention, 2 x 18,944 of the MLP, in 2 bytes, for 16,384 tokens."""
    shape, step = shape_of("Qwen2.5-7B"), Step(rows=4, length=4096, trained=12_000)
    inputs_alone = memory.estimate_memory(shape, step, Plan(LORA))[0]
    roomy = memory.estimate_memory(shape, replace(step, keeps_in=141 * GIB), Plan(LORA))[0]
    kept = next(part for part in roomy if part.name == "kept outputs")
    assert kept.bytes == 28 * (3584 + 2 * 18_944) * 2 * 16_384
    assert roomy[-1].bytes == inputs_alone[-1].bytes + kept.bytes
    tight = memory.estimate_memory(shape, replace(step, keeps_in=40 * GIB), Plan(LORA))[0]
    assert 0.85 * 38 * GIB < tight[-1].bytes + memory.RESERVE <= 38 * GIB


def test_only_what_is_alive_is_counted():
    import torch

    known = torch.zeros(10)
    with activations.Meter([known]) as meter:
        first = torch.zeros(100)
        view = first[:50]
        known.add_(1)
        del first
        second = torch.ones(25)
        assert meter.live == 500
        del view
        assert meter.live == 100
        del second
    assert (meter.live, meter.peak) == (0, 500)


def test_the_simplest_way_that_fits_and_the_fewest_machines_are_found():
    shape, step = shape_of("Yi-34B"), Step(accumulation=8)
    assert memory.fits_best(shape, step, 80 * GIB, 8) == Plan(FULL, ZERO3, False, 8)
    assert memory.fits_best(shape, step, 40 * GIB, 8) == Plan(FULL, ZERO3, True, 8)
    assert memory.least_machines(shape, step, Plan(FULL, ZERO3), 40 * GIB, 8) == 3
    assert memory.least_machines(shape, step, Plan(FULL, ONE), 80 * GIB, 8) is None
    assert memory.least_machines(shape, step, Plan(QLORA, ONE), 32 * GIB, 1) == 1
    assert memory.fits_best(shape_of("bloom-560m"), step, 24 * GIB, 1) == Plan()


def test_disk_is_counted_from_what_a_checkpoint_holds():
    shape, step = shape_of("bloom-560m"), Step()
    assert memory.disk_of_checkpoint(shape, step, Plan()).bytes == 12 * 559_214_592
    assert memory.disk_of_checkpoint(shape, step, Plan(FULL, ZERO3)).bytes == 14 * 559_214_592
    assert memory.disk_of_model(shape, step, Plan()).bytes == 4 * 559_214_592


@pytest.mark.slow
def bytes_of(parts) -> dict[str, int]:
    return {part.name: part.bytes for part in parts}


def test_of_a_row_that_two_gpus_share_each_keeps_half_of_the_activations():
    shape, plan = shape_of("Qwen2.5-7B"), Plan(FULL, ZERO3, False, 8)
    step = Step(length=131_072, trained=131_072, accumulation=8)
    whole, shared = (bytes_of(memory.estimate_memory(shape, replace(step, shared=gpus), plan)[0]) for gpus in (1, 2))
    assert shared["activations"] == pytest.approx(whole["activations"] / 2, rel=0.01)
    assert shared["weights"] == whole["weights"]
    assert memory.longest_rows(shape, step, plan, 80 * GIB) == [(1, 65_536), (2, 131_072)], "it has no more positions"


def test_offloaded_activations_are_counted_in_ram():
    shape, plan = shape_of("Qwen2.5-7B"), Plan(FULL, ZERO3, False, 8)
    step = Step(length=65_536, trained=65_536, accumulation=8)
    kept, moved = (
        memory.estimate_memory(shape, replace(step, activation_offload=moves), plan) for moves in (False, True)
    )
    inputs = 65_536 * 3584 * 2  # tokens, hidden size, bytes: of each of 28 layers
    assert (bytes_of(kept[1]), bytes_of(moved[1])) == ({}, {"activations": 28 * inputs})
    assert bytes_of(kept[0])["activations"] - bytes_of(moved[0])["activations"] == 28 * inputs


def test_rows_of_a_model_that_mixes_tokens_without_attention_are_counted_on_one_gpu():
    layers = {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}
    config = AutoConfig.for_model("lfm2", max_position_embeddings=1024, **layers)
    step = Step(length=2048, trained=2048, accumulation=8)
    found = memory.longest_rows(read_shape(config), step, Plan(FULL, ZERO3, False, 8), 80 * GIB)
    assert found == [(1, 1024)]
