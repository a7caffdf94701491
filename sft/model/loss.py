"""Cross-entropy of the labelled positions alone, in chunks: the full logits never exist, forward or backward.

torch 2.13's own `linear_cross_entropy` was measured beside this: as fast in fp32 if told its chunks, many times slower
in bf16 on a CPU, absent from torch 2.11; and it takes the weight itself, which ZeRO-3 gathers only inside the head.
"""

import functools
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import ModelOutput

from sft.format.tokens import IGNORE_INDEX

# Bytes of logits alive at a time, and rows of them: on a GPU large products pay, on a CPU large buffers don't.
CHUNK_BYTES = {"cuda": 2**29, "cpu": 2**27}
CHUNK_ROWS = {"cpu": 256}
TILE_BYTES = 2**21  # what the softmax of a CPU works on at a time: about its cache
# Settings under which a model changes its logits after the head.
LOGIT_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")


@dataclass
class LossOutput(ModelOutput):
    """What a model with labels returns: the loss, that of each token, and in evaluation the token it ranks first.

    `losses`, without a graph, and `predictions` (batch, length) are aligned as logits are: position t predicts token
    t + 1; where no label follows they are nan and IGNORE_INDEX.
    """

    loss: torch.Tensor | None = None
    losses: torch.Tensor | None = None
    predictions: torch.Tensor | None = None


def use_chunked_loss(model) -> str:
    """Let `model` (with its adapters, if any) compute its loss in chunks when it gets labels; return what was done.

    It and its head change their class, nothing else, so that every wrapper (DDP, DeepSpeed, DataParallel, autocast,
    PEFT) goes on calling forward as before. Without labels, logits come as before.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if isinstance(base, _ChunkedLoss):
        return "loss in chunks"
    reason = _reason_against(base)
    if reason:
        return f"loss over the full logits: {reason}"
    base.__class__ = _with_chunked_loss(type(base))
    if type(base.get_output_embeddings()) is nn.Linear:
        base.get_output_embeddings().__class__ = LossHead
    return "loss in chunks"


def _reason_against(base) -> str | None:
    config = base.config.get_text_config()
    for name in LOGIT_SETTINGS:
        if getattr(config, name, None) not in (None, 1, 1.0):
            return f"{name} is {getattr(config, name)}"
    if getattr(config, "output_router_logits", False):
        return "the router's loss is added"
    if base.get_output_embeddings() is None or base.base_model is base or base.loss_function is not ForCausalLMLoss:
        return f"{type(base).__name__} has no plain head and loss"
    return None


class _ChunkedLoss:
    """Marks the classes that `_with_chunked_loss` makes."""


@functools.cache
def _with_chunked_loss(model_class: type) -> type:
    @functools.wraps(model_class.forward)
    def forward(self, *args, labels=None, num_items_in_batch=None, **kwargs):
        if labels is None:
            return model_class.forward(self, *args, **kwargs)
        hidden = self.base_model(*args, **kwargs)[0]
        return _loss_of(self, hidden, labels, num_items_in_batch)

    members = {"forward": forward, "__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    return type(model_class.__name__, (_ChunkedLoss, model_class), members)


@torch.compiler.disable  # its shapes follow the number of labels, another one in each batch
def _loss_of(model, hidden: torch.Tensor, labels: torch.Tensor, num_items) -> LossOutput:
    """The sum over labelled positions, over `num_items` (else their number); a graph, and 0, where there is none."""
    labels = labels.to(hidden.device)
    targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    labelled = (targets != IGNORE_INDEX).nonzero().squeeze(-1)
    head, predict = model.get_output_embeddings(), not model.training
    chosen = hidden.flatten(0, 1).index_select(0, labelled), targets[labelled]
    if isinstance(head, LossHead) and _compute_dtype(head.weight) != torch.float16:
        total, losses, predicted = head(*chosen, predict)
    else:
        vocab_size = model.config.get_text_config().vocab_size
        total, losses, predicted = _sum_through_module(head, *chosen, predict, vocab_size)
    num_items = torch.as_tensor(len(labelled) if num_items is None else num_items, device=total.device)
    losses = torch.full_like(targets, torch.nan, dtype=torch.float32).index_copy(0, labelled, losses).view_as(labels)
    if predict:
        predicted = torch.full_like(targets, IGNORE_INDEX).index_copy(0, labelled, predicted).view_as(labels)
    return LossOutput(total / num_items.clamp(min=1), losses, predicted)


def _compute_dtype(weight: torch.Tensor) -> torch.dtype:
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


# --- a plain head: its gradients are computed with the loss, three products instead of four ------------------------


class LossHead(nn.Linear):
    """A linear head that also sums the loss. Called as a module, once, because ZeRO-3 gathers its weight just then."""

    def forward(self, hidden, targets=None, predict: bool = False):
        if targets is None:
            return super().forward(hidden)
        if predict or not torch.is_grad_enabled():
            return _sum_through_module(super().forward, hidden, targets, predict, self.out_features)
        return *_SummedLoss.apply(hidden, self.weight, self.bias, targets), None


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets):
        dtype = _compute_dtype(weight)
        with torch.autocast(hidden.device.type, enabled=False):
            losses, ctx.gradients = _losses_with_gradients(hidden, weight, bias, targets, ctx.needs_input_grad, dtype)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _of_losses):
        gradients, ctx.gradients = ctx.gradients, None
        return (*(None if gradient is None else gradient.mul_(grad) for gradient in gradients), None)


def _losses_with_gradients(hidden, weight, bias, targets, wanted, dtype) -> tuple[torch.Tensor, list]:
    """Return the losses (tokens,), and the gradients of their sum by hidden (tokens, size), weight and bias.

    The gradients are fp32 while they grow.
    """
    leaves = [(leaf, want) for leaf, want in zip((hidden, weight, bias), wanted, strict=False)]
    sums = [torch.zeros_like(leaf, dtype=torch.float32) if want else None for leaf, want in leaves]
    losses = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
    cast = weight.to(dtype)
    rows = min(len(hidden), _rows(weight.shape[0] * cast.element_size(), hidden.device.type))
    buffer = cast.new_empty(rows, weight.shape[0])  # fresh memory for each chunk costs a CPU a third of the product
    for start in range(0, len(hidden), max(1, rows)):
        part = slice(start, start + rows)
        states = hidden[part].to(dtype)
        logits = torch.mm(states, cast.t(), out=buffer[: len(states)])
        if bias is not None:
            logits += bias.to(dtype)
        losses[part], gradient = _losses_and_gradient(logits, targets[part])
        if wanted[0]:
            sums[0][part] = gradient @ cast
        if wanted[1]:
            _add_product(sums[1], gradient.t(), states)
        if wanted[2]:
            sums[2] += gradient.sum(0, dtype=torch.float32)
    return losses, [grown.to(leaf.dtype) if want else None for (leaf, want), grown in zip(leaves, sums, strict=True)]


def _losses_and_gradient(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses (rows,) and, where the logits were, the gradient of their sum by them."""
    if logits.device.type == "cuda":
        losses, gradient = _fused_softmax()(logits, targets[:, None])
        return losses.squeeze(-1), gradient
    found, rows = [], max(1, TILE_BYTES // (4 * logits.shape[1]))
    for tile, target in zip(logits.split(rows), targets[:, None].split(rows), strict=True):
        probability = tile.softmax(-1, dtype=torch.float32)
        # The largest logit and its probability give the normalizer without a second exp of every logit.
        normalizer = tile.amax(-1, keepdim=True).float() - probability.amax(-1, keepdim=True).log()
        at_target = tile.gather(-1, target).float() - normalizer
        found.append(-at_target.squeeze(-1))
        tile.copy_(probability.scatter_(-1, target, at_target.expm1()))
    return torch.cat(found), logits


def _softmax(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_probability = logits.log_softmax(-1, dtype=torch.float32)
    at_target = log_probability.gather(-1, targets)
    gradient = log_probability.exp().to(logits.dtype)
    return -at_target, gradient.scatter(-1, targets, at_target.expm1().to(logits.dtype))


@functools.cache
def _fused_softmax():
    """On a GPU the passes over the logits are memory traffic; fused they take a third of it."""
    return torch.compile(_softmax, dynamic=True)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, in fp32 without a rounded copy where the device can."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.device.type == "cuda":
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right


# --- any other head: adapters on it, trainable token rows, fp16's loss scale ----------------------------------------


def _sum_through_module(head, hidden, targets, predict: bool, vocab_size: int):
    """Return the summed loss, that of each token, and the predictions.

    In backward each chunk's logits are computed again.
    Under ZeRO-3 every call of the head gathers on all ranks, which have other numbers of labels: one chunk there.
    """
    rows = _rows(vocab_size * 4, hidden.device.type)
    if isinstance(head, nn.Module) and any(hasattr(parameter, "ds_id") for parameter in head.parameters()):
        rows = max(1, len(hidden))
    losses, predictions = [], []
    for states, target in zip(hidden.split(rows), targets.split(rows), strict=True):
        loss, predicted = checkpoint(_chunk_loss, head, states, target, predict, use_reentrant=False)
        losses.append(loss)
        predictions.append(predicted)
    losses = torch.cat(losses)
    return losses.sum(), losses.detach(), torch.cat(predictions) if predict else None


def _chunk_loss(head, states, targets, predict: bool):
    logits = head(states).float()
    return cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) if predict else None


def _rows(bytes_per_row: int, device: str) -> int:
    """Rows of logits that are alive at a time."""
    device = device if device in CHUNK_BYTES else "cpu"
    return min(max(1, CHUNK_BYTES[device] // bytes_per_row), CHUNK_ROWS.get(device, 2**20))


# --- the proof ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def self_test(model, *, exact: bool = True) -> float:
    """Return how far the loss in chunks is from the plain one on a few tokens; raise ValueError when it is another.

    `exact` says that the model computes in fp32. Catches a model that does more with its logits than its config tells.
    """
    device, was_training = next(model.parameters()).device, model.training
    size = min(model.config.get_text_config().vocab_size, 1000)
    tokens = torch.randint(3, size, (1, 24), generator=torch.Generator().manual_seed(0)).to(device)
    model.eval()
    try:
        found = model(input_ids=tokens, labels=tokens).loss.float()
        logits = model(input_ids=tokens).logits.float()
    finally:
        model.train(was_training)
    expected = cross_entropy(logits[0, :-1], tokens[0, 1:])
    apart = float((found - expected).abs() / expected)
    if not apart < (1e-5 if exact else 1e-2):
        raise ValueError(f"{type(model).__name__}: the loss in chunks is {apart:.1e} from the plain one")
    return apart
