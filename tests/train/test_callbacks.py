"""Checkpointed layers that keep outputs give the same gradient and compute less again."""

import functools
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from transformers.models.qwen2 import modeling_qwen2

import train
from sft.model import adapters, attention, fusion, loss
from sft.train import callbacks

ROOM = 2**30


@pytest.fixture
def load(tiny_base, monkeypatch):
    """Return a function that loads a tiny base whose layers are checkpointed."""
    monkeypatch.setattr(callbacks, "MIN_FLOPS_TO_KEEP", 0.0)

    def model_of(family: str):
        model = AutoModelForCausalLM.from_pretrained(tiny_base(family), dtype=torch.float32)
        attention.isolate_documents(model)
        loss.use_chunked_loss(model)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train()

    return model_of


def step(model, *, half: bool = False) -> tuple[torch.Tensor, int]:
    """Return the gradient of two accumulated packed batches, and the operations of their products."""
    tokens = torch.randint(3, 200, (2, 40), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(23), torch.arange(17)]).expand(2, -1)
    model.zero_grad()
    with FlopCounterMode(display=False) as counter:
        for _ in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                total = model(input_ids=tokens, labels=tokens, position_ids=positions).loss
            total.backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters()]), counter.get_total_flops()


@pytest.mark.parametrize(("family", "half"), [("qwen2", False), ("bloom", False), ("falcon", False), ("qwen2", True)])
def test_layers_that_keep_outputs_compute_less_again_and_give_the_same_gradient(family, half, load):
    model = load(family)
    if half:
        fusion.use_master_products(model, accumulation=2, alone=True)
    expected, all_again = step(model, half=half)
    note = callbacks.keep_outputs(model, 80, room=ROOM)
    assert note.startswith("gradient checkpointing: from now on 2 of 2 layers keep wide products")
    gradient, operations = step(model, half=half)
    assert torch.equal(gradient, expected)
    assert operations < 0.96 * all_again


@pytest.mark.slow
def test_a_run_that_keeps_outputs_ends_with_the_same_weights(tiny_base, tmp_path, monkeypatch, capfd):
    record = {"prompt": "Hello", "completion": "word " * 40}
    (tmp_path / "train.jsonl").write_text("\n".join([json.dumps(record)] * 24))
    flags = ["--model_name_or_path", str(tiny_base("qwen2")), "--data_path", str(tmp_path / "train.jsonl")]
    flags += ["--gradient_checkpointing", "true", "--max_steps", "5", "--save_strategy", "no", "--max_length", "128"]
    flags += ["--num_reply_prompts", "0", "--max_new_tokens", "2", "--cache_dir", str(tmp_path / "cache")]
    flags += ["--disable_tqdm", "true"]
    monkeypatch.setattr(callbacks, "MIN_FLOPS_TO_KEEP", 0.0)
    monkeypatch.setattr(callbacks, "find_room", lambda device: ROOM)
    weights = []
    for keep in ("none", "auto"):
        train.main([*flags, "--output_dir", str(tmp_path / keep), "--checkpoint_keep", keep])
        assert ("2 of 2 layers keep wide products" in capfd.readouterr().out) is (keep == "auto")
        weights.append(load_file(tmp_path / keep / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_no_more_is_kept_than_a_layer_may(load):
    model = load("qwen2")
    _gradient, all_again = step(model)
    for layer in callbacks.find_layers(model):
        function = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = functools.partial(function, context_fn=callbacks.Kept(64, 100))
    assert step(model)[1] == all_again


def test_a_kernel_that_overwrites_what_is_kept_is_found(load, monkeypatch):
    """As Liger's rotary kernel does with queries and keys."""
    plain = modeling_qwen2.apply_rotary_pos_emb

    def overwrite(query, key, *others, **options):
        rotated = plain(query, key, *others, **options)
        query.data.copy_(rotated[0])
        return rotated

    monkeypatch.setattr(modeling_qwen2, "apply_rotary_pos_emb", overwrite)
    monkeypatch.setattr(callbacks, "_is_wide", lambda inputs, outputs, hidden: inputs == hidden)
    model = load("qwen2")
    expected, all_again = step(model)
    note = callbacks.keep_outputs(model, 80, room=ROOM)
    assert note.startswith("gradient checkpointing: layers keep their inputs alone (with more, states end ")
    gradient, operations = step(model)
    assert torch.equal(gradient, expected)
    assert operations == all_again


def test_adapters_change_no_width(load):
    """Of the tiny qwen2: 64 numbers of attention, and gate and up."""
    model = load("qwen2")
    widths = callbacks.find_widths(model)
    assert widths == [64 + 2 * model.config.intermediate_size] * 2
    with_token_rows = adapters.add_lora(model, rank=4, alpha=8, dropout=0.0, untrained_ids=[5, 7])
    assert callbacks.find_widths(with_token_rows) == widths
    note = callbacks.keep_outputs(with_token_rows, 80, room=ROOM)
    assert note.startswith("gradient checkpointing: from now on 2 of 2 layers keep wide products")


def test_layers_that_cannot_keep_more_keep_their_inputs(load, monkeypatch):
    def fail(*_arguments):
        raise RuntimeError("no such\nmode")

    model = load("bloom")
    expected, all_again = step(model)
    monkeypatch.setattr(callbacks, "create_selective_checkpoint_contexts", fail)
    note = callbacks.keep_outputs(model, 80, room=ROOM)
    assert note == "gradient checkpointing: layers keep their inputs alone (keeping more failed: no such mode)"
    gradient, operations = step(model)
    assert torch.equal(gradient, expected)
    assert operations == all_again


def test_layers_keep_what_fits_and_what_is_worth_it():
    sizes = {"hidden": 4, "tokens": 10**12, "element_size": 2}
    assert callbacks.choose_sizes([20, 20, 20], room=10**14, **sizes) == [4 * 10**13] * 2
    assert callbacks.choose_sizes([20], room=10**14, **sizes | {"tokens": 10**9}) == []
    assert callbacks.choose_sizes([4], room=10**14, **sizes) == []


@pytest.mark.parametrize(
    ("changes", "may"),
    [
        ({}, True),
        ({"gradient_checkpointing": False}, False),
        ({"checkpoint_keep": "none"}, False),
        ({"activation_offload": True}, False),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, False),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": False}}, True),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, False),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, True),
    ],
)
def test_runs_that_are_short_of_memory_or_shard_their_weights_keep_inputs_alone(changes, may):
    training = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": None, "deepspeed": None}
    training |= {"checkpoint_keep": "auto", "activation_offload": False}
    assert callbacks.can_keep_outputs(SimpleNamespace(**training | changes)) is may


def test_offloaded_activations_give_the_same_gradients(tiny_base, monkeypatch):
    """Of each layer its input is moved, and the input of the last norm; none of it is a weight or an embedding."""
    tokens, hooks, moved = torch.arange(3, 43)[None], torch.autograd.graph.saved_tensors_hooks, []

    class Recording(hooks):
        def __init__(self, pack, unpack):
            super().__init__(lambda tensor: self.record(tensor, pack(tensor)), unpack)

        def record(self, tensor, kept):
            moved.extend([tuple(tensor.shape)] if isinstance(kept, tuple) and len(kept) == 2 else [])
            return kept

    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", Recording)
    gradients = []
    for offload in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tiny_base("qwen2"), dtype=torch.float32).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if offload:
            callbacks.offload_activations(model)
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    assert all(torch.equal(gradients[1][name], gradient) for name, gradient in gradients[0].items())
    assert len(moved) >= 3
    assert set(moved) == {(1, 40, 64)}
