"""Checks of train.py's flags: every mistake is found before anything is loaded."""

import copy
import inspect
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.serialization._base import parse_size_to_int
from transformers import Trainer, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from sft.checkpoint.manifest import find_incomplete
from sft.checkpoint.save import check_folder, check_output_dir, find_path_fault
from sft.dataset.mixture import find_files
from sft.format.table import FORMAT_NAMES, TURNS_TO_TRAIN
from sft.launch.deepspeed import check_deepspeed_config
from sft.launch.environment import find_launcher_problems
from sft.model.adapters import VARIANTS
from sft.model.load import check_dtype, check_model_path, check_window, load_config
from sft.opendata.decoding import check_encoding
from sft.opendata.fields import check_choices

# "no_effect": flags of transformers that would change nothing here, or break: the values that are refused (null: any),
# and why. "needs": flags that change something only beside another one; a launcher may give both, and a user take the
# other one back. "of_transformers": limits and whether a resume must have the same value, as in a field's metadata.
FLAGS = json.loads(Path(__file__).with_name("flags.json").read_text(encoding="utf-8"))
NO_EFFECT = FLAGS["no_effect"]
NEEDS = FLAGS["needs"]
TOKEN_COUNTS = ("all", "non_padding", "no", "true", "false")
FULL_PRECISION = ("mxfp4", "compressed-tensors")  # quantised weights that can be loaded as if they weren't
METRICS = ("loss", "perplexity", "token_accuracy")  # of the held-out rows; and loss/SOURCE for each source
NEEDS_THE_MODEL = ("lomo", "adalomo")  # optimizers that can't be built without it
# Flags that name files or folders, the first three several.
PATHS = (
    *("data_path", "eval_data_path", "replay_path"),
    *("model_name_or_path", "cache_dir", "output_dir", "resume_from_checkpoint"),
)
MAX_PATH_CHARACTERS = 80  # of a path in a message
GIB = 2**30


def check_arguments(arguments: dict[str, Any], *, typed: set[str]) -> list[str]:
    """Return every mistake in the parsed arguments beside the limits of their fields, one line each."""
    if problems := _check_paths(arguments):
        return problems
    resume = bool(arguments["resume_from_checkpoint"])
    checks = [
        check_model_path(arguments["model_name_or_path"]),
        check_dtype(arguments["dtype"], lora=arguments["lora"]),
        check_output_dir(arguments["output_dir"], resume=resume),
        check_folder("cache_dir", arguments["cache_dir"]),
        *_check_data(arguments),
        *check_choices(arguments["reasoning"], arguments["preference"]),
        *check_deepspeed_config(arguments),
        *find_launcher_problems(os.environ, deepspeed=bool(arguments["deepspeed"])),
        *_check_combinations(arguments),
        *_check_sequence_parallel(arguments),
        *_check_effect(arguments, typed),
    ]
    return [problem for problem in checks if problem]


def _check_paths(arguments: dict[str, Any]) -> list[str]:
    """Return a line for each path that can't exist: each further check of it would end in an OSError."""
    problems = []
    for name in PATHS:
        values = arguments[name] if isinstance(arguments[name], list) else [arguments[name]]
        faults = ((value, find_path_fault(value)) for value in values if value)
        problems += [f"--{name} {value[:MAX_PATH_CHARACTERS]}: {fault}" for value, fault in faults if fault]
    return problems


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
        check_encoding(arguments["encoding"])
    except ValueError as error:
        problems.append(str(error))
    return problems


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
    if arguments["activation_offload"] and not arguments["gradient_checkpointing"]:
        problems.append("--activation_offload: moves what checkpointing keeps; add --gradient_checkpointing")
    if arguments["activation_offload"] and arguments["torch_compile"]:
        problems.append("--activation_offload: was not tried with --torch_compile; leave one of them out")
    if arguments["load_in_4bit"] and not arguments["lora"]:
        problems.append("--load_in_4bit: 4-bit weights can't be trained; add --lora")
    return problems


def _check_sequence_parallel(arguments: dict[str, Any]) -> list[str]:
    """Check the flags that must be given, or left out, where GPUs share rows."""
    parts = arguments["sequence_parallel_size"]
    if parts <= 1:
        return []
    name = f"--sequence_parallel_size {parts}"
    problems = []
    if not arguments["deepspeed"]:
        problems.append(f"{name}: works with --deepspeed ds_zero2.json or ds_zero3.json only")
    if not arguments["packing"]:
        problems.append(f"{name}: only packed rows are shared; leave out --packing false")
    if not arguments["average_tokens_across_devices"]:
        problems.append(f"{name}: needs one mean over all processes; leave out --average_tokens_across_devices false")
    if arguments["label_smoothing_factor"]:
        problems.append(f"{name}: --label_smoothing_factor needs the logits of whole rows; leave one of them out")
    if arguments["neftune_noise_alpha"]:
        problems.append(f"{name}: --neftune_noise_alpha scales by the length of whole rows; leave one of them out")
    if arguments["torch_compile"]:
        problems.append(f"{name}: was not tried with --torch_compile; leave one of them out")
    return problems


def _check_effect(arguments: dict[str, Any], typed: set[str]) -> list[str]:
    """Find flags that were typed and would change nothing, or that this trainer can't honour."""
    problems = []
    for name, (values, advice) in NO_EFFECT.items():
        if name in typed and (values is None or arguments[name] in values):
            value = arguments[name]
            shown = value if isinstance(value, str) else ""
            if isinstance(value, bool):
                shown = str(value).lower()
            problems.append(f"{f'--{name} {shown}'.strip()}: {advice}")
    for name, other in NEEDS.items():
        if name in typed and other not in typed:
            problems.append(f"--{name}: has no effect without --{other}; add that, or leave this out")
    if arguments["train_sampling_strategy"] not in ("random", "sequential"):
        strategy = arguments["train_sampling_strategy"]
        problems.append(f"--train_sampling_strategy {strategy}: use random or sequential")
    return problems


# --- what can be built from the flags alone -----------------------------------------------------------------------


def check_buildable(training) -> list[str]:
    """Build trackers, optimizer and schedule as the trainer will; return a line for each that fails."""
    optimizer, problem = _build_optimizer(training)
    checks = [*_check_trackers(training.report_to), problem, _check_optimizer_flags(training), _check_metric(training)]
    checks += [*_check_checkpointing(training), *_check_values(training)]
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


def _check_optimizer_flags(training) -> str | None:
    """Return which flag this optimizer doesn't read, or None."""
    name = str(getattr(training.optim, "value", training.optim))
    if training.optim_target_modules and not name.startswith(("galore", "apollo")):
        return f"--optim_target_modules: --optim {name} doesn't read it; leave it out"
    if not training.optim_args:
        return None
    without = copy.copy(training)
    without.optim_args = None
    with suppress(ImportError, ValueError, TypeError, RuntimeError, AttributeError):
        if Trainer.get_optimizer_cls_and_kwargs(training) == Trainer.get_optimizer_cls_and_kwargs(without):
            return f"--optim_args {training.optim_args}: --optim {name} doesn't read it; leave it out"
    return None


def _check_checkpointing(training) -> list[str]:
    """Find options that torch's checkpointing doesn't take."""
    from torch.utils.checkpoint import checkpoint

    known = [name for name in inspect.signature(checkpoint).parameters if name not in ("function", "args", "kwargs")]
    known.append("preserve_rng_state")  # in its kwargs
    given = training.gradient_checkpointing_kwargs or getattr(training, "activation_checkpointing_kwargs", None) or {}
    if unknown := sorted(given.keys() - set(known)):
        return [f"--gradient_checkpointing_kwargs: no option {', '.join(unknown)}; use {', '.join(known)}"]
    return []


def _check_values(training) -> list[str]:
    problems = []
    if str(training.include_num_input_tokens_seen).lower() not in TOKEN_COUNTS:
        value = training.include_num_input_tokens_seen
        problems.append(f"--include_num_input_tokens_seen {value}: use all, non_padding or no")
    try:
        parse_size_to_int(training.max_shard_size)
    except ValueError:
        problems.append(f"--max_shard_size {training.max_shard_size}: write a size, as in 5GB or 500MB")
    if training.dataloader_multiprocessing_context and not training.dataloader_num_workers:
        problems.append("--dataloader_multiprocessing_context: needs --dataloader_num_workers above 0")
    if any("tpu" in str(getattr(option, "value", option)) for option in training.debug):
        problems.append("--debug tpu_metrics_debug: is for TPUs; leave it out")
    return problems


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
    if training.save_strategy == "best" and not training.metric_for_best_model:
        return f"--save_strategy best: add --metric_for_best_model, one of {', '.join(METRICS)}"
    return None


def check_held_out_metrics(training, names: Sequence[str], *, num_held_out: int) -> None:
    """Raise ValueError when a flag needs what the held-out data doesn't give; `names` are the sources shown."""
    metric = (training.metric_for_best_model or "").removeprefix("eval_")
    schedule = getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)
    waiting = {
        "load_best_model_at_end": training.load_best_model_at_end,
        "metric_for_best_model": metric and not training.load_best_model_at_end,  # which sets it
        "lr_scheduler_type": schedule == "reduce_lr_on_plateau",
        "eval_on_start": training.eval_on_start,
    }
    problems = []
    if not num_held_out:
        missing = [name for name, is_given in waiting.items() if is_given]
        problems = [f"--{name}: needs held-out data; give --eval_data_path, or leave it out" for name in missing]
    elif metric.startswith("loss/") and metric.removeprefix("loss/") not in names:
        known = ", ".join(f"loss/{name}" for name in names)
        problems = [f"--metric_for_best_model {metric}: no such source is held out; use loss{known and f', {known}'}"]
    if problems:
        raise ValueError("\n".join(problems))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def parse_gpu(text: str) -> tuple[int, int]:
    """Return (bytes of a GPU, number of GPUs) of "80GB×8", "80GBx8", "24GB" or "24576MB".

    Raises ValueError for anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(G|M)i?B?\s*(?:[x×*X]\s*(\d+))?", text.strip(), re.IGNORECASE)
    size = count = 0
    if found:
        size = float(found[1]) * (GIB if found[2].upper() == "G" else 2**20)
        count = int(found[3] or 1)
    if not size or not count:
        raise ValueError(f"--gpu {text}: write the memory of a GPU and their number, as in 80GBx8")
    return int(size), count


def check_against_config(settings, path: str) -> None:
    """Raise ValueError for flags that the config of the model rules out."""
    trusted = settings.model.trust_remote_code
    check_window(path, settings.data.max_length, trust_remote_code=trusted)
    check_checkpointing(path, settings.training.gradient_checkpointing_kwargs, trust_remote_code=trusted)
    if not settings.model.lora:
        check_quantised(path, trust_remote_code=trusted)


def check_quantised(path: str, *, trust_remote_code: bool = False) -> None:
    """Raise ValueError for a base of quantised weights, which transformers' Trainer trains under adapters alone."""
    stored = getattr(load_config(path, trust_remote_code=trust_remote_code), "quantization_config", None)
    if not isinstance(stored, dict) or stored.get("dequantize"):
        return
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    method = stored.get("quant_method")
    if method in {*AUTO_QUANTIZER_MAPPING, "bitsandbytes"}.difference(FULL_PRECISION):
        raise ValueError(
            f"{path}: its weights are quantised ({method}), so only adapters can be trained; add --lora, or name the "
            "model that was quantised"
        )


def check_checkpointing(path: str, options: dict | None, *, trust_remote_code: bool = False) -> None:
    """Raise ValueError for reentrant checkpointing of layers that share keys and values, as some of gemma3n's do."""
    config = load_config(path, trust_remote_code=trust_remote_code).get_text_config()
    if (options or {}).get("use_reentrant") and getattr(config, "num_kv_shared_layers", 0):
        raise ValueError(
            f"--gradient_checkpointing_kwargs: use_reentrant gives {config.model_type} a wrong gradient, as its layers "
            "share keys and values; leave it out"
        )
