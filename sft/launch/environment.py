"""The environment that torchrun, the deepspeed launcher and accelerate launch make for train.py; its quick start.

`RANK`, `LOCAL_RANK` and `WORLD_SIZE` mean the same to all of them. accelerate launch adds settings of its own, as
ACCELERATE_…: those that are flags of train.py, too, are taken from there, and the others are refused by name.
"""

import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, MutableMapping, Sequence

# Settings of accelerate launch that would change the training without a flag of train.py, and what to use instead.
REFUSED = {
    "ACCELERATE_USE_FSDP": "accelerate launch --use_fsdp: checkpoints here are DeepSpeed's or plain; "
    "leave it out and use --deepspeed ds_zero3.json, which also shares weights, gradients and optimizer among the GPUs",
    "ACCELERATE_USE_MEGATRON_LM": "accelerate launch --use_megatron_lm: use --deepspeed ds_zero3.json instead",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "accelerate launch --use_parallelism_config: is not read; leave it "
    "out, and to share rows among GPUs use --sequence_parallel_size",
}
NO_DEEPSPEED_FILE = (
    "accelerate launch --use_deepspeed: its own DeepSpeed settings are not read; "
    "add --deepspeed ds_zero2.json or ds_zero3.json"
)

# The variable with a folder of sft.launch, for errors that a rank doesn't print as the first one has them as well.
ERRORS_OF_RANKS = "SFT_ERRORS_OF_RANKS"
FIRST_RANK_SECONDS = 10  # by which a rank may start later than another


def find_launcher_problems(environment: Mapping[str, str], *, deepspeed: bool) -> list[str]:
    """Return a line for each setting of accelerate launch that is not supported; `deepspeed`: a file is given."""
    problems = [problem for name, problem in REFUSED.items() if _is_true(environment.get(name))]
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        problems.append(f"accelerate launch --dynamo_backend {backend.lower()}: is not read; use --torch_compile")
    if _is_true(environment.get("ACCELERATE_USE_DEEPSPEED")) and not deepspeed:
        problems.append(NO_DEEPSPEED_FILE)
    if _mixed_precision(environment) not in ("no", "bf16", "fp16"):
        problems.append(f"accelerate launch --mixed_precision {_mixed_precision(environment)}: use no, bf16 or fp16")
    return problems


def read_launcher_flags(environment: Mapping[str, str]) -> dict[str, bool]:
    """Return the flags of train.py that accelerate launch was given instead: use_cpu, bf16, fp16."""
    flags = {"use_cpu": _is_true(environment.get("ACCELERATE_USE_CPU"))}
    flags |= {name: _mixed_precision(environment) == name for name in ("bf16", "fp16")}
    return {name: True for name, is_set in flags.items() if is_set}


def _mixed_precision(environment: Mapping[str, str]) -> str:
    return environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()


def _is_true(text: str | None) -> bool:
    return (text or "").lower() in ("1", "true", "yes", "y", "on", "t")


def wait_for_first_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Before this rank ends with an error: let the first one print its own; return whether to print this one too.

    torchrun (also in accelerate launch) and the deepspeed launcher kill all ranks as soon as one has ended. A rank that
    is not killed meanwhile has an error that the first one doesn't have.
    """
    if not {"TORCHELASTIC_RUN_ID", "LOCAL_SIZE"} & environment.keys():
        return False
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(FIRST_RANK_SECONDS)
    return True


def complete_single_process(environment: MutableMapping[str, str] = os.environ) -> None:
    """Without a launcher, describe a group of one process, as DeepSpeed needs it; else change nothing.

    MASTER_PORT is replaced: accelerate launch sets a fixed one, which another job may use.
    """
    if "RANK" in environment:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def prepare_imports() -> None:
    """Before train.py imports torch and transformers: leave packages out, and switch the garbage collection off.

    transformers 5.23 and accelerate 1.15 import the packages wherever they find them: a second at every start. Garbage
    collection took half a second, with nothing to free; `finish_imports` switches it on again.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell starts background jobs with SIGINT ignored
    sys.modules |= dict.fromkeys(unused_packages([*sys.argv, *os.environ]))
    gc.disable()


def unused_packages(words: Sequence[str]) -> list[str]:
    """Packages that a run with these arguments and environment variables can do without."""
    adapter = any(os.path.exists(os.path.join(word.split("=")[-1], "adapter_config.json")) for word in words)
    text = " ".join(words).lower()
    probe = "--probe_steps" in text or "--probe-steps" in text
    dry = probe or "--dry_run" in text or "--dry-run" in text  # counts what adapters would take
    needed = {"datasets": False, "deepspeed": "deepspeed" in text and (probe or not dry)}
    needed["peft"] = adapter or dry or "--lora" in text
    return [package for package, is_needed in needed.items() if not is_needed]


def finish_imports() -> None:
    """Switch the garbage collection on again, without the modules: they stay to the end."""
    gc.enable()
    gc.freeze()
