"""Packed = alone: every family, logits and gradients, every way of attending, and nothing else changed."""

import copy

import pytest
import torch

from sft.model import attention
from sft.model.attention import isolate_documents
from sft.model.attention import self_test as run_self_test
from sft.model.kernels import Documents, attend_one_by_one
from sft.model.loss import use_chunked_loss
from tests.families import FAMILIES

# Falcon and bloom bring their own attention; the rest go through transformers' interface.
PACKINGS = [[5, 3, 7], [40], [1, 1, 30, 1], [290, 3, 300, 17]]


@pytest.fixture
def load(tiny_base):
    """Return a function that loads a tiny base in fp32, its attention sharpened so that a leak shows."""
    from transformers import AutoModelForCausalLM

    def model_of(family: str, implementation: str | None = None):
        options = {"attn_implementation": implementation} if implementation else {}
        model = AutoModelForCausalLM.from_pretrained(tiny_base(family), dtype=torch.float32, **options)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() == 2 and any(part in name for part in ("q_proj", "k_proj", "query_key_value")):
                    weight.mul_(8)
        return model

    return model_of


def texts_of(lengths, seed: int = 0) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 900, (length,), generator=random) for length in lengths]


def packed(texts, padding: int = 0) -> dict:
    """One row; its padding is a document of its own."""
    texts = [*texts, torch.zeros(padding, dtype=torch.long)] if padding else texts
    positions = torch.cat([torch.arange(len(text)) for text in texts])
    return {"input_ids": torch.cat(texts)[None], "position_ids": positions[None]}


def run(model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the logits, and the gradients of a loss that weighs every logit differently."""
    model.zero_grad()
    logits = model(**batch).logits
    targets = batch["input_ids"].roll(-1, dims=1)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


def run_alone(model, texts) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Each text in a forward of its own; the loss of its last token looks where it does in the packed row."""
    model.zero_grad()
    all_logits = []
    for text, after in zip(texts, [*texts[1:], texts[0]], strict=True):
        logits = model(input_ids=text[None]).logits[0]
        targets = torch.cat([text[1:], after[:1]])
        torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
        all_logits.append(logits.detach())
    return all_logits, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(1.0, float(gradient.abs().max()))
        assert float((found[name] - gradient).abs().max()) < 1e-5 * scale, name


@pytest.mark.parametrize("lengths", PACKINGS, ids=str)
@pytest.mark.parametrize(
    ("family", "implementation"),
    # transformers has no sdpa for bloom
    [(family, way) for family in FAMILIES for way in ("eager", "sdpa") if (family, way) != ("bloom", "sdpa")],
)
def test_a_packed_row_equals_its_documents_alone(load, family, implementation, lengths):
    texts = texts_of(lengths, seed=sum(lengths))
    expected, expected_gradients = run_alone(load(family, implementation), texts)
    model = load(family, implementation)
    isolate_documents(model)
    logits, gradients = run(model, packed(texts))
    assert float((logits[0] - torch.cat(expected)).abs().max()) < 1e-5
    assert_same_gradients(gradients, expected_gradients)


def test_rows_of_a_batch_and_padding_at_a_rows_end_are_kept_apart_too(load, family):
    first, second = texts_of([20, 9, 11]), texts_of([30, 4], seed=1)
    expected, _ = run_alone(load(family), [*first, *second])
    model = load(family)
    isolate_documents(model)
    rows = [packed(first), packed(second, padding=6)]
    logits = model(**{name: torch.cat([row[name] for row in rows]) for name in rows[0]}).logits
    found = torch.cat([logits[0], logits[1, :34]]).detach()
    assert float((found - torch.cat(expected)).abs().max()) < 1e-5


def test_gradient_checkpointing_gives_the_same_gradients(load, family):
    model = load(family)
    isolate_documents(model)
    batches = [packed(texts_of([20, 9, 11])), packed(texts_of([3, 37], seed=1))]
    expected = [run(model, batch)[1] for batch in batches]
    model.gradient_checkpointing_enable()
    model.train()
    for batch, gradients in zip(batches, expected, strict=True):
        assert_same_gradients(run(model, batch)[1], gradients)


def test_padded_batches_and_generation_stay_as_they_were(load, family):
    untouched, model = load(family), load(family)
    isolate_documents(model)
    texts = texts_of([300, 4, 11])
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {
        "input_ids": pad(texts, batch_first=True),
        "attention_mask": pad([torch.ones_like(text) for text in texts], batch_first=True),
    }
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits[mask], untouched(**batch).logits[mask])
        assert torch.equal(model(input_ids=texts[0][None]).logits, untouched(input_ids=texts[0][None]).logits)
    left = {name: values[1:, :11].flip(1) for name, values in batch.items()}
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(**left, **options), untouched.generate(**left, **options))


def test_a_packed_batch_leaves_nothing_behind(load, family):
    model, batch = load(family), {"input_ids": texts_of([30])[0][None]}
    with torch.no_grad():
        expected = model(**batch).logits
        isolate_documents(model)
        model(**packed(texts_of([10, 20])))
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            model(**packed(texts_of([10, 20])), inputs_embeds=torch.zeros(1, 2, 3))
        assert torch.equal(model(**batch).logits, expected)


def test_isolating_twice_is_isolating_once_and_a_copy_works(load, family):
    model = load(family)
    said = isolate_documents(model)
    assert isolate_documents(model) == said
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
    batch = packed(texts_of([6, 9]))
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(**batch).logits, model(**batch).logits)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "falcon", "bloom"])
def test_a_compiled_model_gives_the_same_gradients_and_is_compiled_once_for_all_documents(load, family):
    model = load(family)
    isolate_documents(model)
    use_chunked_loss(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, graphs = torch.compile(model, backend="aot_eager"), []
    for number, lengths in enumerate(([5, 3, 7, 9], [24], [1, 1, 20, 2], [12, 12], [8, 16])):
        batch = packed(texts_of(lengths, seed=number))
        batch["labels"] = batch["input_ids"].where(batch["position_ids"] > number % 3, -100)
        found, expected = [], []
        for each, results in ((compiled, found), (model, expected)):
            model.zero_grad()
            loss = each(**batch).loss
            loss.backward()
            results += [loss.item(), *(p.grad.norm().item() for p in model.parameters())]
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[1]
    torch._dynamo.reset()


def test_a_saved_config_has_no_trace_of_packing(load, family, tmp_path):
    model = load(family)
    isolate_documents(model)
    model.save_pretrained(tmp_path)
    assert "documents" not in (tmp_path / "config.json").read_text()


def test_no_square_mask_of_the_row_is_made(load, family, monkeypatch):
    model = load(family)
    isolate_documents(model)
    seen = []
    monkeypatch.setattr(attention, "attend", lambda *args, **kw: seen.append(args[3]) or attend_one_by_one(*args, **kw))
    model(**packed(texts_of([290, 3, 300])))
    assert len(seen) == model.config.num_hidden_layers
    assert all(isinstance(documents, Documents) for documents in seen)
    assert {shape for documents in seen for shape in documents.made} <= {
        (n, w) for n in (290, 3, 300) for w in (n, 256)
    }


def test_adapters_are_isolated_through_their_wrapper(load, family):
    from peft import LoraConfig, get_peft_model

    base = load(family)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    isolate_documents(model)
    apart, reach = run_self_test(model)
    assert apart < 1e-5 and reach == 0.0


def test_the_self_test_passes_and_leaves_mode_and_random_state_alone(load, family):
    model = load(family).train()
    isolate_documents(model)
    state = torch.get_rng_state()
    apart, reach = run_self_test(model)
    assert apart < 1e-5 and reach == 0.0 and model.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", ["bloom", "falcon", "falcon-rw"])
def test_the_self_test_stops_a_model_that_leaks(load, family):
    with pytest.raises(ValueError, match=r"mix documents up in (Bloom|Falcon)ForCausalLM.*turn packing off"):
        run_self_test(load(family))


def test_bf16_autocast_is_near_fp32(load, family):
    model = load(family)
    isolate_documents(model)
    batch = packed(texts_of([60, 20, 33]))
    with torch.no_grad():
        exact = model(**batch).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = model(**batch).logits
    assert float((rounded - exact).norm() / exact.norm()) < 0.03
