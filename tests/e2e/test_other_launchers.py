"""train.py under torchrun, the deepspeed launcher and accelerate launch; and ranks that wait for a slow preparation."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sft.launch.workers import bind_port
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
DEEPSPEED = (sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch")
DATA = "data_proj/sample/blossom_chat.json"
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def start(command, tiny_base, output: Path, *flags: str, script: str = "train.py", **environment: str):
    settings = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    if command == DEEPSPEED:  # its default port may be taken
        with bind_port(0) as free:
            command = (*command, "--master_port", str(free.getsockname()[1]))
    settings |= {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), **environment}
    train = [
        script,
        "--model_name_or_path",
        str(tiny_base("qwen2")),
        "--data_path",
        "data_proj/sample/blossom_chat.json",
    ]
    train += ["--output_dir", str(output), "--max_steps", "2", "--max_length", "256", "--max_new_tokens", "2"]
    train += ["--num_reply_prompts", "0", "--per_device_train_batch_size", "1", "--logging_steps", "1", *flags]
    return subprocess.run(
        [*command, *train], cwd=ROOT, env=settings, capture_output=True, text=True, check=False, timeout=500
    )


@pytest.mark.parametrize(
    ("command", "flags", "processes"),
    [
        (TORCHRUN, (), 2),
        (DEEPSPEED, ("--deepspeed", "ds_zero2.json"), 2),
        (ACCELERATE, (), 1),
        ((*ACCELERATE, "--cpu"), (), 1),
        ((*ACCELERATE, "--cpu"), ("--deepspeed", "ds_zero2.json"), 1),
        ((sys.executable,), ("--deepspeed", "ds_zero3.json"), 1),
    ],
    ids=["torchrun", "deepspeed", "accelerate", "accelerate-cpu", "accelerate-cpu-zero-2", "python-zero-3"],
)
def test_train_py_starts_under_the_launchers_that_people_use(command, flags, processes, tiny_base, tmp_path):
    done = start(command, tiny_base, tmp_path / "run", *flags, "--cache_dir", str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"steps: 2 of {processes} rows (1 x 1 x {processes} processes)" in done.stdout
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert bool(list(tmp_path.glob("run/checkpoint-2/global_step2"))) == bool(flags)


def test_a_setting_of_accelerate_that_is_not_read_is_refused_in_a_line(tiny_base, tmp_path):
    done = start((*ACCELERATE, "--dynamo_backend", "inductor"), tiny_base, tmp_path / "run")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert line == "train.py: accelerate launch --dynamo_backend inductor: is not read; use --torch_compile"
    assert not (tmp_path / "run").exists()


SLOW = """
import os, runpy, sys, time
from pathlib import Path
from sft.dataset import dataset
build, log = dataset._build, Path(os.environ["BUILDS"])
def build_slowly(*arguments, **settings):
    with log.open("a") as stream:
        stream.write(os.environ["RANK"] + "\\n")
    time.sleep(float(os.environ["SECONDS_TO_BUILD"]))
    return build(*arguments, **settings)
dataset._build = build_slowly
if os.environ["SLOW_RANKS"] == "own caches":
    sys.argv += ["--cache_dir", os.environ["CACHES"] + os.environ["RANK"]]
runpy.run_path("train.py", run_name="__main__")
"""


def test_a_slow_preparation_is_done_once_and_meets_no_timeout_of_a_collective(tiny_base, tmp_path):
    """The default group gives up after 5 seconds; one rank prepares for 8, on the same file system as the other."""
    (tmp_path / "slow.py").write_text(SLOW)
    environment = {"BUILDS": str(tmp_path / "builds"), "SECONDS_TO_BUILD": "8", "SLOW_RANKS": "one cache"}
    flags = ("--ddp_timeout", "5", "--cache_dir", str(tmp_path / "cache"))
    began = time.monotonic()
    done = start(TORCHRUN, tiny_base, tmp_path / "run", *flags, script=str(tmp_path / "slow.py"), **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert time.monotonic() - began > 8
    assert len((tmp_path / "builds").read_text().split()) == 2, "the training data once, and the held-out data once"
    assert "steps: 2 of 2 rows" in done.stdout


def test_a_rank_with_a_full_cache_waits_for_one_that_prepares_on_another_file_system(tiny_base, tmp_path):
    """Rank 0 finds its data in its own cache and rank 1 prepares for 8 seconds; the default group gives up after 5."""
    (tmp_path / "slow.py").write_text(SLOW)
    caches = str(tmp_path / "cache-of-")
    environment = {"BUILDS": str(tmp_path / "builds"), "SLOW_RANKS": "own caches", "CACHES": caches}
    alone = {**environment, "SECONDS_TO_BUILD": "0", "RANK": "0"}
    first = start(
        (sys.executable,), tiny_base, tmp_path / "first", "--dry_run", script=str(tmp_path / "slow.py"), **alone
    )
    assert first.returncode == 0, first.stderr[-3000:]
    slow = {**environment, "SECONDS_TO_BUILD": "8"}
    script = str(tmp_path / "slow.py")
    done = start(TORCHRUN, tiny_base, tmp_path / "run", "--ddp_timeout", "5", script=script, **slow)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "builds").read_text().split() == ["0", "0", "1", "1"]


def test_a_rank_that_reads_other_data_than_rank_0_ends_the_run(tiny_base, tmp_path):
    """As on a second machine with an older copy of the data: each rank would train on its own."""
    flags = f'"--data_path", {str(tmp_path)!r} + "/" + os.environ["RANK"]'
    run = f'import os, runpy, sys\nsys.argv += [{flags}]\nrunpy.run_path("train.py", run_name="__main__")\n'
    (tmp_path / "run.py").write_text(run)
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
        (tmp_path / rank / "train.json").write_text(json.dumps({"instruction": "Rank?", "output": f"Rank {rank}."}))
    cache = ("--cache_dir", str(tmp_path / "cache"))
    done = start(TORCHRUN, tiny_base, tmp_path / "out", *cache, script=str(tmp_path / "run.py"))
    lines = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    problem = f"train.py: rank 1 on {socket.gethostname()} has not the data (train.json) of rank 0; all machines must "
    assert lines == [problem + "see the same files and get the same flags"], done.stderr[-3000:]
    assert done.returncode == 1
