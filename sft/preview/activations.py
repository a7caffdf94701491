"""Bytes of the activations of a step: a few layers of each kind run on tensors without memory, all others follow.

The layers run as they are trained (packed rows, autocast, checkpointing, adapters, experts), and the bytes that are
alive are added up: any family of transformers is counted the same way.
"""

import copy
import itertools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses import fake_tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.integrations import moe

from sft.model import adapters, attention, kernels, mixers
from sft.model.shrink import choose_layers, keep_layers, kinds_of_layers, not_sharded
from sft.preview.shape import FULL, ONE, WRONG_CONFIG, Plan, Shape, Step, build_model
from sft.train.sequence_parallel import SharedRow

SHORT_TOKENS = 64  # of a row that stands for a long one: a chunk of linear attention
MAX_TRACED_LAYERS = 8  # a layer takes up to a second
TOKENS_OF_A_LOOP = 8  # where each token is a step of a loop, as in the first Mamba
NOT_TRACEABLE = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
    fake_tensor.UnsupportedOperatorException,
    NotImplementedError,
)


@dataclass(frozen=True)
class Activations:
    """Bytes beyond weights and gradients: after the forward pass, at most in the backward pass, and at its end.

    `host` are those that wait in the machine's memory for the backward pass.
    """

    forward: int
    backward: int
    last: int
    host: int = 0


def count_activations(shape: Shape, step: Step, plan: Plan) -> Activations | None:
    """Count what all layers keep, from the first two of each kind; None where that can't be done."""
    return _count_activations(
        shape, replace(step, trained=0, accumulation=1), plan.method != FULL, plan.launcher != ONE
    )


@lru_cache(256)
def _count_activations(shape: Shape, step: Step, lora: bool, spread: bool) -> Activations | None:
    settings = shape.config.get_text_config().to_dict()
    kinds = kinds_of_layers(settings)
    chosen = choose_layers(settings, 2)
    if len(chosen) > MAX_TRACED_LAYERS:
        chosen = choose_layers(settings, 1)
    if chosen[-1] + 1 < len(kinds):  # the last layer of a model frees less than the others
        chosen.append(chosen[-1] + 1)
    trace = _trace_layers(shape, chosen, step, lora, spread)
    if trace is None:
        return None
    # The first layer of the model makes masks for the others; the second of a kind stands for all further ones.
    places = {kinds[layer]: place for place, layer in enumerate(chosen)}
    layers = [chosen.index(layer) if layer in chosen else places[kinds[layer]] for layer in range(len(kinds))]
    return trace.add_up_offloaded(layers) if step.activation_offload and step.checkpointing else trace.add_up(layers)


class Trace(NamedTuple):
    """Bytes of a model of a few layers; the last number of each list is that of what comes after the layers.

    `before` the first layer, `kept` by each in the forward pass; `begin` of the backward pass of the first layer,
    the `rise` of that of each above its beginning, and what is `freed` by its end.
    """

    before: int
    kept: list[int]
    begin: int
    rise: list[int]
    freed: list[int]

    def add_up(self, layers: Sequence[int]) -> Activations:
        """Walk a model whose layers are those at these places of the trace."""
        layers = [*layers, len(self.kept) - 1]
        forward = self.before + sum(self.kept[place] for place in layers)
        live = self.begin
        last = self.begin + self.rise[layers[0]]
        most = max(forward, last)
        for place in layers[1:]:
            live += self.freed[place]
            most = max(most, live + self.rise[place])
        return Activations(forward, most, last)

    def add_up_offloaded(self, layers: Sequence[int]) -> Activations:
        """As `add_up`, where the input of each layer waits in the machine's memory for its backward pass."""
        forward = self.before + self.kept[-1]
        last = self.begin + self.rise[layers[0]]
        most = self.begin + max(self.rise[place] for place in (*layers, -1))
        return Activations(forward, max(forward, most), last, sum(self.kept[place] for place in layers))


def _trace_layers(shape: Shape, layers: Sequence[int], step: Step, lora: bool, spread: bool) -> Trace | None:
    """Trace a step of a model of these layers; None where the layers' work depends on the data.

    Linear attention and Mamba loop over the tokens where their kernels are missing: two short rows stand for a long
    one, as all that these layers keep grows with the number of tokens.
    """
    settings = shape.config.get_text_config().to_dict()
    chunks = [settings[name] for name in ("chunk_size", "mamba_chunk_size") if settings.get(name)]
    token_by_token = not chunks and any(settings.get(name) for name in ("time_step_rank", "mamba_dt_rank"))
    sizes = [size * (TOKENS_OF_A_LOOP if token_by_token else max(SHORT_TOKENS, *chunks, 0)) for size in (1, 2)]
    tokens = step.rows * step.length
    if token_by_token and len(layers) > MAX_TRACED_LAYERS // 2:  # jamba: minutes
        return None
    if tokens <= sizes[1] or not _has_mixers(shape, tuple(layers), step):
        return _trace_whole(shape, layers, step, lora, spread)
    steps = [replace(step, rows=1, length=size, documents=(size,)) for size in sizes]
    short, longer = (_trace_whole(shape, layers, each, lora, spread) for each in steps)
    if short is None or longer is None:
        return None

    def extend(small, large):
        """Return a number, or each of a list, at so many tokens, from those at the two sizes."""
        if isinstance(small, list):
            return list(map(extend, small, large))
        return small + (large - small) * (tokens - sizes[0]) // (sizes[1] - sizes[0])

    return Trace(*map(extend, short, longer))


def _has_mixers(shape: Shape, layers: tuple[int, ...], step: Step) -> bool:
    with torch.device("meta"), not_sharded():
        model = _shallow_model(shape, layers, torch.float32, replace(step, packing=True), lora=False)
    return any(isinstance(module, mixers.RunByDocument) for module in model.modules())


def _trace_whole(shape: Shape, layers: Sequence[int], step: Step, lora: bool, spread: bool) -> Trace | None:
    """Run a model of these layers on fake tensors."""
    half = torch.bfloat16 if step.half else torch.float32
    with torch.device("meta"), not_sharded():
        model = _shallow_model(shape, layers, half if lora or spread else torch.float32, step, lora)
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        _make_fake(model, half if spread else None)
        weights = [*model.parameters(), *model.buffers()]
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
        weights += [weight.grad for weight in model.parameters() if weight.grad is not None]
        base = model.get_base_model() if lora else model
        embedding = base.get_input_embeddings().weight
        batch = (1, step.tokens) if step.shared > 1 else (step.rows, step.length)
        embedded = torch.zeros((*batch, embedding.shape[1]), dtype=embedding.dtype, requires_grad=True)
        positions = torch.zeros(batch, dtype=torch.long)
        try:
            with _as_on(step), Meter([*weights, embedded]) as meter:
                marks = _Marks(base, len(layers), meter)
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=step.half and not spread):
                    hidden = base.base_model(inputs_embeds=embedded, position_ids=positions, use_cache=False)[0]
                    marks.end_forward()
                marks.note_backward()  # autocast's copies of the weights are gone
                hidden.backward(torch.zeros_like(hidden))
        except NOT_TRACEABLE:
            return None
        except WRONG_CONFIG as error:
            raise ValueError(f"{shape.config.model_type}: a step of a model of this config fails: {error}") from error
    return marks.trace()


class _Marks:
    """Notes the live bytes at the edges of the layers, forwards and backwards."""

    def __init__(self, base, num_layers: int, meter):
        self.meter = meter
        self.num_layers = num_layers
        self.is_past = False
        self.forward: list[int] = []  # live bytes when each layer begins, and when what comes after them does
        self.backward: list[tuple[int, int]] = []  # of each part, the last first: most bytes, and those at its end
        layers = _find_layers(base, num_layers)
        for layer in layers:
            layer.register_forward_pre_hook(self._begin, with_kwargs=True)
        for layer in layers[-1:]:
            layer.register_forward_hook(self._leave_last)
        self.handle = register_module_forward_pre_hook(lambda module, args: self._begin_rest(args))

    def _begin(self, _layer, args, kwargs) -> None:
        if len(self.forward) < self.num_layers:  # else it is computed again in the backward pass
            self._note((*args, *kwargs.values()))

    def _leave_last(self, _layer, _args, _output) -> None:
        self.is_past = True

    def _begin_rest(self, args) -> None:
        if self.is_past and len(self.forward) == self.num_layers:
            self._note(args)

    def _note(self, tensors) -> None:
        self.forward.append(self.meter.live)
        states = next((each for each in tensors if getattr(each, "requires_grad", False)), None)
        if states is not None:
            states.register_hook(self.note_backward)

    def end_forward(self) -> None:
        self.handle.remove()
        self.forward.append(self.meter.live)

    def note_backward(self, *_gradient) -> None:
        self.backward.append((self.meter.peak, self.meter.live))
        self.meter.peak = self.meter.live

    def trace(self) -> Trace | None:
        """Return what was noted; None where the model calls its layers in another way."""
        if len(self.forward) != self.num_layers + 2 or len(self.backward) != self.num_layers + 2:
            return None
        kept = [after - before for before, after in itertools.pairwise(self.forward)]
        spans = [(begin, peak, end) for (_peak, begin), (peak, end) in itertools.pairwise(self.backward)]
        rise = [peak - begin for begin, peak, _end in reversed(spans)]
        freed = [begin - end for begin, _peak, end in reversed(spans)]
        return Trace(self.forward[0], kept, spans[-1][0], rise, freed)


def _find_layers(base, num_layers: int) -> Sequence:
    """Return the largest list of layers of a model."""
    lists = [module for module in base.modules() if isinstance(module, nn.ModuleList) and len(module) == num_layers]
    return max(lists, key=lambda found: sum(weight.numel() for weight in found.parameters()), default=())


def _shallow_model(shape: Shape, layers: Sequence[int], dtype, step: Step, lora: bool):
    config = copy.deepcopy(shape.config)
    keep_layers(config, list(layers))
    model = build_model(config, dtype, shape.trusted)
    if step.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if lora:
        model = adapters.add_lora(
            model,
            plan=shape.adapters,
            variant=step.lora_variant,
            rank=step.lora_rank,
            alpha=1,
            dropout=step.lora_dropout,
            gradient_checkpointing=step.checkpointing,
        )
    if step.packing:
        attention.isolate_documents(model)
    return model.train()


def _make_fake(model, dtype) -> None:
    """Put fake tensors in place of meta ones; parameters of `dtype`, if any: DeepSpeed computes in it throughout."""
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

    def fused(query, key, value, documents, *, scale, dropout=0.0, alibi=None):
        if documents.shared is not None:
            return documents.shared.attend(fused, query, key, value, documents, scale=scale, alibi=alibi)
        states = [state.to(value.dtype).transpose(0, 1)[None] for state in (query, key, value)]
        output = scaled_dot_product_attention(*states, is_causal=True, enable_gqa=query.shape[1] != key.shape[1])
        return output[0].transpose(0, 1)

    before = kernels.current_documents.set(_documents_of(step) if step.packing else None)
    replaced = [(mixers, "take_tokens", _take_first_tokens)]
    if step.device == "cuda":
        replaced.append((attention, "attend", fused))
    if hasattr(moe, "_can_use_grouped_mm"):  # torch 2.13 infers the shapes of its grouped product in bf16 alone
        replaced.append((moe, "_can_use_grouped_mm", lambda *_tensors: False))
    try:
        with ExitStack() as stack:
            for module, name, function in replaced:
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, function)
            yield
    finally:
        kernels.current_documents.reset(before)


def _documents_of(step: Step):
    """Return the documents of the step's rows; where GPUs share them, with an exchange that copies."""
    lengths = list(step.documents) or [step.length] * step.rows
    shared = None
    if step.shared > 1:
        if padding := step.tokens * step.shared - sum(lengths):
            lengths.append(padding)
        shared = SharedRow(step.shared, 0, torch.clone)
    edges = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    positions = torch.zeros(1, sum(lengths), dtype=torch.long)
    groups = {("groups", False): _static_groups(lengths)}
    return kernels.Documents(edges, lengths, made=groups, positions=positions, shared=shared)


def _static_groups(lengths: Sequence[int]) -> tuple[list, object]:
    """Return what `mixers.document_groups` returns, with numbers of tokens in place of masks."""
    groups = []
    for members in mixers.group_lengths(lengths, one_group=False):
        index = torch.zeros(len(members), max(lengths[member] for member in members), dtype=torch.long)
        groups.append((index, (index.shape, sum(lengths[member] for member in members))))
    return groups, torch.zeros(sum(lengths), dtype=torch.long)


def _take_first_tokens(leaf, group: tuple[Sequence[int], int]):
    """As `mixers.take_tokens`, for a number of tokens: a mask's would depend on the data."""
    shape, count = group
    if not hasattr(leaf, "shape"):
        return leaf
    if leaf.shape[:2] == shape:
        return leaf.flatten(0, 1)[:count].clone()
    return mixers.Flat(leaf[:count].clone()) if leaf.dim() and leaf.shape[0] == shape.numel() else leaf


class Meter(TorchDispatchMode):
    """A context in which every new storage counts into `live` until it is freed; `peak` is the highest."""

    def __init__(self, known: Sequence):
        super().__init__()
        self.live = 0
        self.peak = 0
        self.seen = {id(tensor.untyped_storage()): tensor.untyped_storage() for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for output in tree_leaves(outputs):
            if hasattr(output, "untyped_storage"):
                self._add(output.untyped_storage())
        return outputs

    def _add(self, storage) -> None:
        name = id(storage)
        if name in self.seen:
            return
        size = storage.nbytes()
        self.seen[name] = weakref.ref(storage, lambda _: self._remove(name, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _remove(self, name: int, size: int) -> None:
        self.live -= size
        self.seen.pop(name, None)
