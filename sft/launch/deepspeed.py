"""DeepSpeed's settings file: its faults, the additions of --offload, and what a start needs."""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

MIN_LOCK_AGE_SECONDS = 5
MIN_SHARED_LOCK_AGE_SECONDS = 600

# Settings that are both in a DeepSpeed file and a flag of train.py.
SHARED_FLAGS = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
}


def check_deepspeed_config(arguments: dict) -> list[str]:
    """Return the faults of a DeepSpeed file: settings that would fail late or change the training without a warning."""
    path = arguments["deepspeed"]
    if not path:
        return ["--offload: works with --deepspeed ds_zero2.json or ds_zero3.json only"] if arguments["offload"] else []
    if not os.path.isfile(path):  # of JSON in the flag, Path would raise that the name is too long
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
    zero = _get_block(config, "zero_optimization")
    if zero.get("stage") == 3 and zero.get("stage3_gather_16bit_weights_on_model_save") is not True:
        problems.append("stage3_gather_16bit_weights_on_model_save must be true to save weights")
    stage = zero.get("stage", 0)
    if config.get("zero_optimization", zero) is not zero or isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        problems.append('zero_optimization must be an object with a "stage" of 0, 1, 2 or 3')
    if config.get("train_batch_size", "auto") != "auto":
        problems.append('remove train_batch_size, or write "auto": it follows from the flags and the processes')
    for name, other in (("bf16", "fp16"), ("fp16", "bf16")):
        enabled = _get_block(config, name).get("enabled")
        if (enabled is False and arguments[name]) or (enabled is True and arguments[other]):
            problems.append(f'{name} is enabled: {enabled}, against the flags: write "auto"')
    if all(_get_block(config, name).get("enabled") is True for name in ("bf16", "fp16")):
        problems.append('bf16 and fp16 are both enabled: write "auto", which takes the flags')
    if arguments["offload"] and zero.get("stage") not in (2, 3):
        problems.append("--offload needs zero_optimization with stage 2 or 3")
    for name, flag in SHARED_FLAGS.items():
        if config.get(name, "missing") not in ("auto", arguments[flag]):
            problems.append(
                f'{name} is {config.get(name, "missing")}: write "auto", which takes --{flag} {arguments[flag]}'
            )
    problems += [
        f'add "{name}": {{"enabled": "auto"}}, else --{name} changes nothing'
        for name in ("bf16", "fp16")
        if "enabled" not in _get_block(config, name)
    ]
    return problems


def _get_block(config: dict, name: str) -> dict:
    return config[name] if isinstance(config.get(name), dict) else {}


def deepspeed_config(path: str, *, offload: bool, pin_memory: bool) -> dict:
    """Return the settings of a DeepSpeed file; with `offload`, optimizer (and weights, in stage 3) stay on the CPU."""
    config = json.loads(Path(path).read_text(encoding="utf-8"))
    if offload:
        zero = config["zero_optimization"]
        blocks = ("offload_optimizer", "offload_param") if zero["stage"] == 3 else ("offload_optimizer",)
        zero |= {block: {"device": "cpu", "pin_memory": pin_memory} for block in blocks}
    return config


def zero_stage(training) -> int:
    """Return the ZeRO stage of a run's parsed arguments; 0 without DeepSpeed."""
    return (training.deepspeed or {}).get("zero_optimization", {}).get("stage", 0)


def remove_dead_build_locks() -> None:
    """Remove the locks of compilations that were killed: torch 2.13 waits for them forever, without a message.

    DeepSpeed compiles its kernels at the first start, with the lock open. A process of another machine can't be seen,
    so in a folder that several may share a lock has to be ten minutes old.
    """
    num_local = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))  # torchrun's and deepspeed's name
    is_shared = os.environ.get("WORLD_SIZE", num_local) != num_local
    min_age = MIN_SHARED_LOCK_AGE_SECONDS if is_shared else MIN_LOCK_AGE_SECONDS
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(cache) / "torch_extensions")
    locks = {str(lock.resolve()): lock for depth in ("*", "*/*") for lock in root.glob(f"{depth}/lock")}
    for link in Path("/proc").glob("[0-9]*/fd/*") if locks else ():
        with contextlib.suppress(OSError):  # it has just ended, or is another user's
            locks.pop(os.readlink(link), None)
    for lock in locks.values():
        with contextlib.suppress(OSError):
            if time.time() - lock.stat().st_mtime > min_age:
                lock.unlink()
                print(
                    f"train.py: {lock}: removed; the compilation that held it was killed", file=sys.stderr, flush=True
                )


def start_deepspeed_on_cpu() -> dict:
    """Let accelerate run DeepSpeed without a GPU, over gloo; return the accelerator_config that goes with it.

    For accelerate 1.15 and deepspeed 0.19: accelerate has no DeepSpeed backend for a CPU, so the state is made here.
    """
    for name, value in (
        ("ACCELERATE_USE_DEEPSPEED", "true"),
        ("DS_ACCELERATOR", "cpu"),
        ("ACCELERATE_TORCH_DEVICE", "cpu"),
    ):
        os.environ[name] = value
    os.environ.pop("ACCELERATE_USE_CPU", None)  # of accelerate launch --cpu: it would turn DeepSpeed off
    from accelerate import PartialState

    PartialState(backend="gloo")
    return {"use_configured_state": True}
