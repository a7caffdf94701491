"""Copy what a checkpoint's files will hold, so that they can be written while training continues.

torch.save and safetensors are called by transformers and DeepSpeed. While they save, their tensors are copied into host
memory; later a thread writes the files, byte for byte as they would have been. A file is hashed while it is written:
hashing it afterwards reads all of it again, which for the optimizer of a large model costs as long as writing it.
"""

import contextlib
import hashlib
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from sft.checkpoint.manifest import hash_files
from sft.checkpoint.save import UNUSED_FILES

MIN_PARALLEL_BYTES = 1 << 20  # smaller pieces are hashed at once: handing them to the thread would take longer
# The modules that import safetensors' save_file, under this name.
SAFETENSORS_CALLERS = ("transformers.modeling_utils", "peft.peft_model")
SAVE_FILE = "safe_save_file"
CPU_ALLOCATOR = "DefaultCPUAllocator"  # in torch's error when the host's memory has no room


class HashingStream:
    """A new file for torch.save; a thread hashes each piece while this one writes it. On leaving it is on the disk."""

    def __init__(self, path: Path):
        self._stream = open(path, "wb", buffering=0)  # noqa: SIM115
        self._sha256 = hashlib.sha256()
        self._size = 0
        self._thread = ThreadPoolExecutor(1)
        self._error: OSError | None = None

    def __enter__(self) -> "HashingStream":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._thread.shutdown()
        with self._stream:
            if kind is None:
                os.fsync(self._stream.fileno())
            elif self._error:  # torch reports only that writing failed
                raise self._error

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        self._size += len(view)
        hashed = None
        if len(view) < MIN_PARALLEL_BYTES:
            self._sha256.update(view)
        else:
            hashed = self._thread.submit(self._sha256.update, view)
        try:
            written = 0
            while written < len(view):  # a system call writes 2 GiB at most
                written += self._stream.write(view[written:])
        except OSError as error:
            self._error = self._error or error
            raise
        finally:
            if hashed:
                hashed.result()  # torch reuses the memory
        return len(view)

    def flush(self) -> None:
        """torch calls it at the end; there is no buffer."""

    def size_and_hash(self) -> list:
        """Return [bytes, sha256] of what was written."""
        return [self._size, self._sha256.hexdigest()]


class NotEnoughMemoryError(Exception):
    """The host's memory has no room for a copy."""


class GivenUpError(Exception):
    """The rest of the files is not needed any more."""


class CollectedFiles:
    """The files of this rank that are still to be written, copied, and the hashes of those that are written.

    `max_bytes`: what the copies may take; a file that needs more is written at once.
    """

    def __init__(self, folder: Path, max_bytes: int):
        self.hashes: dict[str, list] = {}
        self.waiting: dict[str, Callable[[Path], list]] = {}
        self.has_no_room = False
        self.is_given_up = False  # set by another thread: `write` ends at the next tensor
        self._folder = Path(os.path.abspath(folder))
        self._bytes_left = max_bytes

    def name_of(self, target) -> str | None:
        """Return the name of a file in the folder, or None for a stream or a file elsewhere."""
        path = Path(os.path.abspath(target)) if isinstance(target, str | os.PathLike) else None
        return str(path.relative_to(self._folder)) if path and path.is_relative_to(self._folder) else None

    def add(self, name: str, write: Callable[[Path], list], copy: Callable[[], Callable] | None) -> None:
        """Add a file that `write` writes at once; with `copy`, which returns a function to write it, it waits."""
        self.hashes.pop(name, None)
        self.waiting.pop(name, None)
        if copy:
            bytes_left = self._bytes_left
            try:
                self.waiting[name] = copy()
                return
            except NotEnoughMemoryError:
                self.has_no_room = True
            except RuntimeError as error:  # a limit of the process, as ulimit -v sets it; torch also copies by itself
                if CPU_ALLOCATOR not in str(error):
                    raise
                self.has_no_room = True
            self._bytes_left = bytes_left  # without the tensors that had been copied before
        self.hashes[name] = write(self._folder / name)

    def copy(self, tensor: torch.Tensor, *, is_copy: bool = False) -> torch.Tensor:
        """Return a copy in host memory, or the tensor where it is one; NotEnoughMemoryError when it has no room."""
        if tensor.nbytes > self._bytes_left:
            raise NotEnoughMemoryError
        self._bytes_left -= tensor.nbytes
        if is_copy:
            return tensor
        return tensor.detach().clone() if tensor.device.type == "cpu" else tensor.detach().cpu()

    def names(self) -> list[str]:
        return [*self.waiting, *self.hashes]

    def write(self) -> dict[str, list]:
        """Write the files and return [bytes, sha256] of all, by name; a file's copies are freed when it is written."""
        while self.waiting:
            self.check_given_up()
            name = next(iter(self.waiting))
            self.hashes[name] = self.waiting.pop(name)(self._folder / name)
        return self.hashes

    def check_given_up(self) -> None:
        """Raise GivenUpError when the rest is not needed."""
        if self.is_given_up:
            raise GivenUpError


class ZipRecords:
    """The records of a file of torch.save; torch calls `write_record` as it calls its own writer's."""

    def __init__(self, files: CollectedFiles):
        self._files = files
        self._records = []

    def write_record(self, name: str, data, size: int) -> None:
        if isinstance(data, torch.UntypedStorage):
            # torch has already copied a storage of the GPU; no tensor shares that copy.
            is_copy = torch.cuda.is_available() and torch._C._storage_Use_Count(data._cdata) == 1
            whole = torch.empty(0, dtype=torch.uint8).set_(data)  # storage.clone() takes five times as long
            data = self._files.copy(whole, is_copy=is_copy).untyped_storage()
        self._records.append((name, data, size))

    def write(self, path: Path) -> list:
        with HashingStream(path) as stream, torch.serialization._open_zipfile_writer(stream) as writer:
            for record in self._records:
                self._files.check_given_up()
                writer.write_record(*record)
        return stream.size_and_hash()


@contextlib.contextmanager
def collect_files(folder: Path, max_bytes: int) -> Iterator[CollectedFiles]:
    """Let torch.save and save_pretrained copy what they would write below `folder`, also for DeepSpeed and peft."""
    files = CollectedFiles(folder, max_bytes)
    callers = [sys.modules[name] for name in SAFETENSORS_CALLERS if name in sys.modules]
    originals = [(torch, "save", torch.save)]
    originals += [(module, SAVE_FILE, getattr(module, SAVE_FILE)) for module in callers]
    torch.save = _collect_pickles(files, torch.save)
    for module in callers:
        setattr(module, SAVE_FILE, _collect_tensors(files, getattr(module, SAVE_FILE)))
    try:
        yield files
    finally:
        for module, name, original in originals:
            setattr(module, name, original)


def _collect_pickles(files: CollectedFiles, save: Callable) -> Callable:
    """Return a function to take the place of torch.save."""

    def collect(obj, f, *arguments, **options):  # names of torch.save: DeepSpeed's fast engine passes them
        def copy() -> Callable[[Path], list]:
            records = ZipRecords(files)
            torch.serialization._save(obj, records, pickle, torch.serialization.DEFAULT_PROTOCOL, False)
            return records.write

        def write(path: Path) -> list:
            with HashingStream(path) as stream:
                save(obj, stream, *arguments, **options)
            return stream.size_and_hash()

        name = files.name_of(f)
        if name is None:
            save(obj, f, *arguments, **options)
        elif name not in UNUSED_FILES:
            is_usual = not arguments and options in ({}, {"_use_new_zipfile_serialization": True})
            files.add(name, write, copy if is_usual else None)

    return collect


def _collect_tensors(files: CollectedFiles, save_file: Callable) -> Callable:
    """Return a function to take the place of safetensors' save_file."""

    def collect(tensors, filename, metadata=None):
        def copy() -> Callable[[Path], list]:
            copies = {name: files.copy(tensor) for name, tensor in tensors.items()}
            return partial(write, copies)

        def write(tensors, path: Path) -> list:
            save_file(tensors, path, metadata=metadata)
            return hash_files(path.parent, [path.name], sync=True)[path.name]

        name = files.name_of(filename)
        if name is None:
            save_file(tensors, filename, metadata=metadata)
        else:
            files.add(name, partial(write, tensors), copy)

    return collect
