"""Write the files of torch.save in one pass: hashed while they are written, fsynced at the end.

Hashing a file afterwards reads all of it again; for the optimizer of a large model that costs as long as writing it.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from sft.checkpoint.manifest import hash_files
from sft.checkpoint.save import list_files
from sft.launch.processes import Guard

MIN_PARALLEL_BYTES = 1 << 20  # smaller pieces are hashed at once: handing them to the thread would take longer


class HashingStream:
    """A new file for torch.save; a thread hashes each piece while this one writes it."""

    def __init__(self, path: Path):
        self._stream = open(path, "wb", buffering=0)  # noqa: SIM115
        self._sha256 = hashlib.sha256()
        self._size = 0
        self._thread = ThreadPoolExecutor(1)

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
        finally:
            if hashed:
                hashed.result()  # torch reuses the memory
        return len(view)

    def flush(self) -> None:
        """torch calls it at the end; there is no buffer."""

    def close(self) -> list:
        """Wait until the file is on the disk and return [bytes, sha256]."""
        self._thread.shutdown()
        try:
            os.fsync(self._stream.fileno())
        finally:
            self._stream.close()
        return [self._size, self._sha256.hexdigest()]


@contextlib.contextmanager
def hash_while_saving(folder: Path) -> Iterator[dict[str, list]]:
    """Let torch.save hash what it writes below `folder`, also for DeepSpeed and transformers.

    Yields a dict that gets [bytes, sha256] of each file, by its name in the folder, once it is on the disk.
    """
    save = torch.save
    hashes = {}
    folder = Path(os.path.abspath(folder))

    def save_and_hash(value, target, *arguments, **options):
        path = Path(os.path.abspath(target)) if isinstance(target, str | os.PathLike) else None
        if path is None or not path.is_relative_to(folder):
            return save(value, target, *arguments, **options)
        name = str(path.relative_to(folder))
        hashes.pop(name, None)
        stream = HashingStream(path)
        try:
            save(value, stream, *arguments, **options)
        finally:
            found = stream.close()
        hashes[name] = found

    torch.save = save_and_hash
    try:
        yield hashes
    finally:
        torch.save = save


def hash_all(folder: Path, hashes: dict[str, list], guard: Guard) -> dict[str, list]:
    """Return [bytes, sha256] of each file of a folder, on all ranks; `hashes` are those that this rank has already.

    Each rank fsyncs and hashes its share of the others.
    """
    found = _merge(guard.all_gather(hashes))
    names = guard.broadcast(list_files(folder) if guard.rank == 0 else None)
    others = [name for name in names if name not in found]
    share = hash_files(folder, others[guard.rank :: guard.world_size], sync=True)
    found |= _merge(guard.all_gather(share))
    return {name: found[name] for name in names}


def _merge(parts: Iterable[dict[str, list]]) -> dict[str, list]:
    return {name: found for part in parts for name, found in part.items()}
