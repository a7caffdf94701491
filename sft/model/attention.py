"""Keeps the documents of a packed row apart, in every family, without a (length x length) mask of the row.

A packed batch has `position_ids` that restart at 0 with each document, and no `attention_mask`. While the model runs
one, its layers get `Documents` where they would get a mask; padded batches and generation run as they always did.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sft.model.kernels import Documents, attend, current_documents, read_documents
from sft.model.load import family_model
from sft.model.mixers import carry_documents, find_mixers, leave_out_kernels, mixers_with_kernels, run_by_document
from sft.model.shrink import (
    build_twin,
    describe_twin,
    family_class,
    in_mode,
    random_texts,
    relative_distance,
)

# The name of our attention among transformers' own.
IMPLEMENTATION = "documents"
# Kinds of layers in which our attention, or none, runs; transformers masks the others (chunks, indexers) itself.
LAYER_KINDS = {"full_attention", "sliding_attention", "linear_attention", "conv", "hybrid", "mamba", "moe", "mlp"}
MASK_MAKERS = ("create_causal_mask", "create_sliding_window_causal_mask", "create_chunked_causal_mask")
TEST_LENGTHS = (37, 5, 64, 22)  # tokens of the documents of a test
MORE_LENGTHS = (2, 90, 3, 33)
MAX_GRADIENT_DISTANCE = 2e-5  # of a twin's packed row from its documents alone, in fp32; a leak is above 1e-3


# --- the model ----------------------------------------------------------------------------------------------------


def isolate_documents(model) -> str:
    """Make `model` (with its adapters, if any) keep packed documents apart; return which way was chosen.

    bloom and falcon get their own attention, models that go through transformers' attention interface with sdpa get
    ours, any other keeps transformers' mask. A tiny twin, made of the config, shows which modules mix documents all the
    same: those run once per document. If that is not enough, the whole model runs once per document.
    """
    base = family_model(model)
    if _register_once(model, _enter):
        model.register_forward_hook(_leave, always_call=True)
    implementation = base.config.get_text_config()._attn_implementation
    implementation = "sdpa" if implementation == IMPLEMENTATION else implementation
    family = _Family(family_class(base), describe_twin(base.config), implementation, base.config)
    with torch.device("cpu"):
        isolate_attention, mixers = _choose_way(family)
    if mixers is None:
        return run_model_by_document(model)
    note = isolate_attention(base)
    run_by_document([module for module in base.modules() if type(module) in mixers], with_kernels=True)
    names = ", ".join(sorted(mixer.__name__ for mixer in mixers))
    return f"{note}; {names} run once per document" if names else note


def run_model_by_document(model) -> str:
    """Let the whole model run once per document: slower, and right for any causal family."""
    base = family_model(model)
    run_by_document([base.base_model], with_kernels=False)
    return "documents are kept apart by running the model once per document"


@dataclass(frozen=True)
class _Family:
    """A model's class and config; the JSON of its twin's tells families apart, and may not hold it whole (inf)."""

    model_class: type
    described: str
    implementation: str
    config: object = field(compare=False)


@functools.cache
def _choose_way(family: _Family) -> tuple[Callable, set[type] | None]:
    """Return a function that isolates attention, and which classes run once per document; None: the whole model does.

    The first way that is right in a tiny twin is taken. Without a twin, our attention: the self-test proves it.
    """
    for isolate in (_isolate_attention, _use_masks_with_positions, _use_eager_masks):
        try:
            twin = build_twin(family.model_class, family.config, family.implementation)
        except Exception:  # a config that can't be shrunk fails in many ways
            return _isolate_attention, set()
        mixers = _find_mixers_of_twin(twin, isolate)
        if mixers is not None:
            return isolate, mixers
    return _isolate_attention, None


def _find_mixers_of_twin(twin, isolate) -> set[type] | None:
    """Return the classes that must run once per document beside `isolate`; None where that is not enough."""
    isolate(twin)
    twin.register_forward_pre_hook(_enter, with_kwargs=True)
    twin.register_forward_hook(_leave, always_call=True)
    try:
        mixers = find_mixers(twin, _packed(random_texts(twin, TEST_LENGTHS)), TEST_LENGTHS)
        run_by_document([module for module in twin.modules() if type(module) in mixers], with_kernels=False)
        distances = [compare_gradients(twin, lengths) for lengths in (TEST_LENGTHS, MORE_LENGTHS)]
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError):
        return None  # doge computes with the mask that our attention replaces
    return mixers if max(distances) < MAX_GRADIENT_DISTANCE else None


def _isolate_attention(base) -> str:
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
        return _use_masks_with_positions(base)
    alibi = config.model_type == "bloom" or getattr(config, "alibi", False)
    on_gpu = "flex attention with ALiBi" if alibi else "variable-length attention"
    return f"documents are kept apart by {on_gpu if torch.cuda.is_available() else 'one attention call for each'}"


def _goes_through_the_interface(base, config) -> bool:
    return (
        config._attn_implementation == "sdpa"
        and getattr(base, "_supports_attention_backend", False)
        and set(getattr(config, "layer_types", None) or ()) <= LAYER_KINDS
        and getattr(config, "is_causal", True)
        and not getattr(config, "attention_chunk_size", None)
        and not getattr(config, "attn_logit_softcapping", None)
    )


def has_document_attention(model) -> bool:
    """Whether `isolate_documents` gave the model our attention, its family's or the one of the interface."""
    base = family_model(model)
    config = base.config.get_text_config()
    if config.model_type in OWN_ATTENTION:
        attention_class = OWN_ATTENTION[config.model_type]()
        return any(type(module) is attention_class for module in base.modules())
    return config._attn_implementation == IMPLEMENTATION


def _use_masks_with_positions(base) -> str:
    """Hand `position_ids` to the family's mask makers, which not every family does (gpt_oss in transformers 5.23)."""
    names = {type(module).__module__ for module in base.modules()}
    for modeling in [sys.modules[name] for name in names if name.startswith("transformers.models.")]:
        for name in MASK_MAKERS:
            maker = getattr(modeling, name, None)
            if maker and not hasattr(maker, "gives_positions"):
                setattr(modeling, name, _with_positions(maker))
    implementation = base.config.get_text_config()._attn_implementation
    return f"documents are kept apart by transformers' own mask ({implementation})"


def _use_eager_masks(base) -> str:
    """Let transformers make every mask: doge computes with it, and without one attends to later tokens."""
    base.set_attn_implementation("eager")
    return _use_masks_with_positions(base)


def _with_positions(maker):
    @torch.compiler.disable
    @functools.wraps(maker)
    def make_mask(*args, **kwargs):
        documents = current_documents.get()
        if documents is not None and kwargs.get("position_ids") is None and len(args) < 5:
            kwargs["position_ids"] = documents.positions
        return maker(*args, **kwargs)

    make_mask.gives_positions = True
    return make_mask


def _register_once(model, hook) -> bool:
    new = hook not in model._forward_pre_hooks.values()
    if new:
        model.register_forward_pre_hook(hook, with_kwargs=True)
    return new


@torch.compiler.disable
def _enter(model, args, kwargs):
    """Before the forward of a packed batch: note its documents; with a cache transformers would take it as one text."""
    given = [kwargs.get(name) is not None for name in ("position_ids", "attention_mask", "past_key_values")]
    if given != [True, False, False]:
        return None
    tokens = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    num_rows = next(len(given) for given in tokens if given is not None)
    current_documents.set(read_documents(kwargs["position_ids"], num_rows))
    carry_documents(model)
    return args, {**kwargs, "use_cache": False}


@torch.compiler.disable
def _leave(model, args, output) -> None:
    current_documents.set(None)


@torch.compiler.disable  # a graph that looked into the documents would be compiled anew for each batch
def document_mask(*, local_size=None, **options):
    """Stand in for transformers' sdpa mask: the documents of a packed batch, else the usual mask."""
    documents = current_documents.get()
    return sdpa_mask(local_size=local_size, **options) if documents is None else replace(documents, window=local_size)


def document_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **options):
    """Stand in for transformers' sdpa attention; query, key, value are (batch, heads, length, head size)."""
    if not isinstance(attention_mask, Documents):
        options |= {"dropout": dropout, "scaling": scaling}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    flat = [states.transpose(1, 2).flatten(0, 1) for states in (query, key, value)]
    output = attend(*flat, attention_mask, scale=scaling, dropout=dropout)
    return output.unflatten(0, (query.shape[0], query.shape[2])), None


# --- bloom and falcon, which use neither the interface nor position_ids in their masks (transformers 5.17 to 5.23) -


def _give_documents_as_mask(modeling) -> None:
    """Let the family's `create_causal_mask` return the documents while a packed batch runs."""
    original = modeling.create_causal_mask

    @torch.compiler.disable
    @functools.wraps(original)
    def create_causal_mask(*args, **kwargs):
        return current_documents.get() or original(*args, **kwargs)

    modeling.create_causal_mask = create_causal_mask


def _alibi_of_row(modeling, alibi: torch.Tensor, documents: Documents, num_heads: int) -> torch.Tensor:
    """Return the ALiBi of a row, (heads, positions); the model makes that of its tokens, which may be a part of it."""
    if documents.shared is None:
        return alibi.view(-1, num_heads, alibi.shape[-1])[0]
    if "alibi" not in documents.made:
        row = torch.ones_like(documents.positions)
        documents.made["alibi"] = modeling.build_alibi_tensor(row, num_heads, alibi.dtype).view(num_heads, -1)
    return documents.made["alibi"]


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
                alibi=_alibi_of_row(modeling_bloom, alibi, attention_mask, self.num_heads),
            )
            output = self.dense(output.reshape(*batch, -1))
            return modeling_bloom.dropout_add(output, residual, self.hidden_dropout, self.training), None

    return DocumentBloomAttention


@functools.cache
def _falcon_attention() -> type:
    from transformers.models.falcon import modeling_falcon

    _give_documents_as_mask(modeling_falcon)

    class DocumentFalconAttention(modeling_falcon.FalconAttention):
        rotate = staticmethod(modeling_falcon.apply_rotary_pos_emb)

        def forward(self, hidden_states, alibi, attention_mask, position_embeddings=None, **kwargs):
            if not isinstance(attention_mask, Documents):
                kwargs["position_embeddings"] = position_embeddings
                return super().forward(hidden_states, alibi, attention_mask, **kwargs)
            batch = hidden_states.shape[:2]
            query, key, value = self._split_heads(self.query_key_value(hidden_states))
            options = {}
            if alibi is None:
                query, key = self.rotate(query, key, *position_embeddings, unsqueeze_dim=2)
            else:
                # transformers' eager falcon adds the bias twice, in its mask and in its scores.
                times = 1 if self.config._attn_implementation == "sdpa" else 2
                alibi = _alibi_of_row(modeling_falcon, alibi, attention_mask, self.num_heads)
                options["alibi"] = alibi * (times * self.inv_norm_factor)
                options["dropout"] = self.attention_dropout.p if self.training else 0.0
            flat = [states.flatten(0, 1) for states in (query, key, value)]
            output = attend(*flat, attention_mask, scale=self.inv_norm_factor, **options)
            return self.dense(output.reshape(*batch, -1)), None

    return DocumentFalconAttention


OWN_ATTENTION = {"bloom": _bloom_attention, "falcon": _falcon_attention}


# --- the proof ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def self_test(
    model, *, exact: bool = True, lengths: tuple[int, ...] = TEST_LENGTHS, say: Callable = lambda _note: None
) -> tuple[float, float]:
    """Compare one packed row with its documents alone; return (their distance, how far neighbours reach).

    The first is the largest relative distance of a document's logits in the row from those it has in a padded batch:
    rounding, which is small if the model computes in fp32 (`exact`). The second is how much the logits of the last
    document move when all before it change. A model that fails is tried again without CUDA kernels for its mixers, then
    run once per document as a whole. Raises ValueError when packing would mix documents all the same. Runs the model
    three times, dropout off, and leaves the random state alone.
    """
    apart, reach = _try_packing(model, lengths)
    for fall_back in (leave_out_kernels, run_model_by_document):
        if _is_isolated(apart, reach, exact):
            break
        if note := fall_back(model):
            say(note)
            apart, reach = _try_packing(model, lengths)
    if not _is_isolated(apart, reach, exact):
        raise ValueError(
            f"packing would mix documents up in {type(model).__name__}: logits of a packed row are {apart:.1e} from "
            f"those of its documents alone, and move by {reach:.1e} with their neighbours; turn packing off"
        )
    return apart, reach


def _is_isolated(apart: float, reach: float, exact: bool) -> bool:
    return apart < (1e-3 if exact else 5e-2) and reach < (1e-5 if exact else 1e-3)


def _try_packing(model, lengths: tuple[int, ...]) -> tuple[float, float]:
    """Measure packing; kernels that can't take documents raise errors of their own, and count as mixing them up."""
    try:
        return _measure_packing(model, lengths)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError):
        if not mixers_with_kernels(model):
            raise
        return float("inf"), float("inf")


def _measure_packing(model, lengths: tuple[int, ...]) -> tuple[float, float]:
    texts, others = (random_texts(model, lengths, seed=seed) for seed in (0, 1))
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    with in_mode(model, training=False):
        for mixer in mixers_with_kernels(model):
            mixer.training = True  # Mamba has other kernels in training
        alone = model(input_ids=pad(texts), attention_mask=pad([torch.ones_like(text) for text in texts])).logits
        packed = model(**_packed(texts)).logits[0].split(lengths)
        moved = model(**_packed([*others[:-1], texts[-1]])).logits[0].split(lengths)
    apart = max(relative_distance(row, alone[index, : len(row)]) for index, row in enumerate(packed))
    return apart, relative_distance(moved[-1], packed[-1])


def _packed(texts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    positions = torch.cat([torch.arange(len(text), device=text.device) for text in texts])
    return {"input_ids": torch.cat(texts)[None], "position_ids": positions[None]}


def compare_gradients(model, lengths: tuple[int, ...] = TEST_LENGTHS, *, seed: int = 0) -> float:
    """Return the relative distance of a packed row's gradient, over all weights, from that of its documents alone."""
    texts = random_texts(model, lengths, seed=seed)
    alone = _gradients(model, [{"input_ids": text[None]} for text in texts])
    packed = _gradients(model, [_packed(texts)])
    apart = sum(((packed[name] - alone[name]).double().norm() ** 2).item() for name in alone)
    size = sum((gradient.double().norm() ** 2).item() for gradient in alone.values())
    return (apart / size) ** 0.5 if alone.keys() == packed.keys() and size else float("inf")


def _gradients(model, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Sum the gradients of the next token's loss, but for the first token of each document, which none predicts."""
    model.zero_grad()
    for batch in batches:
        tokens = batch["input_ids"][0, 1:]
        if "position_ids" in batch:
            tokens = tokens.where(batch["position_ids"][0, 1:] > 0, -100)
        torch.nn.functional.cross_entropy(model(**batch).logits.float()[0, :-1], tokens, reduction="sum").backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found
