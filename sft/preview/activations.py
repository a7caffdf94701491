"""Bytes of the activations of a step: one and two layers run on tensors without memory, and all others follow.

The layers run as they are trained (packed rows, autocast, checkpointing, adapters), and the bytes that are alive are
added up: any family of transformers is counted the same way.
"""

import copy
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

from sft.preview.shape import FULL, ONE, WRONG_CONFIG, Plan, Shape, Step, build_model


@dataclass(frozen=True)
class Activations:
    """Bytes beyond weights and gradients: after the forward pass, at most in the backward pass, and at its end."""

    forward: int
    backward: int
    last: int


def activations(shape: Shape, step: Step, plan: Plan) -> Activations:
    """Count what all layers keep, from a model of one layer and one of two; 0 where that depends on the data."""
    if any("experts" in name for name in shape.config.get_text_config().to_dict()):
        return Activations(0, 0, 0)  # how many tokens an expert takes is up to the router
    return _activations(shape, replace(step, trained=0, accumulation=1), plan.method != FULL, plan.launcher != ONE)


@lru_cache(256)
def _activations(shape: Shape, step: Step, lora: bool, spread: bool) -> Activations:
    one, two = (_trace(shape, layers, step, lora, spread) for layers in (1, 2))
    return Activations(*(a + (shape.layers - 1) * (b - a) for a, b in zip(one, two, strict=True)), last=one[1])


def _trace(shape: Shape, layers: int, step: Step, lora: bool, spread: bool) -> tuple[int, int]:
    """Run a model of a few layers on fake tensors; return the live bytes after the forward pass and the highest."""
    import torch
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

    from sft.model.shrink import not_sharded

    half, kind = torch.bfloat16 if step.half else torch.float32, shape.config.model_type
    with torch.device("meta"), not_sharded():
        model = _shallow_model(shape, layers, half if lora or spread else torch.float32, step, lora)
    with FakeTensorMode():
        _make_fake(model, half if spread else None)
        weights = [*model.parameters(), *model.buffers()]
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
        weights += [weight.grad for weight in model.parameters() if weight.grad is not None]
        base = model.get_base_model() if lora else model
        dtype = base.get_input_embeddings().weight.dtype
        size = base.get_input_embeddings().weight.shape[1]
        embedded = torch.zeros(step.rows, step.length, size, dtype=dtype, requires_grad=True)
        positions = torch.zeros(step.rows, step.length, dtype=torch.long)
        try:
            with _as_on(step), _Meter([*weights, embedded]) as meter:
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=step.half and not spread):
                    hidden = base.base_model(inputs_embeds=embedded, position_ids=positions, use_cache=False)[0]
                    forward = meter.live
                meter.peak = meter.live
                hidden.backward(torch.zeros_like(hidden))
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ValueError(f"{kind}: its activations depend on the data and can't be counted") from error
        except WRONG_CONFIG as error:
            raise ValueError(f"{kind}: a step of a model of this config fails: {error}") from error
    return forward, meter.peak


def _shallow_model(shape: Shape, layers: int, dtype, step: Step, lora: bool):
    from sft.model import adapters, attention

    config = copy.deepcopy(shape.config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = (list(text.layer_types) * layers)[:layers]
    model = build_model(config, dtype, shape.trusted)
    if step.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if lora:
        model = adapters.add_lora(
            model, rank=step.lora_rank, alpha=1, dropout=step.lora_dropout, gradient_checkpointing=step.checkpointing
        )
    if step.packing:
        attention.isolate_documents(model)
    return model.train()


def _make_fake(model, dtype) -> None:
    """Put fake tensors in place of meta ones; parameters of `dtype`, if any: DeepSpeed computes in it throughout."""
    import torch

    made = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and id(weight) not in made:
                fake = torch.empty(weight.shape, dtype=dtype or weight.dtype)
                made[id(weight)] = torch.nn.Parameter(fake, requires_grad=weight.requires_grad)
            module._parameters[name] = made.get(id(weight))
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)


@contextmanager
def _as_on(step: Step) -> Iterator[None]:
    """Give packed attention the step's documents; for a GPU, as the fused kernels that keep no scores."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from sft.model import attention, kernels

    def fused(query, key, value, documents, *, scale, dropout=0.0, alibi=None):
        states = [state.to(value.dtype).transpose(0, 1)[None] for state in (query, key, value)]
        output = scaled_dot_product_attention(*states, is_causal=True, enable_gqa=query.shape[1] != key.shape[1])
        return output[0].transpose(0, 1)

    lengths = list(step.documents) or [step.length] * step.rows
    edges = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    before, on_cpu = (
        kernels.current_documents.set(kernels.Documents(edges, lengths) if step.packing else None),
        attention.attend,
    )
    attention.attend = fused if step.device == "cuda" else on_cpu
    try:
        yield
    finally:
        attention.attend = on_cpu
        kernels.current_documents.reset(before)


def _Meter(known: Sequence):
    """A context in which every new storage counts into `live` until it is freed; `peak` is the highest."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Meter(TorchDispatchMode):
        live = peak = 0

        def __init__(self):
            super().__init__()
            self.seen = {id(tensor.untyped_storage()): tensor.untyped_storage() for tensor in known}

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            outputs = function(*args, **(kwargs or {}))
            for output in tree_leaves(outputs):
                if hasattr(output, "untyped_storage"):
                    self.note(output.untyped_storage())
            return outputs

        def note(self, storage) -> None:
            if id(storage) in self.seen:
                return
            size, name = storage.nbytes(), id(storage)
            self.seen[name] = weakref.ref(storage, lambda _: self.free(name, size))
            self.live += size
            self.peak = max(self.peak, self.live)

        def free(self, name: int, size: int) -> None:
            self.live -= size
            self.seen.pop(name, None)

    return Meter()
