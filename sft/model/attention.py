"""Keeps the documents of a packed row apart, in every family, without a (length x length) mask of the row.

A packed batch has `position_ids` that restart at 0 with each document, and no `attention_mask`. While the model runs
one, its layers get `Documents` where they would get a mask; padded batches and generation run as they always did.
"""

import functools
import inspect
import math
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# The name of our attention among transformers' own.
IMPLEMENTATION = "documents"
BLOCK = 128  # tokens on a side of the blocks that flex attention computes or skips
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Documents:
    """Where the documents of a batch lie, its rows laid end to end; read once per batch, passed from layer to layer.

    Two rows of positions [0 1 2 0 1] and [0 1 0 1 0]: lengths [3, 2, 2, 2, 1], edges [0 3 5 7 9 10].
    """

    edges: torch.Tensor  # (documents + 1,) int32, on the device of the batch
    lengths: list[int]
    window: int | None = None  # tokens that a token sees, itself among them
    made: dict = field(default_factory=dict)  # masks that the first layer made for the others
    ndim: ClassVar[int] = 1  # falcon asks its mask


# The documents of the packed batch that a model is running right now.
_current: ContextVar[Documents | None] = ContextVar("documents", default=None)


def read_documents(position_ids: torch.Tensor, num_rows: int) -> Documents:
    """Find the documents of `position_ids` (rows or 1, length): each row and each jump begins one."""
    positions = position_ids.expand(num_rows, -1)
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions.diff() != 1
    edges = torch.nn.functional.pad(begins.flatten().nonzero().flatten(), (0, 1), value=positions.numel())
    return Documents(edges.to(torch.int32), edges.diff().tolist())


# --- the model ----------------------------------------------------------------------------------------------------


def isolate_documents(model) -> str:
    """Make `model` (with its adapters, if any) keep packed documents apart; return which way was chosen.

    The way follows from the config: bloom and falcon get their own attention, models that go through transformers'
    attention interface with sdpa get ours; any other is left to transformers. `self_test` tells whether it works.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config()
    if config.model_type in OWN_ATTENTION and config._attn_implementation != "flash_attention_2":
        attention_class = OWN_ATTENTION[config.model_type]()
        for module in base.modules():
            if type(module) is attention_class.__base__:
                module.__class__ = attention_class
    elif _goes_through_the_interface(base, config):
        AttentionInterface.register(IMPLEMENTATION, document_attention)
        AttentionMaskInterface.register(IMPLEMENTATION, document_mask)
        base.set_attn_implementation(IMPLEMENTATION)
    elif config._attn_implementation != IMPLEMENTATION:
        _register_once(model, _enter_without_documents)
        return f"documents are kept apart by transformers' own mask ({config._attn_implementation})"
    if _register_once(model, _enter):
        model.register_forward_hook(_leave, always_call=True)
    alibi = config.model_type == "bloom" or getattr(config, "alibi", False)
    on_gpu = "flex attention with ALiBi" if alibi else "variable-length attention"
    return f"documents are kept apart by {on_gpu if torch.cuda.is_available() else 'one attention call for each'}"


def _goes_through_the_interface(base, config) -> bool:
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        config._attn_implementation == "sdpa"
        and getattr(base, "_supports_attention_backend", False)
        and layers <= {"full_attention", "sliding_attention"}
        and getattr(config, "is_causal", True)
        and not getattr(config, "attention_chunk_size", None)
        and not getattr(config, "attn_logit_softcapping", None)
    )


def _register_once(model, hook) -> bool:
    new = hook not in model._forward_pre_hooks.values()
    if new:
        model.register_forward_pre_hook(hook, with_kwargs=True)
    return new


@torch.compiler.disable
def _enter_without_documents(model, args, kwargs):
    """Before the forward of a packed batch: keep no cache, with which transformers takes the row for one text."""
    given = [kwargs.get(name) is not None for name in ("position_ids", "attention_mask", "past_key_values")]
    return (args, {**kwargs, "use_cache": False}) if given == [True, False, False] else None


@torch.compiler.disable
def _enter(model, args, kwargs):
    """Before the forward of a packed batch: the same, and note where its documents lie."""
    entered = _enter_without_documents(model, args, kwargs)
    if entered:
        tokens = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        num_rows = next(len(given) for given in tokens if given is not None)
        _current.set(read_documents(kwargs["position_ids"], num_rows))
    return entered


@torch.compiler.disable
def _leave(model, args, output) -> None:
    _current.set(None)


@torch.compiler.disable  # a graph that looked into the documents would be compiled anew for each batch
def document_mask(*, local_size=None, **options):
    """Stand in for transformers' sdpa mask: the documents of a packed batch, else the usual mask."""
    documents = _current.get()
    return sdpa_mask(local_size=local_size, **options) if documents is None else replace(documents, window=local_size)


def document_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **options):
    """Stand in for transformers' sdpa attention; query, key, value are (batch, heads, length, head size)."""
    if not isinstance(attention_mask, Documents):
        options |= {"dropout": dropout, "scaling": scaling}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    flat = [states.transpose(1, 2).flatten(0, 1) for states in (query, key, value)]
    output = attend(*flat, attention_mask, scale=scaling, dropout=dropout)
    return output.unflatten(0, (query.shape[0], query.shape[2])), None


# --- bloom and falcon, which know neither the interface nor position_ids in their masks (transformers 5.17 to 5.23) -


def _give_documents_as_mask(modeling) -> None:
    """Let the family's `create_causal_mask` return the documents while a packed batch runs."""
    original = modeling.create_causal_mask

    @torch.compiler.disable
    @functools.wraps(original)
    def create_causal_mask(*args, **kwargs):
        return _current.get() or original(*args, **kwargs)

    modeling.create_causal_mask = create_causal_mask


@functools.cache
def _bloom_attention() -> type:
    from transformers.models.bloom import modeling_bloom

    _give_documents_as_mask(modeling_bloom)

    class DocumentBloomAttention(modeling_bloom.BloomAttention):
        def forward(self, hidden_states, residual, alibi, attention_mask, **kwargs):
            if not isinstance(attention_mask, Documents):
                return super().forward(hidden_states, residual, alibi, attention_mask, **kwargs)
            batch = hidden_states.shape[:2]
            states = self.query_key_value(hidden_states).view(-1, self.num_heads, 3, self.head_dim).unbind(2)
            output = attend(
                *states,
                attention_mask,
                scale=self.inv_norm_factor,
                dropout=self.attention_dropout.p if self.training else 0.0,
                alibi=alibi.view(batch[0], self.num_heads, -1)[0],
            )
            output = self.dense(output.reshape(*batch, -1))
            return modeling_bloom.dropout_add(output, residual, self.hidden_dropout, self.training), None

    return DocumentBloomAttention


@functools.cache
def _falcon_attention() -> type:
    from transformers.models.falcon import modeling_falcon

    _give_documents_as_mask(modeling_falcon)

    class DocumentFalconAttention(modeling_falcon.FalconAttention):
        def forward(self, hidden_states, alibi, attention_mask, position_embeddings=None, **kwargs):
            if not isinstance(attention_mask, Documents):
                kwargs["position_embeddings"] = position_embeddings
                return super().forward(hidden_states, alibi, attention_mask, **kwargs)
            batch = hidden_states.shape[:2]
            query, key, value = self._split_heads(self.query_key_value(hidden_states))
            options = {}
            if alibi is None:
                query, key = modeling_falcon.apply_rotary_pos_emb(query, key, *position_embeddings, unsqueeze_dim=2)
            else:
                # transformers' eager falcon adds the bias twice, in its mask and in its scores.
                times = 1 if self.config._attn_implementation == "sdpa" else 2
                options["alibi"] = alibi.view(batch[0], self.num_heads, -1)[0] * (times * self.inv_norm_factor)
                options["dropout"] = self.attention_dropout.p if self.training else 0.0
            flat = [states.flatten(0, 1) for states in (query, key, value)]
            output = attend(*flat, attention_mask, scale=self.inv_norm_factor, **options)
            return self.dense(output.reshape(*batch, -1)), None

    return DocumentFalconAttention


OWN_ATTENTION = {"bloom": _bloom_attention, "falcon": _falcon_attention}


# --- the attention ------------------------------------------------------------------------------------------------


@torch.compiler.disable
def attend(query, key, value, documents: Documents, *, scale, dropout: float = 0.0, alibi=None) -> torch.Tensor:
    """Causal attention inside each document; query (tokens, heads, head size), key and value of as many heads or fewer.

    `alibi` (heads, positions) is added to the scores by the key's position in its document.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotary embeddings leave them in fp32
    if value.device.type != "cuda" or dropout:
        return attend_one_by_one(query, key, value, documents, scale=scale, dropout=dropout, alibi=alibi)
    if alibi is not None:
        return attend_flex(query, key, value, documents, scale=scale, alibi=alibi)
    if value.dtype in HALF:
        return attend_varlen(query, key, value, documents, scale=scale)
    return attend_one_by_one(query, key, value, documents, scale=scale)


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
    edges, longest = documents.edges, max(documents.lengths)
    output = kernel(query, key, value, edges, edges, longest, longest, **options)
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


def attend_flex(query, key, value, documents: Documents, *, scale, alibi):
    """flex_attention with the bias and the documents computed on the fly: no (length x length) tensor."""
    assert documents.window is None, "no family has both ALiBi and a sliding window"
    if "flex" not in documents.made:
        documents.made["flex"] = _block_mask(documents)
    block_mask, position = documents.made["flex"]
    alibi = alibi.float()

    def add_alibi(score, batch, head, query_index, key_index):
        return score + (alibi[head, position[key_index]] - alibi[head, position[query_index]])

    output = _flex_kernel(query.device.type)(
        *(states.transpose(0, 1)[None] for states in (query, key, value)),
        score_mod=add_alibi,
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
    first, last = document[::BLOCK], document[(token[::BLOCK] + BLOCK - 1).clamp(max=total - 1)]
    earlier = torch.ones(len(first), len(first), dtype=torch.bool, device=edges.device).tril(-1)
    whole = earlier & (first[None, :] == last[:, None])
    some = ((last[None, :] >= first[:, None]) & earlier | torch.eye(len(first), device=edges.device).bool()) & ~whole

    def same_document(batch, head, query_index, key_index):
        return (document[query_index] == document[key_index]) & (query_index >= key_index)

    blocks = []
    for mask in (some, whole):
        blocks.append(mask.sum(-1, dtype=torch.int32)[None, None])
        blocks.append(mask.int().argsort(dim=-1, descending=True, stable=True).int()[None, None])
    mask = BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=BLOCK, mask_mod=same_document, seq_lengths=(total, total))
    return mask, token - edges[document]


# --- the proof ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def self_test(model, *, exact: bool = True, lengths: tuple[int, ...] = (37, 5, 64, 22)) -> tuple[float, float]:
    """Compare one packed row with its documents alone; return (how far they are apart, how far neighbours reach).

    The first is the largest relative distance of a document's logits in the row from those it has in a padded batch:
    rounding, which is small if the model computes in fp32 (`exact`). The second is how much the logits of the last
    document move when all before it change. Raises ValueError when packing this model would mix documents up. Runs the
    model three times, dropout off, and leaves the random state alone.
    """
    device, was_training = next(model.parameters()).device, model.training
    size = min(model.config.get_text_config().vocab_size, 1000)
    random = torch.Generator().manual_seed(0)
    texts, others = ([torch.randint(3, size, (n,), generator=random).to(device) for n in lengths] for _ in range(2))
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])[None]
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    model.eval()
    try:
        alone = model(input_ids=pad(texts), attention_mask=pad([torch.ones_like(text) for text in texts])).logits
        packed = model(input_ids=torch.cat(texts)[None], position_ids=positions).logits[0].split(lengths)
        mixed = torch.cat([*others[:-1], texts[-1]])[None]
        moved = model(input_ids=mixed, position_ids=positions).logits[0].split(lengths)
    finally:
        model.train(was_training)
    apart = max(_distance(row, alone[index, : len(row)]) for index, row in enumerate(packed))
    reach = _distance(moved[-1], packed[-1])
    if not apart < (1e-3 if exact else 5e-2) or not reach < (1e-5 if exact else 1e-3):
        raise ValueError(
            f"packing would mix documents up in {type(model).__name__}: logits of a packed row are {apart:.1e} from "
            f"those of its documents alone, and move by {reach:.1e} with their neighbours; turn packing off"
        )
    return apart, reach


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())
