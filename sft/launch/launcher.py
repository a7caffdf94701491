"""Starts the processes of a run, one per GPU, on one machine or several; none of them outlives the launcher.

    python -m sft.launch train.py --deepspeed ds_zero3.json ...        what ds_all.sh runs; knobs by environment

torchrun gives every ending its own exit code 1, dies of USR1, and kills after a fixed time; the deepspeed launcher
leaves its workers training when it is killed. This one passes signals on, waits for the checkpoint that train.py then
saves, keeps the exit code, and names the rank that failed.
"""

import contextlib
import ctypes
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

from sft.launch.processes import LOST, SIGNALS, STOPPED

PORT = 29500  # where machines meet that can't agree on a free one
GRACE = 60  # seconds to save a checkpoint in, after a signal
NODE_TIMEOUT = 300  # seconds to wait for another machine, to start or to give a sign of life
SETTLE = 10  # seconds that the others get to notice by themselves that a process has failed
CONNECT = 5  # seconds for one attempt to reach another machine
PR_SET_PDEATHSIG = 1
# What other machines take over from the environment of the one where the job was started.
CARRIED = ("CUDA", "NCCL", "GLOO", "TORCH", "PYTORCH", "OMP", "HF", "DS", "WANDB", "TOKENIZERS", "PYTHON", "TRITON")


@dataclass(frozen=True)
class Job:
    """Who takes part: processes per machine, which of the machines this is, and where they meet."""

    slots: tuple[int, ...]
    node: int = 0
    address: str = "127.0.0.1"
    port: int = 0  # 0: any free one
    hosts: tuple[str, ...] = ()  # names to reach by ssh; empty where every machine runs its own launcher


@dataclass
class Child:
    """A worker ("rank 3"), or the ssh that runs the launcher of another machine and takes signals as lines."""

    name: str
    process: subprocess.Popen
    code: int | None = None

    def send(self, number: int) -> None:
        if self.process.stdin is None:
            self.process.send_signal(number)
        else:
            self.process.stdin.write(f"{number}\n".encode())
            self.process.stdin.flush()

    def has_ended(self) -> bool:
        self.code = self.process.poll()
        if self.code is not None:
            self.kill()
        return self.code is not None

    def kill(self) -> None:
        """Kill it and what it has started; the launcher at the other end of an ssh ends when its input does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def ending(self) -> str:
        if self.code < 0:
            return f"{self.name} was killed by {signal.Signals(-self.code).name}"
        return f"{self.name} ended with exit code {self.code}"


def main(arguments: Sequence[str]) -> int:
    try:
        if arguments[:1] == ["--remote"]:
            return run_remote()
        job = plan(os.environ)
        if arguments[:1] == ["--processes"]:
            print(sum(job.slots))
            return 0
        return run_hosts(job, arguments) if job.hosts else run_node(job, arguments)
    except ValueError as error:
        print(f"ds_all.sh: {error}", file=sys.stderr)
        return 2


# --- who takes part -----------------------------------------------------------------------------------------------


def plan(environment) -> Job:
    """Read the job from HOSTFILE, NNODES or Slurm's variables, else this machine alone; ValueError for a mistake."""
    number(environment, "GRACE", GRACE)
    number(environment, "NODE_TIMEOUT", NODE_TIMEOUT, least=1)
    port = number(environment, "MASTER_PORT", 0, most=65535)
    if environment.get("HOSTFILE"):
        return _from_hostfile(environment, port)
    step = "SLURM_STEP_NUM_NODES" if environment.get("SLURM_STEP_NUM_NODES") else "SLURM_NNODES"
    name = "NNODES" if environment.get("NNODES") else step
    num_nodes = number(environment, name, 1, least=1)
    slots = (processes_here(environment, num_nodes),) * num_nodes
    if num_nodes == 1:
        return Job(slots, port=port)
    _check_several(environment)
    if name == "NNODES":
        if not environment.get("MASTER_ADDR") or not environment.get("NODE_RANK"):
            raise ValueError(
                "NNODES: give NODE_RANK (0 to NNODES-1) and MASTER_ADDR, the name of the machine of rank 0"
            )
        node, address = number(environment, "NODE_RANK", 0, most=num_nodes - 1), environment["MASTER_ADDR"]
        return Job(slots, node, address, port or PORT)
    if environment.get("SLURM_LOCALID", "0") != "0":
        raise ValueError("Slurm started several tasks on this machine; one is enough: --ntasks-per-node=1")
    listed = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not listed or not environment.get("SLURM_NODEID"):
        raise ValueError(
            f"{name}={num_nodes} without SLURM_JOB_NODELIST and SLURM_NODEID: start with srun sh ds_all.sh"
        )
    node = number(environment, "SLURM_NODEID", 0, most=num_nodes - 1)
    job_port = 20000 + number(environment, "SLURM_JOB_ID", 0) % 10000  # jobs that share a machine seldom meet
    return Job(slots, node, environment.get("MASTER_ADDR") or first_host(listed), port or job_port)


def number(environment, name: str, default: int, *, least: int = 0, most: int | None = None) -> int:
    """Return a whole number from the environment; ValueError names the knob and its range."""
    text = environment.get(name) or str(default)
    if not re.fullmatch(r"\d{1,9}", text) or int(text) < least or (most is not None and int(text) > most):
        upper = "" if most is None else f" to {most}"
        raise ValueError(f"{name}={text}: use a whole number, {least}{upper or ' or more'}")
    return int(text)


def processes_here(environment, num_nodes: int = 1) -> int:
    """NUM_GPUS, checked; by default every GPU of this machine, or two CPU processes where there is none.

    ds_all.sh asks once, and hands the answer for all machines on as NUM_PROCESSES.
    """
    if environment.get("NUM_PROCESSES"):
        return number(environment, "NUM_PROCESSES", 0, least=num_nodes) // num_nodes
    if environment.get("NUM_GPUS"):
        number(environment, "NUM_GPUS", 0, least=1)
    there = count_gpus()
    wanted = number(environment, "NUM_GPUS", there or 2, least=1)
    if there and wanted > there:
        raise ValueError(f"NUM_GPUS={wanted}: this machine has {there}")
    return wanted


def count_gpus() -> int:
    done = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"], stdout=subprocess.PIPE, check=True
    )
    return int(done.stdout)


def _check_several(environment) -> None:
    """On several machines nothing may be made up by each of them."""
    if not environment.get("MODEL"):
        raise ValueError("several machines: name MODEL; the embedded default is for one")
    if not environment.get("OUTPUT"):
        raise ValueError("several machines: name OUTPUT, one folder that all of them see")


def _from_hostfile(environment, port: int) -> Job:
    for name in ("NUM_GPUS", "NNODES"):
        if environment.get(name):
            raise ValueError(f"HOSTFILE and {name}: give one of them; slots= in the file counts a machine's GPUs")
    path = Path(environment["HOSTFILE"])
    if not path.is_file():
        raise ValueError(f"HOSTFILE={path}: no such file; a line for each machine: name slots=8")
    hosts: dict[str, int] = {}
    for place, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        found = re.fullmatch(r"slots=([1-9]\d{0,3})", words[1]) if len(words) == 2 else None
        if not found or words[0] in hosts or words[0].startswith("-"):
            raise ValueError(f"{path} line {place}: {line.strip()!r}: write each machine once, as: name slots=8")
        hosts[words[0]] = int(found[1])
    if not hosts:
        raise ValueError(f"{path}: names no machine; a line for each: name slots=8")
    if len(hosts) > 1:
        _check_several({"OUTPUT": "made by base_run.sh, once", **environment})
    address = environment.get("MASTER_ADDR") or next(iter(hosts))
    if address == "localhost" and len(hosts) > 1:
        raise ValueError(f"{path}: the others can't reach a machine named localhost; write its name")
    return Job(tuple(hosts.values()), 0, address, port, tuple(hosts))


def first_host(nodes: str) -> str:
    """The first name of Slurm's list: node[07-09,12],login -> node07."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0]) if first else nodes


# --- one machine --------------------------------------------------------------------------------------------------


def run_node(job: Job, command: Sequence[str], *, by_pipe: bool = False) -> int:
    """Start this machine's workers and see them through to the end; return the exit code of the job."""
    signals = catch_signals()
    clear_dead_builds(shared=len(job.slots) > 1)
    listener = listen(job.port, "127.0.0.1" if len(job.slots) == 1 else "") if job.node == 0 else None
    job = replace(job, port=listener.getsockname()[1] if listener else job.port)
    workers = start_workers(job, command, dict(os.environ))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # a connection that is closed is no news to a launcher
    nodes = Nodes(job, listener, by_pipe=by_pipe)  # imports torch, while the workers do the same
    code = supervise(workers, signals, nodes)
    nodes.leave()
    return code


def clear_dead_builds(*, shared: bool) -> None:
    """Remove the locks of compilations that were killed: torch 2.13 waits for them without end and without a word.

    DeepSpeed compiles its kernels at the first start. Who compiles has the lock open; on another machine that can't be
    seen, so in a folder that may be `shared` a lock has to be ten minutes old.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(cache) / "torch_extensions")
    locks = {str(lock.resolve()): lock for depth in ("*", "*/*") for lock in root.glob(f"{depth}/lock")}
    for link in Path("/proc").glob("[0-9]*/fd/*") if locks else ():
        with contextlib.suppress(OSError):  # it has just ended, or is somebody else's
            locks.pop(os.readlink(link), None)
    for lock in locks.values():
        with contextlib.suppress(OSError):
            if time.time() - lock.stat().st_mtime > (600 if shared else 5):
                lock.unlink()
                say(f"{lock}: removed; the compilation that held it was killed")


def listen(port: int, address: str = "") -> socket.socket:
    """Take the port before anything else is done, so that it can't be lost on the way."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
    except OSError as error:
        raise ValueError(
            f"MASTER_PORT={port}: {error.strerror}; choose another, or leave it out on one machine"
        ) from error
    listener.listen(1024)
    return listener


def start_workers(job: Job, command: Sequence[str], environment: dict[str, str]) -> list[Child]:
    here, before = job.slots[job.node], sum(job.slots[: job.node])
    threads = max(1, len(os.sched_getaffinity(0)) // here)
    common = {
        "WORLD_SIZE": sum(job.slots),
        "LOCAL_WORLD_SIZE": here,
        "GROUP_RANK": job.node,
        "MASTER_ADDR": job.address if job.node else "127.0.0.1",
        "MASTER_PORT": job.port,
        "TORCHELASTIC_USE_AGENT_STORE": True,  # the launcher holds the port, not rank 0
        "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", threads),
    }
    workers = []
    for local_rank in range(here):
        own = {"RANK": before + local_rank, "LOCAL_RANK": local_rank}
        settings = {name: str(value) for name, value in (common | own).items()}
        workers.append(start(f"rank {before + local_rank}", [sys.executable, *command], environment | settings))
    return workers


def start(name: str, command: Sequence[str], environment: dict, *, stdin: int = subprocess.DEVNULL) -> Child:
    """Start a process in a group of its own, so that Ctrl-C reaches it once; it is killed when the launcher dies."""
    launcher, libc = os.getpid(), ctypes.CDLL(None)

    def die_with_launcher() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:
            os._exit(1)

    process = subprocess.Popen(command, env=environment, stdin=stdin, process_group=0, preexec_fn=die_with_launcher)
    return Child(name, process)


def catch_signals() -> deque:
    """Collect signals instead of dying; HUP stays ignored under nohup, INT does not in the background of a shell."""
    signals: deque = deque()
    for number_ in SIGNALS:
        if number_ != signal.SIGHUP or signal.getsignal(number_) != signal.SIG_IGN:
            signal.signal(number_, lambda received, _frame: signals.append(received))
    return signals


# --- until the end ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """Why the job fails: its exit code, a line, and how long the rest may take to end by itself."""

    code: int
    text: str
    patience: int = SETTLE


def supervise(children: list[Child], signals: deque, nodes: "Nodes | None" = None) -> int:
    """Wait for all children; pass signals on, and end all when one fails. Return the exit code of the job.

    A signal gives GRACE seconds to save; after a failure the others get SETTLE seconds to end by themselves.
    """
    grace, passed_on, failed, problem, deadline = number(os.environ, "GRACE", GRACE), set(), [], None, None
    while running := [child for child in children if child.code is None]:
        time.sleep(0.05)
        ended = [child for child in running if child.has_ended()]
        if any(child.code == STOPPED for child in ended) or signals:
            deadline = deadline or time.monotonic() + grace
        while signals:
            passed_on.add(signals[0])
            _tell(running, signals.popleft())
        # Who was killed comes first: the others' errors follow from that.
        failed += sorted((c for c in ended if not _in_order(c.code, passed_on)), key=lambda c: c.code)
        elsewhere = nodes.problem() if nodes else None
        if problem is None and (problem := _problem_of(failed) or elsewhere):
            deadline = time.monotonic() + problem.patience
            if not failed:
                say(problem.text)
            elif nodes:
                nodes.failure = f"{problem.code} machine {nodes.job.node}: {problem.text}"
        if deadline and time.monotonic() > deadline:
            _kill(children)
    if {child.code for child in children} != {2}:  # 2: a mistake in the arguments, said by train.py itself
        for child in failed:
            say(child.ending())
    return problem.code if problem else max((_exit_code(c.code) for c in children), key=lambda c: (c == STOPPED, c))


def _in_order(code: int, passed_on: set[int]) -> bool:
    return code in (0, STOPPED) or _exit_code(code) - 128 in passed_on


def _exit_code(code: int) -> int:
    """As a shell counts: 128 + the signal that killed it."""
    return 128 - code if code < 0 else code


def _problem_of(failed: list[Child]) -> Problem | None:
    return Problem(_exit_code(failed[0].code), failed[0].ending()) if failed else None


def _tell(running: list[Child], number_: int) -> None:
    say(f"passing {signal.Signals(number_).name} on to {', '.join(child.name for child in running)}")
    for child in running:
        with contextlib.suppress(OSError, ValueError):  # it has just ended
            child.send(number_)


def _kill(children: list[Child]) -> None:
    for child in [child for child in children if child.code is None]:
        say(f"{child.name} did not end; killed")
        child.kill()
        child.code = child.process.wait()


def say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)


# --- several machines ---------------------------------------------------------------------------------------------


class Nodes:
    """The launchers of all machines, meeting in the store that the first one holds: who lives, and what went wrong.

    `by_pipe`: another one started this, sends signals on its standard input, and lives while that is open.
    """

    def __init__(self, job: Job, listener: socket.socket | None, *, by_pipe: bool):
        self.job, self.store, self.by_pipe, self.next_look, self.failure = job, None, by_pipe, 0.0, ""
        self.timeout = number(os.environ, "NODE_TIMEOUT", NODE_TIMEOUT)
        self.silent_since = dict.fromkeys(set(range(len(job.slots))) - {job.node}, time.monotonic())
        self.beats = dict.fromkeys(self.silent_since, 0)
        if listener is not None:
            self._connect(is_master=True, master_listen_fd=listener.detach())

    def _connect(self, **options) -> None:
        from torch.distributed import TCPStore

        address = self.job.address if self.job.node else "127.0.0.1"
        # While it waits for an answer no signal gets through: a little at a time.
        self.store = TCPStore(
            address, self.job.port, wait_for_workers=False, timeout=timedelta(seconds=CONNECT), **options
        )

    def problem(self) -> Problem | None:
        """Look once a second for what is wrong elsewhere; None while all is well."""
        if time.monotonic() < self.next_look:
            return None
        self.next_look = time.monotonic() + 1
        if self.by_pipe:
            text = sys.stdin.buffer.raw.read(1024)
            if text == b"":
                return Problem(LOST, "the launcher of the job is gone", patience=0)
            for word in (text or b"").split():
                os.kill(os.getpid(), int(word))
        where, was_there = f"{self.job.address}:{self.job.port}", self.store is not None
        try:
            return self._exchange() if self.beats else None
        except (OSError, RuntimeError):
            if was_there:
                self.beats = {}
                return Problem(LOST, f"the launcher of machine 0 ({where}) is gone")
            if time.monotonic() > self.silent_since[0] + self.timeout:
                return Problem(LOST, f"no launcher at {where} for NODE_TIMEOUT={self.timeout} seconds")
            return None

    def _exchange(self) -> Problem | None:
        if self.store is None:
            socket.create_connection((self.job.address, self.job.port), timeout=CONNECT).close()
            self._connect(is_master=False)
        self.store.add(f"beat {self.job.node}", 1)
        if self.failure:
            self.store.set("failed", self.failure)
        elif self.store.check(["failed"]):
            code, _, text = self.store.get("failed").decode().partition(" ")
            return Problem(int(code), text)
        for node, before in list(self.beats.items()):
            self.beats[node] = self.store.add(f"beat {node}", 0)
            if self.beats[node] != before or self.store.check([f"left {node}"]):
                self.silent_since[node] = time.monotonic()
            elif time.monotonic() > self.silent_since[node] + self.timeout:
                self.beats = {}  # nobody to wait for at the end
                return Problem(LOST, f"no sign of machine {node} for NODE_TIMEOUT={self.timeout} seconds")
        return None

    def leave(self) -> None:
        """Say that all is over here, and why; the first machine stays until the others have left."""
        until = time.monotonic() + SETTLE
        with contextlib.suppress(OSError, RuntimeError):  # the machine that holds the store has gone first
            while self.beats and time.monotonic() < until:
                self._exchange()
                self.store.set(f"left {self.job.node}", "")
                if self.job.node or self.store.check([f"left {node}" for node in self.beats]):
                    return
                time.sleep(0.2)


def run_hosts(job: Job, command: Sequence[str]) -> int:
    """Start a launcher on each machine of the hostfile, this one too, and see them through."""
    signals = catch_signals()
    port = job.port
    if not port:
        with listen(0) as listener:
            port = listener.getsockname()[1]
    carried = {name: value for name, value in os.environ.items() if name.split("_")[0] in CARRIED}
    carried |= {name: os.environ[name] for name in ("GRACE", "NODE_TIMEOUT") if name in os.environ}
    line = f"cd {shlex.quote(os.getcwd())} && exec {shlex.quote(sys.executable)} -m sft.launch --remote"
    own_names = {"localhost", socket.gethostname(), socket.getfqdn()}
    children = []
    for node, host in enumerate(job.hosts):
        ssh = ["ssh", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", host, line]
        begin = ["sh", "-c", line] if host in own_names else ssh
        child = start(f"machine {host}", begin, dict(os.environ), stdin=subprocess.PIPE)
        # Through the pipe, not the command line: a token in the environment is nobody else's to see.
        settings = {"slots": job.slots, "node": node, "address": job.address, "port": port}
        child.process.stdin.write(json.dumps({"job": settings, "env": carried, "command": list(command)}).encode())
        child.process.stdin.write(b"\n")
        child.process.stdin.flush()
        children.append(child)
    return supervise(children, signals)


def run_remote() -> int:
    """Run one machine of a hostfile: the job, then signals, come on standard input; when it ends, so does all here."""
    given = json.loads(sys.stdin.buffer.raw.readline())
    os.environ.update(given["env"])
    job = Job(**{**given["job"], "slots": tuple(given["job"]["slots"])})
    there = count_gpus()
    if there and job.slots[job.node] > there:
        raise ValueError(f"HOSTFILE: slots={job.slots[job.node]} for {socket.gethostname()}, which has {there} GPUs")
    os.set_blocking(0, False)
    return run_node(job, given["command"], by_pipe=True)
