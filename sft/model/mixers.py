"""Runs modules that mix tokens without attention once per document of a packed row.

Linear attention, Mamba and gated convolutions carry a state from token to token, and take no mask. They are causal, so
documents padded at their end to one length are a batch whose padding changes nothing. The same wrapper around a whole
model packs any causal family, more slowly.
"""

import functools
import importlib.util
import inspect
import re
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from sft.format.tokens import IGNORE_INDEX
from sft.model.kernels import Documents, current_documents

# Documents share a padded batch while it has at most this many times their tokens.
MAX_PADDED_RATIO = 1.25
# Packages whose CUDA kernels take the edges of documents.
KERNEL_PACKAGES = ("causal_conv1d", "fla", "mamba_ssm")


class RunByDocument:
    """Marks the classes that `by_document` makes.

    `with_kernels`: if CUDA kernels that take documents are installed, they run on the packed row itself.
    """

    with_kernels = False


def run_by_document(modules: Iterable, *, with_kernels: bool) -> None:
    """Let each of these modules run once per document of a packed batch."""
    for module in modules:
        if not isinstance(module, RunByDocument):
            module.__class__ = by_document(type(module))
        module.with_kernels = with_kernels


@functools.cache
def by_document(module_class: type) -> type:
    """Return a subclass whose forward runs once per document while a packed batch runs."""

    plain_edges = hands_options_on(module_class)

    @torch.compiler.disable
    @functools.wraps(module_class.forward)
    def forward(self, *args, **kwargs):
        documents = current_documents.get()
        if documents is None:
            return module_class.forward(self, *args, **kwargs)
        run = functools.partial(module_class.forward, self)
        if self.with_kernels and (options := kernel_options(documents, plain_edges)):
            return run_on_groups(functools.partial(run, **options), args, kwargs, documents, one_row(documents))
        is_shared = any(hasattr(parameter, "ds_id") for parameter in self.parameters())
        return run_on_groups(run, args, kwargs, documents, document_groups(documents, one_group=is_shared))

    return subclass(module_class, RunByDocument, forward=forward)


@contextmanager
def documents_set_to(documents: Documents | None) -> Iterator[None]:
    token = current_documents.set(documents)
    try:
        yield
    finally:
        current_documents.reset(token)


def kernel_options(documents: Documents, plain_edges: bool) -> dict | None:
    """Return the documents of one row as the kernels of transformers' mixers take them; None where those don't run."""
    if not has_kernels(documents.edges.device.type):
        return None
    key = ("kernel options", plain_edges)
    if key not in documents.made:
        lengths = documents.edges.diff()
        numbers = torch.arange(len(lengths), dtype=torch.int32, device=lengths.device)
        edges = ("cu_seqlens",) if plain_edges else ("cu_seq_lens_q", "cu_seq_lens_k")
        documents.made[key] = {"seq_idx": numbers.repeat_interleave(lengths)[None]}
        documents.made[key] |= dict.fromkeys(edges, documents.edges)
    return documents.made[key]


def hands_options_on(module_class: type) -> bool:
    """Whether a delta rule gets the options of its mixer as they are: kimi_linear's does, under the kernel's names."""
    try:
        source = inspect.getsource(module_class.forward)
    except (OSError, TypeError):  # made without a file
        return False
    return re.search(r"delta_(rule|attention)\(", source) is not None and "cu_seq_lens_q" not in source


@functools.cache
def has_kernels(device: str) -> bool:
    """Whether a package of kernels is installed; where a mixer needs another one, the self-test finds out."""
    return device == "cuda" and any(importlib.util.find_spec(package) is not None for package in KERNEL_PACKAGES)


def mixers_with_kernels(model) -> list:
    """Return the mixers that run installed kernels on packed rows."""
    if not has_kernels(next(model.parameters()).device.type):
        return []
    return [module for module in model.modules() if isinstance(module, RunByDocument) and module.with_kernels]


def leave_out_kernels(model) -> str | None:
    """Run the mixers once per document; return a note, or None where no kernels ran on packed rows anyway."""
    mixers = mixers_with_kernels(model)
    for mixer in mixers:
        mixer.with_kernels = False
    names = ", ".join(sorted({type(mixer).__name__ for mixer in mixers}))
    return f"the installed kernels don't keep documents apart in {names}: once per document instead" if names else None


def carry_documents(model) -> None:
    """Let gradient checkpointing run the layers again, in whichever thread, with the documents of their forward."""
    for module in model.modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if checkpoint is not None and not isinstance(checkpoint, _CarryDocuments):
            module._gradient_checkpointing_func = _CarryDocuments(checkpoint)


@dataclass(frozen=True)
class _CarryDocuments:
    checkpoint: Callable

    def __call__(self, function, *args, **kwargs):
        return self.checkpoint(functools.partial(_run_with, current_documents.get(), function), *args, **kwargs)


def _run_with(documents: Documents | None, function, *args, **kwargs):
    with documents_set_to(documents):
        return function(*args, **kwargs)


# --- padded batches of documents ----------------------------------------------------------------------------------


def run_on_groups(run, args, kwargs, documents: Documents, groups_and_order: tuple[list, torch.Tensor]):
    """Call `run` on padded batches of documents; return its output as if it had been called on the packed rows."""
    total = sum(documents.lengths)
    shape = next(
        tensor.shape[:2]
        for tensor in tree_leaves((args, kwargs))
        if isinstance(tensor, torch.Tensor) and tensor.dim() >= 2 and tensor.shape[:2].numel() == total
    )
    groups, order = groups_and_order
    outputs = []
    structure = None
    for index, is_token in groups:
        group_args, group_kwargs = tree_map(functools.partial(take_group, index=index, shape=shape), (args, kwargs))
        with documents_set_to(None):
            leaves, structure = tree_flatten(run(*group_args, **group_kwargs))
        outputs.append([take_tokens(leaf, is_token) for leaf in leaves])
    merged = [merge_groups(leaves, order, shape) for leaves in zip(*outputs, strict=True)]
    return tree_unflatten(merged, structure)


def one_row(documents: Documents) -> tuple[list, torch.Tensor]:
    """Return what `document_groups` returns for a batch of one row that holds all documents end to end."""
    if "one row" not in documents.made:
        index = torch.arange(sum(documents.lengths), device=documents.edges.device)
        documents.made["one row"] = [(index[None], torch.ones_like(index[None], dtype=torch.bool))], index
    return documents.made["one row"]


def document_groups(documents: Documents, one_group: bool) -> tuple[list, torch.Tensor]:
    """Return [(index of tokens, whether each is one) of a padded batch], and the order that puts tokens back.

    `one_group`: under ZeRO-3 a call gathers weights on all ranks, which have other numbers of documents.
    Lengths [3, 1] in one group: index [[0 1 2] [3 3 3]], is_token [[1 1 1] [1 0 0]].
    """
    key = ("groups", one_group)
    if key not in documents.made:
        starts = documents.edges[:-1].long()
        lengths = documents.edges.diff().long()
        groups = []
        for members in group_lengths(documents.lengths, one_group):
            chosen = torch.tensor(members, device=starts.device)
            offsets = torch.arange(max(documents.lengths[member] for member in members), device=starts.device)
            is_token = offsets < lengths[chosen, None]
            index = starts[chosen, None] + offsets.minimum(lengths[chosen, None] - 1)
            groups.append((index, is_token))
        places = torch.cat([index[is_token] for index, is_token in groups])
        documents.made[key] = groups, places.argsort()
    return documents.made[key]


def group_lengths(lengths: Sequence[int], one_group: bool) -> list[list[int]]:
    """Return the numbers of the documents of each padded batch, the longest documents first."""
    groups = []
    tokens = 0
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        longest = lengths[groups[-1][0]] if groups else 0
        fits = groups and longest * (len(groups[-1]) + 1) <= MAX_PADDED_RATIO * (tokens + lengths[number])
        if groups and (one_group or fits):
            groups[-1].append(number)
            tokens += lengths[number]
        else:
            groups.append([number])
            tokens = lengths[number]
    return groups


def take_group(leaf, *, index: torch.Tensor, shape: torch.Size):
    """Return the group's tokens of a tensor (rows or 1, length, ...); a mask of the row becomes None."""
    if isinstance(leaf, Documents):
        return None
    if not isinstance(leaf, torch.Tensor):
        return leaf
    if leaf.dim() == 4 and leaf.shape[-1] == leaf.shape[-2] == shape[1]:
        return None  # a square mask
    if leaf.dim() < 2 or leaf.shape[1] != shape[1] or leaf.shape[0] not in (1, shape[0]):
        return leaf
    return leaf.expand(shape[0], *leaf.shape[1:]).flatten(0, 1)[index]


def take_tokens(leaf, is_token: torch.Tensor):
    """Return the tokens (tokens, ...) of an output (documents, longest, ...) or (documents * longest, ...)."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    if leaf.shape[:2] == is_token.shape:
        return leaf[is_token]
    if leaf.dim() and leaf.shape[0] == is_token.numel():
        return Flat(leaf[is_token.flatten()])
    return leaf


class Flat:
    """Tokens of an output that had one dimension for rows and length."""

    def __init__(self, tokens: torch.Tensor):
        self.tokens = tokens


def merge_groups(leaves: Sequence, order: torch.Tensor, shape: torch.Size):
    """Put the tokens of all groups back in the order of the packed rows; of any other output, return the first."""
    tokens = [leaf.tokens if isinstance(leaf, Flat) else leaf for leaf in leaves]
    if not isinstance(tokens[0], torch.Tensor) or sum(len(leaf) if leaf.dim() else 0 for leaf in tokens) != len(order):
        return tokens[0]
    merged = torch.cat(tokens)[order]
    return merged if all(isinstance(leaf, Flat) for leaf in leaves) else merged.unflatten(0, tuple(shape))


def mask_labelled_documents(labels: torch.Tensor) -> torch.Tensor | None:
    """Mark the tokens of a packed batch's documents that have a label, (rows, length): what pads a row has none.

    Returns None outside a packed batch.
    """
    documents = current_documents.get()
    if documents is None:
        return None
    numbers = torch.arange(len(documents.lengths), device=labels.device).repeat_interleave(
        torch.tensor(documents.lengths, device=labels.device)
    )
    counts = torch.zeros(len(documents.lengths), dtype=torch.long, device=labels.device)
    counts = counts.index_add(0, numbers, (labels != IGNORE_INDEX).flatten().long())
    return (counts > 0)[numbers].long().view_as(labels)


# --- which modules mix --------------------------------------------------------------------------------------------


@torch.no_grad()
def find_mixers(model, batch: dict, lengths: Sequence[int]) -> set[type]:
    """Return the classes of modules inside the layers whose last document changes with those before it in a packed row.

    `batch` is a packed row of documents of `lengths`. Calls each module of the layers twice.
    """
    mixing: dict[str, type] = {}

    def compare(path: str, module, args, kwargs, output) -> None:
        leaves = tree_leaves((args, kwargs))
        states = next((leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()), None)
        if states is None or states.dim() != 3 or states.shape[1] != sum(lengths):
            return
        moved = states.clone()
        moved[:, : -lengths[-1]] = moved[:, : -lengths[-1]].flip(-1) + 1
        args, kwargs = tree_map(lambda leaf: moved if leaf is states else leaf, (args, kwargs))
        if is_changed(output, type(module).forward(module, *args, **kwargs), lengths):
            mixing[path] = type(module)

    handles = [
        module.register_forward_hook(functools.partial(compare, path), with_kwargs=True)
        for path, module in model.named_modules()
        if re.search(r"\.\d+\.", path)
    ]
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return {mixer for path, mixer in mixing.items() if not any(path.startswith(f"{other}.") for other in mixing)}


def is_changed(output, other, lengths: Sequence[int]) -> bool:
    """Whether the last document's states in two outputs differ by more than rounding."""
    last = slice(sum(lengths[:-1]), sum(lengths))
    for first, second in zip(tree_leaves(output), tree_leaves(other), strict=True):
        is_states = isinstance(first, torch.Tensor) and first.is_floating_point() and first.dim() >= 2
        if is_states and first.shape[1] == sum(lengths):
            apart = (first[:, last] - second[:, last]).norm() / first[:, last].norm().clamp(min=1e-12)
            if float(apart) > 1e-5:
                return True
    return False


# --- classes and functions made of others ---------------------------------------------------------------------------


def subclass(module_class: type, marker: type, **members) -> type:
    """Return a subclass of the same name, of which `marker` is a base too."""
    names = {"__module__": module_class.__module__, "__qualname__": module_class.__qualname__}
    return type(module_class.__name__, (marker, module_class), names | members)


def rotate_with(model, rotate: Callable, modeling: str) -> None:
    """Let the attention modules that a module of transformers defines rotate with another function."""
    for module in model.modules():
        plain = type(module).forward
        if type(module).__module__ == modeling and "apply_rotary_pos_emb" in getattr(plain, "__code__", plain).co_names:
            module.forward = types.MethodType(with_globals(plain, apply_rotary_pos_emb=rotate), module)


def with_globals(function: Callable, **replaced) -> Callable:
    """Return the same code with other values for some of its globals."""
    names = function.__globals__ | replaced
    copied = types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied
