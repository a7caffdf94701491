"""Handle signals, a launcher that is gone, ranks that died or froze, and two runs in one folder.

A thread receives the signals and watches the other ranks, so that a process that waits inside a library reacts, too.
Ranks communicate through a gloo group of their own, on the CPU, without waiting for a GPU.
"""

import atexit
import json
import os
import re
import select
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from sft.files import (
    HEARTBEAT_SECONDS,
    is_alive,
    is_local,
    release_lock,
    remove_temporaries,
    this_process,
    try_lock,
    write_json,
)

STOPPED = 75  # exit code after a signal and a complete checkpoint: the same command resumes the run
LOST = 76  # exit code when another rank died or froze
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# files of a running process in output_dir: its lock, one heartbeat file per rank
LOCK = ".lock"
RANKS = ".ranks"
GROUP_TIMEOUT = timedelta(days=1)  # of the gloo group: ranks may wait for one that prepares the data
STOPPING_SECONDS = 60.0  # to wait for a run that saves its last checkpoint
LOST_RANK_SECONDS = 5.0  # to find out which rank caused the error of a collective
LOST_RANK_ERRORS = r"onnection (closed|reset)|gloo|NCCL|[Tt]imed out"


def handled_signals() -> list[signal.Signals]:
    """Return SIGNALS without an ignored SIGHUP: nohup means it, a shell that ignores SIGINT under & does not."""
    return [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


class Stopped(Exception):
    """A signal ended the training, on all ranks at the same step, after a complete checkpoint."""


class UserError(ValueError):
    """A user's error that all ranks raise alike, so that rank 0 prints it for all."""


class Guard:
    """Handles signals and lost ranks. As a context it installs the handlers, and on leaving restores the old ones.

    `lasting`: the process exits next, and a late signal must not change its exit code.

    `stage` decides what a signal does: "loading" and "saving" end the process at once (nothing is lost: before the
    first step, or after the last checkpoint), "training" waits for the end of the step, "done" ignores it.
    """

    def __init__(self, *, lasting: bool = False):
        self.lasting = lasting
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.stage = "loading"
        self.requested = None
        self.lock = None
        self.resume_command = ""
        self.folder = None
        self.timeout = float("inf")
        self._group = None
        self._has_launcher = "LOCAL_RANK" in os.environ
        self._parent = os.getppid()
        self._heartbeats = {}
        self._files_lock = threading.Lock()
        self._active = False
        self._made_folder = False

    def __enter__(self) -> "Guard":
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in handled_signals()}
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._active = True
        # Blocked while forking: else a signal to the child, before it has reset its handlers, would arrive here.
        block = partial(self._mask_signals, signal.SIG_BLOCK)
        unblock = partial(self._mask_signals, signal.SIG_UNBLOCK)
        os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=self._reset_in_child)
        self._thread = threading.Thread(target=self._run, name="guard", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        is_of_this_rank = self.stage == "training" and kind is not None and not issubclass(kind, (Stopped, UserError))
        if error is not None:
            error.printed_by = "all" if is_of_this_rank else "machines"
            if isinstance(error, UserError):
                error.printed_by = "first rank"
        self.stage = "done"
        self._active = False
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_IGN if self.lasting else handler or signal.SIG_DFL)
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)
        self._remove_own_files(keep_rank=is_of_this_rank)
        self._group = None
        if self.lasting:
            is_of_all_ranks = issubclass(kind or Stopped, (Stopped, UserError)) or getattr(error, "code", 0) == STOPPED
            close_process_groups(abort=not is_of_all_ranks)
            code = error.code if isinstance(error, SystemExit) else error
            if self.world_size > 1 and isinstance(code, int | None):
                end_process(code or 0)

    def _reset_in_child(self) -> None:
        """In a forked child (a data loader's worker): its signals are not handled by this process."""
        if self._active:
            signal.set_wakeup_fd(-1)
            for number in self._handlers:
                signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
            self._mask_signals(signal.SIG_UNBLOCK)
            self._active = False

    def _mask_signals(self, how: int) -> None:
        if self._active:
            signal.pthread_sigmask(how, SIGNALS)

    # --- the thread ---

    def _run(self) -> None:
        last = time.monotonic()
        while True:
            ready, _, _ = select.select([self._read], [], [], HEARTBEAT_SECONDS)
            for number in os.read(self._read, 64) if ready else b"":
                if number == 0:
                    return
                if number in self._handlers:
                    self.handle_signal(number)
            if self._has_launcher and os.getppid() != self._parent:
                self._has_launcher = False
                self.handle_signal(signal.SIGTERM, "the launcher is gone")
            now = time.monotonic()
            if now - last > 10 * HEARTBEAT_SECONDS:  # this process was frozen: the other ranks may have been, too
                self._heartbeats.clear()
            last = now
            with self._files_lock:
                self._watch_ranks(now)

    def handle_signal(self, number: int, reason: str = "") -> None:
        """React to a signal as the stage demands."""
        reason = reason or signal.Signals(number).name
        if self.stage == "loading":
            self._exit(128 + number, f"{reason} before the first step; nothing to save")
        if self.stage == "saving":
            self._exit(STOPPED, f"{reason} while the final model was saved; {self.resume_command}")
        if self.stage == "training" and self.requested is None:
            self.requested = number
            if self.lock:
                with suppress(OSError):  # a full disk; only a run that waits for this one would have read it
                    write_json(self.lock, {**this_process(), "stopping": True})
            self._print(f"{reason}: the step ends, then a checkpoint is saved")

    def _watch_ranks(self, now: float) -> None:
        """Write this rank's heartbeat, and exit when the next rank has none."""
        if self.folder is None or not self._active:
            return
        for path in [self.folder / RANKS / str(self.rank), *([self.lock] if self.lock else [])]:
            with suppress(OSError):
                os.utime(path)
        lost = self._find_lost_neighbour(now) if self.world_size > 1 else None
        if lost:
            self._exit(LOST, f"{lost}; the run ends, {self.resume_command}")

    def _find_lost_neighbour(self, now: float) -> str | None:
        """Return a line when the next rank died or froze; a frozen one of this machine is killed."""
        other = (self.rank + 1) % self.world_size
        path = self.folder / RANKS / str(other)
        try:
            touched = path.stat().st_mtime_ns
            process = json.loads(path.read_text())
        except (OSError, ValueError):
            return None  # not started yet, or ended without an error
        if _is_dead(process):
            return f"{_name_rank(other, process)} died"
        if self._heartbeats.get(other, (None, now))[0] != touched:
            self._heartbeats[other] = touched, now
        silent_seconds = now - self._heartbeats[other][1]
        if silent_seconds < self.timeout:
            return None
        if is_local(process):
            with suppress(ProcessLookupError):
                os.kill(process["pid"], signal.SIGKILL)
        return f"{_name_rank(other, process)} has not answered for {silent_seconds:.0f} seconds (--rank_timeout)"

    def _exit(self, code: int, text: str) -> None:
        """End the process from the thread: its main thread may wait for ever inside a collective."""
        try:
            self._print(text)
            remove_temporaries()
            self._remove_own_files(keep_rank=code == LOST)
        finally:
            os._exit(code)

    def _print(self, text: str) -> None:
        where = f"rank {self.rank}: " if self.world_size > 1 else ""
        with suppress(OSError):  # its reader may be gone; an error would end this thread
            print(f"train.py: {where}{text}", file=sys.stderr, flush=True)
            sys.stdout.flush()

    def _remove_own_files(self, *, keep_rank: bool) -> None:
        if self.folder is not None and not keep_rank:
            own = self.folder / RANKS / str(self.rank)
            with suppress(FileNotFoundError):  # rank 0 may remove the files of all ranks meanwhile
                if f'"pid": {os.getpid()},' in own.read_text():
                    own.unlink()
        if self.lock:
            lock = self.lock
            self.lock = None
            shutil.rmtree(self.folder / RANKS, ignore_errors=True)
            release_lock(lock)
            if self._made_folder and not any(self.folder.iterdir()):
                self.folder.rmdir()

    # --- called by the run ---

    def lock_output_dir(self, output_dir: str, *, timeout: float, resume_command: str) -> None:
        """Lock `output_dir` for this run, on all ranks, and start to watch them; UserError when another run has it."""
        if self.world_size > 1:
            from torch import distributed

            self._group = distributed.new_group(backend="gloo", timeout=GROUP_TIMEOUT)
        folder = Path(output_dir)
        problem = None
        if self.rank == 0:
            try:
                self._made_folder = not folder.exists()
                folder.mkdir(parents=True, exist_ok=True)
                self.folder = folder
                self.lock = lock_folder(folder)
                shutil.rmtree(folder / RANKS, ignore_errors=True)
                (folder / RANKS).mkdir()
            except (ValueError, OSError) as error:
                problem = f"--output_dir {folder}: {error.strerror}" if isinstance(error, OSError) else str(error)
        problem = self.broadcast(problem)
        if problem:
            raise UserError(problem)
        is_shared = (folder / RANKS).is_dir()
        if is_shared:
            write_json(folder / RANKS / str(self.rank), this_process())
        if not all(self.all_gather(is_shared)):
            raise UserError(f"--output_dir {output_dir}: all machines must see the same folder")
        with self._files_lock:
            self.resume_command = resume_command
            self.timeout = timeout
            self.folder = folder

    def end_training(self) -> None:
        """Enter the stage "saving" on all ranks together; Stopped when a signal came before."""
        number = self.stop_requested()
        self.stage = "saving"
        if number:
            raise Stopped("stopped after the last step")

    def find_lost_rank(self, error: RuntimeError) -> str | None:
        """Return which rank was lost, when an error of a collective comes from that; None for any other error."""
        until = time.monotonic() + LOST_RANK_SECONDS
        while self.folder is not None and self.world_size > 1 and time.monotonic() < until:
            for other in range(self.world_size):
                try:
                    process = json.loads((self.folder / RANKS / str(other)).read_text())
                except (OSError, ValueError):
                    continue
                if _is_dead(process):
                    return f"{_name_rank(other, process)} died"
            if not re.search(LOST_RANK_ERRORS, str(error)):
                return None
            time.sleep(0.2)
        return None if self.world_size == 1 else f"another rank is gone ({str(error).splitlines()[0][:200]})"

    def broadcast(self, value):
        """Return rank 0's `value`, on all ranks."""
        if self._group is None:
            return value
        from torch import distributed

        box = [value]
        distributed.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def all_gather(self, value) -> list:
        """Return the value of every rank, on all ranks."""
        if self._group is None:
            return [value]
        from torch import distributed

        box = [None] * self.world_size
        distributed.all_gather_object(box, value, group=self._group)
        return box

    def wait_for_all(self) -> None:
        """Return when every rank has called this; a rank may take GROUP_TIMEOUT; --ddp_timeout has no effect."""
        self.all_gather(None)

    def check_same(self, settings: Mapping[str, Any]) -> None:
        """Wait for all ranks; UserError on all where one has other `settings` than rank 0, as on another machine."""
        (_host, first), *others = self.all_gather((this_process()["host"], settings))
        for rank, (host, found) in enumerate(others, start=1):
            if different := _name_differences(first, found):
                raise UserError(
                    f"rank {rank} on {host} has not the {', '.join(different)} of rank 0; "
                    "all machines must see the same files and get the same flags"
                )

    def stop_requested(self) -> int | None:
        """Return the signal that any rank received, the same on all, or None; called at the end of a step."""
        return self._all_reduce_max(self.requested or 0) or None

    def is_set_on_any_rank(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank, the same on all."""
        return bool(self._all_reduce_max(int(flag)))

    def _all_reduce_max(self, value: int) -> int:
        if self._group is None:
            return value
        import torch

        box = torch.tensor([value])
        torch.distributed.all_reduce(box, op=torch.distributed.ReduceOp.MAX, group=self._group)
        return int(box)


def close_process_groups(*, abort: bool) -> None:
    """End the threads of gloo and NCCL: one that still runs when Python exits may abort the process.

    `abort`: the other ranks don't leave now or are lost, and NCCL would wait for them.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    if abort and "nccl" in distributed.get_backend():
        distributed.distributed_c10d._abort_process_group()
    else:
        distributed.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """Exit as Python does, but for its finalizers: DeepSpeed keeps process groups, whose threads may abort them."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def _name_differences(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the keys in which two dictionaries differ, and those of dictionaries in them in brackets."""
    names = []
    for name in sorted(first.keys() | other.keys()):
        values = first.get(name), other.get(name)
        if values[0] != values[1]:
            is_nested = all(isinstance(value, dict) for value in values)
            names.append(f"{name} ({', '.join(_name_differences(*values))})" if is_nested else name)
    return names


def _is_dead(process: dict) -> bool:
    return is_local(process) and not is_alive(process)


def _name_rank(rank: int, process: dict) -> str:
    return f"rank {rank} (process {process['pid']} on {process['host']})"


def lock_folder(folder: Path) -> Path:
    """Lock a folder for this process and return the lock; ValueError when a living run has it.

    A run that is saving its last checkpoint after a signal is waited for, up to STOPPING_SECONDS.
    """
    path = folder / LOCK
    began = time.monotonic()
    while (holder := try_lock(path)) is not None:
        seconds = STOPPING_SECONDS if holder.get("stopping") else 2 * HEARTBEAT_SECONDS
        if time.monotonic() - began > seconds:
            who = f"process {holder['pid']} on {holder['host']} since {holder['since']}" if holder else "another run"
            raise ValueError(
                f"--output_dir {folder}: {who} trains into it; wait for it, stop it, or name another folder"
            )
        time.sleep(0.1)
    return path
