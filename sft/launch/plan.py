"""Plan a job from the environment: processes per machine, this machine's number, and the address of the first one."""

import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

DEFAULT_PORT = 29500  # port at which NNODES machines meet: they can't agree on a free one
GRACE_SECONDS = 60  # to save a checkpoint in, after a signal
NODE_TIMEOUT_SECONDS = 300  # to wait for another machine, at the start or for its next heartbeat
SLURM_PORTS = (20000, 10000)  # first port, and how many: jobs that share a machine seldom choose the same
# Device files of NVIDIA (also Jetson and WSL) and AMD; without any of them torch need not be asked, which takes 3 s.
GPU_DEVICES = ("nvidia*", "nvhost*", "nvmap", "dxg", "kfd")


@dataclass(frozen=True)
class Job:
    """Processes (`slots`) per machine, the number of this machine (`node`), and where all of them connect."""

    slots: tuple[int, ...]
    node: int = 0
    address: str = "127.0.0.1"
    port: int = 0  # 0: any free one
    hosts: tuple[str, ...] = ()  # names to reach by ssh; empty where every machine runs its own launcher


def plan_job(environment: Mapping[str, str]) -> Job:
    """Read the job from HOSTFILE, NNODES or Slurm's variables, else this machine alone; ValueError for a mistake."""
    read_number(environment, "GRACE", GRACE_SECONDS)
    read_number(environment, "NODE_TIMEOUT", NODE_TIMEOUT_SECONDS, least=1)
    port = read_number(environment, "MASTER_PORT", 0, most=65535)
    if environment.get("HOSTFILE"):
        return _plan_hostfile(environment, port)
    step = "SLURM_STEP_NUM_NODES" if environment.get("SLURM_STEP_NUM_NODES") else "SLURM_NNODES"
    name = "NNODES" if environment.get("NNODES") else step
    num_nodes = read_number(environment, name, 1, least=1)
    slots = (count_processes(environment, num_nodes),) * num_nodes
    if num_nodes == 1:
        return Job(slots, port=port)
    _check_shared_settings(environment)
    return (_plan_nnodes if name == "NNODES" else _plan_slurm)(environment, slots, port, name)


def _plan_nnodes(environment: Mapping[str, str], slots: tuple[int, ...], port: int, name: str) -> Job:
    if not environment.get("MASTER_ADDR") or not environment.get("NODE_RANK"):
        raise ValueError(f"{name}: give NODE_RANK (0 to NNODES-1) and MASTER_ADDR, the name of the machine of rank 0")
    node = read_number(environment, "NODE_RANK", 0, most=len(slots) - 1)
    return Job(slots, node, environment["MASTER_ADDR"], port or DEFAULT_PORT)


def _plan_slurm(environment: Mapping[str, str], slots: tuple[int, ...], port: int, name: str) -> Job:
    if environment.get("SLURM_LOCALID", "0") != "0":
        raise ValueError("Slurm started several tasks on this machine; one is enough: --ntasks-per-node=1")
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not nodes or not environment.get("SLURM_NODEID"):
        raise ValueError(
            f"{name}={len(slots)} without SLURM_JOB_NODELIST and SLURM_NODEID: start with srun sh ds_all.sh"
        )
    node = read_number(environment, "SLURM_NODEID", 0, most=len(slots) - 1)
    first, count = SLURM_PORTS
    job_port = first + read_number(environment, "SLURM_JOB_ID", 0) % count
    return Job(slots, node, environment.get("MASTER_ADDR") or find_first_host(nodes), port or job_port)


def read_number(
    environment: Mapping[str, str], name: str, default: int, *, least: int = 0, most: int | None = None
) -> int:
    """Return a whole number from the environment; ValueError names the variable and its range."""
    text = environment.get(name) or str(default)
    if not re.fullmatch(r"\d{1,9}", text) or int(text) < least or (most is not None and int(text) > most):
        upper = "" if most is None else f" to {most}"
        raise ValueError(f"{name}={text}: use a whole number, {least}{upper or ' or more'}")
    return int(text)


def count_processes(environment: Mapping[str, str], num_nodes: int = 1) -> int:
    """Return NUM_GPUS, checked; by default every GPU of this machine, or two CPU processes where there is none.

    ds_all.sh asks once, and hands the answer for all machines on as NUM_PROCESSES.
    """
    if environment.get("NUM_PROCESSES"):
        return read_number(environment, "NUM_PROCESSES", 0, least=num_nodes) // num_nodes
    if environment.get("NUM_GPUS"):
        read_number(environment, "NUM_GPUS", 0, least=1)
    num_gpus = count_gpus()
    wanted = read_number(environment, "NUM_GPUS", num_gpus or 2, least=1)
    if num_gpus and wanted > num_gpus:
        raise ValueError(f"NUM_GPUS={wanted}: this machine has {num_gpus}")
    return wanted


def count_gpus() -> int:
    """Return how many GPUs torch sees; it is asked in a process of its own, which gives their memory back."""
    if not any(found for name in GPU_DEVICES for found in Path("/dev").glob(name)):
        return 0
    code = "import torch; print(torch.cuda.device_count())"
    return int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout)


def _check_shared_settings(environment: Mapping[str, str]) -> None:
    """Several machines can't each make up a model or a folder."""
    if not environment.get("MODEL"):
        raise ValueError("several machines: name MODEL; the embedded default is for one")
    if not environment.get("OUTPUT"):
        raise ValueError("several machines: name OUTPUT, one folder that all of them see")


def _plan_hostfile(environment: Mapping[str, str], port: int) -> Job:
    for name in ("NUM_GPUS", "NNODES"):
        if environment.get(name):
            raise ValueError(f"HOSTFILE and {name}: give one of them; slots= in the file counts a machine's GPUs")
    path = Path(environment["HOSTFILE"])
    slots_of = _read_hostfile(path)
    if len(slots_of) > 1:
        _check_shared_settings({"OUTPUT": "made by base_run.sh, once", **environment})
    address = environment.get("MASTER_ADDR") or next(iter(slots_of))
    if address == "localhost" and len(slots_of) > 1:
        raise ValueError(f"{path}: the others can't reach a machine named localhost; write its name")
    return Job(tuple(slots_of.values()), 0, address, port, tuple(slots_of))


def _read_hostfile(path: Path) -> dict[str, int]:
    """Return {host: slots} in the file's order."""
    if not path.is_file():
        raise ValueError(f"HOSTFILE={path}: no such file; a line for each machine: name slots=8")
    slots_of: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        slots = re.fullmatch(r"slots=([1-9]\d{0,3})", words[1]) if len(words) == 2 else None
        if not slots or words[0] in slots_of or words[0].startswith("-"):
            raise ValueError(f"{path} line {number}: {line.strip()!r}: write each machine once, as: name slots=8")
        slots_of[words[0]] = int(slots[1])
    if not slots_of:
        raise ValueError(f"{path}: names no machine; a line for each: name slots=8")
    return slots_of


def find_first_host(nodes: str) -> str:
    """Return the first name of Slurm's list: node[07-09,12],login -> node07."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0]) if first else nodes
