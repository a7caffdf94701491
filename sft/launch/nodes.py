"""The launchers of all machines of a job: heartbeats and failures, through a store that the first one holds."""

import contextlib
import os
import socket
import sys
import time
from dataclasses import dataclass
from datetime import timedelta

from sft.launch.plan import NODE_TIMEOUT_SECONDS, Job, read_number
from sft.launch.processes import LOST

CONNECT_SECONDS = 5  # for one attempt to reach another machine
EXIT_SECONDS = 10  # for the other processes to notice a failure and exit by themselves
CHECK_SECONDS = 1  # between two looks at the other machines


@dataclass(frozen=True)
class Problem:
    """Why the job fails: its exit code, a line, and how many seconds the rest may take to exit by itself."""

    code: int
    text: str
    seconds: int = EXIT_SECONDS


class Nodes:
    """This launcher's view of the others.

    `by_pipe`: another launcher started this one, sends signals on its standard input, and runs as long as that is open.
    """

    def __init__(self, job: Job, listener: socket.socket | None, *, by_pipe: bool):
        self.job = job
        self.store = None
        self.by_pipe = by_pipe
        self.failure = ""
        self.next_check = 0.0
        self.timeout = read_number(os.environ, "NODE_TIMEOUT", NODE_TIMEOUT_SECONDS)
        self.silent_since = dict.fromkeys(set(range(len(job.slots))) - {job.node}, time.monotonic())
        self.beats = dict.fromkeys(self.silent_since, 0)
        if listener is not None:
            self._connect(is_master=True, master_listen_fd=listener.detach())

    def _connect(self, **options) -> None:
        from torch.distributed import TCPStore

        address = self.job.address if self.job.node else "127.0.0.1"
        # No signal is handled while it waits for an answer, so the timeout is short.
        self.store = TCPStore(
            address, self.job.port, wait_for_workers=False, timeout=timedelta(seconds=CONNECT_SECONDS), **options
        )

    def find_problem(self) -> Problem | None:
        """Return what is wrong on another machine, or None; looks once in CHECK_SECONDS."""
        if time.monotonic() < self.next_check:
            return None
        self.next_check = time.monotonic() + CHECK_SECONDS
        if self.by_pipe:
            text = sys.stdin.buffer.raw.read(1024)
            if text == b"":
                return Problem(LOST, "the launcher of the job is gone", seconds=0)
            for word in (text or b"").split():
                os.kill(os.getpid(), int(word))
        return self._find_lost_machine() if self.beats else None

    def _find_lost_machine(self) -> Problem | None:
        where = f"{self.job.address}:{self.job.port}"
        was_connected = self.store is not None
        try:
            return self._exchange_heartbeats()
        except (OSError, RuntimeError):
            if was_connected:
                self.beats = {}
                return Problem(LOST, f"the launcher of machine 0 ({where}) is gone")
            if time.monotonic() > self.silent_since[0] + self.timeout:
                return Problem(LOST, f"no launcher at {where} for NODE_TIMEOUT={self.timeout} seconds")
            return None

    def _exchange_heartbeats(self) -> Problem | None:
        if self.store is None:
            socket.create_connection((self.job.address, self.job.port), timeout=CONNECT_SECONDS).close()
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
                self.beats = {}  # none to wait for at the end
                return Problem(LOST, f"no sign of machine {node} for NODE_TIMEOUT={self.timeout} seconds")
        return None

    def leave(self) -> None:
        """Tell the others that this machine is done, and of its failure; the first one waits until all have left."""
        until = time.monotonic() + EXIT_SECONDS
        with contextlib.suppress(OSError, RuntimeError):  # the machine that holds the store has left first
            while self.beats and time.monotonic() < until:
                self._exchange_heartbeats()
                self.store.set(f"left {self.job.node}", "")
                if self.job.node or self.store.check([f"left {node}" for node in self.beats]):
                    return
                time.sleep(0.2)
