"""Worker processes that share the work on data files: results come back in the order of their tasks, in bounded memory.

A fresh Python process imports only what the function needs, neither torch nor the threads of this process, makes the
function once and forks the workers, which share its memory. They ignore the signals that a terminal or a scheduler
sends to all processes; they exit when this process closes its end of a socket, which the kernel does however it ends.

    this process --- control socket --- forking process
         |                                   | fork
         '------- a socket each ------- workers
"""

import contextlib
import ctypes
import functools
import gc
import os
import pickle
import queue
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

BYTES_PER_WORKER = 32 << 20  # of data; for less, starting a worker takes longer than it saves
TASKS_PER_WORKER = 2  # sent to a worker at a time: one is done while the next waits
AHEAD_PER_WORKER = 3  # tasks of which the results were not taken yet, for each worker
EXIT_SECONDS = 5.0  # to wait for the exit code of a worker that closed its socket
HANDLED_BY_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# A worker computes in one thread. Another one of fastokens has a cache of its own, and so does each of glibc's arenas.
ONE_THREAD = {
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "FASTOKENS_BPE_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
}
LENGTH_BYTES = 8  # before each message
SEND_BUFFER_BYTES = 1 << 20  # a result is about that long
OBJECTS_BETWEEN_COLLECTIONS = 20_000  # a task makes thousands of objects, and all of them live until its end
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent ends
CGROUP_QUOTA = "/sys/fs/cgroup/cpu.max"


class Task(Protocol):
    """A piece of work that can be pickled; `where` names its file and lines."""

    @property
    def where(self) -> str: ...


class TaskError(ValueError):
    """The work on a record failed; the message names its file and line."""


def choose_num_workers(asked: int | None, num_bytes: int) -> int:
    """Return how many processes share the work on `num_bytes` of data: as asked, else up to one for each core."""
    return asked or max(1, min(count_cores(), num_bytes // BYTES_PER_WORKER))


def count_cores() -> int:
    """Return the cores that this process may use: those of its affinity, and of its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path(CGROUP_QUOTA).read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # another system, or "max": no quota
        return cores


def release_freed_memory() -> None:
    """Return freed memory to the system: glibc keeps arrays of up to 32 MiB, which at millions of examples add up."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def run_task(function: Callable[[Task], Any], task: Task) -> Any:
    """Return the result of a task. Raises TaskError, which names the task, for any error."""
    try:
        return function(task)
    except (TaskError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of a Rust library is no Exception
        raise TaskError(f"{task.where}: {describe_error(error)}") from error


def describe_error(error: BaseException) -> str:
    """Return the type and the words of an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}".rstrip(": ")


class _Channel:
    """Pickled messages over a socket, each read into one buffer: multiprocessing's Connection takes four times as long.

    Raises EOFError or OSError when the other side is gone.
    """

    def __init__(self, end: socket.socket):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        self._socket = end
        self.fileno = end.fileno
        self.set_timeout = end.settimeout
        self.close = end.close

    def send(self, message: object) -> None:
        self.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))

    def send_bytes(self, data: bytes) -> None:
        self._socket.sendall(len(data).to_bytes(LENGTH_BYTES))
        self._socket.sendall(data)

    def receive(self) -> Any:
        return pickle.loads(self.receive_bytes())

    def receive_bytes(self) -> bytearray:
        return self._read(int.from_bytes(self._read(LENGTH_BYTES)))

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        unread = memoryview(data)
        while unread:
            count = self._socket.recv_into(unread, 0, socket.MSG_WAITALL)
            if not count:
                raise EOFError
            unread = unread[count:]
        return data


class _Worker:
    """This process's end of a worker; `tasks` are the numbers and names of those whose results it still owes."""

    def __init__(self, channel: _Channel):
        self.channel = channel
        self.tasks: deque[tuple[int, str]] = deque()


class _WorkerProcesses:
    """The forking process and its workers. Call `end`."""

    def __init__(self, num_workers: int, setup: bytes):
        pairs = [socket.socketpair() for _end in range(1 + num_workers)]
        theirs = [end.fileno() for _ours, end in pairs]
        root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-P", "-c", f"from sft.workers import fork_workers; fork_workers({theirs})"]
        # A process that is started while signals are blocked never gets them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED_BY_PARENT)
        try:
            environment = os.environ | ONE_THREAD | {"PYTHONPATH": path}
            options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
            self._process = subprocess.Popen(command, env=environment, pass_fds=theirs, **options)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for _ours, end in pairs:
                end.close()
        self._control, *channels = [_Channel(ours) for ours, _end in pairs]
        self.workers = [_Worker(channel) for channel in channels]
        with contextlib.suppress(OSError):  # it has ended already; the first task says so
            self._control.send_bytes(setup)

    def have_started(self) -> bool:
        """Say whether the forking process has forked the workers, or has ended."""
        return bool(select.select([self._control], (), (), 0)[0])

    def find_exit_code(self, worker: _Worker) -> int:
        """Return the exit code of a worker that closed its socket, negative for a signal."""
        ended = None
        with contextlib.suppress(EOFError, OSError):  # also the forking process has ended, or takes too long
            self._control.set_timeout(EXIT_SECONDS)
            while ended != self.workers.index(worker):
                ended, code = self._control.receive()
            return code
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(EXIT_SECONDS)
        return 0

    def end(self) -> None:
        """Kill the workers and wait for their end."""
        self._control.close()  # the forking process kills them and exits
        try:
            self._process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for worker in self.workers:
            worker.channel.close()


class Workers:
    """`num_workers` processes that apply a function; with one, the function is applied in this process.

    `make_function` is called in a process without threads, and returns the function of a task; it is pickled, as are
    tasks and results. The workers are started for the first task. While they start, which takes half a second, this
    process applies `stand_in`, the same function. A context, which kills the workers on leaving.
    """

    def __init__(
        self,
        num_workers: int,
        make_function: Callable[[], Callable[[Task], Any]],
        stand_in: Callable[[Task], Any] | None = None,
    ):
        self.num_workers = num_workers
        self._stand_in = stand_in
        self._make_function = make_function
        self._setup = pickle.dumps(make_function) if num_workers > 1 else b""
        self._function: Callable | None = None
        self._processes: _WorkerProcesses | None = None
        self._results: dict[int, tuple[Any, BaseException | None]] = {}
        self._num_sent = 0

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_error) -> None:
        if self._processes:
            self._processes.end()

    def map(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Any]]:
        """Yield each task with its result, in order; TaskError where one failed or its worker was killed.

        Never more than a few tasks for each worker ahead of what was taken. A second map may run inside the first.
        """
        if self.num_workers == 1:
            self._function = self._function or self._make_function()
            for task in tasks:
                yield task, run_task(self._function, task)
            return
        waiting: deque[tuple[int, Task]] = deque()
        for task in tasks:
            if self._are_starting():
                yield task, run_task(self._stand_in, task)
                continue
            waiting.append((self._send(task), task))
            if len(waiting) >= AHEAD_PER_WORKER * self.num_workers:
                number, first = waiting.popleft()
                yield first, self._take(number)
        for number, task in waiting:
            yield task, self._take(number)

    def _are_starting(self) -> bool:
        """Say whether the workers start and there is a stand-in, whose memory is freed as soon as they have started."""
        self._processes = self._processes or _WorkerProcesses(self.num_workers, self._setup)
        if self._stand_in and self._processes.have_started():
            self._stand_in = None
            release_freed_memory()
        return self._stand_in is not None

    def _send(self, task: Task) -> int:
        self._num_sent += 1
        worker = self._find_worker()
        worker.tasks.append((self._num_sent, task.where))
        try:
            worker.channel.send((self._num_sent, task))
        except OSError:
            self._receive(worker)  # a result from before it was killed
        return self._num_sent

    def _find_worker(self) -> _Worker:
        """Return the worker with the fewest tasks when it has room."""
        while True:
            idlest = min(self._processes.workers, key=lambda worker: len(worker.tasks))
            if len(idlest.tasks) < TASKS_PER_WORKER:
                return idlest
            self._receive_some()

    def _take(self, number: int) -> Any:
        while number not in self._results:
            self._receive_some()
        result, error = self._results.pop(number)
        if error is not None:
            raise error
        return result

    def _receive_some(self) -> None:
        with selectors.DefaultSelector() as selector:
            for worker in self._processes.workers:
                if worker.tasks:
                    selector.register(worker.channel, selectors.EVENT_READ, worker)
            for key, _events in selector.select():
                self._receive(key.data)

    def _receive(self, worker: _Worker) -> None:
        try:
            number, result, error = worker.channel.receive()
        except (EOFError, OSError):
            raise TaskError(f"{worker.tasks[0][1]}: {self._describe_exit(worker)}") from None
        assert number == worker.tasks.popleft()[0]
        self._results[number] = result, error

    def _describe_exit(self, worker: _Worker) -> str:
        code = self._processes.find_exit_code(worker)
        if code >= 0:
            return f"the worker that read it ended with code {code}; its own words are above"
        name = signal.Signals(-code).name
        cause = "maybe for lack of memory" if name == "SIGKILL" else "which is a fault of a library"
        return f"a worker was killed by {name} while it read them, {cause}; try --preprocessing_num_workers 1"


# --- in the forking process ---------------------------------------------------------------------------------------


def fork_workers(descriptors: Sequence[int]) -> None:
    """Receive what makes the function, make it, fork a worker for each socket but the first, and report exit codes.

    The first is the control socket: when it is closed, the workers are killed.
    """
    _end_with_parent()
    control = _Channel(socket.socket(fileno=descriptors[0]))
    try:
        setup = control.receive_bytes()
    except (EOFError, OSError):  # the parent was stopped while this process started
        return
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
    try:
        function = pickle.loads(setup)()
    except Exception as error:
        function = functools.partial(_raise_error, error)
    gc.freeze()  # a collection would write to the memory that the workers share
    sys.stderr.flush()
    numbers = {}
    for number, descriptor in enumerate(descriptors[1:]):
        pid = os.fork()
        if pid == 0:
            control.close()
            for other in descriptors[2 + number :]:
                os.close(other)
            _serve_tasks(socket.socket(fileno=descriptor), function)
        numbers[pid] = number
        os.close(descriptor)
    with contextlib.suppress(OSError):  # the parent is gone
        control.send((None, 0))
    threading.Thread(target=_kill_workers, args=(control, numbers), daemon=True).start()
    while numbers:
        pid, status = os.wait()
        with contextlib.suppress(OSError):  # the parent is gone
            control.send((numbers.pop(pid), os.waitstatus_to_exitcode(status)))


def _end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, also inside a call that lasts."""
    if sys.platform == "linux":  # elsewhere the end of a socket tells
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _kill_workers(control: _Channel, running: dict[int, int]) -> None:
    """Wait until the parent closes its end, or is gone, and kill the workers that still run, by their process ids."""
    with contextlib.suppress(EOFError, OSError):
        control.receive_bytes()
    for pid in list(running):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# --- in a worker --------------------------------------------------------------------------------------------------


def _serve_tasks(end: socket.socket, function: Callable[[Task], Any]) -> NoReturn:
    """Apply the function to each task that comes, and send (number, result, error) back."""
    _end_with_parent()
    parent = _Channel(end)
    tasks = queue.SimpleQueue()
    threading.Thread(target=_receive_tasks, args=(parent, tasks), daemon=True).start()
    while True:
        number, task = tasks.get()
        try:
            message = number, run_task(function, task), None
        except TaskError as error:
            message = number, None, TaskError(str(error))
        try:
            parent.send(message)
        except OSError:  # the parent is gone
            os._exit(0)


def _receive_tasks(parent: _Channel, tasks: queue.SimpleQueue) -> None:
    """Take tasks from the socket at once, so that this process and its parent never wait for each other."""
    while True:
        try:
            tasks.put(parent.receive())
        except (EOFError, OSError):  # the parent is gone, or has closed the socket
            os._exit(0)
        except BaseException as error:  # no memory for a task: the main thread would wait for it forever
            print(f"worker: {describe_error(error)}", file=sys.stderr, flush=True)
            os._exit(1)


def _raise_error(error: Exception, _task: Task) -> None:
    raise error
