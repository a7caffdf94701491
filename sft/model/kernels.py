"""Computes attention inside each document of a packed row, and the loss of a chunk of logits with its gradients."""

import functools
import inspect
import math
import os
import weakref
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

BLOCK_TOKENS = 128  # on a side of the blocks that flex attention computes or skips
HALF_DTYPES = (torch.float16, torch.bfloat16)
# Bytes of logits alive at a time, and rows of them: on a GPU large products pay, on a CPU large buffers don't.
CHUNK_BYTES = {"cuda": 2**29, "cpu": 2**27}
CHUNK_ROWS = {"cpu": 256}
TILE_BYTES = 2**21  # part of the scores for one softmax on a CPU: about its cache


@dataclass(frozen=True)
class Documents:
    """The documents of a packed batch, its rows laid end to end; read once per batch, passed from layer to layer.

    Two rows of positions [0 1 2 0 1] and [0 1 0 1 0]: lengths [3, 2, 2, 2, 1], edges [0 3 5 7 9 10].
    """

    edges: torch.Tensor  # (documents + 1,) int32, on the device of the batch
    lengths: list[int]
    window: int | None = None  # tokens that a token sees, itself among them
    made: dict = field(default_factory=dict)  # masks and indices that the first layer made for the others
    positions: torch.Tensor | None = None  # (rows, length), as the model got them
    shared: object | None = None  # a SharedRow of sft.train.sequence_parallel, where processes share the row
    ndim: ClassVar[int] = 1  # falcon asks its mask


# The documents of the packed batch that a model runs in this thread, or None.
current_documents: ContextVar[Documents | None] = ContextVar("documents", default=None)


def read_documents(position_ids: torch.Tensor, num_rows: int) -> Documents:
    """Find the documents of `position_ids` (rows or 1, length): each row and each jump begins one."""
    positions = position_ids.expand(num_rows, -1)
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions.diff() != 1
    edges = torch.nn.functional.pad(begins.flatten().nonzero().flatten(), (0, 1), value=positions.numel())
    return Documents(edges.to(torch.int32), edges.diff().tolist(), positions=positions)


@torch.compiler.disable
def attend(query, key, value, documents: Documents, *, scale, dropout: float = 0.0, alibi=None) -> torch.Tensor:
    """Causal attention inside each document; query (tokens, heads, head size), key and value of as many heads or fewer.

    `alibi` (heads, positions) is added to the scores by the key's position in its document.
    """
    query = query.to(value.dtype)  # under autocast, rotary embeddings leave them in fp32
    key = key.to(value.dtype)
    if documents.shared is not None:
        return documents.shared.attend(attend, query, key, value, documents, scale=scale, dropout=dropout, alibi=alibi)
    way = choose_attention(value.device.type, value.dtype, dropout=dropout, alibi=alibi is not None)
    if way == "flex":
        return attend_flex(query, key, value, documents, scale=scale, alibi=alibi)
    if way == "varlen":
        return attend_varlen(query, key, value, documents, scale=scale)
    return attend_one_by_one(query, key, value, documents, scale=scale, dropout=dropout, alibi=alibi)


def choose_attention(device: str, dtype: torch.dtype, *, dropout: float, alibi: bool) -> str:
    """Return one by one, varlen or flex. On a GPU flex attention's backward alone is deterministic (dev/LOG.md)."""
    if device != "cuda" or dropout:
        return "one by one"
    if alibi or torch.are_deterministic_algorithms_enabled():
        return "flex"
    return "varlen" if dtype in HALF_DTYPES else "one by one"


def make_determinism_fast() -> None:
    """Undo what is slow in transformers' settings for determinism and not needed for equal bits.

    transformers 5.23 gives cuBLAS workspaces of 16 KiB and waits for each kernel. Must be called before the first
    matrix product on the GPU, as cuBLAS reads its setting then.
    """
    os.environ |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "CUDA_LAUNCH_BLOCKING": "0"}


def attend_one_by_one(query, key, value, documents: Documents, *, scale, dropout: float = 0.0, alibi=None):
    """One sdpa call per document: the fastest exact way on a CPU, and the one that runs everywhere."""
    outputs = []
    for states in zip(*(states.split(documents.lengths) for states in (query, key, value)), strict=True):
        mask = _one_mask(documents, len(states[0]), alibi, query)
        output = scaled_dot_product_attention(
            *(state.transpose(0, 1)[None] for state in states),
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


def _one_mask(documents: Documents, length: int, alibi, like: torch.Tensor) -> torch.Tensor | None:
    """The additive mask (1, heads or 1, length, length) of a document, or None where plain causal attention does."""
    window = documents.window or length
    if alibi is None and window >= length:
        return None
    if (length, window) not in documents.made:
        mask = torch.zeros(1, 1, 1, device=like.device)
        if alibi is not None:
            # Relative to the query: the same softmax, and near keys keep their precision in bf16.
            mask = (alibi[:, None, :length] - alibi[:, :length, None]).float()
        seen = torch.ones(length, length, dtype=torch.bool, device=like.device).tril().triu(1 - window)
        documents.made[length, window] = mask.masked_fill(~seen, -math.inf)[None].to(like.dtype)
    return documents.made[length, window]


def attend_varlen(query, key, value, documents: Documents, *, scale):
    """FlashAttention's variable-length kernel: of flash-attn where it is installed, else torch's own build of it."""
    kernel, is_torch = _varlen_kernel()
    window = (-1 if documents.window is None else documents.window - 1, 0)
    options = {"scale" if is_torch else "softmax_scale": scale, "window_size": window}
    if not is_torch:
        options["causal"] = True
    elif query.shape[1] != key.shape[1]:
        if "enable_gqa" in inspect.signature(kernel).parameters:
            options["enable_gqa"] = True
        else:  # torch 2.11
            groups = query.shape[1] // key.shape[1]
            key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    longest = max(documents.lengths)
    output = kernel(query, key, value, documents.edges, documents.edges, longest, longest, **options)
    return output[0] if isinstance(output, tuple) else output


@functools.cache
def _varlen_kernel():
    for package in ("flash_attn_interface", "flash_attn"):
        try:
            return __import__(package).flash_attn_varlen_func, False
        except (ImportError, AttributeError):
            continue
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, True


def attend_flex(query, key, value, documents: Documents, *, scale, alibi=None):
    """flex_attention with the bias and the documents computed on the fly: no (length x length) tensor."""
    name = "flex", documents.window
    if name not in documents.made:
        documents.made[name] = _block_mask(documents)
    block_mask, position = documents.made[name]
    bias = None if alibi is None else alibi.float()

    def add_alibi(score, batch, head, query_index, key_index):
        return score + (bias[head, position[key_index]] - bias[head, position[query_index]])

    output = _flex_kernel(query.device.type)(
        *(states.transpose(0, 1)[None] for states in (query, key, value)),
        score_mod=None if alibi is None else add_alibi,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[0].transpose(0, 1)


@functools.cache
def _flex_kernel(device: str):
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if device == "cuda" else flex_attention


def _block_mask(documents: Documents):
    """Return (the block mask of the documents, each token's position), from block edges alone, no token pair looked at.

    Documents lie in order, so a block of keys matters to a later block of queries if its last document is not over
    before that begins, and needs no look at its tokens if the first document of the one is the last of the other.
    """
    from torch.nn.attention.flex_attention import BlockMask

    edges = documents.edges.long()
    total = sum(documents.lengths)
    token = torch.arange(total, device=edges.device)
    document = torch.bucketize(token, edges[1:], right=True)
    first = document[::BLOCK_TOKENS]
    last = document[(token[::BLOCK_TOKENS] + BLOCK_TOKENS - 1).clamp(max=total - 1)]
    earlier = torch.ones(len(first), len(first), dtype=torch.bool, device=edges.device).tril(-1)
    window = documents.window or total
    block = torch.arange(len(first), device=edges.device)
    apart = (block[:, None] - block[None, :]) * BLOCK_TOKENS  # from a block of keys to one of queries, in tokens
    earlier &= apart - BLOCK_TOKENS < window - 1
    whole = earlier & (first[None, :] == last[:, None]) & (apart + BLOCK_TOKENS <= window)
    some = ((last[None, :] >= first[:, None]) & earlier | torch.eye(len(first), device=edges.device).bool()) & ~whole

    def same_document(batch, head, query_index, key_index):
        distance = query_index - key_index
        return (document[query_index] == document[key_index]) & (distance >= 0) & (distance < window)

    blocks = []
    for mask in (some, whole):
        blocks.append(mask.sum(-1, dtype=torch.int32)[None, None])
        blocks.append(mask.int().argsort(dim=-1, descending=True, stable=True).int()[None, None])
    mask = BlockMask.from_kv_blocks(
        *blocks, BLOCK_SIZE=BLOCK_TOKENS, mask_mod=same_document, seq_lengths=(total, total)
    )
    return mask, token - edges[document]


# --- the loss of a chunk of logits ---------------------------------------------------------------------------------


def compute_dtype(weight: torch.Tensor) -> torch.dtype:
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


class SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, shape):
        dtype = compute_dtype(weight)
        with torch.autocast(hidden.device.type, enabled=False):
            leaves = (hidden, weight, bias)
            losses, ctx.gradients = _losses_with_gradients(leaves, targets, shape, ctx.needs_input_grad[:3], dtype)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _of_losses):
        gradients, ctx.gradients = ctx.gradients, None
        return (*(None if gradient is None else gradient.mul_(grad) for gradient in gradients), None, None)


def _losses_with_gradients(leaves, targets, shape, wanted, dtype) -> tuple[torch.Tensor, list]:
    """Return the losses (tokens,), and the gradients of their sum by hidden (tokens, size), weight and bias.

    `shape`, a LogitShape of sft.model.loss, changes the logits. The gradients are fp32 while they grow.
    """
    hidden, weight, bias = leaves
    pairs = list(zip(leaves, wanted, strict=True))
    sums = [torch.zeros_like(leaf, dtype=torch.float32) if want else None for leaf, want in pairs]
    losses = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
    cast = weight.to(dtype)
    rows = min(len(hidden), rows_at_a_time(weight.shape[0] * cast.element_size(), hidden.device.type))
    buffer = cast.new_empty(rows, weight.shape[0])  # fresh memory for each chunk costs a CPU a third of the product
    for start in range(0, len(hidden), max(1, rows)):
        part = slice(start, start + rows)
        states = hidden[part].to(dtype)
        logits = torch.mm(states, cast.t(), out=buffer[: len(states)])
        if bias is not None:
            logits += bias.to(dtype)
        slope = shape.apply_in_place(logits)
        losses[part], gradient = _losses_and_gradient(logits, targets[part])
        if slope is not None:
            gradient = gradient.mul_(slope)
        if wanted[0]:
            sums[0][part] = gradient @ cast
        if wanted[1]:
            _add_product(sums[1], gradient.t(), states)
        if wanted[2]:
            sums[2] += gradient.sum(0, dtype=torch.float32)
    return losses, [grown.to(leaf.dtype) if want else None for (leaf, want), grown in zip(pairs, sums, strict=True)]


def _losses_and_gradient(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses (rows,) and, where the logits were, the gradient of their sum by them."""
    if logits.device.type == "cuda":
        losses, gradient = _fused_softmax()(logits, targets[:, None])
        return losses.squeeze(-1), gradient
    found = []
    rows = max(1, TILE_BYTES // (4 * logits.shape[1]))
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


def rows_at_a_time(bytes_per_row: int, device: str) -> int:
    """Rows of logits that are alive at a time."""
    device = device if device in CHUNK_BYTES else "cpu"
    return min(max(1, CHUNK_BYTES[device] // bytes_per_row), CHUNK_ROWS.get(device, 2**20))


# --- products of fp32 masters in half precision --------------------------------------------------------------------


class SharedRounding:
    """Rounds states to half precision once for the layers that take the same ones: q, k, v, or gate and up."""

    def __init__(self):
        self._last = (lambda: None), None, None

    def round(self, states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        of, version, rounded = self._last
        if of() is not states or version != states._version or rounded.dtype != dtype:
            rounded = states.detach().to(dtype)
            self._last = weakref.ref(states), states._version, rounded
        return rounded


class MasterLinear(nn.Linear):
    """A linear layer that under autocast rounds its fp32 weight once per update and gives fp32 gradients.

    The products are autocast's, to the bit. Autocast rounds each weight and each input in every call, and casts the
    gradients from half precision to fp32; here they come as fp32 from the product itself. `adds_gradients`: in one
    process the product is added to the gradient in place.
    """

    keeps_rounded = adds_gradients = False
    kept: torch.Tensor | None = None

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        device = states.device.type
        is_master = weight.dtype == torch.float32 and weight.requires_grad and weight.is_leaf
        if not (is_master and torch.is_grad_enabled() and torch.is_autocast_enabled(device)):
            return self.plain_class.forward(self, states)
        rounded = self.rounding.round(states, torch.get_autocast_dtype(device)).flatten(0, -2)
        output = MasterProduct.apply(states.flatten(0, -2), weight, self.bias, rounded, self)
        return output.view(*states.shape[:-1], output.shape[-1])

    def rounded_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight in half precision, from the second batch of an update on the same tensor.

        While there is a gradient the weight has not changed: an update ends with gradients that are None. Its version
        says nothing, as torch's fused AdamW leaves that as it is.
        """
        if self.kept is not None and self.weight.grad is not None:
            return self.kept
        rounded = self.weight.detach().to(dtype)
        self.kept = rounded if self.keeps_rounded else None
        return rounded


class MasterProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, weight, bias, rounded, layer):
        cast = layer.rounded_weight(rounded.dtype)
        ctx.save_for_backward(rounded, cast)
        ctx.layer = layer
        ctx.dtype = states.dtype
        with torch.autocast(states.device.type, enabled=False):
            return nn.functional.linear(rounded, cast, None if bias is None else bias.to(rounded.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rounded, cast = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        weight = ctx.layer.weight
        by_states = _product(grad, cast, ctx.dtype) if wanted[0] else None
        by_bias = grad.sum(0, dtype=torch.float32) if wanted[2] else None
        by_weight = None
        if ctx.layer.adds_gradients and weight.grad is not None:
            _add_product(weight.grad, grad.t(), rounded)
        else:
            by_weight = _product(grad.t(), rounded, torch.float32)
        return by_states, by_weight, by_bias, None, None


def _product(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """left @ right in `dtype`, without a rounded copy where the device can."""
    if left.dtype != dtype and left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)
