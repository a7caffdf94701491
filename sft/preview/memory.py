"""What a training step keeps in memory, from a model's config alone: nothing is downloaded, read or allocated.

Parameters are counted on the meta device. Activations are counted by running one and two layers of the model as it is
trained (packed rows, autocast, checkpointing, adapters) on tensors without memory, and adding up the bytes that are
alive: any family that transformers knows is counted the same way, and all its layers follow from the difference.
"""

import copy
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache

from sft.train.arguments import GIB

RESERVE = 2 * GIB  # CUDA's context, cuBLAS and NCCL workspaces, gaps between blocks
MACHINES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
# nf4 in blocks of 64 with a scale each, the scales in 8 bits in blocks of 256 (QLoRA, arXiv 2305.14314, section 3).
BYTES_IN_4_BIT = (4 + 8 / 64 + 32 / (64 * 256)) / 8
# DeepSpeed 0.19.8: reduce_bucket_size of ZeRO-2 (two of them with overlap_comm), stage3_max_live_parameters.
ZERO2_BUCKETS, ZERO3_LIVE = 2 * 5e8, 1e9
FULL, LORA, QLORA = "all weights", "LoRA", "QLoRA"
WRONG_CONFIG = (ValueError, RuntimeError, ImportError, KeyError, TypeError, AttributeError, ZeroDivisionError)
ONE, ZERO2, ZERO3 = "one process", "ZeRO-2", "ZeRO-3"


@dataclass(frozen=True)
class Shape:
    """What is counted in a model; `linear` are the parameters of linear layers without the head."""

    config: object = field(compare=False)
    described: str  # the config as JSON, which tells shapes apart
    parameters: int
    linear: int
    adapter_per_rank: int
    layers: int
    hidden: int
    vocabulary: int
    tied: bool
    trusted: bool = False  # its code came with it

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden


@dataclass(frozen=True)
class Step:
    """One forward and backward on one GPU: `rows` of `length` tokens, `trained` of them in the loss, and how."""

    rows: int = 1
    length: int = 2048
    trained: int = 2048
    documents: tuple[int, ...] = ()  # lengths of the conversations in the batch; empty: one in each row
    packing: bool = True
    checkpointing: bool = True
    accumulation: int = 1
    half: bool = True  # bf16 or fp16 computing
    lora_rank: int = 16
    device: str = "cuda"


@dataclass(frozen=True)
class Plan:
    """How the weights are trained, and over how many GPUs they are spread."""

    method: str = FULL
    launcher: str = ONE
    offload: bool = False
    gpus: int = 1

    def __str__(self) -> str:
        return f"{self.method}, {self.launcher}{' with offload' if self.offload else ''}"


@dataclass(frozen=True)
class Part:
    """A number of bytes of one GPU (or of the machine's memory), and where it comes from."""

    name: str
    bytes: int
    formula: str


# --- what the config says -----------------------------------------------------------------------------------------


def read_shape(config, *, trust_remote_code: bool = False) -> Shape:
    """Build the model of a config on the meta device, and count; raises ValueError for one that can't be built."""
    import torch
    from torch import nn

    from sft.model.shrink import not_sharded

    try:
        with torch.device("meta"), not_sharded():
            model = _build(config, torch.float32, trust_remote_code)
    except WRONG_CONFIG as error:
        raise ValueError(
            f"{getattr(config, 'model_type', '?')}: no model can be built from this config: {error}"
        ) from None
    head, text = model.get_output_embeddings(), config.get_text_config()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    rows, size = model.get_input_embeddings().weight.shape
    return Shape(
        config=config,
        described=config.to_json_string(),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linear=sum(module.weight.numel() for module in linear),
        adapter_per_rank=sum(module.in_features + module.out_features for module in linear),
        layers=text.num_hidden_layers,
        hidden=size,
        vocabulary=rows,
        tied=bool(text.tie_word_embeddings),
        trusted=trust_remote_code,
    )


def _build(config, dtype, trust_remote_code: bool):
    from transformers import AutoModelForCausalLM

    trust = {"trust_remote_code": True} if trust_remote_code else {}
    return AutoModelForCausalLM.from_config(config, dtype=dtype, **trust)


# --- activations, by running layers that hold no memory -----------------------------------------------------------


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
    from sft.model import attention
    from sft.model import load as models

    config = copy.deepcopy(shape.config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = (list(text.layer_types) * layers)[:layers]
    model = _build(config, dtype, shape.trusted)
    if step.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if lora:
        model = models.add_lora(
            model, rank=step.lora_rank, alpha=1, dropout=0.05, gradient_checkpointing=step.checkpointing
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
    """Let packed attention see the step's documents; for a GPU, as the fused kernels that keep no scores."""
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


# --- the parts of a step ------------------------------------------------------------------------------------------


def adapter_parameters(shape: Shape, step: Step) -> int:
    return step.lora_rank * shape.adapter_per_rank


def estimate(shape: Shape, step: Step, plan: Plan) -> tuple[list[Part], list[Part]]:
    """Return the parts on each GPU, their sum with what is not there at the same time taken out, and those in RAM."""
    trained = shape.parameters if plan.method == FULL else adapter_parameters(shape, step)
    counted = activations(shape, step, plan)
    loss = loss_part(shape, step, plan)
    weights, gradients, optimizer, buffers, host = _states(shape, step, plan, trained)
    peak = max(counted.forward + loss.bytes, counted.backward)
    tied = 4 * shape.embedding if plan.method == FULL and shape.tied else 0
    running = Part(
        "activations", counted.forward, f"{shape.layers} layers, {step.rows} x {step.length:,} tokens, traced"
    )
    kept = gradients.bytes if step.accumulation > 1 or plan.launcher != ONE else 0
    # The backward pass ends in the first layer, when all gradients but the embedding's are there.
    late = gradients.bytes + max(tied, counted.last - (4 * shape.embedding if plan.method == FULL else 0))
    most = max(kept + peak, late)
    total = weights.bytes + optimizer.bytes + buffers.bytes + most
    formula = "all of them at once" if kept else "weights + optimizer + max(activations + loss, gradients + a layer)"
    parts = [weights, gradients, optimizer, buffers, running, loss, Part("peak", int(total), formula)]
    return [part for part in parts if part.bytes], host


def _states(shape: Shape, step: Step, plan: Plan, trained: int) -> tuple[Part, Part, Part, Part, list[Part]]:
    """Weights, gradients, optimizer state and buffers on a GPU, and what lies in the machine's memory."""
    if plan.launcher == ONE:
        return *_states_of_one(shape, step, plan, trained), Part("buffers", 0, ""), []
    frozen, n, host = shape.parameters - trained if plan.method == FULL else shape.parameters, plan.gpus, []
    total, each = frozen + trained, 2 if step.half else 4
    if plan.launcher == ZERO2:
        weights = Part("weights", each * total, f"{each} bytes x {_short(total)}")
        gradients = Part("gradients", 4 * trained // n, f"4 bytes (summed in fp32) x {_short(trained)} / {n}")
        # On a CPU memory that was never written to is not taken.
        size = ZERO2_BUCKETS if step.device == "cuda" else min(ZERO2_BUCKETS, 2 * trained)
        buffers = Part("buffers", int(each * size), f"two buckets of {_short(size / 2)} x {each} bytes")
    else:
        live = int(min(total, max(ZERO3_LIVE, shape.embedding)))
        weights = Part("weights", each * total // n, f"{each} bytes x {_short(total)} / {n}")
        gradients = Part("gradients", 4 * trained // n, f"4 bytes (summed in fp32) x {_short(trained)} / {n}")
        buffers = Part("buffers", each * live, f"gathered weights: {each} bytes x {_short(live)}")
        if plan.offload:
            host.append(replace(weights, name="weights"))
            weights = replace(weights, bytes=0)
    optimizer = Part("optimizer", 12 * trained // n, f"12 bytes (master, two moments) x {_short(trained)} / {n}")
    if plan.offload:
        host += [optimizer, Part("gradients", 4 * trained // n, f"4 bytes x {_short(trained)} / {n}")]
        optimizer, gradients = replace(optimizer, bytes=0), replace(gradients, bytes=0)
    return weights, gradients, optimizer, buffers, host


def _states_of_one(shape: Shape, step: Step, plan: Plan, trained: int) -> tuple[Part, Part, Part]:
    if plan.method == QLORA:
        rest = shape.parameters - shape.linear
        size = BYTES_IN_4_BIT * shape.linear + 4 * rest + 4 * trained
        formula = (
            f"{BYTES_IN_4_BIT:.3f} bytes x {_short(shape.linear)} + 4 bytes x ({_short(rest)} + {_short(trained)})"
        )
    elif plan.method == LORA:
        each = 2 if step.half else 4
        size = each * shape.parameters + 4 * trained
        formula = f"{each} bytes x {_short(shape.parameters)} + 4 bytes x {_short(trained)}"
    else:
        size, formula = 4 * trained, f"4 bytes x {_short(trained)}"
    gradients = Part("gradients", 4 * trained, f"4 bytes x {_short(trained)}")
    return (
        Part("weights", int(size), formula),
        gradients,
        Part("optimizer", 8 * trained, f"8 bytes x {_short(trained)}"),
    )


def loss_part(shape: Shape, step: Step, plan: Plan) -> Part:
    """Count what the loss in chunks needs: a chunk of logits, the head's gradient, the states' gradient."""
    from sft.model.kernels import CHUNK_BYTES, CHUNK_ROWS

    compute, kept = 2 if step.half else 4, 2 if step.half and (plan.launcher != ONE or plan.method != FULL) else 4
    head = shape.embedding if plan.method == FULL else 0
    chunk_rows = max(1, CHUNK_BYTES[step.device] // (shape.vocabulary * compute))
    rows = min(step.trained, chunk_rows, CHUNK_ROWS.get(step.device, 2**20))
    copies = 2 if step.device == "cuda" else 1
    chunk = copies * rows * shape.vocabulary * compute
    cast = compute * head if compute != kept else 0
    # A CPU adds the 16-bit product to the fp32 sum through a copy in fp32.
    product = (compute + 4) * head if compute != 4 and step.device == "cpu" else 0
    states = step.trained * shape.hidden * (kept + 4)
    formula = f"{copies} x {rows:,} rows of logits x {compute} bytes"
    if head:
        formula += f" + {4 + (cast + product) // head} bytes x {_short(head)} (head)"
    return Part("loss", int(chunk + 4 * head + cast + product + states), formula)


def full_logits(shape: Shape, step: Step) -> Part:
    """What a loss over all logits would take: logits, their log-softmax and its gradient in fp32."""
    each = 14 if step.half else 12
    tokens = step.rows * step.length
    return Part(
        "full logits", tokens * shape.vocabulary * each, f"{tokens:,} tokens x {shape.vocabulary:,} x {each} bytes"
    )


def _short(number: float) -> str:
    return f"{number / 1e9:.3g}B" if number >= 1e9 else f"{number / 1e6:.3g}M"


# --- the machine --------------------------------------------------------------------------------------------------


def fits(parts: Sequence[Part], gpu_bytes: int) -> bool:
    return parts[-1].bytes + RESERVE <= gpu_bytes


def least_machines(shape: Shape, step: Step, plan: Plan, gpu_bytes: int, gpus_each: int) -> int | None:
    """Return how many machines of this kind the plan needs, or None if even MACHINES' last are too few."""
    for machines in MACHINES if plan.launcher != ONE else (1,):
        gpus = machines * gpus_each if plan.launcher != ONE else 1
        if fits(estimate(shape, step, replace(plan, gpus=gpus))[0], gpu_bytes):
            return machines
    return None


def all_plans(gpus: int) -> list[Plan]:
    full = [Plan(FULL, launcher, offload, gpus) for launcher in (ZERO2, ZERO3) for offload in (False, True)]
    lora = [Plan(LORA, ZERO3, False, gpus)]
    return [Plan(), *full, Plan(LORA), *lora, Plan(QLORA)]


def plan_table(shape: Shape, step: Step, gpu_bytes: int, gpus: int) -> list[list[str]]:
    """Rows of: how it is trained, peak with and without checkpointing, memory of the machine, machines needed."""
    rows = [["", "with checkpointing", "without", "in the machine's RAM", "machines needed"]]
    for plan in all_plans(gpus):
        kept, full = replace(step, checkpointing=True), replace(step, checkpointing=False)
        parts, host = estimate(shape, kept, plan)
        machines = least_machines(shape, kept, plan, gpu_bytes, gpus)
        each = sum(part.bytes for part in host) * gpus
        without = gib(estimate(shape, full, plan)[0][-1].bytes)
        needed = "does not fit" if machines is None else str(machines)
        rows.append([str(plan), gib(parts[-1].bytes), without, gib(each) if each else "-", needed])
    return rows


def gib(size: float) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.1f} MiB"


def fits_best(shape: Shape, step: Step, gpu_bytes: int, gpus: int) -> Plan | None:
    """The first plan, from the simplest to the one that saves most, that fits on one machine without offload first."""
    full = [plan for plan in all_plans(gpus) if plan.method == FULL]
    for plan in sorted(full, key=lambda plan: plan.offload):
        if fits(estimate(shape, step, plan)[0], gpu_bytes):
            return plan
    return None


# --- disk ---------------------------------------------------------------------------------------------------------


def disk_of_checkpoint(shape: Shape, step: Step, plan: Plan) -> Part:
    """Bytes of one checkpoint: weights, and in fp32 two moments (DeepSpeed: masters too); adapters alone under LoRA."""
    trained = shape.parameters if plan.method == FULL else adapter_parameters(shape, step)
    each, kept = (8, 4) if plan.launcher == ONE else (12, 2)
    return Part("checkpoint", (each + kept) * trained, f"({kept} + {each}) bytes x {_short(trained)}")


def disk_of_model(shape: Shape, step: Step, plan: Plan) -> Part:
    trained = shape.parameters if plan.method == FULL else adapter_parameters(shape, step)
    each = 4 if plan.launcher == ONE else 2
    return Part("model", each * trained, f"{each} bytes x {_short(trained)}")
