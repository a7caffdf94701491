"""Fuses the elementwise work between the matrix products of a model: norms, rotary positions, activations.

On a GPU each such operation is a pass over memory. Liger's kernels are used where the family has them; elsewhere the
functions themselves are compiled. A compiled function works on single tokens and their number is a symbol of its graph,
so no graph depends on the documents of a batch, and attention, matrix products and loss stay outside all graphs.
"""

import functools
import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import util

import torch
from torch import nn

from sft.model.adapters import embed_token
from sft.model.kernels import HALF_DTYPES, MasterLinear, SharedRounding, compute_dtype, read_documents
from sft.model.load import family_model, has_liger, use_liger_kernels
from sft.model.mixers import documents_set_to, subclass, with_globals
from sft.model.shrink import in_mode, relative_distance

CHOICES = ("auto", "liger", "compile", "none")
BACKEND = "inductor"
# A run that would train for less than this does not earn back the seconds of compiling (dev/LOG.md).
MIN_SECONDS_TO_COMPILE = 120
WITHOUT_LIGER = (
    "liger-kernel is not installed: its kernels made a 7B qwen2 16% faster than none on an H200, without compiling; "
    "pip install -r requirements-gpu.txt"
)
GATED_MLP = "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"
# Activations of transformers that are one kernel already.
SINGLE_KERNELS = {"GELUActivation", "SiLUActivation", "GELUTanh", "LinearActivation"}
# Of the fused model from the plain one, relative: rounding through all layers.
MAX_DISTANCES = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 0.15}
PROOF_TOKENS = 48


# --- the choice -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Circumstances:
    """Facts on which the choice of kernels depends. `seconds`: how long the run will take, None where unknown.

    `half`: it computes in fp16 or bf16 under autocast. `zero_stage` is None without DeepSpeed.
    """

    on_gpu: bool
    half: bool = False
    lora: bool = False
    zero_stage: int | None = None
    world_size: int = 1
    accumulation: int = 1
    seconds: float | None = None


def fuse(model, wanted: str, facts: Circumstances) -> list[str]:
    """Fuse what `wanted`, one of CHOICES, and the circumstances allow; return lines that say what was done and why.

    Must be called after `isolate_documents`, which looks for the families' own classes.
    """
    chosen = choose_kernels(model, wanted, facts)
    if wanted == "none" or (chosen == "none" and not facts.on_gpu):
        return []
    notes = []
    if chosen == "liger":
        chosen = _apply_liger(model, wanted, facts, notes)
    if chosen == "compile":
        notes.append(compile_elementwise(model))
    elif chosen == "none":
        notes.append(f"fused kernels: none ({_reason_for_none(facts)})")
    if wanted == "auto" and facts.on_gpu and util.find_spec("liger_kernel") is None:
        notes.append(WITHOUT_LIGER)
    if facts.on_gpu and facts.half and not facts.lora and facts.zero_stage is None:
        use_master_products(model, accumulation=facts.accumulation, alone=facts.world_size == 1)
        notes.append("weights are rounded to half precision once per update; their gradients are computed in fp32")
    return notes


def choose_kernels(model, wanted: str, facts: Circumstances) -> str:
    """Return liger, compile or none. On a CPU auto is none: compiling did not pay there (dev/LOG.md)."""
    if wanted != "auto":
        return "none" if wanted == "compile" and facts.zero_stage == 3 else wanted
    if not facts.on_gpu:
        return "none"
    return "liger" if has_liger(model) else _choose_without_liger(facts)


def _choose_without_liger(facts: Circumstances) -> str:
    is_short = facts.seconds is not None and facts.seconds < MIN_SECONDS_TO_COMPILE
    return "none" if is_short or facts.zero_stage == 3 else "compile"


def _apply_liger(model, wanted: str, facts: Circumstances, notes: list[str]) -> str:
    """Use Liger's kernels, or if they fail and were not asked for, choose another way; return the way."""
    base = family_model(model)
    others = {module for module in base.modules() if "forward" in vars(module)}
    try:
        notes.append(f"fused kernels: {use_liger_kernels(model)}")
        fused = [module for module in base.modules() if "forward" in vars(module) and module not in others]
        base.liger_forwards = {module: module.forward for module in fused}
        return "liger"
    except Exception as error:  # it patches modules of transformers, whose versions differ
        if wanted == "liger":
            raise
        notes.append(f"Liger's kernels failed: {shorten(error)}")
        return _choose_without_liger(facts)


def _reason_for_none(facts: Circumstances) -> str:
    if facts.zero_stage == 3:
        return "ZeRO-3 gathers weights in hooks, which compiled functions don't see"
    return f"compiling pays in runs of more than {MIN_SECONDS_TO_COMPILE} s, this one takes about {facts.seconds:.0f} s"


def use_master_products(model, *, accumulation: int, alone: bool) -> int:
    """Let the linear layers of a model that is trained whole be MasterLinear; return their number.

    `alone`: one process without DeepSpeed, so that no other code waits for each gradient.
    """
    rounding = SharedRounding()
    head = model.get_output_embeddings()
    changed = 0
    for module in model.modules():
        is_plain = type(module) is nn.Linear or (type(module).__name__ == "FalconLinear" and module.bias is None)
        if module is head or not is_plain or "forward" in vars(module):
            continue
        module.__class__ = _master_class(type(module))
        module.rounding = rounding
        module.keeps_rounded = accumulation > 1
        module.adds_gradients = alone
        changed += 1
    return changed


@functools.cache
def _master_class(plain_class: type) -> type:
    return subclass(plain_class, MasterLinear, plain_class=plain_class)


# --- compiled functions -----------------------------------------------------------------------------------------------


@functools.cache
def _compiled(function: Callable, backend: str) -> Callable:
    return torch.compile(function, fullgraph=True, backend=backend)


def _run_compiled(function: Callable, *arguments, dynamic: dict[int, tuple[int, ...]]):
    """Call the compiled function; `dynamic` names the dimensions of its tensors that change from batch to batch."""
    for place, dimensions in dynamic.items():
        for dimension in dimensions:
            torch._dynamo.maybe_mark_dynamic(arguments[place], dimension)
    return _compiled(function, BACKEND)(*arguments)


class Compiled:
    """Marks the classes of modules that run compiled functions while they train; `is_compiled` turns them off."""

    is_compiled = True

    def runs_compiled(self) -> bool:
        return self.training and self.is_compiled


@functools.cache
def _compiled_by_token(module_class: type) -> type:
    """Return a subclass whose forward, a function of each token's states alone, is compiled."""

    @functools.wraps(module_class.forward)
    def forward(self, hidden_states):
        if not self.runs_compiled():
            return module_class.forward(self, hidden_states)
        rows = hidden_states.flatten(0, -2).contiguous()  # strides of a slice would be guarded
        return _run_compiled(module_class.forward, self, rows, dynamic={1: (0,)}).view(hidden_states.shape)

    return subclass(module_class, Compiled, forward=forward)


@functools.cache
def _compiled_gate(module_class: type) -> type:
    """Return a subclass of a gated MLP in which activation and product are one function."""

    @functools.wraps(module_class.forward)
    def forward(self, x):
        if not self.runs_compiled():
            return module_class.forward(self, x)
        gate = self.gate_proj(x)
        up = self.up_proj(x)
        rows = [states.flatten(0, -2) for states in (gate, up)]
        product = _run_compiled(_gated, self.act_fn, *rows, dynamic={1: (0,), 2: (0,)})
        return self.down_proj(product.view(up.shape))

    return subclass(module_class, Compiled, forward=forward)


def _gated(activation, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return activation(gate) * up


@functools.cache
def _compiled_rotary(module_class: type) -> type:
    """Return a subclass of an attention module whose function for rotary positions is compiled.

    The forward is the same code with another `apply_rotary_pos_emb` among its globals.
    """
    plain = module_class.forward
    if hasattr(module_class, "rotate"):  # our own attention of falcon
        return subclass(module_class, Compiled, forward=plain, rotate=_choose_rotation)
    rotate = plain.__globals__["apply_rotary_pos_emb"]
    fused = with_globals(plain, apply_rotary_pos_emb=functools.partial(rotate_compiled, rotate))

    @functools.wraps(plain)
    def forward(self, *args, **kwargs):
        return (fused if self.runs_compiled() else plain)(self, *args, **kwargs)

    return subclass(module_class, Compiled, forward=forward)


def _choose_rotation(self, *states, **options):
    rotate = super(type(self), self).rotate
    return rotate_compiled(rotate, *states, **options) if self.runs_compiled() else rotate(*states, **options)


def rotate_compiled(rotate: Callable, query, key, cos, sin, unsqueeze_dim: int = 1):
    """Rotate query and key, (batch, heads, length, size) or with `unsqueeze_dim` 2 (batch, length, heads, size).

    Half precision under autocast: the result is rounded to it at once, as attention does with the fp32 result.
    """
    states = (0, 3 - unsqueeze_dim)
    dynamic = {1: states, 2: states, 3: (0, 1), 4: (0, 1)}
    return _run_compiled(_rotated, rotate, query, key, cos, sin, unsqueeze_dim, dynamic=dynamic)


def _rotated(rotate: Callable, query, key, cos, sin, unsqueeze_dim: int):
    rotated = rotate(query, key, cos, sin, unsqueeze_dim=unsqueeze_dim)
    if not torch.is_autocast_enabled(query.device.type):
        return rotated
    pairs = zip(rotated, (query, key), strict=True)
    return tuple(new.to(old.dtype) if old.dtype in HALF_DTYPES else new for new, old in pairs)


# --- what is compiled in a model ------------------------------------------------------------------------------------


def compile_elementwise(model) -> str:
    """Let the model's norms, activations and rotary positions run as compiled functions; return which.

    It only changes classes of modules, so hooks, adapters and checkpoints see the same modules.
    """
    found = {}
    for module in list(_decoder_modules(model)):
        kind = _kind_of(module)
        if kind is None:
            continue
        module.__class__ = _SUBCLASSES[kind](type(module))
        found[kind] = found.get(kind, 0) + 1
    parts = ", ".join(f"{number} {kind}" for kind, number in found.items())
    return f"fused kernels: compiled {parts}" if parts else "fused kernels: none (no norm or activation is known here)"


def _decoder_modules(model) -> Iterator[nn.Module]:
    """Yield the base's modules; an activation inside a gated MLP is part of its function and left out."""
    inside = set()
    for module in family_model(model).modules():
        if _is_gated_mlp(module) and isinstance(module.act_fn, nn.Module):
            inside |= {id(child) for child in module.act_fn.modules()}
        if id(module) not in inside:
            yield module


def _kind_of(module: nn.Module) -> str | None:
    """Return norms, gated MLPs, activations or rotary positions; None for any other module, or one changed already."""
    if isinstance(module, Compiled) or "forward" in vars(module):  # another package has replaced the forward
        return None
    if _is_gated_mlp(module):
        return "gated MLPs"
    name = type(module).__name__
    names = getattr(getattr(type(module).forward, "__code__", None), "co_names", ())
    if ("apply_rotary_pos_emb" in names or hasattr(type(module), "rotate")) and _has_usual_rotary(module):
        return "rotary positions"
    if any(True for _ in module.children()) or not _takes_states_alone(module):
        return None
    if name.endswith(("RMSNorm", "LayerNorm")):
        return "norms"
    is_activation = "gelu" in name.lower() or name.endswith("Activation")
    if is_activation and name not in SINGLE_KERNELS and type(module).__module__.startswith("transformers."):
        return "activations"
    return None


def _is_gated_mlp(module: nn.Module) -> bool:
    if not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return False
    try:
        return not isinstance(module, Compiled) and GATED_MLP in inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return False


def _has_usual_rotary(module: nn.Module) -> bool:
    rotate = getattr(type(module), "rotate", type(module).forward.__globals__.get("apply_rotary_pos_emb"))
    if rotate is None or rotate.__module__.split(".")[0] != "transformers":
        return False
    return list(inspect.signature(rotate).parameters) == ["q", "k", "cos", "sin", "unsqueeze_dim"]


def _takes_states_alone(module: nn.Module) -> bool:
    _module, *others = inspect.signature(type(module).forward).parameters.values()
    return len(others) == 1 and others[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


_SUBCLASSES = {
    "norms": _compiled_by_token,
    "activations": _compiled_by_token,
    "gated MLPs": _compiled_gate,
    "rotary positions": _compiled_rotary,
}


# --- the proof ------------------------------------------------------------------------------------------------------


def prove_fused(model, *, num_rows: int = 1, packing: bool = True) -> str:
    """Compile every function now, compare the model with itself run plainly, and say what it took; empty if unfused.

    Hidden states and their gradient by the embeddings are compared in the types of the training: call it under its
    autocast. If they differ, or a kernel fails (no C compiler, an unknown GPU), the model runs plainly.
    """
    has_liger_kernels = hasattr(family_model(model), "liger_forwards")
    is_sharded = any(hasattr(parameter, "ds_id") for parameter in model.parameters())  # hooks gather, for a whole step
    if is_sharded or not (has_liger_kernels or any(isinstance(module, Compiled) for module in model.modules())):
        return ""
    began = time.monotonic()
    kind = "Liger's kernels" if has_liger_kernels else "compiled functions"
    switches = (functools.partial(_switch, model, on) for on in (False, True))
    try:
        distance = measure_distance(model, *switches, num_rows=num_rows, packing=packing)
    except Exception as error:  # compilers fail in many ways
        _switch(model, False)
        return f"fused kernels: none ({kind} failed: {shorten(error)})"
    if not distance < find_max_distance(model):
        _switch(model, False)
        return f"fused kernels: none ({kind} end {distance:.0e} from the plain ones)"
    return f"fused kernels: {kind} in {time.monotonic() - began:.1f} s, hidden states within {distance:.0e} of plain"


def shorten(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _switch(model, is_fused: bool) -> None:
    for module in model.modules():
        if isinstance(module, Compiled):
            module.is_compiled = is_fused
    for module, forward in getattr(family_model(model), "liger_forwards", {}).items():
        vars(module).pop("forward", None)
        if is_fused:
            module.forward = forward


def measure_distance(model, plain: Callable, other: Callable, *, num_rows: int = 1, packing: bool = True) -> float:
    """Return the relative distance of the model after `other()` from itself after `plain()`, in training."""
    found = []
    with in_mode(model, training=True):
        for switch in (plain, other):
            switch()
            found.append(_run_once(model, min(num_rows, 2), packing))
    return max(relative_distance(of_other, of_plain) for of_plain, of_other in zip(*found, strict=True))


def _run_once(model, num_rows: int, packing: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden states of random embeddings, and a gradient: the embeddings', or the weights' if they have none."""
    token = embed_token(model)
    device = token.device
    random = torch.Generator().manual_seed(0)
    embedded = (torch.randn(num_rows, PROOF_TOKENS, token.shape[-1], generator=random) * 0.1).to(token)
    embedded.requires_grad_(token.requires_grad)  # the first layer is compiled for it
    positions = torch.arange(PROOF_TOKENS, device=device).expand(num_rows, -1)
    documents = read_documents(positions, num_rows) if packing else None
    with torch.random.fork_rng([device] if device.type == "cuda" else []), documents_set_to(documents):
        torch.manual_seed(0)  # the same dropout
        hidden = family_model(model).base_model(inputs_embeds=embedded, position_ids=positions, use_cache=False)[0]
    weights = torch.linspace(-1, 1, hidden.numel(), device=device).view(hidden.shape).to(hidden.dtype)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    found = torch.autograd.grad(hidden, [embedded] if embedded.requires_grad else trained, weights, allow_unused=True)
    return hidden.detach(), torch.cat([gradient.flatten() for gradient in found if gradient is not None])


def find_max_distance(model) -> float:
    return MAX_DISTANCES[compute_dtype(embed_token(model))]
