"""Compiled functions and products in half precision give the plain gradients, and no batch compiles anew."""

import copy
from dataclasses import replace

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM

from sft.model import adapters, attention, fusion, loss

ON_GPU = fusion.Circumstances(on_gpu=True, half=True, seconds=1000.0)


@pytest.fixture
def load(tiny_base):
    """Return a function that loads a tiny base for packed training, in fp32."""

    def model_of(family: str):
        model = AutoModelForCausalLM.from_pretrained(tiny_base(family), dtype=torch.float32)
        attention.isolate_documents(model)
        loss.use_chunked_loss(model)
        return model.train()

    return model_of


@pytest.fixture
def compile_with(monkeypatch):
    """Return a function that chooses the backend of torch.compile; graphs are forgotten after the test."""
    yield lambda backend: monkeypatch.setattr(fusion, "BACKEND", backend)
    torch._dynamo.reset()
    fusion._compiled.cache_clear()


def packed(*lengths: int) -> dict:
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    tokens = torch.randint(3, 200, positions.shape, generator=torch.Generator().manual_seed(len(lengths)))
    return {"input_ids": tokens, "labels": tokens, "position_ids": positions}


def padded(rows: int, length: int) -> dict:
    tokens = torch.randint(3, 200, (rows, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(tokens)
    mask[0, length // 2 :] = 0
    return {"input_ids": tokens, "labels": tokens, "attention_mask": mask}


def gradients_of(model, *batches: dict) -> dict[str, torch.Tensor]:
    """Return the gradients summed over the batches of an update."""
    model.zero_grad()
    for batch in batches:
        model(**batch).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def largest_distance(found: dict, expected: dict) -> float:
    """The largest relative distance of a weight's gradient; one that is all rounding (a key's bias) counts little."""
    assert found.keys() == expected.keys()
    least = 1e-3 * max(float(gradient.norm()) for gradient in expected.values())
    return max(float((found[name] - of).norm()) / max(float(of.norm()), least) for name, of in expected.items())


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("qwen2", "fused kernels: compiled 2 rotary positions, 2 gated MLPs, 5 norms"),
        ("bloom", "fused kernels: compiled 6 norms, 2 activations"),
        ("falcon", "fused kernels: compiled 2 rotary positions, 3 norms"),
    ],
)
def test_no_batch_compiles_anew_after_the_start(family, said, load, compile_with):
    compile_with("eager")
    plain = load(family)
    model = copy.deepcopy(plain)
    assert fusion.compile_elementwise(model) == said
    assert fusion.prove_fused(model).startswith("fused kernels: compiled functions in ")
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (packed(5, 9, 20), packed(34), packed(*[3] * 13), packed(64, 1, 2, 2)):
            assert largest_distance(gradients_of(model, batch), gradients_of(plain, batch)) < 1e-6
        for checkpointed in (plain, model):
            checkpointed.gradient_checkpointing_enable()
        for batch in (packed(30, 11), packed(2, 2, 2)):
            assert largest_distance(gradients_of(model, batch), gradients_of(plain, batch)) < 1e-6
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize(("family", "half"), [("qwen2", False), ("bloom", True)])
def test_no_batch_compiles_anew_under_lora(family, half, load, compile_with):
    """The embeddings are frozen, so that the first layer's states have no gradient and its norm a graph of its own."""
    compile_with("eager")
    plain = adapters.add_lora(load(family), rank=4, alpha=8, dropout=0.0)
    model = copy.deepcopy(plain)
    fusion.compile_elementwise(model)
    with torch.autocast("cpu", dtype=torch.float16, enabled=half):
        assert "compiled functions in " in fusion.prove_fused(model)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for batch in (packed(5, 9, 20), packed(*[3] * 13)):
                found, expected = (model_of(**batch).loss for model_of in (model, plain))
                assert float((found - expected).detach()) == pytest.approx(0.0, abs=1e-5)
                found.backward()


@pytest.mark.slow
def test_the_slices_of_a_hybrid_compile_once(compile_with):
    """Queries of qwen3_5 are every other slice of a product; their strides would be guarded."""
    compile_with("eager")
    shape = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 16}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("qwen3_5_text", **shape)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    attention.isolate_documents(model)
    fusion.compile_elementwise(model)
    fusion.prove_fused(model)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (packed(5, 9, 20), packed(34), packed(*[3] * 5)):
            model(**batch).loss.backward()


def test_liger_kernels_that_give_something_else_are_taken_out(load, monkeypatch):
    monkeypatch.setattr(fusion, "has_liger", lambda model: True)
    for factor, said in (
        (1.0, "fused kernels: Liger's kernels in "),
        (1.01, "fused kernels: none (Liger's kernels end "),
    ):

        def patch(model, factor=factor):
            norm = model.model.norm
            norm.forward = lambda states: type(norm).forward(norm, states) * factor
            return "Liger's for qwen2"

        monkeypatch.setattr(fusion, "use_liger_kernels", patch)
        model = load("qwen2")
        fusion.fuse(model, "auto", replace(ON_GPU, half=False))
        assert fusion.prove_fused(model).startswith(said)
        assert ("forward" in vars(model.model.norm)) is (factor == 1.0)


def test_padded_batches_compile_in_the_first_update_alone(load, compile_with):
    compile_with("eager")
    plain = load("qwen2")
    model = copy.deepcopy(plain)
    fusion.compile_elementwise(model)
    fusion.prove_fused(model, num_rows=3, packing=False)
    gradients_of(model, padded(3, 21))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (padded(3, 40), padded(3, 17), padded(4, 33)):
            assert largest_distance(gradients_of(model, batch), gradients_of(plain, batch)) < 1e-6


@pytest.mark.slow
def test_functions_of_inductor_give_the_gradients_of_plain_ones(load, compile_with):
    compile_with("inductor")
    plain = load("qwen2")
    model = copy.deepcopy(plain)
    fusion.compile_elementwise(model)
    batch = packed(5, 9, 20)
    assert largest_distance(gradients_of(model, batch), gradients_of(plain, batch)) < 1e-6
    assert model.model.norm.runs_compiled()


def test_a_compiler_that_fails_leaves_the_plain_model_and_says_so(load, compile_with):
    def failing(graph, inputs):
        raise OSError("no C compiler\nat all")

    compile_with(failing)
    model = load("qwen2")
    fusion.compile_elementwise(model)
    said = fusion.prove_fused(model)
    assert said.startswith("fused kernels: none (compiled functions failed: ") and "\n" not in said
    assert not model.model.norm.runs_compiled()
    gradients_of(model, packed(5, 9))


def test_a_compiler_error_without_a_message_is_named_by_its_class(load, compile_with):
    def failing(graph, inputs):
        raise AssertionError

    compile_with(failing)
    assert fusion.shorten(AssertionError()) == "AssertionError"
    model = load("bloom")
    fusion.compile_elementwise(model)
    assert fusion.prove_fused(model).startswith("fused kernels: none (compiled functions failed: ")


def test_compiled_functions_that_give_something_else_are_turned_off(load, compile_with):
    def doubled(graph, inputs):
        return lambda *arguments: tuple(output * 1.01 for output in graph(*arguments))

    compile_with(doubled)
    model = load("bloom")
    fusion.compile_elementwise(model)
    assert "from the plain ones)" in fusion.prove_fused(model)
    assert not any(module.runs_compiled() for module in model.modules() if isinstance(module, fusion.Compiled))


def test_evaluation_runs_plainly(load, compile_with):
    compile_with("eager")
    model = load("qwen2").eval()
    fusion.compile_elementwise(model)
    before = counters["stats"]["unique_graphs"]
    with torch.no_grad():
        model(**packed(5, 9))
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize(
    ("wanted", "changes", "chosen"),
    [
        ("auto", {}, "compile"),
        ("auto", {"seconds": 30.0}, "none"),
        ("auto", {"seconds": None}, "compile"),
        ("auto", {"on_gpu": False}, "none"),
        ("auto", {"zero_stage": 3}, "none"),
        ("auto", {"zero_stage": 2}, "compile"),
        ("compile", {"seconds": 30.0}, "compile"),
        ("compile", {"on_gpu": False}, "compile"),
        ("compile", {"zero_stage": 3}, "none"),
        ("none", {}, "none"),
        ("liger", {}, "liger"),
    ],
)
def test_the_kernels_are_chosen_by_the_circumstances(wanted, changes, chosen, monkeypatch):
    monkeypatch.setattr(fusion, "has_liger", lambda model: False)
    assert fusion.choose_kernels(None, wanted, replace(ON_GPU, **changes)) == chosen


def test_liger_is_taken_where_it_has_the_family(monkeypatch):
    monkeypatch.setattr(fusion, "has_liger", lambda model: True)
    assert fusion.choose_kernels(None, "auto", replace(ON_GPU, seconds=1.0, zero_stage=3)) == "liger"


def test_liger_that_fails_is_replaced_unless_it_was_asked_for(load, monkeypatch):
    def fail(model):
        raise AttributeError("no such module\nin this version")

    monkeypatch.setattr(fusion, "has_liger", lambda model: True)
    monkeypatch.setattr(fusion, "use_liger_kernels", fail)
    notes = fusion.fuse(load("bloom"), "auto", replace(ON_GPU, lora=True))
    assert notes[:2] == [
        "Liger's kernels failed: no such module in this version",
        "fused kernels: compiled 6 norms, 2 activations",
    ]
    with pytest.raises(AttributeError):
        fusion.fuse(load("bloom"), "liger", ON_GPU)


def test_a_run_says_what_liger_would_gain(load):
    notes = fusion.fuse(load("falcon"), "auto", replace(ON_GPU, seconds=1.0, half=False))
    assert notes == [
        "fused kernels: none (compiling pays in runs of more than 120 s, this one takes about 1 s)",
        fusion.WITHOUT_LIGER,
    ]
    assert fusion.fuse(load("falcon"), "none", ON_GPU) == []
    assert fusion.fuse(load("falcon"), "auto", replace(ON_GPU, on_gpu=False)) == []


@pytest.mark.parametrize(("family", "checkpointing"), [("qwen2", True), ("bloom", False), ("falcon", False)])
def test_products_of_masters_give_the_gradients_of_autocast(family, checkpointing, load):
    plain = load(family)
    batches = [packed(5, 9, 20), packed(30, 11), packed(7, 7)]
    models = [plain, *(copy.deepcopy(plain) for _ in range(3))]
    for model, accumulation, alone in zip(models[1:], (1, 3, 3), (True, True, False), strict=True):
        assert fusion.use_master_products(model, accumulation=accumulation, alone=alone) > 0
    found = []
    for model in models:
        if checkpointing:
            model.gradient_checkpointing_enable()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(gradients_of(model, *batches))
    for gradients in found[1:]:
        biases = {name for name in gradients if name.endswith("bias")}  # autocast rounds their sums to bf16
        for names, limit in ((gradients.keys() - biases, 1e-6), (biases, 5e-3)):
            parts = [{name: of[name] for name in names} for of in (gradients, found[0])]
            assert not names or largest_distance(*parts) < limit


def test_a_weight_is_rounded_once_in_an_update_and_anew_after_it(load):
    model = load("qwen2")
    fusion.use_master_products(model, accumulation=2, alone=True)
    layer = model.model.layers[0].mlp.up_proj
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradients_of(model, packed(5, 9))
        first = layer.rounded_weight(torch.bfloat16)
        model(**packed(7, 7)).loss.backward()
        assert layer.rounded_weight(torch.bfloat16) is first
        torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()
        model.zero_grad()
        assert layer.rounded_weight(torch.bfloat16) is not first
    assert torch.equal(layer.rounded_weight(torch.bfloat16), layer.weight.detach().bfloat16())


def test_outside_autocast_and_in_evaluation_a_master_layer_is_a_linear_one(load):
    plain = load("qwen2")
    model = copy.deepcopy(plain)
    fusion.use_master_products(model, accumulation=1, alone=True)
    batch = packed(5, 9)
    assert largest_distance(gradients_of(model, batch), gradients_of(plain, batch)) == 0
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(**batch).loss, plain(**batch).loss)
