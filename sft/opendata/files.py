"""From what a user names to files: paths, folders, globs, data sets on the hub, mixes and samples."""

import functools
import glob
import hashlib
import heapq
import json
import os
import pickle
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sft.opendata.decoding import MAX_LAST_BYTES, Range, check_encoding, cut_file
from sft.opendata.records import RawRecord, check_file, split_file, split_range, split_rest
from sft.workers import Workers

_TEXT_EXTENSIONS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
_COMPRESSED_EXTENSIONS = ("", ".gz", ".bz2", ".xz", ".zst", ".zstd")
EXTENSIONS = (*(text + packed for text in _TEXT_EXTENSIONS for packed in _COMPRESSED_EXTENSIONS), ".parquet")
KNOWN_FILES = "JSON, JSON Lines, CSV, TSV (each maybe compressed) or Parquet file"
# The files that sft.opendata writes.
TRAIN = "train.json"
EVAL = "eval.json"
REJECTS = "rejects.jsonl"
LEDGER = "ledger.json"
# Never read as data: what sft.opendata writes beside its conversations, and what the hub keeps beside a data set.
NOT_DATA = (LEDGER, REJECTS, "dataset_info.json", "dataset_infos.json")
# The mixes that the seeds were trained on. Belle: the BLOOM folder's sets, 20,000 of each. Blossom v5 (model card): 40K
# wizard, 40K orca and 10K math; then 10K chat and a tenth of the first stage again.
MIXES: dict[str, list[str]] = json.loads(Path(__file__).with_name("mixes.json").read_text(encoding="utf-8"))


# --- Files of a path


def list_files(path_or_glob: str | os.PathLike) -> list[str]:
    """List the data files of a file, a folder (all the way down) or a glob, sorted.

    In a folder only names with one of `EXTENSIONS` count; hidden files and `NOT_DATA` do not. Raises ValueError when
    nothing is there.
    """
    path = os.fspath(path_or_glob)
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        found = _list_data_files(path)
        if not found:
            raise ValueError(f"{path}: the folder holds no {KNOWN_FILES}")
        return found
    matches = sorted(match for match in glob.glob(path, recursive=True) if os.path.basename(match) not in NOT_DATA)
    found = {file for match in matches for file in ([match] if os.path.isfile(match) else _list_data_files(match))}
    if not found:
        raise ValueError(f"{path}: no such file or folder, and as a glob it matches no data file")
    return sorted(found)


def split_suffix(text: str) -> tuple[str, str]:
    """`x.json@20000` -> ("x.json", "20000"), without a suffix ("x.json", ""). A path that exists is taken as it is."""
    path, at, suffix = text.rpartition("@")
    return (text, "") if not at or "/" in suffix or os.path.exists(text) or glob.glob(text) else (path, suffix)


def _list_data_files(folder: str) -> list[str]:
    """The data files of a folder, sorted."""
    return sorted(path for path in _list_folder(folder) if _is_data(path))


def _list_folder(folder: str) -> Iterator[str]:
    """All files of a folder that are not hidden."""
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(parent, name) for name in files if not name.startswith("."))


def _is_data(path: str) -> bool:
    """Say whether a file of a folder is read; a pipe would wait for a writer, and a broken link is an error later."""
    is_named = path.endswith(EXTENSIONS) and os.path.basename(path) not in NOT_DATA
    return is_named and (os.path.isfile(path) or not os.path.exists(path))


def find_skipped(paths: Iterable[str | os.PathLike]) -> list[str]:
    """List the files of folders that are not read as data, sorted; our own beside a train.json are left out."""
    folders = {path for text in map(os.fspath, paths) if os.path.isdir(path := split_suffix(text)[0])}
    skipped = {path for folder in folders for path in _list_folder(folder) if not _is_data(path)}
    ours = [path for path in skipped if os.path.basename(path) in NOT_DATA[:2]]
    return sorted(skipped - {path for path in ours if os.path.exists(os.path.join(os.path.dirname(path), TRAIN))})


def describe_skipped(skipped: Sequence[str]) -> list[str]:
    """Say in a line, if there are any, which files of the folders are not read."""
    if not skipped:
        return []
    here = os.path.join(os.getcwd(), "")
    names = [path.removeprefix(here) for path in skipped[:8]]
    shown = ", ".join(names)
    if len(skipped) > 8:
        shown = f"{shown} and {len(skipped) - 8:,} more"
    return [f"not read, as their names are not those of data files: {shown}"]


# --- Inputs of the command


@dataclass(frozen=True)
class Source:
    """A file to read: `name` is what the ledger and the records call it, `group` the INPUT it came with."""

    name: str
    path: str
    group: str
    sample: int | float | None = None
    open_file: Callable[[], BinaryIO] | None = None


def resolve_inputs(inputs: Iterable[str], *, skip: Collection[str] = ()) -> tuple[list[Source], list[str]]:
    """Turn INPUTs into files in canonical order, and list every mistake in them. `skip` are paths that aren't data."""
    found: dict[str, Source] = {}
    mistakes = []
    for text in inputs:
        try:
            for source in _resolve_input(text):
                if source.path in skip and source.path != os.path.abspath(text):
                    continue
                if found.setdefault(source.path, source).sample != source.sample:
                    mistakes.append(f"{text}: {source.path} is also given with another sample size; give it once")
        except ValueError as error:
            mistakes.append(str(error))
    names = _short_names([source.path for source in found.values() if not source.open_file])
    sources = [replace(source, name=source.name or names[source.path]) for source in found.values()]
    return sorted(sources, key=lambda source: source.name), mistakes


def _resolve_input(text: str) -> list[Source]:
    if text.startswith("--mix "):
        raise ValueError(f"{text}: there are {', '.join(MIXES)}")
    path, sample = split_sample(text)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not path.endswith(EXTENSIONS) and not os.path.exists(path):
        return _list_hub(path, text, sample)
    return [Source("", os.path.abspath(file), text, sample) for file in list_files(path)]


def split_sample(text: str) -> tuple[str, int | float | None]:
    """`x.json@20000` -> ("x.json", 20000); `x.json@10%` -> ("x.json", 0.1)."""
    path, suffix = split_suffix(text)
    if path == text:
        return text, None
    if re.fullmatch(r"\d+", suffix) and int(suffix):
        return path, int(suffix)
    if re.fullmatch(r"\d+(\.\d+)?%", suffix) and 0 < float(suffix[:-1]) <= 100:
        return path, float(suffix[:-1]) / 100
    raise ValueError(f"{text}: {suffix!r} is no sample size; write a number as in @20000, or a share as in @10%")


def _list_hub(name: str, group: str, sample: int | float | None) -> list[Source]:
    from huggingface_hub import HfApi, HfFileSystem
    from huggingface_hub.errors import HTTPError  # of its HTTP client, whichever that is

    endpoint = os.environ.get("HF_ENDPOINT") or None
    try:
        info = HfApi(endpoint=endpoint).dataset_info(name, timeout=20)
    except (OSError, ValueError, HTTPError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{name}: no such path here, and no data set the hub would give us ({reason})") from error
    paths = sorted(file.rfilename for file in info.siblings or [] if _is_data(file.rfilename))
    if not paths:
        raise ValueError(f"{name}: the data set on the hub holds no {KNOWN_FILES}")
    open_on_hub = functools.partial(HfFileSystem(endpoint=endpoint).open, mode="rb")
    addresses = {path: f"datasets/{name}@{info.sha}/{path}" for path in paths}
    return [
        Source(f"{name}/{path}", address, group, sample, functools.partial(open_on_hub, address))
        for path, address in addresses.items()
    ]


def _short_names(paths: list[str]) -> dict[str, str]:
    """Each path's file name, with as many folders before it as it takes to tell it from the others."""
    depths = dict.fromkeys(paths, 1)
    while True:
        names = {path: os.sep.join(path.split(os.sep)[-depth:]) for path, depth in depths.items()}
        num_uses = Counter(names.values())
        if num_uses.total() == len(num_uses):
            return {path: os.fsencode(name).decode("utf-8", "backslashreplace") for path, name in names.items()}
        depths = {path: depth + (num_uses[names[path]] > 1) for path, depth in depths.items()}


# --- Pieces of a file, for the tasks of worker processes

BATCH_RECORDS = 256
BATCH_CHARACTERS = 1 << 19


class Batch(NamedTuple):
    """Records of a file that can't be cut into ranges; in a worker they are parsed."""

    path: str
    records: list[RawRecord]


class Work(NamedTuple):
    """A task: a piece of the file that the ledger calls `name`."""

    name: str
    piece: Range | Batch

    @property
    def where(self) -> str:
        """Name the file and the lines."""
        if isinstance(self.piece, Range):
            first = self.piece.line
            last = self.piece.end_line - 1 if self.piece.end_line else "the last"
        else:
            first = self.piece.records[0].line
            last = self.piece.records[-1].line
        return f"{self.piece.path} line {first} to {last}"

    def split(self) -> Iterator[RawRecord]:
        """Yield the records; some are parsed, some not. WrongCut comes last."""
        return split_range(self.piece) if isinstance(self.piece, Range) else iter(self.piece.records)


def cut_pieces(path: str, encoding: str, *, parse: bool) -> Iterator[Range | Batch]:
    """Cut a file into ranges where that can be, else into batches of records, which are parsed here if asked."""
    is_cut = False
    try:
        for piece in cut_file(path, encoding):
            is_cut = True
            if piece.end_line is None and piece.end - piece.start > MAX_LAST_BYTES:
                yield from cut_batches(path, split_rest(piece, parse=parse))
            else:
                yield piece
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}; check the path and its permissions") from error
    if not is_cut:
        yield from cut_batches(path, split_file(path, encoding=encoding, parse=parse))


def cut_batches(path: str, records: Iterable[RawRecord]) -> Iterator[Batch]:
    """Cut records into batches, bounded by number and by text."""
    batch = []
    num_characters = 0
    for raw in records:
        if batch and (len(batch) >= BATCH_RECORDS or num_characters >= BATCH_CHARACTERS):
            yield Batch(path, batch)
            batch = []
            num_characters = 0
        batch.append(raw)
        num_characters += len(raw.raw)
    if batch:
        yield Batch(path, batch)


def map_pieces(workers: Workers, tasks: Iterable[Work]) -> Iterator[tuple[Work, Any]]:
    """Yield each task with its result, in order. A result of None says that a range was wrongly cut.

    From there on the file is read as a stream, and the results of its further ranges are left out.
    """
    read_again = set()
    parse = workers.num_workers == 1
    for task, result in workers.map(tasks):
        if task.piece.path in read_again:
            continue
        if result is not None:
            yield task, result
            continue
        read_again.add(task.piece.path)
        batches = cut_batches(task.piece.path, split_rest(task.piece, parse=parse))
        yield from workers.map(Work(task.name, batch) for batch in batches)


# --- Sources of a run, whole or as a sample


def check_sources(sources: list[Source], encoding: str) -> list[str]:
    """List what is wrong with whole files: missing, not permitted, or in another encoding."""
    mistakes = []
    try:
        check_encoding(encoding)
    except ValueError as error:
        return [str(error)]
    for source in sources:
        try:
            if source.open_file is None:
                check_file(source.path, encoding=encoding)
        except ValueError as error:
            mistakes.append(str(error))
    return mistakes


def count_bytes(sources: list[Source]) -> int:
    """Bytes of the sources on this machine, and enough for any number of workers where one is elsewhere."""
    if any(source.open_file for source in sources):
        return sys.maxsize
    return sum(os.path.getsize(source.path) for source in sources)


def split_source(source: Source, encoding: str) -> Iterator[RawRecord]:
    if source.open_file is None:
        yield from split_file(source.path, encoding=encoding)
        return
    from huggingface_hub.errors import HTTPError

    try:
        yield from split_file(source.name, encoding=encoding, open_file=source.open_file)
    except HTTPError as error:
        raise ValueError(f"{source.name}: the connection to the hub broke ({error}); run again") from error


class Samples:
    """The records of a run's sources that are in the samples; `num_left_out` counts the others of each source.

    The sample of a fixed size of an INPUT is drawn at once, in one pass: the records with the lowest keys of all its
    files. A record that enters the running sample is written to `spill`, so that memory holds only keys and offsets.
    """

    def __init__(self, sources: list[Source], spill: BinaryIO, *, seed: int, encoding: str):
        self.num_left_out: Counter[str] = Counter()
        self._spill = spill
        self._seed = seed
        self._encoding = encoding
        self._offsets: dict[str, list[int]] = {source.name: [] for source in sources}
        heaps: dict[str, list[tuple[float, str, int, int]]] = {}
        for source in sources:
            if isinstance(source.sample, int):
                self._draw(source, heaps.setdefault(source.group, []))
        drawn = [entry for heap in heaps.values() for entry in heap]
        for _key, name, _number, offset in sorted(drawn, key=lambda entry: entry[2]):
            self._offsets[name].append(offset)
            self.num_left_out[name] -= 1

    def _draw(self, source: Source, heap: list[tuple[float, str, int, int]]) -> None:
        for number, raw in enumerate(split_source(source, self._encoding)):
            self.num_left_out[source.name] += 1
            entry = (-self._key(source, number), source.name, number, self._spill.tell())
            if len(heap) < source.sample:
                heapq.heappush(heap, entry)
            elif entry > heap[0]:
                heapq.heapreplace(heap, entry)
            else:
                continue
            pickle.dump(raw, self._spill)

    def _key(self, source: Source, number: int) -> float:
        """The place of a record in a random order that depends on nothing but the seed and the record's place."""
        return hash_to_share(f"{self._seed}\0{source.name}\0{number}")

    def cut(self, source: Source, *, parse: bool) -> Iterator[Range | Batch]:
        """Cut a source into pieces; see `cut_pieces`."""
        if source.sample is None and source.open_file is None:
            return cut_pieces(source.path, self._encoding, parse=parse)
        return cut_batches(source.path, self._read(source))

    def _read(self, source: Source) -> Iterator[RawRecord]:
        if isinstance(source.sample, int):
            for offset in self._offsets[source.name]:
                self._spill.seek(offset)
                yield pickle.load(self._spill)
            return
        for number, raw in enumerate(split_source(source, self._encoding)):
            if source.sample is None or self._key(source, number) < source.sample:
                yield raw
            else:
                self.num_left_out[source.name] += 1


def hash_to_share(text: str) -> float:
    """A number in [0, 1) that depends on nothing but the text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) / 2**64


# --- Files that are written


class LinesFile:
    """A file that is written in lines, with its digest; it may be read meanwhile."""

    def __init__(self, path: Path):
        self.file = open(path, "w+b")  # noqa: SIM115
        self.sha256 = hashlib.sha256()
        self.num_records = 0
        self.num_bytes = 0

    def write(self, lines: Sequence[bytes]) -> None:
        data = b"".join(lines)
        self.file.write(data)
        self.sha256.update(data)
        self.num_records += len(lines)
        self.num_bytes += len(data)

    def close(self) -> dict[str, Any]:
        self.file.close()
        return {"records": self.num_records, "bytes": self.num_bytes, "sha256": self.sha256.hexdigest()}
