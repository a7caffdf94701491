"""Start the processes of a run, one per GPU, on one machine or several; none of them outlives the launcher.

    python -m sft.launch train.py --deepspeed ds_zero3.json ...        as ds_all.sh does it; settings by environment

torchrun gives every ending its own exit code 1, is killed by USR1, and kills after a fixed time; the deepspeed launcher
leaves its workers training when it is killed. This one passes signals on, waits for the checkpoint that train.py then
saves, keeps the exit code, and names the rank that failed.
"""

import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace

from sft.launch.environment import ERRORS_OF_RANKS
from sft.launch.nodes import Nodes
from sft.launch.plan import Job, count_gpus, plan_job
from sft.launch.supervise import supervise_children
from sft.launch.workers import bind_port, collect_signals, start_process, start_workers

# The first word of variables that the other machines of a hostfile take over.
FORWARDED = ("CUDA", "NCCL", "GLOO", "TORCH", "PYTORCH", "OMP", "HF", "DS", "WANDB", "TOKENIZERS", "PYTHON", "TRITON")
HELP = """\
usage: python -m sft.launch SCRIPT [ARGUMENTS ...]     start SCRIPT once per GPU, or twice on a machine without one
       python -m sft.launch --processes                print how many processes that would be

Settings are environment variables: NUM_GPUS, GRACE, MASTER_PORT, NODE_TIMEOUT; for several machines HOSTFILE, or
NNODES, NODE_RANK and MASTER_ADDR, or Slurm's own. The header of ds_all.sh says what each of them does.
"""


def main(arguments: Sequence[str]) -> int:
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(HELP, end="")
            return 0 if arguments else 2
        if arguments[0] == "--remote":
            return run_remote()
        job = plan_job(os.environ)
        if arguments[0] == "--processes":
            print(sum(job.slots))
            return 0
        return run_hosts(job, arguments) if job.hosts else run_node(job, arguments)
    except ValueError as error:
        print(f"ds_all.sh: {error}", file=sys.stderr)
        return 2


def run_node(job: Job, command: Sequence[str], *, by_pipe: bool = False) -> int:
    """Start this machine's workers and supervise them to the end; return the exit code of the job."""
    signals = collect_signals()
    listener = None
    if job.node == 0:
        listener = bind_port(job.port, "127.0.0.1" if len(job.slots) == 1 else "")
    job = replace(job, port=listener.getsockname()[1] if listener else job.port)
    with tempfile.TemporaryDirectory(prefix="sft-launch-", ignore_cleanup_errors=True) as errors:
        workers = start_workers(job, command, os.environ | {ERRORS_OF_RANKS: errors})
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # a closed connection is no error of a launcher
        nodes = Nodes(job, listener, by_pipe=by_pipe)  # imports torch, while the workers do the same
        code = supervise_children(workers, signals, nodes, errors=errors)
    nodes.leave()
    return code


def run_hosts(job: Job, command: Sequence[str]) -> int:
    """Start a launcher on each machine of the hostfile, also on this one, and supervise them."""
    signals = collect_signals()
    port = job.port or _find_free_port()
    forwarded = {name: value for name, value in os.environ.items() if name.split("_")[0] in FORWARDED}
    forwarded |= {name: os.environ[name] for name in ("GRACE", "NODE_TIMEOUT") if name in os.environ}
    line = f"cd {shlex.quote(os.getcwd())} && exec {shlex.quote(sys.executable)} -m sft.launch --remote"
    own_names = {"localhost", socket.gethostname(), socket.getfqdn()}
    children = []
    for node, host in enumerate(job.hosts):
        ssh = ["ssh", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", host, line]
        shell = ["sh", "-c", line] if host in own_names else ssh
        child = start_process(f"machine {host}", shell, dict(os.environ), stdin=subprocess.PIPE)
        # Through the pipe, not the command line, where other users could see a token of the environment.
        settings = {"slots": job.slots, "node": node, "address": job.address, "port": port}
        child.process.stdin.write(json.dumps({"job": settings, "env": forwarded, "command": list(command)}).encode())
        child.process.stdin.write(b"\n")
        child.process.stdin.flush()
        children.append(child)
    return supervise_children(children, signals)


def _find_free_port() -> int:
    with bind_port(0) as listener:
        return listener.getsockname()[1]


def run_remote() -> int:
    """Run one machine of a hostfile: the job, then signals, come on standard input; its end stops everything here."""
    given = json.loads(sys.stdin.buffer.raw.readline())
    os.environ.update(given["env"])
    job = Job(**{**given["job"], "slots": tuple(given["job"]["slots"])})
    num_gpus = count_gpus()
    if num_gpus and job.slots[job.node] > num_gpus:
        name = socket.gethostname()
        raise ValueError(f"HOSTFILE: slots={job.slots[job.node]} for {name}, which has {num_gpus} GPUs")
    os.set_blocking(0, False)
    return run_node(job, given["command"], by_pipe=True)
