"""Ends a run well: signals, a launcher that is gone, ranks that died or froze, and two runs in one folder.

A thread receives the signals and watches the other ranks, so that a process that waits inside a library answers too.
Ranks agree through a gloo group of their own, on the CPU: asking costs no wait for a GPU.
"""

import json
import os
import re
import select
import shutil
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

STOPPED = 75  # exit code after a signal, once a checkpoint is sealed: the same command continues the run
LOST = 76  # exit code when another rank died or froze
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
LOCK, RANKS = ".lock", ".ranks"  # what a running process keeps in output_dir
TICK = 1.0  # seconds between two looks at the others


class Stopped(Exception):
    """A signal ended the training, on all ranks at the same step, after a sealed checkpoint."""


class Agreed(ValueError):
    """A user's error that all ranks raise alike, so that the first one says it for all."""


class Guard:
    """What stands around a run. As a context it installs the handlers, and on leaving puts everything back.

    `lasting`: the process ends next, and a late signal shall not change its exit code.

    `stage` decides what a signal does: "loading" and "saving" end the process at once (nothing is lost: before the
    first step, or after the last checkpoint), "training" waits for the end of the step, "done" ignores it.
    """

    def __init__(self, *, lasting: bool = False):
        self.lasting = lasting
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.stage, self.requested, self.lock, self.continue_with = "loading", None, None, ""
        self.folder, self.timeout, self._group = None, float("inf"), None
        self._launched, self._parent = "LOCAL_RANK" in os.environ, os.getppid()
        self._seen, self._files, self._active, self._made_folder = {}, threading.Lock(), False, False

    def __enter__(self) -> "Guard":
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # nohup ignores SIGHUP, and means it; a shell ignores SIGINT in whatever it starts with &, and doesn't.
        numbers = [
            number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
        ]
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in numbers}
        self._wakeup, self._active = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False), True
        # Blocked while forking: else a signal to the child, before it forgets, would arrive here.
        block, unblock = partial(self._mask, signal.SIG_BLOCK), partial(self._mask, signal.SIG_UNBLOCK)
        os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=self._forget)
        self._thread = threading.Thread(target=self._run, name="guard", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        ended_alone = self.stage == "training" and kind is not None and not issubclass(kind, (Stopped, Agreed))
        if error is not None:
            error.alone = ended_alone
        self.stage, self._active = "done", False
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_IGN if self.lasting else handler or signal.SIG_DFL)
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read), os.close(self._write)
        self._leave(keep_rank=ended_alone)

    def _forget(self) -> None:
        """In a forked child (a data loader's worker): signals are its own, not this process's."""
        if self._active:
            signal.set_wakeup_fd(-1)
            for number in self._handlers:
                signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
            self._mask(signal.SIG_UNBLOCK)
            self._active = False

    def _mask(self, how: int) -> None:
        if self._active:
            signal.pthread_sigmask(how, SIGNALS)

    # --- what the thread does ---

    def _run(self) -> None:
        last = time.monotonic()
        while True:
            ready, _, _ = select.select([self._read], [], [], TICK)
            for number in os.read(self._read, 64) if ready else b"":
                if number == 0:
                    return
                if number in self._handlers:
                    self.receive(number)
            if self._launched and os.getppid() != self._parent:
                self._launched = False
                self.receive(signal.SIGTERM, "the launcher is gone")
            now = time.monotonic()
            if now - last > 10 * TICK:  # this process itself was stopped: the others may have been too
                self._seen.clear()
            last = now
            with self._files:
                self._watch(now)

    def receive(self, number: int, why: str = "") -> None:
        """Act on a signal as the stage demands."""
        why = why or signal.Signals(number).name
        if self.stage == "loading":
            self._end(128 + number, f"{why} before the first step; nothing to save")
        if self.stage == "saving":
            self._end(STOPPED, f"{why} while the final model was saved; {self.continue_with}")
        if self.stage == "training" and self.requested is None:
            self.requested = number
            if self.lock:
                write_whole(self.lock, {**_myself(), "stopping": True})
            self._tell(f"{why}: the step ends, then a checkpoint is saved")

    def _watch(self, now: float) -> None:
        """Show that this rank lives, and end the process when the next one does not."""
        if self.folder is None or not self._active:
            return
        for path in [self.folder / RANKS / str(self.rank), *([self.lock] if self.lock else [])]:
            if path.exists():
                os.utime(path)
        lost = self._lost(now) if self.world_size > 1 else None
        if lost:
            self._end(LOST, f"{lost}; the run ends, {self.continue_with}")

    def _lost(self, now: float) -> str | None:
        other = (self.rank + 1) % self.world_size
        path = self.folder / RANKS / str(other)
        try:
            touched, who = path.stat().st_mtime_ns, json.loads(path.read_text())
        except (OSError, ValueError):
            return None  # not there yet, or it left in good order
        name = f"rank {other} (process {who['pid']} on {who['host']})"
        here = who["host"] == socket.gethostname()
        if here and not _alive(who):
            return f"{name} died"
        if self._seen.get(other, (None, now))[0] != touched:
            self._seen[other] = touched, now
        since = now - self._seen[other][1]
        if since < self.timeout:
            return None
        if here:
            os.kill(who["pid"], signal.SIGKILL)
        return f"{name} has not answered for {since:.0f} seconds (--rank_timeout)"

    def _end(self, code: int, text: str) -> None:
        """End the process from the thread: its main thread may wait for ever inside a collective."""
        self._tell(text)
        self._leave(keep_rank=code == LOST)
        os._exit(code)

    def _tell(self, text: str) -> None:
        where = f"rank {self.rank}: " if self.world_size > 1 else ""
        print(f"train.py: {where}{text}", file=sys.stderr, flush=True)
        sys.stdout.flush()

    def _leave(self, *, keep_rank: bool) -> None:
        if self.folder is not None and not keep_rank:
            mine = self.folder / RANKS / str(self.rank)
            if mine.exists() and f'"pid": {os.getpid()},' in mine.read_text():
                mine.unlink(missing_ok=True)
        if self.lock:
            lock, self.lock = self.lock, None
            shutil.rmtree(self.folder / RANKS, ignore_errors=True)
            lock.unlink(missing_ok=True)
            if self._made_folder and not any(self.folder.iterdir()):
                self.folder.rmdir()

    # --- what the run calls ---

    def hold(self, output_dir: str, *, timeout: float, continue_with: str) -> None:
        """Take `output_dir` for this run, on all ranks, and begin to watch them; Agreed when another run has it."""
        if self.world_size > 1:
            from torch import distributed

            self._group = distributed.new_group(backend="gloo", timeout=timedelta(days=1))
        folder, problem = Path(output_dir), None
        if self.rank == 0:
            try:
                self._made_folder = not folder.exists()
                folder.mkdir(parents=True, exist_ok=True)
                self.folder, self.lock = folder, take_lock(folder)
                shutil.rmtree(folder / RANKS, ignore_errors=True)
                (folder / RANKS).mkdir()
            except (ValueError, OSError) as error:
                problem = f"--output_dir {folder}: {error.strerror}" if isinstance(error, OSError) else str(error)
        problem = self.from_first(problem)
        if problem:
            raise Agreed(problem)
        shared = (folder / RANKS).is_dir()
        if shared:
            write_whole(folder / RANKS / str(self.rank), _myself())
        if not all(self.gather(shared)):
            raise Agreed(f"--output_dir {output_dir}: all machines must see the same folder")
        with self._files:
            self.continue_with, self.timeout, self.folder = continue_with, timeout, folder

    def finish_training(self) -> None:
        """Go on to what a signal may end at once; all ranks together, and with the signals that came before."""
        number = self.agree_to_stop()
        self.stage = "saving"
        if number:
            raise Stopped("stopped after the last step")

    def find_lost(self, error: RuntimeError, *, patience: float = 5.0) -> str | None:
        """Return which rank was lost, when an error of a collective comes from that; None for any other error."""
        until = time.monotonic() + patience
        while self.folder is not None and self.world_size > 1 and time.monotonic() < until:
            for other in range(self.world_size):
                try:
                    who = json.loads((self.folder / RANKS / str(other)).read_text())
                except (OSError, ValueError):
                    continue
                if who["host"] == socket.gethostname() and not _alive(who):
                    return f"rank {other} (process {who['pid']} on {who['host']}) died"
            if not re.search(r"onnection (closed|reset)|gloo|NCCL|[Tt]imed out", str(error)):
                return None
            time.sleep(0.2)
        return None if self.world_size == 1 else f"another rank is gone ({str(error).splitlines()[0][:200]})"

    def from_first(self, value):
        """Return rank 0's `value`, on all ranks."""
        if self._group is None:
            return value
        from torch import distributed

        box = [value]
        distributed.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def gather(self, value) -> list:
        """Return the value of every rank, on all ranks; also waits for all of them."""
        if self._group is None:
            return [value]
        from torch import distributed

        box = [None] * self.world_size
        distributed.all_gather_object(box, value, group=self._group)
        return box

    def agree_to_stop(self) -> int | None:
        """Return the signal that any rank received, the same on all, or None; called at the end of a step."""
        return self._largest(self.requested or 0) or None

    def any_of(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank, the same on all."""
        return bool(self._largest(int(flag)))

    def _largest(self, value: int) -> int:
        if self._group is None:
            return value
        import torch

        box = torch.tensor([value])
        torch.distributed.all_reduce(box, op=torch.distributed.ReduceOp.MAX, group=self._group)
        return int(box)


# --- one run in a folder ------------------------------------------------------------------------------------------


def take_lock(folder: Path, *, patience: float = 60.0) -> Path:
    """Write this process into the folder's lock; ValueError when a living run has it.

    The lock of a dead process is taken over; so is that of another host that no longer touches it. A run that is just
    saving its last checkpoint after a signal is waited for, up to `patience` seconds.
    """
    path, began = folder / LOCK, time.monotonic()
    while True:
        if _claim(path):
            return path
        holder, touched = _read_lock(path)
        waited = time.monotonic() - began
        dead = holder is not None and (holder["host"] == socket.gethostname() and not _alive(holder))
        abroad = holder is None or holder["host"] != socket.gethostname()
        if dead or (abroad and time.time() - touched > 20 * TICK):
            if _read_lock(path) == (holder, touched):
                path.unlink(missing_ok=True)
            continue
        if waited > (patience if holder and holder.get("stopping") else 2 * TICK):
            who = f"process {holder['pid']} on {holder['host']} since {holder['since']}" if holder else "another run"
            raise ValueError(
                f"--output_dir {folder}: {who} trains into it; wait for it, stop it, or name another folder"
            )
        time.sleep(0.1)


def _claim(path: Path) -> bool:
    """Make the lock with its content in one step, unless there is one: a full disk leaves no empty lock behind."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(_myself()))
        os.link(partial, path)
    except FileExistsError:
        return False
    finally:
        partial.unlink(missing_ok=True)
    return True


def _read_lock(path: Path) -> tuple[dict | None, float]:
    try:
        return json.loads(path.read_text()), path.stat().st_mtime
    except FileNotFoundError:
        return None, 0.0
    except (OSError, ValueError):
        return None, time.time()


def _myself() -> dict:
    started = _start_time(os.getpid())
    return {"pid": os.getpid(), "host": socket.gethostname(), "start": started, "since": time.strftime("%F %T")}


def _alive(who: dict) -> bool:
    """Whether the process still runs; another one with the same number, and a zombie, do not count."""
    try:
        os.kill(who["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _start_time(who["pid"]) == who["start"]


def _start_time(pid: int) -> str | None:
    """A process's start in clock ticks since boot; "dead" for a zombie, None where there is no /proc."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "dead" if state in "ZX" else rest[18]


def write_whole(path: Path, value) -> None:
    """Write JSON beside and rename it into place, on the disk before the name is."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with open(partial, "w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)
