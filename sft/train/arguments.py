"""Flags of train.py: parse them, and say every mistake at once before anything is loaded."""

import copy
import json
import math
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser, Trainer, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from sft.checkpoint.manifest import find_incomplete
from sft.checkpoint.save import check_output_dir
from sft.dataset.dataset import find_files
from sft.format.table import FORMAT_NAMES, TURNS_TO_TRAIN
from sft.launch.environment import complete_single_process, find_launcher_problems, read_launcher_flags
from sft.model.adapters import VARIANTS
from sft.model.load import check_dtype, check_model_path, choose_compute
from sft.opendata.fields import check_choices
from sft.train.deepspeed import check_deepspeed_config, deepspeed_config, start_deepspeed_on_cpu

LIMITS = ("at_least", "above", "at_most", "below")  # keys of a field's metadata: the values that it allows
# "same": a checkpoint is resumed only with the same value, unless --allow_changed names it. "same unless default": its
# default counts as the value of older checkpoints, which lack the flag.
RESUME = "resume"
# The same for flags that train.py leaves as transformers has them. All others (logging, saving, evaluation, paths)
# don't change what is computed, and may differ freely in a resumed run.
OF_TRANSFORMERS = {
    "per_device_train_batch_size": {"at_least": 1, RESUME: "same"},
    "gradient_accumulation_steps": {"at_least": 1, RESUME: "same"},
    "per_device_eval_batch_size": {"at_least": 1},
    **{
        name: {RESUME: "same"}
        for name in (
            *("seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last", "num_train_epochs", "max_steps"),
            *("lr_scheduler_kwargs", "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2"),
            *("adam_epsilon", "max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha", "bf16", "fp16"),
            *("tf32", "use_liger_kernel"),
        )
    },
}
# Flags of transformers that would change nothing here, or break: the values that are refused (None: any), and why.
NO_EFFECT = {
    "do_train": ((False,), "train.py always trains; to measure a model use python -m sft.evaluate"),
    "do_eval": ((False,), "the evaluations are chosen by --eval_strategy; use --eval_strategy no"),
    "do_predict": ((True,), "train.py predicts nothing; use python -m sft.evaluate"),
    "auto_find_batch_size": ((True,), "the rows of an update must stay the same; --dry_run tells which batch fits"),
    "ignore_data_skip": ((True,), "a resumed run continues at its place in the data"),
    "batch_eval_metrics": ((True,), "the metrics of train.py are summed over all held-out rows; leave it out"),
    "remove_unused_columns": ((True,), "a row holds only what the model takes; leave it out"),
    "label_names": (None, "the labels of a row are named labels; leave it out"),
    "hub_strategy": (("checkpoint", "all_checkpoints"), "the model is pushed once, after training; leave it out"),
    "hub_always_push": ((True,), "the model is pushed once, after training; leave it out"),
    "enable_jit_checkpoint": ((True,), "a signal saves a checkpoint anyway; leave it out"),
    "fsdp": (None, "checkpoints of train.py are plain or DeepSpeed's; use --deepspeed ds_zero3.json"),
    "fsdp_config": (None, "checkpoints of train.py are plain or DeepSpeed's; use --deepspeed ds_zero3.json"),
}
METRICS = ("loss", "perplexity", "token_accuracy")  # of the held-out rows; and loss/SOURCE for each source
NEEDS_THE_MODEL = ("lomo", "adalomo")  # optimizers that can't be built without it
GIB = 2**30


def flag(default: Any, help: str, **metadata: Any) -> Any:
    """Return the field of a dataclass that is a flag: a limit of LIMITS, or `resume`, may stand in its metadata."""
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
        flags, same = self.by_name(), ("same", "same unless default")
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
    problems += check_arguments(given, groups, typed=parser.typed)
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
        os.environ["HF_TOKEN"], given["hub_token"] = given["hub_token"], None
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
    if given["use_liger_kernel"] and on_cpu:
        raise ValueError("--use_liger_kernel: its kernels are Triton's and need a GPU; leave the flag out")
    deepspeed = given["deepspeed"]
    if given["dry_run"] and not given["probe_steps"]:
        given |= {"deepspeed": None, "use_cpu": on_cpu}
    elif deepspeed:
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


class Parser(HfArgumentParser):
    """Collects the values that it can't read instead of stopping at the first."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.problems: list[str] = []
        self.typed: set[str] = set()  # flags that were given, by name

    @staticmethod
    def _parse_dataclass_field(parser, entry):
        """Leave out of the metadata what argparse doesn't know (transformers 5.23 passes on all of it)."""
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


def fail(problems: Sequence[str], *, everywhere: bool = False) -> NoReturn:
    """Print each problem on a line, from the first process or from `everywhere`, and exit with code 2."""
    rank = int(os.environ.get("RANK", 0))
    if rank == 0 or everywhere:
        for problem in problems:
            print(f"train.py: {f'rank {rank}: ' if rank else ''}{problem}", file=sys.stderr, flush=True)
    sys.exit(2)


# --- checks -------------------------------------------------------------------------------------------------------


def check_arguments(arguments: dict[str, Any], groups: Sequence[type], *, typed: set[str]) -> list[str]:
    """Return every mistake in the parsed arguments, one line each, before anything is loaded."""
    required = [
        f"--{name} is required" for name in ("model_name_or_path", "data_path", "output_dir") if not arguments[name]
    ]
    if required:
        return required
    resume = bool(arguments["resume_from_checkpoint"])
    checks = [
        check_model_path(arguments["model_name_or_path"]),
        check_dtype(arguments["dtype"], lora=arguments["lora"]),
        check_output_dir(arguments["output_dir"], resume=resume),
        *_check_data(arguments),
        *check_choices(arguments["reasoning"], arguments["preference"]),
        *_check_limits(arguments, groups),
        *check_deepspeed_config(arguments),
        *find_launcher_problems(os.environ, deepspeed=bool(arguments["deepspeed"])),
        *_check_combinations(arguments),
        *_check_effect(arguments, typed),
    ]
    return [problem for problem in checks if problem]


def _check_data(arguments: dict[str, Any]) -> list[str]:
    problems = []
    for name in ("data_path", "eval_data_path", "replay_path"):
        for path in arguments[name] or ():
            try:
                if name == "data_path":
                    find_files([path])
                else:
                    find_files([], [path])
            except (ValueError, OSError) as error:
                problems.append(f"--{name} {error}")
    if not problems:
        try:
            find_files(arguments["data_path"], arguments["eval_data_path"] or (), arguments["replay_path"] or ())
        except ValueError as error:
            problems.append(str(error))
    if bool(arguments["replay_path"]) != (arguments["replay_share"] > 0):
        problems.append("--replay_path and --replay_share go together: 0.1 makes a tenth of the tokens replay")
    try:
        "".encode(arguments["encoding"])
    except LookupError:
        problems.append(f"--encoding {arguments['encoding']}: no such encoding; try utf-8, gb18030, big5 or utf-16")
    return problems


def _check_limits(arguments: dict[str, Any], groups: Sequence[type]) -> list[str]:
    metadata = {entry.name: entry.metadata for group in groups for entry in fields(group)}
    problems = []
    for name, keys in (metadata | OF_TRANSFORMERS).items():
        limits = {key: keys[key] for key in LIMITS if key in keys}
        if limits and not is_within(arguments[name], limits):
            words = " and ".join(f"{key.replace('_', ' ')} {limit}" for key, limit in limits.items())
            problems.append(f"--{name} {arguments[name]}: must be {words}")
    if not 0 < arguments["num_train_epochs"] < float("inf") and arguments["max_steps"] <= 0:
        problems.append("--num_train_epochs must be above 0 (or give --max_steps)")
    return problems


def is_within(value: float, limits: Mapping[str, float]) -> bool:
    """Whether a number is finite and within the limits of its field."""
    return (
        math.isfinite(value)
        and value >= limits.get("at_least", -math.inf)
        and value > limits.get("above", -math.inf)
        and value <= limits.get("at_most", math.inf)
        and value < limits.get("below", math.inf)
    )


def _check_combinations(arguments: dict[str, Any]) -> list[str]:
    """Check flags against fixed lists and against each other."""
    problems = []
    if arguments["train_turns"] not in TURNS_TO_TRAIN:
        problems.append(f"--train_turns {arguments['train_turns']}: use one of {', '.join(TURNS_TO_TRAIN)}")
    try:
        is_object = isinstance(json.loads(arguments["template_kwargs"]), dict)
    except ValueError:
        is_object = False
    if not is_object:
        problems.append(
            f"--template_kwargs {arguments['template_kwargs']}: write a JSON object, such as "
            """'{"enable_thinking": false}'"""
        )
    if arguments["chat_format"] not in FORMAT_NAMES:
        problems.append(f"--chat_format {arguments['chat_format']}: use one of {', '.join(FORMAT_NAMES)}")
    named = arguments["resume_from_checkpoint"]
    if named and named != "auto" and (problem := find_incomplete(Path(named))):
        problems.append(f"--resume_from_checkpoint {named}: {problem}; use auto, or name a checkpoint folder")
    try:
        parse_gpu(arguments["gpu"] or "1GB")
    except ValueError as error:
        problems.append(str(error))
    if arguments["probe_steps"] < 0 or arguments["probe_steps"] in (1, 2):
        problems.append(f"--probe_steps {arguments['probe_steps']}: at least 3, as the first two are not timed")
    if arguments["gpu"] and arguments["probe_steps"]:
        problems.append("--gpu: judges another machine, and --probe_steps measures this one; leave one of them out")
    if arguments["gpu"] and not arguments["dry_run"]:
        problems.append("--gpu: says which GPU a --dry_run judges; add --dry_run, or leave it out")
    if arguments["lora_variant"] not in VARIANTS:
        problems.append(f"--lora_variant {arguments['lora_variant']}: use one of {', '.join(VARIANTS)}")
    if arguments["load_in_4bit"] and not arguments["lora"]:
        problems.append("--load_in_4bit: 4-bit weights can't be trained; add --lora")
    return problems


def _check_effect(arguments: dict[str, Any], typed: set[str]) -> list[str]:
    """Find flags that were typed and would change nothing, or that this trainer can't honour."""
    problems = []
    for name, (values, advice) in NO_EFFECT.items():
        if name in typed and (values is None or arguments[name] in values):
            value = arguments[name]
            shown = (
                str(value).lower() if isinstance(value, bool) else " ".join([value] if isinstance(value, str) else [])
            )
            problems.append(f"{f'--{name} {shown}'.strip()}: {advice}")
    if arguments["train_sampling_strategy"] not in ("random", "sequential"):
        strategy = arguments["train_sampling_strategy"]
        problems.append(f"--train_sampling_strategy {strategy}: use random or sequential")
    return problems


# --- what can be built from the flags alone -----------------------------------------------------------------------


def check_buildable(training) -> list[str]:
    """Build trackers, optimizer and schedule as the trainer will; return a line for each that fails."""
    optimizer, problem = _build_optimizer(training)
    checks = [*_check_trackers(training.report_to), problem, _check_metric(training)]
    if optimizer is not None:
        checks.append(_check_schedule(training, optimizer))
    return [line for line in checks if line]


def _check_trackers(names: Sequence[str]) -> list[str]:
    problems = []
    for name in names:
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except (RuntimeError, ImportError, ValueError, AssertionError) as error:
            problems.append(f"--report_to {name}: {_one_line(error)}")
    return problems


def _build_optimizer(training) -> tuple[torch.optim.Optimizer | None, str | None]:
    """Return the optimizer, built over one number, or what is wrong; neither where it needs the model."""
    flags = f"--optim {getattr(training.optim, 'value', training.optim)}"
    if training.optim_args:
        flags += f" --optim_args {training.optim_args}"
    try:
        make, options = Trainer.get_optimizer_cls_and_kwargs(training)
        return make([torch.nn.Parameter(torch.zeros(1))], **options), None
    except AttributeError:  # galore and apollo look for their layers in the model
        return None, None
    except (ImportError, ValueError, TypeError, RuntimeError) as error:
        needs_model = training.optim in NEEDS_THE_MODEL and not isinstance(error, ImportError)
        return None, None if needs_model else f"{flags}: {_one_line(error)}"


def _check_schedule(training, optimizer: torch.optim.Optimizer) -> str | None:
    options = training.lr_scheduler_kwargs or {}
    try:
        get_scheduler(training.lr_scheduler_type, optimizer, 1, 2, scheduler_specific_kwargs=dict(options))
    except (ValueError, TypeError, KeyError) as error:
        name = getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)
        return (
            f"--lr_scheduler_type {name}: {_one_line(error)}; give its settings as --lr_scheduler_kwargs " + "'{...}'"
        )
    return None


def _check_metric(training) -> str | None:
    """Return why the best checkpoint can't be chosen, or None; whether the data has the source is seen later."""
    metric = (training.metric_for_best_model or "loss").removeprefix("eval_")
    if metric not in METRICS and not metric.startswith("loss/"):
        return (
            f"--metric_for_best_model {training.metric_for_best_model}: use {', '.join(METRICS)}, or loss/SOURCE "
            "with a source of the held-out data"
        )
    if training.metric_for_best_model and training.eval_strategy == "no":
        return f"--metric_for_best_model {training.metric_for_best_model}: --eval_strategy no measures nothing"
    return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def parse_gpu(text: str) -> tuple[int, int]:
    """Return (bytes of a GPU, number of GPUs) of "80GB×8", "80GBx8", "24GB" or "24576MB".

    Raises ValueError for anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(G|M)i?B?\s*(?:[x×*X]\s*(\d+))?", text.strip(), re.IGNORECASE)
    size = float(found[1]) * (GIB if found[2].upper() == "G" else 2**20) if found else 0
    count = int(found[3] or 1) if found else 0
    if not size or not count:
        raise ValueError(f"--gpu {text}: write the memory of a GPU and their number, as in 80GBx8")
    return int(size), count
