"""Cross-entropy of the labelled positions alone, in chunks: the full logits never exist, forward or backward.

torch 2.13's own `linear_cross_entropy` was measured beside this: as fast in fp32 if given its chunks, many times slower
in bf16 on a CPU, absent from torch 2.11; and it takes the weight itself, which ZeRO-3 gathers only inside the head.
"""

import copy
import functools
import inspect
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import ModelOutput

from sft.format.tokens import IGNORE_INDEX
from sft.model import kernels
from sft.model.load import family_model
from sft.model.mixers import mask_labelled_documents, subclass
from sft.model.shrink import in_mode, random_texts, relative_distance

FULL_LOGIT_BYTES = 12  # that a plain loss takes for each logit: logits, log-softmax and gradient in fp32
FP32_SLICE = 1024  # rows of the head on which the self-test compares gradients in fp32


@dataclass(frozen=True)
class LogitShape:
    """Logits are `cap * tanh(scale * raw / cap)`, or `scale * raw` without a cap."""

    scale: float = 1.0
    cap: float | None = None

    def __str__(self) -> str:
        scale = f", logits times {self.scale:.4g}" if self.scale != 1 else ""
        return scale + (f", soft cap {self.cap:.4g}" if self.cap else "")

    def apply(self, raw: torch.Tensor) -> torch.Tensor:
        scaled = raw if self.scale == 1 else raw * self.scale
        return scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)

    def apply_in_place(self, raw: torch.Tensor) -> torch.Tensor | None:
        """Shape the logits in place; return their slope by the raw ones, or None where it is 1."""
        if self.scale != 1:
            raw *= self.scale
        if self.cap is None:
            return None if self.scale == 1 else raw.new_tensor(self.scale)
        raw.div_(self.cap).tanh_()
        slope = raw.square().neg_().add_(1).mul_(self.scale)
        raw *= self.cap
        return slope


@dataclass
class LossOutput(ModelOutput):
    """Output of a model with labels: the loss, that of each token, and in evaluation the token it ranks first.

    `losses`, without a graph, and `predictions` (batch, length) are aligned as logits are: position t predicts token
    t + 1; where no label follows they are nan and IGNORE_INDEX. `router_loss`: the load-balancing loss of a mixture of
    experts whose config asks for it, without its weight; `loss` holds it with its weight.
    """

    loss: torch.Tensor | None = None
    losses: torch.Tensor | None = None
    predictions: torch.Tensor | None = None
    router_loss: torch.Tensor | None = None


def use_chunked_loss(model) -> str:
    """Let `model` (with its adapters, if any) compute its loss in chunks when it gets labels; return what was done.

    It and its head change their class, nothing else, so that every wrapper (DDP, DeepSpeed, DataParallel, autocast,
    PEFT) still calls forward as before. Without labels, logits come as before. A scale or soft cap of the logits is
    measured on the model's own forward; any other change of them is made by that forward, chunk by chunk.
    """
    base = family_model(model)
    if reason := find_reason_against_chunks(model):
        return _note_of_full_logits(base, reason)
    if not isinstance(base, _ChunkedLoss):
        shape = measure_logit_shape(base)
        base.__class__ = _with_chunked_loss(type(base))
        head = base.get_output_embeddings()
        if shape is not None and type(head) is nn.Linear:
            head.__class__ = LossHead
            head.shape = shape
    head = base.get_output_embeddings()
    return f"loss in chunks{head.shape if isinstance(head, LossHead) else ', through the head as it is'}"


def find_reason_against_chunks(model) -> str | None:
    """Return why the loss of a model can't be computed in chunks, or None."""
    base = family_model(model)
    if isinstance(base, _ChunkedLoss):
        return None
    if base.get_output_embeddings() is None or _layers_of(base) is base or base.loss_function is not ForCausalLMLoss:
        return f"{type(base).__name__} has no plain head and loss"
    hidden, raw = _probes(base)
    try:
        _own_logits(base, hidden, raw=raw)
    except Exception as error:  # the forward of a family that needs more than hidden states
        return f"{type(base).__name__} makes its logits of more than its last states ({type(error).__name__})"
    return None


def _note_of_full_logits(base, reason: str) -> str:
    size = base.config.get_text_config().vocab_size * FULL_LOGIT_BYTES / 2**20
    return f"loss over the full logits, {size:.1f} MiB a token: {reason}"


def use_full_logits(model, reason: str) -> str:
    """Undo `use_chunked_loss`; return a note that says why and what it costs."""
    base = family_model(model)
    head = base.get_output_embeddings()
    if isinstance(base, _ChunkedLoss):
        base.__class__ = type(base).__mro__[2]
    if isinstance(head, LossHead):
        head.__class__ = nn.Linear
    return _note_of_full_logits(base, reason)


def _layers_of(base) -> nn.Module:
    """Return the part of a model that makes the hidden states of its head; the model itself where it has none."""
    return base.base_model if base.base_model is not base else getattr(base, "model", base)


# --- what a model does with the logits of its head ----------------------------------------------------------------


class _Given(nn.Module):
    """Stands in for a part of a model and for its modules, returns what it was given, and has the part's settings."""

    def __init__(self, part, output, record: list | None = None):
        super().__init__()
        self.__dict__["part"] = part  # hidden from the list of modules
        self.output = output
        self.record = record

    def __getattr__(self, name: str):
        found = getattr(self.__dict__["part"], name)
        return self if isinstance(found, nn.Module) else found

    def forward(self, *args, **kwargs):
        if self.record is not None:
            self.record += args
        return self.output


class _Hidden:
    """Stands in for any family's output of the base model: the hidden states, and None for all else."""

    def __init__(self, hidden: torch.Tensor, others=None):
        self.last_hidden_state = hidden
        self.others = others

    def __getitem__(self, index):
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str):
        return getattr(self.__dict__.get("others"), name, None)


def _own_logits(base, hidden: torch.Tensor, *, raw=None, others=None, record: list | None = None, **kwargs):
    """Return what the family's own forward makes of these hidden states (batch, length, size), without its layers.

    `raw` are logits in place of the head's, `record` gets that head's input; `others` is the rest of the base's output.
    """
    part = copy.copy(base)
    part.__dict__ = {**base.__dict__, "_modules": dict(base._modules)}
    layers = _layers_of(base)
    head = base.get_output_embeddings()
    names = {id(module): name for name, module in base.named_children()}
    part._modules[names[id(layers)]] = _Given(layers, _Hidden(hidden, others))
    if raw is not None:
        part._modules[names[id(head)]] = _Given(head, raw, record)
    own_class = type(base).__mro__[2] if isinstance(base, _ChunkedLoss) else type(base)
    tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    return own_class.forward(part, input_ids=tokens, **kwargs)


def _probes(base) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden states (1, 1, size), exact in bf16, and logits (1, 1, vocabulary) from -50 to 50."""
    head = base.get_output_embeddings()
    config = base.config.get_text_config()
    is_linear = isinstance(head, nn.Linear)
    sizes = (head.in_features, head.out_features) if is_linear else (config.hidden_size, config.vocab_size)
    device = next(base.parameters()).device
    hidden = (torch.arange(sizes[0], device=device) % 129 - 64) / 64
    return hidden[None, None], torch.linspace(-50, 50, sizes[1], device=device)[None, None]


@torch.no_grad()
def measure_logit_shape(base) -> LogitShape | None:
    """Measure how the family's forward changes the logits of its head; None where it is neither scale nor soft cap."""
    hidden, raw = _probes(base)
    found = {size: _own_logits(base, hidden, raw=raw * size).logits.float() for size in (1e-7, 1.0, 1e6)}
    if found[1.0].shape != raw.shape or _changes_head_input(base):
        return None
    scale = (found[1e-7][0, 0, -1] / (raw[0, 0, -1] * 1e-7)).item()
    cap = found[1e6].max().item()
    shapes = (LogitShape(), LogitShape(scale=_rounded(scale)), LogitShape(_rounded(scale), _rounded(cap)))
    return next((shape for shape in shapes if torch.allclose(shape.apply(raw), found[1.0], rtol=1e-5, atol=1e-5)), None)


def _changes_head_input(base) -> bool:
    """Whether the family's forward changes the hidden states on their way to the head, as minicpm3 and inkling do."""
    hidden, raw = _probes(base)
    inputs = []
    _own_logits(base, hidden, raw=raw, record=inputs)
    return not inputs or not torch.equal(inputs[0].float(), hidden)


def _rounded(number: float) -> float:
    """The nearest number of few digits, if it is within the rounding of fp32: settings are written in few digits."""
    near = float(f"{number:.6g}")
    return near if abs(near - number) <= 1e-6 * abs(number) else number


class _ChunkedLoss:
    """Marks the classes that `_with_chunked_loss` makes."""


@functools.cache
def _with_chunked_loss(model_class: type) -> type:
    @functools.wraps(model_class.forward)
    def forward(self, *args, labels=None, num_items_in_batch=None, **kwargs):
        if labels is None:
            return model_class.forward(self, *args, **kwargs)
        layers = _layers_of(self)
        output = layers(*args, **{name: kwargs[name] for name in kwargs if _takes(type(layers), name)})
        result = _loss_of(self, output[0], labels, num_items_in_batch)
        _add_router_loss(self, result, output, labels, num_items_in_batch, kwargs)
        return result

    return subclass(model_class, _ChunkedLoss, forward=forward)


@functools.cache
def _takes(layers_class: type, name: str) -> bool:
    """Whether the layers take an argument; the family's own forward leaves out others: mamba has no positions."""
    parameters = inspect.signature(layers_class.forward).parameters
    return name in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def _add_router_loss(model, result: LossOutput, output, labels, num_items, kwargs: dict) -> None:
    """Add the load-balancing loss that the family's own forward computes, weighted by this batch's share of labels."""
    num_labels = (labels[:, 1:] != IGNORE_INDEX).sum()
    if getattr(output, "router_logits", None) is None or not num_labels:
        return
    given = {name: kwargs[name] for name in ("attention_mask", "output_router_logits") if kwargs.get(name) is not None}
    options = {"attention_mask": mask_labelled_documents(labels), **given}
    found = _own_logits(model, output[0][:, :1], raw=output[0].new_zeros(1, 1, 1), others=output, **options)
    router_loss = getattr(found, "aux_loss", None)
    if not torch.is_tensor(router_loss):
        return
    settings = model.config.get_text_config().to_dict()
    weight = settings.get("router_aux_loss_coef", settings.get("aux_loss_coef", 0.0))
    share = 1.0 if num_items is None else (num_labels / torch.as_tensor(num_items).clamp(min=1)).to(router_loss.device)
    result.router_loss = router_loss.detach()
    result.loss = result.loss + (weight * share * router_loss).to(result.loss.device)


@torch.compiler.disable  # its shapes follow the number of labels, another one in each batch
def _loss_of(model, hidden: torch.Tensor, labels: torch.Tensor, num_items) -> LossOutput:
    """The sum over labelled positions, over `num_items` (else their number); a graph, and 0, where there is none.

    `labels` (batch, length), or (batch, length + 1) for a part of a row: the last one is that of the token behind it.
    """
    targets = labels[:, 1:].to(hidden.device)
    shape = hidden.shape[:2]
    targets = nn.functional.pad(targets, (0, shape[1] - targets.shape[1]), value=IGNORE_INDEX).flatten()
    labelled = (targets != IGNORE_INDEX).nonzero().squeeze(-1)
    head = model.get_output_embeddings()
    predict = not model.training
    chosen = hidden.flatten(0, 1).index_select(0, labelled), targets[labelled]
    if isinstance(head, LossHead) and kernels.compute_dtype(head.weight) != torch.float16:
        total, losses, predicted = head(*chosen, predict)
    else:
        vocab_size = model.config.get_text_config().vocab_size
        total, losses, predicted = _sum_through_module(_OwnHead(model, head), *chosen, predict, vocab_size)
    num_items = torch.as_tensor(len(labelled) if num_items is None else num_items, device=total.device)
    losses = torch.full_like(targets, torch.nan, dtype=torch.float32).index_copy(0, labelled, losses).view(shape)
    if predict:
        predicted = torch.full_like(targets, IGNORE_INDEX).index_copy(0, labelled, predicted).view(shape)
    return LossOutput(total / num_items.clamp(min=1), losses, predicted)


# --- a plain head: its gradients are computed with the loss, three products instead of four ------------------------


class LossHead(nn.Linear):
    """A linear head that also sums the loss. Called as a module, once, because ZeRO-3 gathers its weight just then."""

    shape = LogitShape()

    def forward(self, hidden, targets=None, predict: bool = False):
        if targets is None:
            return super().forward(hidden)
        if predict or not torch.is_grad_enabled():
            return _sum_through_module(self.shaped_logits, hidden, targets, predict, self.out_features)
        return *kernels.SummedLoss.apply(hidden, self.weight, self.bias, targets, self.shape), None

    def shaped_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.shape.apply(super().forward(hidden))


# --- any other head: adapters on it, trainable token rows, fp16's loss scale, logits that the family shapes itself ---


class _OwnHead(NamedTuple):
    """Calls the family's own forward on hidden states (tokens, size) for the logits; the layers are left out."""

    model: nn.Module
    head: nn.Module

    def parameters(self):
        return self.head.parameters()

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        return _own_logits(self.model, states[None]).logits[0]


def _sum_through_module(head, hidden, targets, predict: bool, vocab_size: int):
    """Return the summed loss, that of each token, and the predictions; backward computes each chunk's logits again.

    Under ZeRO-3 every call of the head gathers on all ranks, which have other numbers of labels: one chunk there.
    """
    rows = kernels.rows_at_a_time(vocab_size * 4, hidden.device.type)
    if hasattr(head, "parameters") and any(hasattr(parameter, "ds_id") for parameter in head.parameters()):
        rows = max(1, len(hidden))
    chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
    found = [checkpoint(_chunk_loss, head, *chunk, predict, use_reentrant=False) for chunk in chunks]
    losses, predictions = zip(*found, strict=True)
    losses = torch.cat(losses)
    return losses.sum(), losses.detach(), torch.cat(predictions) if predict else None


def _chunk_loss(head, states, targets, predict: bool):
    logits = head(states).float()
    return cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) if predict else None


# --- the proof ----------------------------------------------------------------------------------------------------


def self_test(model, *, exact: bool = True) -> float:
    """Return how far the loss in chunks is from the plain one on a few tokens; raise ValueError when it is another.

    `exact` says that the model computes in fp32. From the same hidden states the chunks must make the model's logits,
    and in fp32 their gradient, on a slice of the head's rows.
    """
    base = family_model(model)
    is_chunked = isinstance(base, _ChunkedLoss)
    hidden = []
    tokens = random_texts(model, [24])[0][None]
    handle = _layers_of(base).register_forward_hook(lambda _module, _inputs, output: hidden.append(output[0]))
    try:
        with in_mode(model, training=False), torch.no_grad():
            output = model(input_ids=tokens, labels=tokens)
            logits = model(input_ids=tokens).logits.float()
            of_chunks = _own_logits(base, hidden[-1]).logits.float() if is_chunked else logits
    finally:
        handle.remove()
    if not is_chunked and output.get("aux_loss") is not None:
        return 0.0
    found = output.losses[0, :-1].mean() if is_chunked else output.loss  # without the loss of routers
    apart = relative_distance(found, cross_entropy(logits[0, :-1], tokens[0, 1:]))
    if not apart < (1e-5 if exact else 1e-2):
        raise ValueError(f"{type(model).__name__}: the loss in chunks is {apart:.1e} from the plain one")
    distance = relative_distance(of_chunks, logits)
    if not distance < (1e-5 if exact else 1e-3):
        raise ValueError(f"{type(model).__name__}: the loss in chunks has logits {distance:.1e} from the plain ones")
    if is_chunked and (distance := _gradient_distance(base)) > 1e-4:
        raise ValueError(f"{type(model).__name__}: the gradient of the loss in chunks is {distance:.1e} off")
    return apart


def _gradient_distance(base) -> float:
    """Return the relative distance of the chunks' gradient from that of the family's own forward, in fp32."""
    head = base.get_output_embeddings()
    if not isinstance(head, LossHead) or any(hasattr(parameter, "ds_id") for parameter in head.parameters()):
        return 0.0  # the family's own forward makes the logits; ZeRO-3 has the weight in shards
    with torch.autocast(head.weight.device.type, enabled=False):
        weight = head.weight.detach()[:FP32_SLICE].float()
        bias = None if head.bias is None else head.bias.detach()[:FP32_SLICE].float()
        random = torch.Generator().manual_seed(0)
        states = torch.randn(24, weight.shape[1], generator=random).to(weight) * 30 / weight.norm(dim=1).mean()
        targets = torch.randint(len(weight), (24,), generator=random).to(weight.device)
        gradients = []
        for own in (True, False):
            leaf = states.clone().requires_grad_()
            if own:
                raw = torch.nn.functional.linear(leaf, weight, bias)[None]
                loss = cross_entropy(_own_logits(base, leaf[None], raw=raw).logits[0].float(), targets, reduction="sum")
            else:
                loss = kernels.SummedLoss.apply(leaf, weight, bias, targets, head.shape)[0]
            gradients += torch.autograd.grad(loss, leaf)
    return relative_distance(gradients[1], gradients[0])
