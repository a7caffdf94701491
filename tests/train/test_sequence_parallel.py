"""A row shared by processes has the gradient of the whole row; threads stand in for the processes.

tests/train/test_gradients.py shares rows among two real processes, under ZeRO-2 and ZeRO-3.
"""

import copy
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.families import SETTINGS
from sft.format.tokens import IGNORE_INDEX
from sft.launch.processes import UserError
from sft.model import attention, kernels, loss
from sft.model.kernels import read_documents
from sft.train import sequence_parallel
from sft.train.losses import SourceLosses, Sources
from sft.train.sequence_parallel import SharedRow, Shares, check_model, check_processes, cut_part, self_test

SMALL = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_LIKE = {**SMALL, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 512}
MODELS = {
    "qwen2": ("qwen2", LLAMA_LIKE),
    "one key head": ("qwen3", {**LLAMA_LIKE, "num_key_value_heads": 1, "head_dim": 16}),
    "three key heads": (
        "llama",
        {**LLAMA_LIKE, "num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 96},
    ),
    "sliding window": ("mistral", {**LLAMA_LIKE, "sliding_window": 11}),
    "experts": ("mixtral", {**LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "ALiBi of bloom": ("bloom", {**SMALL, "hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "ALiBi of falcon": ("falcon", {**SMALL, "alibi": True, "multi_query": False, "new_decoder_architecture": False}),
    "falcon": ("falcon", {**SMALL, "alibi": False, "multi_query": True, "new_decoder_architecture": False}),
}


class Exchange:
    """An all-to-all of threads: `of(part)` is that of one of them."""

    def __init__(self, parts: int):
        self.parts, self.sent, self.barrier = parts, [None] * parts, threading.Barrier(parts, timeout=60)
        self.num_calls = 0

    def send(self, part: int, tensor: torch.Tensor) -> torch.Tensor:
        self.sent[part] = tensor.detach()
        self.barrier.wait()
        received = torch.stack([sent[part] for sent in self.sent])
        self.num_calls += part == 0
        self.barrier.wait()
        return received

    def of(self, part: int):
        send = self.send

        class AllToAll(torch.autograd.Function):
            @staticmethod
            def forward(ctx, tensor):
                return send(part, tensor)

            @staticmethod
            def backward(ctx, gradient):
                return send(part, gradient.contiguous())

        return AllToAll.apply


def build(name: str):
    """Return a model of a name of MODELS in fp32, ready to train packed rows."""
    kind, settings = MODELS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.float32).train()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.05)
    attention.isolate_documents(model)
    loss.use_chunked_loss(model)
    return model


def packed(lengths, *, seed: int, multiple_of: int) -> dict[str, torch.Tensor]:
    """Return a row of documents, about half of their tokens labelled, padded as the collator pads it."""
    random = torch.Generator().manual_seed(seed)
    size = sum(lengths)
    lengths = (*lengths, -size % multiple_of)
    tokens = torch.randint(3, 128, (1, sum(lengths)), generator=random)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    labels = tokens.where(torch.rand(tokens.shape, generator=random) < 0.5, IGNORE_INDEX)
    labels[positions == 0] = labels[:, size:] = IGNORE_INDEX
    return {"input_ids": tokens, "labels": labels, "position_ids": positions}


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def share(model, batch, parts: int, num_items: int) -> tuple[dict[str, torch.Tensor], list, Exchange]:
    """Return the summed gradients and the losses by token of threads that share the row of a batch."""
    exchange, copies, losses, errors = Exchange(parts), [copy.deepcopy(model) for _ in range(parts)], {}, []

    def run(part: int) -> None:
        try:
            copies[part].shared_row = SharedRow(parts, part, exchange.of(part))
            copies[part].register_forward_pre_hook(sequence_parallel._enter, with_kwargs=True)
            output = copies[part](**cut_part(batch, parts, part), num_items_in_batch=num_items)
            losses[part] = output.losses
            output.loss.backward()
        except Exception as error:
            errors.append(error)
            exchange.barrier.abort()

    threads = [threading.Thread(target=run, args=(part,)) for part in range(parts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    found = [gradients(each) for each in copies]
    summed = {name: sum(each[name] for each in found if name in each) for name in found[0]}
    return summed, [losses[part] for part in range(parts)], exchange


CASES = [(name, 2, (37, 5, 64, 22), False) for name in MODELS]
CASES += [("qwen2", 4, (1, 90, 2, 8), True), ("one key head", 4, (101,), True), ("three key heads", 6, (50, 3), False)]
CASES += [("ALiBi of bloom", 4, (70, 33), True), ("ALiBi of falcon", 2, (9, 100), True), ("experts", 4, (13, 78), True)]


@pytest.mark.parametrize(("name", "parts", "lengths", "checkpointing"), CASES)
def test_a_shared_row_has_the_gradient_and_the_losses_of_the_whole_row(name, parts, lengths, checkpointing):
    """A document spans each seam; the tokens are no multiple of the parts, and are padded to one."""
    model = build(name)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = packed(lengths, seed=sum(lengths), multiple_of=parts)
    num_items = int((batch["labels"] != IGNORE_INDEX).sum())
    shared, losses, exchange = share(model, batch, parts, num_items)
    assert exchange.num_calls >= 2 * 4 * 2, "four exchanges in each of two layers, forward and backward"
    output = model(**batch, num_items_in_batch=num_items)
    output.loss.backward()
    expected = gradients(model)
    assert shared.keys() == expected.keys()
    for weight, gradient in expected.items():
        assert (shared[weight] - gradient).norm() <= 1e-5 * max(gradient.norm().item(), 1e-2), weight
    together = torch.cat(losses, dim=1)
    assert torch.equal(together.isnan(), output.losses.isnan())
    assert torch.allclose(together.nan_to_num(), output.losses.nan_to_num(), rtol=1e-5, atol=1e-5)


def test_the_output_of_a_shared_row_is_contiguous_where_each_process_has_one_head():
    """jetmoe and afmoe call `view` on it."""
    states = torch.ones(3, 4, 8)
    documents = read_documents(torch.arange(12)[None], 1)
    output = SharedRow(4, 0, lambda tensor: tensor).attend(kernels.attend, states, states, states, documents, scale=1.0)
    assert output.shape == (3, 4, 8)
    assert output.is_contiguous()


def test_a_part_has_its_tokens_and_the_label_beyond_its_last_one():
    x = IGNORE_INDEX
    batch = {
        "input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]),
        "labels": torch.tensor([[1, 2, 3, 4], [5, 6, x, 8]]),
        "position_ids": torch.tensor([[0, 1, 2, 0], [0, 1, 2, 3]]),
    }
    parts = [cut_part(batch, 4, part) for part in range(4)]
    assert [part["input_ids"].tolist() for part in parts] == [[[1, 2]], [[3, 4]], [[5, 6]], [[7, 8]]]
    assert [part["labels"].tolist() for part in parts] == [[[x, 2, 3]], [[x, 4, x]], [[x, 6, x]], [[x, 8, x]]]
    assert all(part["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 2, 3]] for part in parts)
    assert batch["labels"][0, 0] == 1, "the batch itself is left alone"


def test_held_out_rows_stay_whole():
    batch = {"input_ids": torch.ones(2, 4), "labels": torch.ones(2, 4), "attention_mask": torch.ones(2, 4)}
    assert Shares(lambda examples: batch, 2, 1)([]) is batch


def test_the_losses_of_each_source_add_up_over_the_parts_of_a_row():
    dataset = SimpleNamespace(
        rows=[np.array([1, 0]), np.array([2])],
        examples=[{"input_ids": np.zeros(size)} for size in (3, 4, 2)],
    )
    sources = Sources(("a", "b"), np.array([0, 1, 0]), np.zeros(0, int))
    losses = torch.tensor([[1, 2, 4, 8, 16, 32, torch.nan, torch.nan], [64, 128] + [torch.nan] * 6])
    whole = SourceLosses(sources)
    whole.add([[0, 1]], [losses], dataset)
    whole.read_pending()
    assert whole.sums == {"a": [16 + 32 + 64 + 128, 4], "b": [15, 4]}
    summed = {"a": np.zeros(2), "b": np.zeros(2)}
    for part in range(4):
        shared = SourceLosses(sources, parts=4, part=part)
        shared.add([[0, 1]], [losses.reshape(1, -1)[:, 4 * part : 4 * part + 4]], dataset)
        shared.read_pending()
        for name, sums in shared.sums.items():
            summed[name] += sums
    assert {name: sums.tolist() for name, sums in summed.items()} == whole.sums


def test_the_self_test_finds_a_row_whose_parts_attend_to_themselves_alone(monkeypatch):
    """The exchange of a single process: its part gets no token of the others."""
    model = build("qwen2")
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *arguments: None)
    model.shared_row = SharedRow(2, 0, lambda tensor: tensor.clone())
    model.register_forward_pre_hook(sequence_parallel._enter, with_kwargs=True)
    with pytest.raises(
        UserError, match=r"logits of a shared row of Qwen2ForCausalLM are .* from those of the whole row"
    ):
        self_test(model)


@pytest.mark.parametrize(
    ("kind", "settings", "parts", "reason"),
    [
        ("qwen2", LLAMA_LIKE, 4, None),
        ("bloom", SMALL, 2, None),
        ("mixtral", MODELS["experts"][1], 2, None),
        ("qwen2", LLAMA_LIKE, 3, "the 4 attention heads can't be divided among 3 GPUs"),
        ("bamba", SETTINGS["bamba"], 2, "rows of bamba can't be shared: BambaMixer mix tokens without attention"),
        ("mamba", {}, 2, "rows of mamba can't be shared: MambaMixer mix tokens without attention"),
        ("lfm2", SETTINGS["lfm2"], 2, "rows of lfm2 can't be shared: Lfm2ShortConv mix tokens without attention"),
        (
            "gpt_oss",
            {},
            2,
            "rows of gpt_oss can't be shared: documents are kept apart by transformers' own mask (eager)",
        ),
        (
            "mixtral",
            {**MODELS["experts"][1], "output_router_logits": True},
            2,
            "the load-balancing loss of the routers",
        ),
        (
            "qwen2",
            {**LLAMA_LIKE, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}},
            2,
            "dynamic rotary embeddings depend on the length beyond 512 tokens",
        ),
        (
            "gemma3_text",
            {
                **LLAMA_LIKE,
                "rope_parameters": {
                    "full_attention": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                },
            },
            2,
            "dynamic rotary embeddings depend on the length beyond 512 tokens",
        ),
    ],
)
def test_models_whose_rows_cannot_be_shared_are_refused_by_name(kind, settings, parts, reason):
    config = AutoConfig.for_model(kind, **settings)
    if reason is None:
        check_model(config, parts=parts, max_length=1024, options={})
        return
    with pytest.raises(ValueError) as error:
        check_model(config, parts=parts, max_length=1024, options={})
    assert str(error.value).startswith(f"--sequence_parallel_size {parts}: {reason}")
    assert "\n" not in str(error.value)


def test_processes_that_can_not_be_divided_into_groups_are_refused():
    check_processes(4, 8)
    with pytest.raises(ValueError, match="--sequence_parallel_size 4: 6 processes can't be divided into groups of 4"):
        check_processes(4, 6)
