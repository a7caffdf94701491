"""Keeps the documents of a packed row apart, in every family, without a (length x length) mask of the row.

A packed batch has `position_ids` that restart at 0 with each document, and no `attention_mask`. While the model runs
one, its layers get `Documents` where they would get a mask; padded batches and generation run as they always did.
"""

import functools
from contextvars import ContextVar
from dataclasses import replace

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sft.model.kernels import Documents, attend, read_documents

# The name of our attention among transformers' own.
IMPLEMENTATION = "documents"


# The documents of the packed batch that a model is running right now.
_current: ContextVar[Documents | None] = ContextVar("documents", default=None)


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
