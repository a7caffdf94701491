"""Files that survive a kill: written whole, staged in a folder, locked, or appended to line by line.

A new file or folder is written under a temporary name beside its target, fsynced, then renamed. Temporary names end in
`.partial`; those of this process are listed, so that `remove_temporaries` can delete them before a hard exit.
"""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

PARTIAL = ".partial"  # the end of every temporary name
CACHE_DIR = ".cache"  # of tokenised data and hashes, unless a flag names another
MAX_SHARD_SIZE = "5GB"  # of a file of weights, unless a flag names another
HEARTBEAT_SECONDS = 1.0  # between two touches of a lock
STALE_SECONDS = 20.0  # after which an untouched lock of another machine counts as abandoned
RENAME_EXCHANGE = 2  # of Linux's renameat2
AT_FDCWD = -100

_temporaries: set[Path] = set()


# --- a file or a folder, written whole ----------------------------------------------------------------------------


def temporary_path(target: Path) -> Path:
    """Return an unused path beside `target`: a hidden name that ends in `.partial`."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}{PARTIAL}")


@contextlib.contextmanager
def _make_temporary(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`; what is left under it at the end is deleted."""
    path = temporary_path(target)
    _temporaries.add(path)
    try:
        yield path
    finally:
        _delete_path(path)
        _temporaries.discard(path)


def _delete_path(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_temporaries() -> None:
    """Delete what this process has not finished; for an exit that runs no `finally`, from any thread."""
    for path in list(_temporaries):
        for _attempt in range(2):  # another thread may add a file while the folder is being deleted
            with contextlib.suppress(OSError):
                _delete_path(path)


@contextlib.contextmanager
def open_whole(path: str | Path, mode: str = "w", **options) -> Iterator[IO]:
    """Open a stream for a new file that replaces `path` when the block ends well; else `path` stays as it was."""
    target = Path(path)
    if "b" not in mode:
        options = {"encoding": "utf-8", **options}
    with _make_temporary(target) as partial:
        with open(partial, mode, **options) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, target)


def write_text(path: str | Path, text: str) -> None:
    """Replace a file by `text`; half of a surrogate pair becomes a question mark."""
    with open_whole(path, errors="replace") as stream:
        stream.write(text)


def write_json(path: str | Path, value: object, *, ensure_ascii: bool = False) -> None:
    """Replace a file by `value` as JSON; with `ensure_ascii`, halves of surrogate pairs can be read back."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=ensure_ascii) + "\n")


@contextlib.contextmanager
def stage_folder(target: str | Path) -> Iterator[Path]:
    """A new folder beside `target`, renamed to it when the block ends well, else deleted.

    All files are on the disk before the rename. OSError when `target` has come to exist and is not an empty folder.
    """
    target = Path(target)
    with _make_temporary(target) as staged:
        staged.mkdir()
        yield staged
        for path in staged.rglob("*"):
            if path.is_file() and not path.is_symlink():
                sync_file(path)
        sync_folder(staged)
        os.rename(staged, target)
        sync_folder(target.parent)


def remove_cut_off(folder: Path) -> None:
    """Delete the temporary files in a folder, but not those that a thread of this process is writing."""
    written = {path.name for path in list(_temporaries)}
    for path in folder.glob(f".*{PARTIAL}"):
        if path.name not in written:
            path.unlink(missing_ok=True)


def remove_abandoned(target: Path) -> None:
    """Delete what killed processes left of `target`; only for the holder of its lock."""
    for path in target.parent.glob(f".{target.name}.*{PARTIAL}"):
        _delete_path(path)


def move_files(staged: Path, folder: Path, names: Sequence[str]) -> None:
    """Move files into another folder of the same disk, in this order, each on the disk before it is renamed."""
    for name in names:
        sync_file(staged / name)
        os.replace(staged / name, folder / name)
    sync_folder(folder)


def hash_file(path: str | Path) -> str:
    """Return the sha256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def exchange_names(left: Path, right: Path) -> None:
    """Swap two names in one step (Linux's renameat2), so that neither is ever missing; elsewhere in three."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 and renameat2(AT_FDCWD, os.fsencode(left), AT_FDCWD, os.fsencode(right), RENAME_EXCHANGE) == 0:
        return
    between = right.with_name(f".exchange-{right.name}")
    os.rename(right, between)
    os.rename(left, right)
    os.rename(between, left)


def sync_file(path: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until a folder's names are on the disk."""
    sync_file(folder)


# --- one process of this machine at a time ------------------------------------------------------------------------


def lock_stream(stream: IO, busy: str) -> None:
    """Lock an open file until it is closed; ValueError(`busy`) when another process has it.

    On a network file system without locks this has no effect.
    """
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(busy) from None
    except OSError:
        pass


class LineLog:
    """A file of lines that one process at a time appends to; a kill at any byte costs at most the last line.

    A last line without its newline was cut off. It is not read, and removed by the first `append`.
    """

    def __init__(self, path: str | Path, *, busy: str):
        """Open or create it; ValueError(`busy`) when another process writes into it."""
        self.path = Path(path)
        self._stream = open(self.path, "ab+")  # noqa: SIM115  close() is ours
        self._end: int | None = None
        self._lock = threading.Lock()
        try:
            lock_stream(self._stream, busy)
        except BaseException:
            self._stream.close()
            raise

    def read(self) -> Iterator[tuple[int, bytes]]:
        """Yield the offset and the bytes of each whole line."""
        end = 0
        with open(self.path, "rb") as stream:
            for line in stream:
                if line.endswith(b"\n"):
                    yield end, line
                    end += len(line)
        self._end = end

    def read_first(self) -> bytes:
        """Return the first line, whole or cut off; empty for a new file."""
        with open(self.path, "rb") as stream:
            return stream.readline()

    def append(self, line: bytes, *, sync: bool = True) -> int:
        """Write a line, which ends in a newline, and return its offset; `sync`: wait until it is on the disk."""
        with self._lock:
            if self._end is None:
                for _offset, _line in self.read():
                    pass
            start = self._end
            if os.fstat(self._stream.fileno()).st_size != start:
                os.ftruncate(self._stream.fileno(), start)
            self._stream.write(line)
            self._stream.flush()
            if sync:
                os.fsync(self._stream.fileno())
            self._end = start + len(line)
            return start

    def close(self) -> None:
        self._stream.close()


# --- one process of all machines that share a folder --------------------------------------------------------------


def this_process() -> dict:
    """Return who this process is, for a lock: number, machine and start, which tell it from a later one."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "namespace": _pid_namespace(),
        "start": start_time(os.getpid()),
        "since": time.strftime("%F %T"),
    }


def is_local(process: dict) -> bool:
    """Whether its number means something here: it is of this machine, and of this container."""
    mine = _pid_namespace()
    return process["host"] == socket.gethostname() and process.get("namespace", mine) == mine


def is_alive(process: dict) -> bool:
    """Whether a local process still runs; a later one with its number, or a zombie, does not count."""
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return start_time(process["pid"]) == process["start"]


def _pid_namespace() -> str | None:
    """Containers of one machine may share its name, but not its process numbers."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def start_time(pid: int) -> str | None:
    """Return a process's start in clock ticks since boot; "dead" for a zombie, None where there is no /proc."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "dead" if state in "ZX" else rest[18]


def try_lock(path: Path) -> dict | None:
    """Create the lock file `path` for this process and return None; or return what is known of its living holder.

    The lock of a dead process is taken over, and one of another machine that was not touched for STALE_SECONDS. The
    holder must touch it (`os.utime`) every HEARTBEAT_SECONDS, and delete it at the end.
    """
    while (clock := _create_lock(path)) is not None:
        holder, touched = _read_lock(path)
        if touched is None:  # it has just been released
            continue
        is_known = holder is not None and is_local(holder)
        abandoned = not is_alive(holder) if is_known else clock - touched > STALE_SECONDS
        if not abandoned:
            return holder or {}
        _delete_abandoned(path, (holder, touched))
    return None


def _delete_abandoned(path: Path, lock: tuple) -> None:
    """Delete the lock file if it is still `lock`: of two that have read it, one may have a new lock there by now."""
    with contextlib.suppress(FileNotFoundError), open(path, "r+b" if os.access(path, os.W_OK) else "rb") as stream:
        with contextlib.suppress(OSError):  # a network file system without locks
            fcntl.flock(stream, fcntl.LOCK_EX)
        if os.path.samestat(os.fstat(stream.fileno()), path.stat()) and _read_lock(path) == lock:
            path.unlink()


def _create_lock(path: Path) -> float | None:
    """Create the lock with its content in one step and return None; where there is one, the file system's time.

    A full disk leaves no empty lock. The time is that of a file made just now: machines' clocks may differ.
    """
    with _make_temporary(path) as partial:
        partial.write_text(json.dumps(this_process()))
        try:
            _link_or_copy(partial, path)
        except FileExistsError:
            return partial.stat().st_mtime
    return None


def _link_or_copy(source: Path, path: Path) -> None:
    """Give a file a second name, or copy it where the file system has no hard links; FileExistsError if it is taken."""
    try:
        os.link(source, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        with open(path, "x", encoding="utf-8") as stream:
            stream.write(source.read_text())


def _read_lock(path: Path) -> tuple[dict | None, float | None]:
    """Return the holder, None where it can't be read, and when the lock was last touched, None where it is gone."""
    try:
        touched = path.stat().st_mtime
        return json.loads(path.read_text()), touched
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError):
        return None, touched


@contextlib.contextmanager
def hold_lock(path: Path, *, on_wait: Callable[[dict], None]) -> Iterator[None]:
    """Hold the lock file `path` for the block, after waiting for the process that has it, on any machine.

    `on_wait` is called once, with the holder, when there is one to wait for.
    """
    seconds = 0.0
    while (holder := try_lock(path)) is not None:
        if not seconds:
            on_wait(holder)
        seconds = min(1.0, 2 * seconds or 0.05)
        time.sleep(seconds)
    _temporaries.add(path)
    done = threading.Event()
    thread = threading.Thread(target=_touch_until, args=(path, done), name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        _temporaries.discard(path)
        release_lock(path)


def _touch_until(path: Path, done: threading.Event) -> None:
    while not done.wait(HEARTBEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(path)


def release_lock(path: Path) -> None:
    """Delete the lock file if it is still this process's."""
    if is_held(path):
        path.unlink(missing_ok=True)


def is_held(path: Path) -> bool:
    """Whether the lock file is this process's."""
    holder, _touched = _read_lock(path)
    return holder is not None and holder["pid"] == os.getpid() and is_local(holder)
