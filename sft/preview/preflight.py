"""What is checked before a run starts, all mistakes in the arguments at once; and a row with its trained tokens."""

import json
import os
import sys
from pathlib import Path

import numpy as np

from sft.checkpoint.save import check_output_dir, incomplete
from sft.dataset.dataset import find_files
from sft.format.table import FORMAT_NAMES
from sft.format.tokens import IGNORE_INDEX
from sft.model.load import check_dtype, check_model_path
from sft.preview.memory import parse_gpu

# What a DeepSpeed file and a flag of train.py both say.
DEEPSPEED_FLAGS = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
}
GREEN, DIM, RESET = "\033[32m", "\033[2m", "\033[0m"


def check_arguments(arguments: dict) -> list[str]:
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
        *_check_numbers(arguments),
        *check_deepspeed_config(arguments),
    ]
    if arguments["chat_format"] not in FORMAT_NAMES:
        checks.append(f"--chat_format {arguments['chat_format']}: use one of {', '.join(FORMAT_NAMES)}")
    named = arguments["resume_from_checkpoint"]
    if named and named != "auto" and (problem := incomplete(Path(named))):
        checks.append(f"--resume_from_checkpoint {named}: {problem}; use auto, or name a checkpoint folder")
    try:
        parse_gpu(arguments["gpu"] or "1GB")
    except ValueError as error:
        checks.append(str(error))
    if arguments["probe_steps"] < 0 or arguments["probe_steps"] in (1, 2):
        checks.append(f"--probe_steps {arguments['probe_steps']}: at least 3, as the first two are not timed")
    if arguments["gpu"] and arguments["probe_steps"]:
        checks.append("--gpu: judges another machine, and --probe_steps measures this one; leave one of them out")
    if arguments["gpu"] and not arguments["dry_run"]:
        checks.append("--gpu: says which GPU a --dry_run judges; add --dry_run, or leave it out")
    if arguments["load_in_4bit"] and not arguments["lora"]:
        checks.append("--load_in_4bit: 4-bit weights can't be trained; add --lora")
    return [problem for problem in checks if problem]


def _check_data(arguments: dict) -> list[str]:
    problems = []
    for name in ("data_path", "eval_data_path", "replay_path"):
        for path in arguments[name] or ():
            try:
                find_files([path] if name == "data_path" else [], *[[path]] * (name != "data_path"))
            except (ValueError, OSError) as error:
                problems.append(f"--{name} {error}")
    if not problems:
        try:
            find_files(arguments["data_path"], arguments["eval_data_path"] or (), arguments["replay_path"] or ())
        except ValueError as error:
            problems.append(str(error))
    if bool(arguments["replay_path"]) != (arguments["replay_share"] > 0):
        problems.append("--replay_path and --replay_share go together: 0.1 makes a tenth of the tokens replay")
    if not 0 <= arguments["replay_share"] < 1:
        problems.append(f"--replay_share {arguments['replay_share']}: must be a share from 0 to below 1")
    try:
        "".encode(arguments["encoding"])
    except LookupError:
        problems.append(f"--encoding {arguments['encoding']}: no such encoding; try utf-8, gb18030, big5 or utf-16")
    return problems


def _check_numbers(arguments: dict) -> list[str]:
    positive = ("max_length", "per_device_train_batch_size", "gradient_accumulation_steps", "lora_rank", "lora_alpha")
    positive += ("per_device_eval_batch_size", "max_new_tokens")
    problems = [f"--{name} {arguments[name]}: must be at least 1" for name in positive if arguments[name] < 1]
    problems += [
        f"--{name} {arguments[name]}: must be above 0, and finite"
        for name in ("learning_rate",)
        if not 0 < arguments[name] < float("inf")
    ]
    for name in ("max_lost", "lora_dropout"):
        if not 0 <= arguments[name] <= 1:
            problems.append(f"--{name} {arguments[name]}: must be a share between 0 and 1")
    if not 0 < arguments["num_train_epochs"] < float("inf") and arguments["max_steps"] <= 0:
        problems.append("--num_train_epochs must be above 0 (or give --max_steps)")
    return problems


def check_deepspeed_config(arguments: dict) -> list[str]:
    """Return what is wrong in a DeepSpeed file: settings that would fail late or change the training without a word."""
    path = arguments["deepspeed"]
    if not path:
        return ["--offload: works with --deepspeed ds_zero2.json or ds_zero3.json only"] if arguments["offload"] else []
    if not Path(path).is_file():
        return [f"--deepspeed {path}: no such file; use ds_zero2.json or ds_zero3.json"]
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        return [f"--deepspeed {path}: not valid JSON ({error})"]
    if not isinstance(config, dict):
        return [f"--deepspeed {path}: must hold a JSON object"]
    return [f"--deepspeed {path}: {problem}" for problem in _deepspeed_problems(config, arguments)]


def _deepspeed_problems(config: dict, arguments: dict) -> list[str]:
    problems = [
        f"remove the {block!r} block; it would override the flags of train.py"
        for block in ("optimizer", "scheduler")
        if block in config
    ]
    zero = _block(config, "zero_optimization")
    if zero.get("stage") == 3 and zero.get("stage3_gather_16bit_weights_on_model_save") is not True:
        problems.append("stage3_gather_16bit_weights_on_model_save must be true to save weights")
    stage = zero.get("stage", 0)
    if config.get("zero_optimization", zero) is not zero or isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        problems.append('zero_optimization must be an object with a "stage" of 0, 1, 2 or 3')
    if config.get("train_batch_size", "auto") != "auto":
        problems.append('remove train_batch_size, or write "auto": it follows from the flags and the processes')
    for name, other in (("bf16", "fp16"), ("fp16", "bf16")):
        enabled = _block(config, name).get("enabled")
        if (enabled is False and arguments[name]) or (enabled is True and arguments[other]):
            problems.append(f'{name} is enabled: {enabled}, against the flags: write "auto"')
    if all(_block(config, name).get("enabled") is True for name in ("bf16", "fp16")):
        problems.append('bf16 and fp16 are both enabled: write "auto", which takes the flags')
    if arguments["offload"] and zero.get("stage") not in (2, 3):
        problems.append("--offload needs zero_optimization with stage 2 or 3")
    for name, flag in DEEPSPEED_FLAGS.items():
        if config.get(name, "missing") not in ("auto", arguments[flag]):
            problems.append(
                f'{name} is {config.get(name, "missing")}: write "auto", which takes --{flag} {arguments[flag]}'
            )
    problems += [
        f'add "{name}": {{"enabled": "auto"}}, else --{name} changes nothing'
        for name in ("bf16", "fp16")
        if "enabled" not in _block(config, name)
    ]
    return problems


def _block(config: dict, name: str) -> dict:
    return config[name] if isinstance(config.get(name), dict) else {}


def deepspeed_config(path: str, *, offload: bool, pin_memory: bool) -> dict:
    """Return the settings of a DeepSpeed file; with `offload`, optimizer (and weights, in stage 3) stay on the CPU."""
    config = json.loads(Path(path).read_text(encoding="utf-8"))
    if offload:
        zero = config["zero_optimization"]
        blocks = ("offload_optimizer", "offload_param") if zero["stage"] == 3 else ("offload_optimizer",)
        zero |= {block: {"device": "cpu", "pin_memory": pin_memory} for block in blocks}
    return config


def paint(tokenizer, input_ids: np.ndarray, labels: np.ndarray, *, colour: bool | None = None) -> str:
    """Return a row as text, trained stretches in green, or in ⟦ ⟧ where there is no colour (a pipe, NO_COLOR)."""
    if colour is None:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    trained, plain = ((GREEN, RESET), (DIM, RESET)) if colour else (("⟦", "⟧"), ("", ""))
    parts = [(text, trained if in_loss else plain) for text, in_loss in stretches(tokenizer, input_ids, labels)]
    return "".join(before + text + after for text, (before, after) in parts)


def stretches(tokenizer, input_ids: np.ndarray, labels: np.ndarray) -> list[tuple[str, bool]]:
    """Return a row as (text, whether it is trained), cut where that changes."""
    if not len(input_ids):
        return []
    in_loss = np.asarray(labels) != IGNORE_INDEX
    edges = np.flatnonzero(np.diff(in_loss)) + 1
    parts = zip(np.split(np.asarray(input_ids), edges), np.split(in_loss, edges), strict=True)
    return [(tokenizer.decode(ids.tolist()), bool(flags[0])) for ids, flags in parts]
