"""Start the processes of one machine, and what must be in order before they start."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from sft.launch.plan import Job
from sft.launch.processes import handled_signals
from sft.workers import PR_SET_PDEATHSIG


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
        """Kill it and its children; the launcher at the other end of an ssh ends when its input is closed."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def ending(self) -> str:
        if self.code < 0:
            return f"{self.name} was killed by {signal.Signals(-self.code).name}"
        return f"{self.name} ended with exit code {self.code}"


def start_workers(job: Job, command: Sequence[str], environment: dict[str, str]) -> list[Child]:
    """Start this machine's ranks, with torchrun's variables in their environment."""
    num_local = job.slots[job.node]
    first_rank = sum(job.slots[: job.node])
    num_threads = max(1, len(os.sched_getaffinity(0)) // num_local)
    common = {
        "WORLD_SIZE": sum(job.slots),
        "LOCAL_WORLD_SIZE": num_local,
        "GROUP_RANK": job.node,
        "MASTER_ADDR": job.address if job.node else "127.0.0.1",
        "MASTER_PORT": job.port,
        "TORCHELASTIC_USE_AGENT_STORE": True,  # the launcher holds the port, not rank 0
        "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", num_threads),
    }
    workers = []
    for local_rank in range(num_local):
        rank = first_rank + local_rank
        settings = {name: str(value) for name, value in (common | {"RANK": rank, "LOCAL_RANK": local_rank}).items()}
        workers.append(start_process(f"rank {rank}", [sys.executable, *command], environment | settings))
    return workers


def start_process(name: str, command: Sequence[str], environment: dict, *, stdin: int = subprocess.DEVNULL) -> Child:
    """Start a process in a group of its own, so that Ctrl-C reaches it once; the kernel kills it with the launcher."""
    launcher = os.getpid()
    libc = ctypes.CDLL(None)

    def ask_for_kill_with_launcher() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:
            os._exit(1)

    process = subprocess.Popen(
        command, env=environment, stdin=stdin, process_group=0, preexec_fn=ask_for_kill_with_launcher
    )
    return Child(name, process)


def collect_signals() -> deque:
    """Queue signals instead of ending."""
    signals: deque = deque()
    for number in handled_signals():
        signal.signal(number, lambda received, _frame: signals.append(received))
    return signals


def bind_port(port: int, address: str = "") -> socket.socket:
    """Bind the port before anything else starts, so that no other process can take it."""
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


def print_line(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)
