"""Sequence parallelism: the processes of a group share each packed row, with the exchange of DeepSpeed's Ulysses.

Each process computes its part of the row's tokens. Around attention an all-to-all gives it the whole row for its part
of the heads (Jacobs et al. 2023, arXiv 2309.14509), so that documents are kept apart as in a row of one process:

    2 processes, 4 heads, a row of 6 tokens:   tokens 0-2, heads 0-3  <->  tokens 0-5, heads 0-1   on process 0
                                               tokens 3-5, heads 0-3  <->  tokens 0-5, heads 2-3   on process 1

Everything else is data parallel: a process's loss is that of its own tokens over the trained tokens of all processes,
and ZeRO averages the gradients over all of them.
"""

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from sft.format.tokens import IGNORE_INDEX
from sft.launch.processes import UserError
from sft.model import attention, loss
from sft.model.kernels import Documents, current_documents
from sft.model.load import context_window
from sft.model.mixers import RunByDocument
from sft.model.shrink import in_mode, not_sharded, random_texts, relative_distance

FLAG = "--sequence_parallel_size"
TEST_LENGTHS = (37, 5, 64, 22)  # tokens of the documents of the self-test; their number is no multiple of most groups
# Rotary embeddings whose frequencies follow the largest position, which differs among the parts of a row.
DYNAMIC_ROPE = ("dynamic", "longrope")


# --- what can be shared -------------------------------------------------------------------------------------------


def check_processes(parts: int, num_processes: int) -> None:
    """Raise ValueError when the processes can't be divided into groups of `parts`."""
    if num_processes % parts:
        raise ValueError(f"{FLAG} {parts}: {num_processes} processes can't be divided into groups of {parts}")


def check_model(config, *, parts: int, max_length: int, options: dict[str, Any]) -> None:
    """Raise ValueError, naming the reason, when `parts` processes can't share a row of a model of this config.

    Its weights are not read: the model is built, with transformers' `options`, on the meta device.
    """
    text = config.get_text_config()
    heads = count_heads(config)
    rope = getattr(text, "rope_parameters", None) or {}
    of_kinds = [rope, *(each for each in rope.values() if isinstance(each, dict))]  # of each kind of layer, in gemma3
    dynamic = next((each for each in of_kinds if each.get("rope_type") in DYNAMIC_ROPE), {})
    window = dynamic.get("original_max_position_embeddings") or context_window(config)
    if heads % parts:
        raise ValueError(f"{FLAG} {parts}: the {heads} attention heads can't be divided among {parts} GPUs")
    if dynamic and window and max_length > window:
        raise ValueError(
            f"{FLAG} {parts}: {dynamic['rope_type']} rotary embeddings depend on the length beyond {window:,} tokens, "
            f"which differs among the parts of a row; use --max_length {window}"
        )
    if getattr(text, "output_router_logits", False):
        raise ValueError(
            f"{FLAG} {parts}: the load-balancing loss of the routers needs whole rows; "
            "set output_router_logits to false in config.json"
        )
    with torch.device("meta"), not_sharded():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), **options)
    if reason := find_reason_against(model):
        given = options.get("attn_implementation")
        remedy = f"leave out --attn_implementation {given}, or " if given else ""
        raise ValueError(
            f"{FLAG} {parts}: rows of {config.model_type} can't be shared: {reason}; {remedy}leave out {FLAG}, or use "
            "another model"
        )


def count_heads(config) -> int:
    """Return the attention heads of a model; 0 where it has none, or another number in each layer."""
    heads = getattr(config.get_text_config(), "num_attention_heads", None)
    return heads if isinstance(heads, int) else 0


def find_reason_against(model) -> str | None:
    """Return why a row of a model, which is made ready to train, can't be shared by attention heads; else None."""
    note = attention.isolate_documents(model)
    mixers = sorted({type(module).__name__ for module in model.modules() if isinstance(module, RunByDocument)})
    if mixers:
        return f"{', '.join(mixers)} mix tokens without attention"
    if not attention.has_document_attention(model):
        return note
    return loss.find_reason_against_chunks(model)


# --- one row, several processes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SharedRow:
    """Part number `part` of a packed row in `parts` parts of as many tokens.

    `exchange` is a differentiable all-to-all of the group: of (parts, ...) tensors, the i-th goes to process i.
    """

    parts: int
    part: int
    exchange: Callable[[torch.Tensor], torch.Tensor]

    def attend(self, attend, query, key, value, documents: Documents, *, alibi=None, **options) -> torch.Tensor:
        """Call `attend` on all tokens of the row and this part of the heads; return all heads of this part's tokens."""
        num_heads = query.shape[1]
        if num_heads % self.parts:
            raise ValueError(f"{FLAG} {self.parts}: a layer's {num_heads} attention heads can't be divided by it")
        copies = self.parts // math.gcd(self.parts, key.shape[1])
        if copies > 1:  # a key head serves the query heads of several processes
            key, value = (states.repeat_interleave(copies, dim=1) for states in (key, value))
        if alibi is not None:
            alibi = alibi.chunk(self.parts)[self.part]
        whole = [self._gather_tokens(states) for states in (query, key, value)]
        output = attend(*whole, replace(documents, shared=None), alibi=alibi, **options)
        return self._gather_heads(output)

    def _gather_tokens(self, states: torch.Tensor) -> torch.Tensor:
        """(tokens of a part, heads, size) -> (tokens of the row, heads of a part, size)."""
        by_receiver = states.unflatten(1, (self.parts, -1)).transpose(0, 1)
        return self.exchange(by_receiver.contiguous()).flatten(0, 1)

    def _gather_heads(self, states: torch.Tensor) -> torch.Tensor:
        """(tokens of the row, heads of a part, size) -> (tokens of a part, heads, size)."""
        by_receiver = states.unflatten(0, (self.parts, -1))
        output = self.exchange(by_receiver.contiguous()).transpose(0, 1).flatten(1, 2)
        return output.contiguous()  # afmoe and jetmoe call view on it


def join_group(parts: int) -> SharedRow:
    """Return this process's part in its group: `parts` neighbouring ranks, which share their rows."""
    from deepspeed.sequence.layer import _dim_zero_all_to_all, register_all_to_all_group

    rank = torch.distributed.get_rank()
    world_size = torch.distributed.get_world_size()
    groups = [torch.distributed.new_group(range(first, first + parts)) for first in range(0, world_size, parts)]
    group = groups[rank // parts]
    register_all_to_all_group(group)
    return SharedRow(parts, rank % parts, functools.partial(_dim_zero_all_to_all, group))


def share_rows(model, parts: int) -> str:
    """Let `model`, whose documents are kept apart, compute its part of the rows that `Shares` cuts; return a note."""
    if reason := find_reason_against(model):
        raise ValueError(f"{FLAG} {parts}: rows can't be shared: {reason}")
    model.shared_row = join_group(parts)
    model.register_forward_pre_hook(_enter, with_kwargs=True)
    return f"each packed row is shared by {parts} processes, which exchange tokens for heads around attention"


@torch.compiler.disable
def _enter(model, args, kwargs):
    """Before the forward of a part: its documents are the whole row's, its positions are its own."""
    documents = current_documents.get()
    shared = model.shared_row
    tokens = next(given for given in (*args[:1], kwargs.get("input_ids")) if given is not None)
    if documents is None or documents.positions.numel() == tokens.numel():
        return None
    assert tokens.shape == (1, documents.positions.shape[1] // shared.parts), "a part of one row"
    current_documents.set(replace(documents, shared=shared))
    return args, {**kwargs, "position_ids": documents.positions.chunk(shared.parts, dim=1)[shared.part]}


class Shares:
    """Collates packed rows, lays them end to end, and keeps one of `parts` parts of as many tokens.

    Batches that are not packed, of held-out rows, stay whole.

    `labels` have one token more than the part: the first of the next part, which the part's last token predicts. Its
    own first label is left out, which the part before predicts. `position_ids` are those of the whole row.

        tokens a b c | d e f:   part 0 has [a b c] and labels [- b c d], part 1 [d e f] and labels [- e f -]
    """

    def __init__(self, collate: Callable, parts: int, part: int):
        self.collate = collate
        self.parts = parts
        self.part = part

    def __call__(self, examples: Sequence[dict]) -> dict[str, torch.Tensor]:
        batch = self.collate(examples)
        return cut_part(batch, self.parts, self.part) if "position_ids" in batch else batch


def cut_part(batch: dict[str, torch.Tensor], parts: int, part: int) -> dict[str, torch.Tensor]:
    """Return part number `part` of a packed batch, whose tokens are a multiple of `parts`."""
    labels = batch["labels"].clone()
    labels[:, 0] = IGNORE_INDEX
    row = {name: values.reshape(1, -1) for name, values in {**batch, "labels": labels}.items()}
    size, rest = divmod(row["labels"].shape[1], parts)
    assert rest == 0, "rows are padded to a multiple of the group"
    start = part * size
    end = (part + 1) * size
    following = torch.nn.functional.pad(row["labels"], (0, 1), value=IGNORE_INDEX)[:, start : end + 1].clone()
    following[:, 0] = IGNORE_INDEX
    return {
        "input_ids": row["input_ids"][:, start:end],
        "labels": following,
        "position_ids": row["position_ids"],
    }


def cut_tokens(of_token: np.ndarray, parts: int, part: int) -> np.ndarray:
    """Return what a (rows, length) array says of the tokens of a part, (1, tokens)."""
    return of_token.reshape(1, -1)[:, part * of_token.size // parts : (part + 1) * of_token.size // parts]


# --- the proof ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def self_test(model, *, exact: bool = True, lengths: Sequence[int] = TEST_LENGTHS) -> float:
    """Return the largest relative distance, over all parts, of the logits of a shared row from those of a whole one.

    Raises UserError, on all processes, when they are not the same. `exact`: the model computes in fp32.
    """
    inner = model.module if hasattr(model, "module") else model
    shared = inner.shared_row
    padded = (*lengths, -sum(lengths) % shared.parts)
    tokens = random_texts(inner, [sum(padded)])[0][None]
    positions = torch.cat([torch.arange(length, device=tokens.device) for length in padded])[None]
    batch = {"input_ids": tokens, "labels": tokens, "position_ids": positions}
    part = cut_part(batch, shared.parts, shared.part)
    with in_mode(model, training=False):
        whole = model(input_ids=tokens, position_ids=positions).logits
        found = model(input_ids=part["input_ids"], position_ids=positions).logits
    expected = whole.chunk(shared.parts, dim=1)[shared.part]
    apart = torch.tensor([relative_distance(found, expected)], device=tokens.device)
    torch.distributed.all_reduce(apart, torch.distributed.ReduceOp.MAX)
    if not float(apart) < (1e-4 if exact else 5e-2):
        raise UserError(
            f"{FLAG} {shared.parts}: logits of a shared row of {type(inner).__name__} are {float(apart):.1e} from "
            "those of the whole row; leave the flag out"
        )
    return float(apart)
