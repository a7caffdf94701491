"""The loss in chunks is the plain loss, with its gradients, for every family, head and wrapper."""

import copy
import inspect

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutput

from sft.format.tokens import IGNORE_INDEX
from sft.model import kernels
from sft.model.attention import isolate_documents
from sft.model.loss import LogitShape, LossHead, use_chunked_loss, use_full_logits
from sft.model.loss import self_test as run_self_test


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    """Chunks of five tokens and tiles of two, so that tiny tests go through many, and a last one that is not full."""
    monkeypatch.setattr(kernels, "rows_at_a_time", lambda *_: 5)
    monkeypatch.setattr(kernels, "TILE_BYTES", 2 * 4 * 2048)


@pytest.fixture
def load(tiny_base):
    from transformers import AutoModelForCausalLM

    return lambda family, **options: AutoModelForCausalLM.from_pretrained(
        tiny_base(family), dtype=torch.float32, **options
    )


def batch_of(rows: int = 3, length: int = 24, labelled: float = 0.6, seed: int = 0) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 900, (rows, length), generator=random)
    in_loss = torch.rand(rows, length, generator=random) < labelled
    return {
        "input_ids": tokens,
        "labels": tokens.where(in_loss, IGNORE_INDEX),
        "attention_mask": torch.ones_like(tokens),
    }


def run(model, batch, **options) -> tuple[float, dict[str, torch.Tensor]]:
    model.train()
    model.zero_grad()
    loss = model(**batch, **options).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, tolerance: float = 1e-5) -> None:
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        distance = (found[1][name] - gradient).norm() / gradient.norm().clamp(min=1e-8)
        assert float(distance) < tolerance, name


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(100)])
def test_loss_and_gradients_equal_the_plain_ones(load, family, num_items):
    options = {} if num_items is None else {"num_items_in_batch": num_items}
    expected = run(load(family), batch_of(), **options)
    model = load(family)
    assert use_chunked_loss(model) == "loss in chunks"
    assert isinstance(model.get_output_embeddings(), LossHead)
    assert_same(run(model, batch_of(), **options), expected)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_heads_tied_and_with_bias(load, tied, bias):
    def model_of():
        torch.manual_seed(0)
        model = load("qwen2", tie_word_embeddings=tied)
        if bias:
            model.lm_head.bias = torch.nn.Parameter(torch.randn(model.config.vocab_size))
        return model

    expected = run(model_of(), batch_of())
    model = model_of()
    use_chunked_loss(model)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert_same(run(model, batch_of()), expected)


def test_a_frozen_head_gets_no_gradient(load):
    plain, model = load("qwen3"), load("qwen3")
    use_chunked_loss(model)
    for each in (plain, model):
        each.lm_head.weight.requires_grad_(False)
    assert_same(run(model, batch_of()), run(plain, batch_of()))


def test_accumulated_batches_give_the_gradient_of_the_whole(load, family):
    batches = [batch_of(2, seed=1), batch_of(1, labelled=0.1, seed=2), batch_of(2, labelled=0.9, seed=3)]
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    num_items = (whole["labels"][:, 1:] != IGNORE_INDEX).sum()
    expected = run(load(family), whole)
    model = load(family)
    use_chunked_loss(model)
    loss = 0.0
    for batch in batches:
        part = model.train()(**batch, num_items_in_batch=num_items).loss
        part.backward()
        loss += part.item()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same((loss, found), expected)


def test_a_batch_without_labels_has_loss_0_and_a_graph(load, family):
    model, batch = load(family), batch_of()
    use_chunked_loss(model)
    batch["labels"][:, 1:] = IGNORE_INDEX  # the first token of a row is predicted by none
    for num_items in (None, 30, 0):
        loss, gradients = run(model, batch, num_items_in_batch=num_items)
        assert loss == 0.0
        assert all(float(gradient.abs().max()) == 0.0 for gradient in gradients.values())
        assert gradients.keys() == {name for name, _ in model.named_parameters()}


def test_bf16_autocast_is_as_near_to_fp32_as_the_plain_loss_is(load, family):
    exact = run(load(family), batch_of(8, 64))
    plain, model = load(family), load(family)
    use_chunked_loss(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, found = run(plain, batch_of(8, 64)), run(model, batch_of(8, 64))
    assert found[0] == pytest.approx(rounded[0], rel=1e-4)
    assert all(gradient.dtype == torch.float32 for gradient in found[1].values())
    ours, theirs = (
        sum(float((result[1][name] - gradient).norm()) ** 2 for name, gradient in exact[1].items())
        for result in (found, rounded)
    )
    assert ours <= 1.5 * theirs


def test_fp16_leaves_the_scaling_of_small_gradients_to_autograd(load, monkeypatch):
    model = load("qwen2")
    use_chunked_loss(model)
    monkeypatch.setattr(kernels, "SummedLoss", None)
    with torch.autocast("cpu", dtype=torch.float16):
        assert run(model, batch_of())[0] == pytest.approx(run(load("qwen2"), batch_of())[0], rel=1e-3)


@pytest.mark.parametrize("on_head", ["lora", "token rows", "none"])
def test_adapters_also_on_the_head(load, family, on_head):
    from peft import LoraConfig, get_peft_model

    def model_of():
        torch.manual_seed(0)
        base = load(family)
        names = {id(each): name.split(".")[-1] for name, each in base.named_modules()}
        modules = r".*(query_key_value|q_proj|lm_head)" if on_head == "lora" else "all-linear"
        options = {"target_modules": modules}
        if on_head == "token rows":
            heads = [base.get_input_embeddings()]
            heads += [] if base.config.tie_word_embeddings else [base.get_output_embeddings()]
            options["trainable_token_indices"] = {names[id(head)]: [5, 6, 7] for head in heads}
        return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, **options))

    expected = run(model_of(), batch_of())
    model = model_of()
    use_chunked_loss(model)
    assert isinstance(model.base_model.model.get_output_embeddings(), LossHead) == (on_head == "none")
    assert_same(run(model, batch_of()), expected)


def test_gradient_checkpointing_and_isolation_go_with_it(load, family):
    texts = batch_of(1, 30)
    texts["position_ids"] = torch.cat([torch.arange(12), torch.arange(18)])[None]
    del texts["attention_mask"]
    expected = load(family)
    isolate_documents(expected)
    model = load(family)
    use_chunked_loss(model)
    isolate_documents(model)
    model.gradient_checkpointing_enable()
    assert_same(run(model, texts), run(expected, texts))


def test_evaluation_gives_the_loss_and_the_first_ranked_tokens(load, family):
    batch = batch_of()
    plain, model = load(family).eval(), load(family).eval()
    use_chunked_loss(model)
    with torch.no_grad():
        expected, found = plain(**batch), model(**batch)
    in_loss = batch["labels"][:, 1:] != IGNORE_INDEX
    assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-5)
    assert list(found) == ["loss", "losses", "predictions"]
    each = torch.nn.functional.cross_entropy(expected.logits[:, :-1].mT, batch["labels"][:, 1:], reduction="none")
    assert torch.allclose(found.losses[:, :-1][in_loss], each[in_loss], rtol=1e-4, atol=1e-5)
    assert found.losses[:, :-1][~in_loss].isnan().all() and found.losses[:, -1].isnan().all()
    assert torch.equal(found.predictions[:, :-1][in_loss], expected.logits.argmax(-1)[:, :-1][in_loss])
    assert set(found.predictions[:, :-1][~in_loss].tolist()) | set(found.predictions[:, -1].tolist()) == {IGNORE_INDEX}


def test_without_labels_the_model_is_as_before(load, family):
    plain, model = load(family), load(family)
    use_chunked_loss(model)
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)  # Trainer and generate look there
    tokens = batch_of()["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, plain(input_ids=tokens).logits)
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(tokens, **options), plain.generate(tokens, **options))


def test_a_saved_model_has_no_wrapper_and_a_copy_works(load, family, tmp_path):
    from transformers import AutoModelForCausalLM

    plain, model = load(family), load(family)
    use_chunked_loss(model)
    use_chunked_loss(model)
    assert_same(run(copy.deepcopy(model), batch_of()), run(plain, batch_of()))
    plain.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "ours")
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "ours").iterdir())
    for name in names:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")) is type(plain)


@pytest.mark.parametrize("plain_head", [True, False])
def test_no_tensor_as_large_as_the_logits_is_made(load, plain_head):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.size = max(self.size, result.numel())
            return result

    model, batch = load("qwen2"), batch_of(8, 256)
    use_chunked_loss(model)
    if not plain_head:
        model.lm_head.__class__ = torch.nn.Linear
    model.train()
    with Largest() as largest:
        model(**batch).loss.backward()
    assert largest.size < 8 * 256 * model.config.vocab_size / 4  # it is the widest layer's, which is wide here


class Shaped:
    """Changes the logits after the head, as gemma2, cohere and their kin do."""

    def forward(self, **kwargs):
        output = super().forward(**kwargs)
        output.logits = self.change(output.logits)
        return output


CHANGES = {
    ", logits times 0.25": lambda raw: raw * 0.25,
    ", soft cap 0.05": lambda raw: 0.05 * torch.tanh(raw / 0.05),
    ", logits times 3, soft cap 0.2": lambda raw: 0.2 * torch.tanh(3 * raw / 0.2),
    ", through the head as it is": lambda raw: torch.tanh(raw) * 2 + raw.flip(-1) / 7,
}


def plain_loss(model, batch) -> tuple[float, dict]:
    model.train()
    model.zero_grad()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("said", CHANGES)
def test_logits_that_a_family_changes_after_the_head_are_changed_in_the_chunks(load, said):
    model = load("qwen3")
    model.__class__ = type("Shaped", (Shaped, type(model)), {"change": staticmethod(CHANGES[said])})
    expected = plain_loss(model, batch_of())
    assert use_chunked_loss(model) == f"loss in chunks{said}"
    assert_same(run(model, batch_of()), expected)
    assert run_self_test(model) < 1e-5
    with torch.no_grad():
        assert float(model.eval()(**batch_of()).loss) == pytest.approx(expected[0], rel=1e-5)


# minicpm3 and inkling scale the head's input, modernbert-decoder has layers before its head, mamba and opt name their
# parts otherwise, llama4's prefix is no part of it, and falcon_h1 reads its scale from its layers.
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("minicpm3", ", through the head as it is"),
        ("inkling_text", ", through the head as it is"),
        ("modernbert-decoder", ", through the head as it is"),
        ("mamba", ""),
        ("opt", ""),
        ("llama4_text", ""),
        ("falcon_h1", ", logits times 0.25"),
    ],
)
def test_a_family_with_another_way_to_its_head_has_its_loss_and_gradients_in_chunks(kind, said):
    from benchmarks.families import build_model

    model, batch = build_model(kind), {name: value % 500 for name, value in batch_of().items()}
    if kind == "falcon_h1":
        model.model.lm_head_multiplier = 0.25
    batch["labels"] = batch["input_ids"]
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    expected = plain_loss(model, batch)
    for name in [name for name in expected[1] if kind == "opt" and name.endswith("k_proj.bias")]:
        model.get_parameter(name).requires_grad_(False)  # its gradient is 0, but for rounding
        del expected[1][name]
    assert use_chunked_loss(model) == f"loss in chunks{said}"
    assert_same(run(model, batch), expected, tolerance=1e-4)
    assert run_self_test(model) < 1e-5


def mixture():
    """A small mixture of experts whose config asks for the loss of its routers."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    from sft.model.shrink import shrink_config

    torch.manual_seed(0)
    config = shrink_config(Qwen3MoeConfig(output_router_logits=True, router_aux_loss_coef=0.1))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def mixture_batch(**options) -> dict[str, torch.Tensor]:
    batch = batch_of(**options)
    return {**batch, "input_ids": batch["input_ids"] % 500, "labels": batch["labels"].clamp(max=499)}


def test_padding_counts_in_no_router_loss_packed_or_not():
    batch, model = mixture_batch(rows=2), mixture()
    isolate_documents(model)
    use_chunked_loss(model)
    tokens = {name: value.view(1, 48) for name, value in batch.items() if name != "attention_mask"}
    packed = {**tokens, "position_ids": torch.arange(24).repeat(2)[None]}
    padded = {**batch, "attention_mask": batch["attention_mask"].clone()}
    fill = {"input_ids": 7, "labels": IGNORE_INDEX, "attention_mask": 0}
    padded = {name: torch.nn.functional.pad(value, (0, 9), value=fill[name]) for name, value in padded.items()}
    filled = {name: torch.nn.functional.pad(tokens[name], (0, 9), value=fill[name]) for name in tokens}
    filled["position_ids"] = torch.cat([packed["position_ids"], torch.arange(9)[None]], 1)
    expected = run(model, batch)
    for given in (packed, padded, filled):
        assert_same(run(model, given), expected)
        assert model(**given).router_loss.item() == pytest.approx(model(**batch).router_loss.item(), rel=1e-5)


def test_accumulated_router_losses_are_weighted_by_their_labels():
    model, batches = mixture(), [mixture_batch(seed=1), mixture_batch(rows=1, seed=2)]
    use_chunked_loss(model)
    counts = [int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in batches]
    alone = [run(model, batch) for batch in batches]
    found = [run(model, batch, num_items_in_batch=torch.tensor(sum(counts))) for batch in batches]
    for name in alone[0][1]:
        expected = sum(gradients[name] * count for (_, gradients), count in zip(alone, counts, strict=True))
        summed = sum(gradients[name] for _, gradients in found) * sum(counts)
        assert float((summed - expected).norm() / expected.norm().clamp(min=1e-8)) < 1e-4, name


def test_the_router_loss_of_a_mixture_is_added_as_the_family_adds_it_and_reported():
    batch = mixture_batch()
    plain, model = mixture(), mixture()
    expected = run(plain, batch)
    assert use_chunked_loss(model) == "loss in chunks"
    assert_same(run(model, batch), expected)
    found = model(**batch)
    assert found.router_loss.item() == pytest.approx(plain(**batch).aux_loss.item(), rel=1e-5)
    assert found.router_loss.item() > 1
    assert run_self_test(model) < 1e-5


def test_a_family_whose_logits_come_from_elsewhere_takes_the_full_logits_and_says_what_they_cost(load):
    model = load("qwen2")

    model.loss_function = lambda **kwargs: None
    assert (
        use_chunked_loss(model)
        == "loss over the full logits, 0.0 MiB a token: Qwen2ForCausalLM has no plain head and loss"
    )
    assert hasattr(model(input_ids=batch_of()["input_ids"]), "logits")


class ShapedByTokens:
    """Changes logits by the tokens of the input, which the chunks don't have."""

    def forward(self, input_ids, labels=None, **kwargs):
        logits = super().forward(input_ids, **kwargs).logits
        logits = logits + 0.3 * input_ids[..., None].cos() * torch.arange(logits.shape[-1]).sin()
        found = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutput(loss=found, logits=logits)


@pytest.mark.parametrize("exact", [True, False])
def test_a_model_whose_chunks_are_wrong_goes_back_to_the_full_logits(load, exact):
    model = load("qwen3")
    model.__class__ = type("Biased", (ShapedByTokens, type(model)), {})
    expected = plain_loss(model, batch_of())
    use_chunked_loss(model)
    with pytest.raises(ValueError, match=r"Biased: the loss in chunks (is|has logits) \S+ from") as found:
        run_self_test(model, exact=exact)
    assert use_full_logits(model, str(found.value)).startswith(
        "loss over the full logits, 0.0 MiB a token: Biased: the"
    )
    assert_same(run(model, batch_of()), expected)
    assert run_self_test(model, exact=exact) < 1e-5


def test_the_self_test_passes_and_leaves_mode_and_random_state_alone(load, family):
    model, state = load(family).train(), torch.get_rng_state()
    use_chunked_loss(model)
    assert run_self_test(model) < 1e-5 and model.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("exact", [True, False])
def test_the_self_test_finds_a_gradient_that_is_off(load, exact):
    model = load("qwen2")
    use_chunked_loss(model)
    model.get_output_embeddings().shape = LogitShape(cap=50.0)  # which hardly changes the loss
    with pytest.raises(ValueError, match=r"the gradient of the loss in chunks is .* off|is .* from the plain one"):
        run_self_test(model, exact=exact)


def test_the_self_test_finds_a_loss_that_is_another(load):
    model = load("qwen2")
    use_chunked_loss(model)
    model.get_output_embeddings().shape = LogitShape(scale=3.0)
    with pytest.raises(ValueError, match=r"Qwen2ForCausalLM: the loss in chunks is .* from the plain one"):
        run_self_test(model)


def test_a_second_backward_of_one_loss_is_refused(load):
    model = load("qwen2")
    use_chunked_loss(model)
    loss = model.train()(**batch_of()).loss
    loss.backward(retain_graph=True)
    with pytest.raises((RuntimeError, TypeError)):
        loss.backward()
