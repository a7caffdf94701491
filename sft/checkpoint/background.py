"""A checkpoint that a thread of each rank writes while training continues; all ranks complete it together.

The threads call no collective: NCCL and gloo need the same order of calls on all ranks, which only the main threads
keep. At the end of a step these ask whether all threads are done; rank 0 then writes the manifest and renames.
"""

import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from sft.base import BASE_RECORD, BaseIdentity, start_thread
from sft.checkpoint.manifest import hash_files
from sft.checkpoint.save import (
    complete_checkpoint,
    delete_old_checkpoints,
    explain_error,
    is_full_disk,
    list_files,
    note_written,
    remove_leftovers,
)
from sft.checkpoint.writing import CollectedFiles
from sft.files import write_json
from sft.launch.processes import Guard, Stopped, UserError

MAX_SHARE_OF_FREE_MEMORY = 0.7  # that the copies of all ranks of a machine may take
MEMORY_INFO = Path("/proc/meminfo")
STATUS_OF_PROCESS = Path("/proc/self/status")
CGROUPS_OF_PROCESS = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")
# By the name of the controller, as version 1 and 2 of cgroups have them: limit, usage, pages that can be dropped.
CGROUP_FILES = {
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    "": ("memory.max", "memory.current", "inactive_file"),
}


class BackgroundSaves:
    """The saves of a run, one at a time. On leaving the context the last one is complete.

    `say` prints a line from rank 0.
    """

    def __init__(self, output: Path, guard: Guard, say: Callable[[str], None]):
        self._output = output
        self._guard = guard
        self._say = say
        self.base: BaseIdentity | None = None  # to be stored with each checkpoint
        self._current: Save | None = None
        self._has_told_memory = False
        self._growth: tuple[int, int] | None = None

    def __enter__(self) -> "BackgroundSaves":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._current is None:
            return
        if kind is None:
            self.finish()
        elif self._guard.world_size == 1 or issubclass(kind, (Stopped, UserError)):  # all ranks raise it
            try:
                self.finish()
            except UserError as failed:
                self._say(str(failed))
        else:
            self._current.give_up()

    def bytes_for_copies(self) -> int:
        """Return what the copies of the next save may take of this rank's memory."""
        if self._growth is None:  # later the peak includes the copies of an earlier save
            self._growth = growth_in_a_step()
        return free_memory_for_copies(self._growth)

    def start(self, folder: Path, files: CollectedFiles, **of_run) -> None:
        """Write `files`, of which `folder` already has the others; `of_run` as for `Save`."""
        if self._guard.is_set_on_any_rank(files.has_no_room) and not self._has_told_memory:
            self._has_told_memory = True
            self._say(f"{folder.name}: too little free memory for a copy; training waits while checkpoints are written")
        self._current = Save(folder, self._output, files, self._guard, base=self.base, **of_run)

    def finish(self) -> None:
        """Wait until the current save, if any, is complete on all ranks; UserError on all when it failed."""
        if save := self._current:
            self._current = None
            self._say(save.publish())

    def finish_if_written(self) -> None:
        """Complete the current save when the threads of all ranks are done; called at the end of a step."""
        if self._current and self._current.is_written():
            self.finish()


@dataclass
class Save:
    """A checkpoint in `folder`, complete but for `files`, which a thread writes; `publish` moves it to `output`.

    `began`: `time.monotonic()` when training stopped for it; `step`, `run`, `keep`, `spare` as for
    `delete_old_checkpoints`.
    """

    folder: Path
    output: Path
    files: CollectedFiles
    guard: Guard
    base: BaseIdentity | None
    began: float
    step: int
    run: str
    keep: int | None
    spare: str | None

    def __post_init__(self):
        names = self.guard.all_gather(self.files.names())  # after this no rank's main thread writes into the folder
        self._collected = {name for of_rank in names for name in of_rank}
        self._written = start_thread(self._write)
        self._waited = time.monotonic() - self.began

    def _write(self) -> dict[str, list]:
        """Write this rank's files; rank 0 also stores the base, and hashes what was written at once without a hash."""
        hashes = self.files.write()
        if self.guard.rank == 0:
            if identity := self.base and self.base.wait():
                write_json(self.folder / BASE_RECORD, identity)
            others = [name for name in list_files(self.folder) if name not in self._collected]
            hashes |= hash_files(self.folder, others, sync=True)
        note_written(self.folder, hashes, rank=self.guard.rank, world_size=self.guard.world_size)
        return hashes

    def is_written(self) -> bool:
        """Whether the threads of all ranks are done, the same on all ranks."""
        return not self.guard.is_set_on_any_rank(not self._written.done())

    def give_up(self) -> None:
        """Leave the checkpoint to the next start, as the other ranks train on; but wait for the thread.

        A thread that is inside torch when Python exits aborts the process.
        """
        self.files.is_given_up = True
        text = f"{self.folder.name} is completed at the next start if all other ranks have written it too"
        if self._written.exception():
            text = f"{self.folder.name} is not complete: this process ended while it was written"
        rank = self.guard.rank
        print(f"train.py: rank {rank}: {text}", file=sys.stderr, flush=True)

    def publish(self) -> str:
        """Wait for all ranks, write the manifest and rename; return a line. UserError on all ranks when it failed."""
        began = time.monotonic()
        error = self._written.exception()
        hashes = self.guard.all_gather({} if error else self._written.result())
        problems = self.guard.all_gather(self._explain(error) if error else None)
        line = None
        if self.guard.rank == 0 and not any(problems):
            try:
                line = self._rename({name: found for of_rank in hashes for name, found in of_rank.items()}, began)
            except (OSError, ValueError) as failed:
                problems = [self._explain(failed)]
        line, problems = self.guard.broadcast((line, problems))
        if problem := next(filter(None, problems), None):
            raise UserError(problem) from error
        return line

    def _rename(self, hashes: dict[str, list], began: float) -> str:
        final = self.output / self.folder.name
        size, aside = complete_checkpoint(self.folder, final, hashes, run=self.run)
        delete_old_checkpoints(self.output, keep=self.keep, step=self.step, run=self.run, spare=self.spare)
        remove_leftovers(self.output)
        now = time.monotonic()
        waited = self._waited + now - began
        seconds = f"in {now - self.began:.2f} s, of which training waited {waited:.2f} s"
        return aside or f"saved {final}: {size:,} bytes {seconds}"

    def _explain(self, error: BaseException) -> str:
        explained = str(explain_error(error, str(self.output)))
        return explained if is_full_disk(error) else f"{self.output}: {self.folder.name} can't be written ({explained})"


def growth_in_a_step() -> tuple[int, int]:
    """Return by how many bytes this process was larger at its peak than now, resident and in addresses.

    On a CPU the next step needs them again. On a GPU the peak was that of loading the model.
    """
    if torch.cuda.is_available():
        return 0, 0
    try:
        sizes = _read_sizes(STATUS_OF_PROCESS)
        return max(0, sizes["VmHWM"] - sizes["VmRSS"]), max(0, sizes["VmPeak"] - sizes["VmSize"])
    except (OSError, KeyError):
        return 0, 0


def free_memory_for_copies(growth: tuple[int, int] = (0, 0)) -> int:
    """Return the bytes of host memory that this rank's copies may take; 0 where Linux doesn't tell.

    `growth`: resident bytes and addresses that the process needs besides.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    try:
        free = min([_read_sizes(MEMORY_INFO)["MemAvailable"], *_free_in_cgroups()]) // ranks - growth[0]
        limit, _hard = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            free = min(free, limit - _read_sizes(STATUS_OF_PROCESS)["VmSize"] - growth[1])
    except (OSError, KeyError):
        return 0
    return int(MAX_SHARE_OF_FREE_MEMORY * max(0, free))


def _read_sizes(path: Path) -> dict[str, int]:
    """Return the sizes that a file of /proc holds, in bytes, by name."""
    lines = (line.split() for line in path.read_text().splitlines() if line.endswith(" kB"))
    return {name.removesuffix(":"): 1024 * int(size) for name, size, _unit in lines}


def _free_in_cgroups() -> Iterator[int]:
    """Yield what each cgroup of this process has left below its limit; pages of files that can be dropped count."""
    for line in CGROUPS_OF_PROCESS.read_text().splitlines():
        _number, controllers, path = line.split(":", 2)
        if controllers not in CGROUP_FILES:
            continue
        limit, usage, droppable = CGROUP_FILES[controllers]
        root = CGROUPS / controllers
        folder = root / path.lstrip("/")
        for group in [folder, *folder.parents]:
            if not group.is_relative_to(root):
                break
            try:
                statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                used = int((group / usage).read_text()) - int(statistics[droppable])
                yield int((group / limit).read_text()) - used
            except (OSError, ValueError, KeyError):  # no memory controller there, or no limit ("max")
                continue
