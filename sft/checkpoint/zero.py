"""Read the optimizer files of DeepSpeed and torch without running pickled code, and join the slices of the ranks.

A ZeRO checkpoint holds flat slices of all parameters, one file per rank. `Shards` returns whole tensors by name, to
rebuild a model from them, or to resume with another number of processes or another ZeRO stage.
"""

import contextlib
import json
import pickle
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

import torch

from sft.launch.processes import UserError

# All classes in deepspeed 0.19's files beside tensors; plain records of numbers.
ALLOWED = (
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
)
STAGES = ("disabled", "optimizer_states", "gradients", "weights")  # the members of ZeroStageEnum, from 0
KINDS = ("weight", "exp_avg", "exp_avg_sq")


class SkippedRecord(int):
    """Replaces deepspeed's own records where only tensors are read, so that deepspeed need not be installed."""


def _zero_stage(kind, name: str):
    """Replace getattr, by which Python before 3.11.4 pickles a member of an enum: here, a stage of ZeRO."""
    if kind.__name__ != "ZeroStageEnum" or name not in STAGES:
        raise pickle.UnpicklingError(f"GLOBAL getattr of {kind.__name__}")
    return kind(STAGES.index(name))


def load_safely(path: Path, *, mmap: bool = False, known: Sequence = ()):
    """Load a file of tensors, plain values and `known` classes; ValueError when it holds anything else, or is cut."""
    stages = [(_zero_stage, f"{module}.getattr") for module in ("builtins", "__builtin__")] if known else []
    with torch.serialization.safe_globals([*known, *stages]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            reason = next((line for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), "")
            raise ValueError(f"{path}: holds more than tensors and numbers; no code of it was run. {reason}") from None
        except (RuntimeError, EOFError, OSError) as error:
            raise ValueError(f"{path}: can't be read ({str(error).splitlines()[0]})") from None


@contextlib.contextmanager
def safe_deepspeed_loading(is_used: bool) -> Iterator[None]:
    """Let DeepSpeed, where it is used, load through `load_safely`; 0.19 runs code that is pickled in checkpoints."""
    if not is_used:
        yield
        return
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    unsafe = TorchCheckpointEngine.load
    known = [getattr(import_module(module), name) for module, name in ALLOWED]
    TorchCheckpointEngine.load = lambda _self, path, map_location=None: load_safely(Path(path), known=known)
    try:
        yield
    finally:
        TorchCheckpointEngine.load = unsafe


class Shards:
    """The trained parameters of a ZeRO-2 or ZeRO-3 checkpoint and their two moments, whole and in fp32."""

    def __init__(self, checkpoint: Path):
        folder = checkpoint / (checkpoint / "latest").read_text().strip()
        models = sorted(folder.glob("*_model_states.pt"), key=_rank_of_file)
        optimizers = sorted(folder.glob("*_optim_states.pt"), key=_rank_of_file)
        if not models or not optimizers:
            raise ValueError(f"{folder}: no optimizer states of ZeRO-2 or ZeRO-3")
        model = load_safely(models[0], mmap=True)
        known = [(type(name, (SkippedRecord,), {}), f"{module}.{name}") for module, name in ALLOWED]
        self._ranks = [load_safely(path, mmap=True, known=known)["optimizer_state_dict"] for path in optimizers]
        self.stage = int(self._ranks[0]["zero_stage"])
        if self.stage not in (2, 3):
            raise ValueError(f"{folder}: is of ZeRO stage {self.stage}; only 2 and 3 can be joined")
        self.shapes = {name: tuple(shape) for group in model["param_shapes"] for name, shape in group.items()}
        self.aliases = dict(model["shared_params"])
        slices = self._slices_in_stage_2() if self.stage == 2 else self._slices_in_stage_3(model["param_shapes"])
        self._slices: dict[str, list[tuple[int, int, int, int]]] = slices

    def _slices_in_stage_2(self) -> dict:
        """Return each parameter's slices as (rank, group, start, length): a group is cut into one slice per rank."""
        slices: dict = {name: [] for name in self.shapes}
        for rank, state in enumerate(self._ranks):
            for group, mapping in enumerate(state["param_slice_mappings"]):
                for name, address in mapping.items():
                    slices[name].append((rank, group, address.start, address.numel))
        return slices

    def _slices_in_stage_3(self, groups: list) -> dict:
        """Return the same for ZeRO-3: each parameter is cut into one slice per rank, padded; a rank joins its own."""
        slices: dict = {name: [] for name in self.shapes}
        sizes = [len(flat) for flat in self._ranks[0]["fp32_flat_groups"]]
        part = 0
        start = 0
        for name, shape in ((name, shape) for group in groups for name, shape in group.items()):
            if start == sizes[part]:
                part = part + 1
                start = 0
            length = -(-shape.numel() // len(self._ranks))
            slices[name] = [(rank, part, start, length) for rank in range(len(self._ranks))]
            start += length
        return slices

    def _get_flat(self, rank: int, group: int, kind: str) -> torch.Tensor:
        state = self._ranks[rank]
        if kind == "weight":
            return state["single_partition_of_fp32_groups" if self.stage == 2 else "fp32_flat_groups"][group]
        states = state["base_optimizer_state" if self.stage == 2 else "optimizer_state_dict"]["state"]
        return _find_moment(states.get(group, {}), kind)

    @property
    def step(self) -> float:
        state = self._ranks[0]["base_optimizer_state" if self.stage == 2 else "optimizer_state_dict"]["state"]
        return float(next(iter(state.values()))["step"])

    def get(self, name: str, kind: str) -> torch.Tensor:
        """Return a parameter, or a moment of it, in its full shape, in fp32."""
        slices = self._slices[name]
        parts = [self._get_flat(rank, group, kind)[start : start + length] for rank, group, start, length in slices]
        whole = torch.cat(parts).float()
        numel = torch.Size(self.shapes[name]).numel()
        if whole.numel() < numel:
            raise ValueError(f"{name} has {whole.numel()} numbers in the shards, not {numel}")
        return whole[:numel].reshape(self.shapes[name])


def write_weights(shards: Shards, folder: Path, max_shard_size: str) -> None:
    """Write the parameters as safetensors that transformers loads, one file in memory at a time."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    meta = {name: torch.empty(shape, device="meta") for name, shape in shards.shapes.items()}
    plan = split_torch_state_dict_into_shards(meta, max_shard_size=max_shard_size)
    for file, members in plan.filename_to_tensors.items():
        tensors = {name: shards.get(name, "weight").contiguous() for name in members}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def _rank_of_file(path: Path) -> int:
    words = path.name.split("_")
    return int(words[words.index("rank") + 1]) if path.name.startswith(("zero_pp", "bf16_zero")) else 0


class PlainCheckpoint:
    """The same for a checkpoint without ZeRO: its weights, and the moments in optimizer.pt."""

    def __init__(self, checkpoint: Path, names: list[list[str]]):
        from safetensors import safe_open

        saved = load_safely(checkpoint / "optimizer.pt", mmap=True)
        numbers = [group["params"] for group in saved["param_groups"]]
        if [len(group) for group in names] != [len(group) for group in numbers]:
            raise ValueError(f"{checkpoint}: its optimizer holds other parameters than the model")
        self._states = {
            name: saved["state"].get(number, {})
            for of_names, of_numbers in zip(names, numbers, strict=True)
            for name, number in zip(of_names, of_numbers, strict=True)
        }
        self.step = float(next(iter(self._states.values())).get("step", 0))
        self._files = {}
        for path in checkpoint.glob("*.safetensors"):
            opened = safe_open(path, framework="pt")
            self._files |= {name: opened for name in opened.keys()}  # noqa: SIM118 (safe_open is no dict)

    def get(self, name: str, kind: str) -> torch.Tensor:
        if kind != "weight":
            return _find_moment(self._states[name], kind).float()
        for known in (name, name.replace(".default", "")):
            if known in self._files:
                return self._files[known].get_tensor(known).float()
        raise ValueError(f"{name} is not in the checkpoint's weights")


def _find_moment(state: dict, kind: str) -> torch.Tensor:
    """Return a moment of AdamW; UserError, which all ranks raise, for a state of another optimizer."""
    if kind not in state:
        raise UserError(
            "another number of processes or ZeRO stage can take over the optimizer states of AdamW alone; resume with "
            "the old ones"
        )
    return state[kind]


def load_checkpoint(folder: Path, model, optimizer, *, decayed: Sequence[str]) -> None:
    """Load the weights and moments of any checkpoint with `load_into`; `decayed`: the parameters with weight decay."""
    if (folder / "latest").is_file():
        source = Shards(folder)
    else:
        names = [name for name, _parameter in _trained_parameters(getattr(model, "module", model))]
        groups = [[name for name in names if (name in decayed) is wanted] for wanted in (True, False)]
        source = PlainCheckpoint(folder, groups)
    load_into(model, optimizer, source)


def load_schedule(scheduler, path: Path) -> None:
    """Load a schedule's state; it may be of another number of parameter groups: DeepSpeed drops those that are empty.

    All groups have one rate and one function of the step.
    """
    state = load_safely(path)
    num_groups = len(scheduler.optimizer.param_groups)
    of_groups = {name: num_groups * state[name][:1] for name in ("base_lrs", "_last_lr", "lr_lambdas") if name in state}
    scheduler.load_state_dict(state | of_groups)


def load_into(model, optimizer, source: Shards | PlainCheckpoint) -> None:
    """Copy weights and moments into a model and its AdamW, under ZeRO-2, ZeRO-3 or neither.

    `model` is DeepSpeed's engine, or a plain module with the `optimizer` that makes its updates.
    """
    if not hasattr(model, "zero_optimization_stage"):
        for name, parameter in _trained_parameters(model):
            values = {kind: source.get(name, kind).to(parameter.device) for kind in KINDS}
            parameter.data.copy_(values.pop("weight"))
            optimizer.state[parameter] = {"step": torch.tensor(source.step), **values}
        return
    stage = model.zero_optimization_stage()
    _create_moments(model.optimizer, stage)
    for name, parameter in _trained_parameters(model.module):
        values = {kind: source.get(name, kind).to(parameter.device) for kind in KINDS}
        (_set_in_stage_3 if stage == 3 else _set_in_stage_2)(parameter, values)
    for state in model.optimizer.optimizer.state.values():
        state["step"] = torch.tensor(source.step)


def _trained_parameters(module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


def _create_moments(sharded, stage: int) -> None:
    """Create AdamW's moments, which it does itself only at the first update, where DeepSpeed reads them."""
    flats = sharded.fp32_partitioned_groups_flat if stage == 3 else sharded.single_partition_of_fp32_groups
    for flat in flats:
        sharded.optimizer.state[flat] = {"step": torch.tensor(0.0)} | {k: torch.zeros_like(flat) for k in KINDS[1:]}
    if stage != 3:
        sharded._hp_optimizer_states_linked = False
        sharded._lazy_init_hp_params_optimizer_state()


def _set_in_stage_2(parameter, values: dict) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    parameter.data.copy_(values["weight"])
    safe_set_full_fp32_param(parameter, values["weight"])
    for kind in KINDS[1:]:
        safe_set_full_optimizer_state(parameter, values[kind], kind)


def _set_in_stage_3(parameter, values: dict) -> None:
    """Set this rank's slice; deepspeed 0.19's own function fails where the ranks' slices are not equally long."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if torch.distributed.get_rank() == 0:
            parameter.data.copy_(values["weight"])
    sharded = parameter._z3_optimizer
    for kind, value in values.items():
        key = None if kind == "weight" else kind
        part, _ = sharded._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=key)
        begin = part.numel() * sharded._get_param_partition_rank(parameter)
        own = value.flatten()[begin : begin + part.numel()]
        part.data[: len(own)].copy_(own)
