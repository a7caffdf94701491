"""Flags of train.py: parse them, and say every mistake at once before anything is loaded."""

import contextlib
import copy
import math
import operator
import os
import sys
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser

from sft.launch.deepspeed import deepspeed_config, remove_dead_build_locks, start_deepspeed_on_cpu
from sft.launch.environment import (
    ERRORS_OF_RANKS,
    complete_single_process,
    read_launcher_flags,
    wait_for_first_rank,
)
from sft.model.load import choose_compute
from sft.train.checks import FLAGS, check_arguments, check_buildable

# Keys of a field's metadata: the values that it allows.
LIMITS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}
# "same": a checkpoint is resumed only with the same value, unless --allow_changed names it. "same unless default": its
# default counts as the value of older checkpoints, which lack the flag.
RESUME = "resume"
# The same for flags that train.py leaves as transformers has them. All others (logging, saving, evaluation, paths)
# don't change what is computed, and may differ freely in a resumed run.
OF_TRANSFORMERS = FLAGS["of_transformers"]


def flag(default: Any, help: str, **metadata: Any) -> Any:
    """Return the field of a dataclass that is a flag: a limit of LIMITS, or `resume`, may be in its metadata."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class Settings:
    """The parsed flags in the three groups of train.py: an object of each of its dataclasses."""

    model: Any
    data: Any
    training: Any

    def by_name(self) -> dict[str, Any]:
        """Return every flag by its name."""
        return {**vars(self.training), **vars(self.data), **vars(self.model)}

    def same_on_resume(self) -> dict[str, Any]:
        """Return the flags that change what is computed: a resume must have the same."""
        groups = (self.model, self.data, self.training)
        metadata = {entry.name: entry.metadata for group in groups for entry in fields(group)} | OF_TRANSFORMERS
        flags = self.by_name()
        same = ("same", "same unless default")
        found = {name: flags[name] for name, keys in metadata.items() if keys.get(RESUME) in same and name in flags}
        defaults = {entry.name: entry.default for group in groups for entry in fields(group)}
        later = [name for name in found if metadata[name][RESUME] != "same" and found[name] == defaults[name]]
        return {name: value for name, value in found.items() if name not in later}


def parse_arguments(groups: tuple[type, type, type], arguments: Sequence[str] | None) -> Settings:
    """Parse into the three dataclasses of train.py; exit with every mistake at once before anything is loaded."""
    parser = Parser(groups, prog="train.py", allow_abbrev=False)
    parser.set_defaults(eval_strategy=None)
    given, unknown = parser.parse_known_args(sys.argv[1:] if arguments is None else list(arguments))
    given = vars(given)
    problems = parser.problems + [f"unknown argument {name}" for name in unknown if name.startswith("--")]
    problems += [f"unknown argument {name}" for name in unknown if not problems]
    given["dry_run"] |= given["probe_steps"] > 0
    given |= read_launcher_flags(os.environ)
    missing = [name for name in ("model_name_or_path", "data_path", "output_dir") if not given[name]]
    problems += [f"--{name} is required" for name in missing]
    if not missing:
        problems += [*_check_limits(given, groups), *check_arguments(given, typed=parser.typed)]
    if problems:
        fail(problems)
    try:
        settings = _make_settings(groups, given)
    except (ValueError, TypeError, ImportError) as error:
        fail([" ".join(str(error).split())])
    if problems := check_buildable(settings.training):
        fail(problems)
    return settings


def _make_settings(groups: tuple[type, type, type], given: dict[str, Any]) -> Settings:
    """Fill in what depends on the machine, and make an object of each group."""
    given["eval_strategy"] = given["eval_strategy"] or "epoch"
    if given["hub_token"]:  # transformers would pickle it into every checkpoint
        os.environ["HF_TOKEN"] = given["hub_token"]
        given["hub_token"] = None
    if (
        given["metric_for_best_model"] and given["greater_is_better"] is None
    ):  # transformers looks for "loss" at the end
        given["greater_is_better"] = given["metric_for_best_model"].removeprefix("eval_") == "token_accuracy"
    if given["disable_tqdm"] is None:
        given["disable_tqdm"] = not sys.stderr.isatty()
    on_cpu = given["use_cpu"] or not torch.cuda.is_available()
    if given["deepspeed"]:
        given["deepspeed"] = deepspeed_config(given["deepspeed"], offload=given["offload"], pin_memory=not on_cpu)
    given |= choose_compute(bf16=given["bf16"], fp16=given["fp16"], use_cpu=on_cpu)
    given |= choose_fused_kernels(given, on_cpu=on_cpu)
    deepspeed = given["deepspeed"]
    if given["dry_run"] and not given["probe_steps"]:
        given |= {"deepspeed": None, "use_cpu": on_cpu}
    elif deepspeed:
        remove_dead_build_locks()
        complete_single_process()
        given |= {"accelerator_config": start_deepspeed_on_cpu(), "use_cpu": True} if on_cpu else {}
    else:
        given["use_cpu"] = on_cpu
    made = []
    for group in groups:
        names = {entry.name for entry in fields(group) if entry.init}
        made.append(group(**{name: value for name, value in given.items() if name in names}))
    settings = Settings(*made)
    settings.training.deepspeed = deepspeed  # a dry run starts no processes, and shows what they would hold
    return settings


def choose_fused_kernels(given: Mapping[str, Any], *, on_cpu: bool) -> dict[str, Any]:
    """Read transformers' flags for Liger and torch.compile as --fused_kernels.

    transformers would compile the whole model: a graph that depends on the documents of a batch, new for each.
    """
    names = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
    chosen = given["fused_kernels"]
    if any(given[name] for name in names):
        chosen = "compile"
    if given["use_liger_kernel"]:
        chosen = "liger"
    if chosen == "liger" and on_cpu:
        flag_name = "--use_liger_kernel" if given["use_liger_kernel"] else "--fused_kernels liger"
        raise ValueError(f"{flag_name}: its kernels are Triton's and need a GPU; leave the flag out")
    return {"fused_kernels": chosen, "torch_compile": False, "torch_compile_backend": None, "torch_compile_mode": None}


class Parser(HfArgumentParser):
    """Collects the values that it can't read instead of stopping at the first."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.problems: list[str] = []
        self.typed: set[str] = set()  # flags that were given, by name

    @staticmethod
    def _parse_dataclass_field(parser, entry):
        """Leave out of the metadata what argparse doesn't take (transformers 5.23 passes on all of it)."""
        entry = copy.copy(entry)
        ours = (*LIMITS, RESUME)
        entry.metadata = MappingProxyType({key: value for key, value in entry.metadata.items() if key not in ours})
        HfArgumentParser._parse_dataclass_field(parser, entry)

    def _get_values(self, action, arg_strings):
        self.typed.add(action.dest)
        try:
            return super()._get_values(action, arg_strings)
        except ArgumentError as error:
            self.problems.append(str(error).removeprefix("argument "))
            return action.default

    def error(self, message: str) -> NoReturn:
        fail([*self.problems, message])


def fail(problems: Sequence[str], *, printed_by: str = "machines") -> NoReturn:
    """Print each problem on a line, and exit with code 2.

    `printed_by`: the "first rank" for a problem that all have, the first one of all "machines", or "all" ranks.
    Others print it where a launcher shows that the first rank didn't have it; sft.launch prints it for them.
    """
    rank = int(os.environ.get("RANK", 0))
    number = {"first rank": rank, "machines": int(os.environ.get("LOCAL_RANK", rank)), "all": 0}[printed_by]
    lines = [f"train.py: {f'rank {rank}: ' if rank else ''}{problem}" for problem in problems]
    if number == 0 or wait_for_first_rank():
        print(*lines, sep="\n", file=sys.stderr, flush=True)
    elif folder := os.environ.get(ERRORS_OF_RANKS):
        with contextlib.suppress(OSError):
            Path(folder, f"rank {rank}").write_text("\n".join(lines), encoding="utf-8")
    sys.exit(2)


def _check_limits(arguments: dict[str, Any], groups: Sequence[type]) -> list[str]:
    metadata = {entry.name: entry.metadata for group in groups for entry in fields(group)}
    problems = []
    for name, keys in (metadata | OF_TRANSFORMERS).items():
        limits = {key: keys[key] for key in LIMITS if key in keys}
        if limits and arguments[name] is not None and not is_within(arguments[name], limits):
            words = " and ".join(f"{key.replace('_', ' ')} {limit}" for key, limit in limits.items())
            problems.append(f"--{name} {arguments[name]}: must be {words}")
    if arguments["max_steps"] == 0:  # transformers would train --num_train_epochs
        problems.append("--max_steps 0: trains nothing; give a number above 0, or leave it out")
    elif not 0 < arguments["num_train_epochs"] < float("inf") and arguments["max_steps"] < 0:
        problems.append("--num_train_epochs must be above 0 (or give --max_steps)")
    return problems


def is_within(value: float, limits: Mapping[str, float]) -> bool:
    """Whether a number is finite and within the limits of its field."""
    return math.isfinite(value) and all(LIMITS[name](value, limit) for name, limit in limits.items())
