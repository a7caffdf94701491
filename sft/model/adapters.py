"""LoRA adapters: which matrices of a model they adapt and why others are left out, proven on a tiny twin."""

import functools
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from sft.model.load import repair_peft

VARIANTS = ("lora", "rslora", "dora")
MAX_LOGIT_DISTANCE = 1e-4  # relative, of a twin's merged logits in fp32; a wrong merge is above 1e-2
# Parameters with two or three dimensions that no token is multiplied with.
NO_MATRIX = r"bias|A_log|(^|_)D$|norm|sink|scale|slope|conv|position|embed"
NOT_TEXT = r"(^|\.)(vision|visual|audio|image)[^.]*\."
NOT_OF_TEXT = "no part of the text model"
FUSED_PROJECTIONS = {"mamba_inner_fn", "mamba2_split_conv1d_scan_combined"}
ROUTER = "a router; --lora_router adapts it"


@dataclass(frozen=True)
class Group:
    """The same matrix of every layer: its name with * for numbers, and why it is left out ("" if it is adapted)."""

    name: str
    is_parameter: bool  # a bare Parameter, as fused experts are; else a linear layer
    size: int  # weights of all layers
    per_rank: int  # weights that an adapter of rank 1 has, over all layers
    num_outputs: int  # of all layers: DoRA's magnitudes
    left_out: str = ""


@dataclass(frozen=True)
class Plan:
    """The groups of a model; `notes` are lines for a person."""

    groups: tuple[Group, ...]
    notes: tuple[str, ...] = ()

    @property
    def adapted(self) -> list[Group]:
        return [group for group in self.groups if not group.left_out]

    @property
    def share(self) -> float:
        """The share of the layers' matrices that is adapted, by weights."""
        of_text = [group for group in self.groups if group.left_out != NOT_OF_TEXT]
        return sum(group.size for group in self.adapted) / max(1, sum(group.size for group in of_text))

    def count_parameters(self, rank: int, variant: str) -> int:
        """Return the weights of the adapters of this rank."""
        magnitudes = sum(group.num_outputs for group in self.adapted) if variant == "dora" else 0
        return rank * sum(group.per_rank for group in self.adapted) + magnitudes

    def table(self) -> list[list[str]]:
        rows = [[group.name, f"{group.size:,}", group.left_out or "adapted"] for group in self.groups]
        return [["matrix", "weights", "LoRA"], *rows]

    def lines(self) -> list[str]:
        """The table as text, then the share, then the notes."""
        widths = [max(len(row[place]) for row in self.table()) for place in range(2)]
        rows = [f"  {row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]}" for row in self.table()]
        return [*rows, f"LoRA adapts {self.share:.1%} of the layers' weights", *self.notes]


# --- which matrices there are -------------------------------------------------------------------------------------


def plan_adapters(model, *, variant: str = "lora", router: bool = False, dropout: float = 0.0, prove: bool = True):
    """Plan the adapters of a base model (a meta one too): every matrix of its layers, but for routers unless `router`.

    With `prove` a tiny twin of the model is trained, saved and merged; layers that can't be adapted in it are left out.
    """
    groups = tuple(find_groups(model, variant=variant, router=router))
    plan = Plan(groups, _dropout_note(groups, dropout))
    return prove_on_twin(model, plan, variant=variant) if prove else plan


def _dropout_note(groups: Sequence[Group], dropout: float) -> tuple[str, ...]:
    if dropout and any(group.is_parameter and not group.left_out for group in groups):
        return (f"LoRA dropout is 0 instead of {dropout}: peft has none for fused experts",)
    return ()


def find_groups(model, *, variant: str, router: bool) -> Iterator[Group]:
    """Yield the matrices of a model's layers by name."""
    members: dict[str, list] = {}
    for matrix in find_matrices(model):
        members.setdefault(star(matrix.name), []).append(matrix)
    for name, matrices in members.items():
        shapes = [matrix.shape for matrix in matrices]
        per_rank = sum((shape[0] if len(shape) == 3 else 1) * sum(shape[-2:]) for shape in shapes)
        outputs = sum(matrix.num_outputs for matrix in matrices)
        left_out = _reason_against(model, matrices[0], variant=variant, router=router)
        yield Group(name, matrices[0].is_parameter, sum(map(math.prod, shapes)), per_rank, outputs, left_out)


class Matrix(NamedTuple):
    """A linear layer (`name` is its path) or a bare Parameter (`name` ends in the Parameter's)."""

    name: str
    path: str
    is_parameter: bool
    shape: Sequence[int]
    num_outputs: int
    is_sharded: bool


def find_matrices(model) -> Iterator[Matrix]:
    """Yield every matrix of a model but embeddings, head, norms and convolutions."""
    from torch import nn

    outside = {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    for path, module in model.named_modules():
        if id(module) in outside or not path:
            continue
        for name, weight in module.named_parameters(recurse=False):
            shape = getattr(weight, "ds_shape", weight.shape)
            if _is_linear(module) and name == "weight":
                outputs = shape[0] if isinstance(module, nn.Linear) else shape[1]
                yield Matrix(path, path, False, shape, outputs, hasattr(weight, "ds_id"))
            elif len(shape) in (2, 3) and not _is_other_layer(module) and not re.search(NO_MATRIX, name):
                yield Matrix(f"{path}.{name}", path, True, shape, 0, hasattr(weight, "ds_id"))


def _reason_against(model, matrix: Matrix, *, variant: str, router: bool) -> str:
    if re.search(NOT_TEXT, matrix.name):
        return NOT_OF_TEXT
    if _is_router(model, matrix.path, matrix.shape):
        return "" if router else ROUTER
    if matrix.is_parameter and variant == "dora":
        return "peft has no DoRA for fused experts"
    if matrix.is_parameter and matrix.is_sharded:
        return "peft can't adapt fused experts that ZeRO-3 shards; use ZeRO-2"
    return "no matrix product" if matrix.is_parameter and min(matrix.shape[-2:]) < 8 else ""


def star(name: str) -> str:
    """Return a name with * for its numbers: model.layers.3.mlp.up_proj becomes model.layers.*.mlp.up_proj."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _is_linear(module) -> bool:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def _is_other_layer(module) -> bool:
    """Whether a module's weight is no matrix that tokens are multiplied with."""
    from torch import nn

    return isinstance(module, (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.LayerNorm)) or "Norm" in type(module).__name__


def _is_router(model, path: str, shape: Sequence[int]) -> bool:
    """Whether a matrix scores experts: it has a row for each of the experts beside it."""
    if len(shape) != 2:
        return False
    parts = path.split(".")
    for depth in range(len(parts) - 1, max(0, len(parts) - 3), -1):
        parent = model.get_submodule(".".join(parts[:depth]))
        for name, sibling in parent.named_children():
            if "expert" in name and "shared" not in name and not path.startswith(".".join([*parts[:depth], name])):
                return shape[0] in _num_experts(sibling)
    return False


def _num_experts(experts) -> set[int]:
    """Return the numbers that count these experts: of their modules, their fused weights, their settings."""
    shapes = [getattr(weight, "ds_shape", weight.shape) for weight in experts.parameters()]
    settings = [getattr(experts, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")]
    fused = {shape[0] for shape in shapes if len(shape) == 3}
    return (
        fused
        | {number for number in settings if isinstance(number, int)}
        | ({len(experts)} if hasattr(experts, "append") else set())
    )


# --- adding them --------------------------------------------------------------------------------------------------


def add_lora(
    model,
    *,
    rank: int,
    alpha: int,
    dropout: float,
    plan: Plan | None = None,
    variant: str = "lora",
    untrained_ids: Sequence[int] = (),
    gradient_checkpointing: bool = False,
):
    """Put LoRA on the matrices of the plan, in fp32, and make the embedding and head rows of `untrained_ids` trainable.

    ChatML's `<|im_end|>` has an untrained row in base Qwen and Yi: with frozen embeddings the model might never stop.
    """
    from peft import get_peft_model, prepare_model_for_kbit_training

    plan = plan or plan_adapters(model, variant=variant, prove=False)
    if getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=gradient_checkpointing)
    repair_peft()
    config = make_config(model, plan, rank=rank, alpha=alpha, dropout=dropout, variant=variant)
    config.trainable_token_indices = _token_rows(model, untrained_ids) or None
    model = get_peft_model(model, config)
    avoid_fused_projections(model)
    if gradient_checkpointing:
        model.enable_input_require_grads()
    return model


def avoid_fused_projections(model) -> None:
    """Let Mamba's layers call their adapted projections: a kernel for training takes the plain weights past adapters.

    transformers 5.23 uses its other kernels where that one returns None.
    """
    for name in {type(module).__module__ for module in model.modules()}:
        modeling = sys.modules[name]
        for function in FUSED_PROJECTIONS & vars(modeling).keys():
            setattr(modeling, function, _without_kernel(getattr(modeling, function)))


def _without_kernel(function):
    """Return a function that says, as `function` does where its package is missing, that there is no kernel."""

    @functools.wraps(function)
    def no_kernel(*_args, **_kwargs) -> None:
        return None

    return no_kernel


def make_config(model, plan: Plan, *, rank: int, alpha: int, dropout: float, variant: str):
    """Return peft's config for a plan: names that end in a target and belong to no matrix that is left out."""
    from peft import LoraConfig

    modules = _targets(model, plan, is_parameter=False)
    parameters = _targets(model, plan, is_parameter=True)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0 if parameters else dropout,
        target_modules=modules,
        target_parameters=parameters,  # a list, also an empty one: see repair_peft
        use_rslora=variant == "rslora",
        use_dora=variant == "dora",
    )


def _targets(model, plan: Plan, *, is_parameter: bool) -> list[str]:
    """Return the shortest name endings that select the adapted matrices and no other module or parameter."""
    adapted = {group.name for group in plan.adapted}
    matrices = [matrix for matrix in find_matrices(model) if matrix.is_parameter == is_parameter]
    wanted = {matrix.name for matrix in matrices if star(matrix.name) in adapted}
    names = [name for name, _ in (model.named_parameters() if is_parameter else model.named_modules())]
    ending_counts, wanted_counts = (Counter(end for name in some for end in endings(name)) for some in (names, wanted))
    return sorted({next(end for end in endings(name) if ending_counts[end] == wanted_counts[end]) for name in wanted})


def endings(name: str) -> list[str]:
    """Return the endings of a dotted name, the shortest first: a.b.c gives c, b.c, a.b.c."""
    parts = name.split(".")
    return [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]


def _token_rows(model, token_ids: Sequence[int]) -> dict[str, list[int]]:
    if not token_ids:
        return {}
    names = {id(module): name for name, module in model.named_modules()}
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    if modules[0].weight is modules[1].weight:
        modules.pop()
    return {names[id(module)].split(".")[-1]: sorted(token_ids) for module in modules}


def untrained_ids(tokenizer, renderer) -> list[int]:
    """The format's control tokens that a base may never have seen: all but its own bos and eos."""
    seen = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    return sorted(renderer.control_ids - seen)


# --- the proof ----------------------------------------------------------------------------------------------------


def prove_on_twin(model, plan: Plan, *, variant: str) -> Plan:
    """Leave out the groups whose adapters a tiny twin's forward doesn't use, or whose merging changes its logits."""
    import torch

    from sft.model.shrink import build_twin_of

    try:
        build_twin_of(model)
    except Exception as error:  # a config that can't be shrunk fails in many ways
        note = f"LoRA: not proven on a tiny twin, none can be made of this config ({type(error).__name__})"
        return replace(plan, notes=(*plan.notes, note))
    with torch.device("cpu"):
        if _find_fault(build_twin_of(model), plan, variant) is None:
            return plan
        return replace(plan, groups=tuple(_try_alone(model, plan, group, variant) for group in plan.groups))


def _try_alone(model, plan: Plan, group: Group, variant: str) -> Group:
    """Try a group's adapters without the others; return the group, left out where that fails."""
    from sft.model.shrink import build_twin_of

    if group.left_out:
        return group
    others = (replace(other, left_out="not tried") for other in plan.groups if other is not group)
    fault = _find_fault(build_twin_of(model), Plan((group, *others)), variant)
    return replace(group, left_out=fault) if fault else group


def _find_fault(twin, plan: Plan, variant: str) -> str | None:
    """Adapt a twin by a plan; return why that fails, or None."""
    try:
        return _try_adapters(twin, plan, variant)
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, KeyError) as error:
        reason = re.sub(r"^\[PEFT:.*?\] ", "", str(error).splitlines()[0])
        return f"peft can't adapt it: {reason[:90]}"


def _try_adapters(twin, plan: Plan, variant: str) -> str | None:
    import torch

    tokens = torch.randint(3, 200, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = twin(input_ids=tokens).logits
    model = add_lora(twin, rank=2, alpha=4, dropout=0.0, plan=plan, variant=variant).eval()
    with torch.no_grad():
        fresh = model(input_ids=tokens).logits
        if (fresh - plain).norm() > MAX_LOGIT_DISTANCE * plain.norm():
            return "a fresh adapter changes the logits"
        random = torch.Generator().manual_seed(0)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.add_(0.2 * torch.randn(weight.shape, generator=random))
    for batch in (tokens, tokens[:1, 5:]):  # a layer that keeps a state must begin anew with each batch
        trained = model.train()(input_ids=batch).logits
        if not trained.requires_grad:
            return "no gradient reaches an adapter of it"
        trained.float().square().mean().backward()
    for name, weight in model.named_parameters():
        if "lora_A" in name and (weight.grad is None or not weight.grad.any()) and "expert" not in name:
            return "no gradient reaches an adapter of it"
    with torch.no_grad():
        logits = model.eval()(input_ids=tokens).logits
        merged = model.merge_and_unload(safe_merge=True)(input_ids=tokens).logits
    if not (merged - logits).norm() <= MAX_LOGIT_DISTANCE * logits.norm():
        return "an adapter of it can't be merged"
    return None


def self_test(model, *, exact: bool = True) -> float:
    """Return how far fresh adapters move the logits; raise ValueError when they do. `exact`: it computes in fp32."""
    import torch

    from sft.model.shrink import in_mode, random_texts, relative_distance

    tokens = random_texts(model, [24])[0][None]
    with in_mode(model, training=False), torch.no_grad():
        fresh = model(input_ids=tokens).logits
        with model.disable_adapter():
            base = model(input_ids=tokens).logits
    apart = relative_distance(fresh, base)
    if not apart < (1e-6 if exact else 1e-2):
        raise ValueError(f"fresh adapters change the logits of {type(model.get_base_model()).__name__} by {apart:.1e}")
    return apart


def embed_token(model):
    """Return what the first layer gets in training for one token: its size, type, device and need of a gradient.

    Leaves the random state alone: NEFTune adds noise in the embeddings' forward.
    """
    import torch

    embedding = model.get_input_embeddings()  # with trainable token rows peft's wrapper, which has no embedding_dim
    token = torch.zeros(1, 1, dtype=torch.long, device=next(embedding.parameters()).device)
    with torch.random.fork_rng([token.device] if token.is_cuda else []):
        return embedding(token)
