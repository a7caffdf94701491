"""Canonical or raw files -> tokenised examples, cached by content; and the account of every conversation."""

import contextlib
import errno
import hashlib
import itertools
import json
import mmap
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from sft.dataset import packing
from sft.dataset.ledger import add_up, merge_ledger, new_ledger
from sft.dataset.mixture import Mixture
from sft.dataset.tokenise import ORIGIN, Part, make_tokeniser, pack_renderer, reading_options
from sft.files import CACHE_DIR, hash_file, hold_lock, is_held, remove_abandoned, stage_folder, write_text
from sft.format.render import Renderer
from sft.format.tokens import IGNORE_INDEX
from sft.opendata.conversation import Conversation, read_conversations
from sft.opendata.fields import FieldCounts
from sft.opendata.files import Work, cut_pieces, map_pieces
from sft.workers import Workers, choose_num_workers, release_freed_memory

PROOF_SIZE = 16  # conversations of the data on which a bulk encoder must prove itself
MAX_LENGTH = 2048  # tokens of a row, unless a flag names another
STATISTICS = [("trained", "<i4"), ("replies", "<i4"), ("prompt", "<i4"), ("stops", "?")]
EXAMPLES_AT_ONCE = 10_000
EXAMPLES_BETWEEN_RELEASES = 64  # examples read; one brings a MiB or two of the pages around it


class Examples:
    """Tokenised examples, memory-mapped; `examples[i]` is {"input_ids", "labels"}, each (length,) int32, unshifted.

    Pages that were read are released, so that a process doesn't grow with the data; they stay in the system's cache.
    """

    def __init__(
        self, input_ids: np.ndarray, in_loss: np.ndarray, starts: np.ndarray, origins: np.ndarray | None = None
    ):
        self._input_ids = input_ids
        self._in_loss = in_loss
        self._starts = starts
        self._num_read = 0
        self.origins = np.zeros(len(starts) - 1, ORIGIN) if origins is None else origins

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        self._num_read += 1
        if self._num_read % EXAMPLES_BETWEEN_RELEASES == 0:
            self._release_pages()
        span = slice(self._starts[index], self._starts[index + 1])
        ids = np.array(self._input_ids[span])
        return {"input_ids": ids, "labels": np.where(self._in_loss[span], ids, np.int32(IGNORE_INDEX))}

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per example, (examples,)."""
        return np.diff(self._starts).astype(np.int32)

    def count_tokens(self, numbers: np.ndarray) -> int:
        return int((self._starts[numbers + 1] - self._starts[numbers]).sum())

    @property
    def num_trained_tokens(self) -> int:
        return sum(int(np.count_nonzero(self._in_loss[span])) for span in self._spans())

    @property
    def largest_id(self) -> int:
        return max((int(self._input_ids[span].max()) for span in self._spans()), default=0)

    def _spans(self) -> Iterable[slice]:
        """The tokens of EXAMPLES_AT_ONCE examples after the other."""
        for begin in range(0, len(self), EXAMPLES_AT_ONCE):
            yield slice(self._starts[begin], self._starts[min(begin + EXAMPLES_AT_ONCE, len(self))])
            self._release_pages()

    def _release_pages(self) -> None:
        for mapped in (self._input_ids, self._in_loss):
            if isinstance(mapped, np.memmap):
                mapped._mmap.madvise(mmap.MADV_DONTNEED)

    def row_statistics(self, stop_ids: Sequence[int]) -> np.ndarray:
        """Return of each example, (examples,): tokens `trained`, trained `replies`, tokens of `prompt`, `stops`.

        `prompt` is the text before the first trained token; `stops`: the last trained token ends a reply.
        """
        found = np.zeros(len(self), STATISTICS)
        for begin, span in zip(range(0, len(self), EXAMPLES_AT_ONCE), self._spans(), strict=True):
            rows = slice(begin, begin + EXAMPLES_AT_ONCE)
            starts = self._starts[begin : begin + EXAMPLES_AT_ONCE + 1]
            _read_statistics(self._input_ids[span], self._in_loss[span], starts - starts[0], stop_ids, found[rows])
        return found


class TrainingRows:
    """Rows of one epoch, of `max_length` tokens: whole examples, best-fit packed; without a `max_length` one each.

    `rows[i]` is an example; packed, it has `position_ids` that restart at 0 in each of its examples. Which examples an
    epoch takes, and which share a row, follows from the mixture, the seed and the epoch alone, so that a resumed run
    sees the same rows. Their number is the same in every epoch.
    """

    def __init__(
        self, examples: Examples, max_length: int | None, *, seed: int, mixture: Mixture | None = None, epochs: int = 1
    ):
        self.examples = examples
        self.max_length = max_length
        self.seed = seed
        self.mixture = mixture
        self.num_rows = 0
        if max_length and mixture and mixture.changes:
            taken = (examples.lengths[mixture.take(epoch)] for epoch in range(epochs))
            self.num_rows = max(packing.count_rows(lengths, max_length) for lengths in taken)
        self.pack_for(0)

    def pack_for(self, epoch: int) -> None:
        """Take the examples of an epoch, counted from 0, and pack them anew."""
        taken = np.arange(len(self.examples)) if self.mixture is None else self.mixture.take(epoch)
        taken = taken.astype(np.int32)
        lengths = self.examples.lengths[taken]
        self.num_examples = len(taken)
        self.num_tokens = int(lengths.sum())
        if self.max_length is None:
            self.rows = packing.Rows(taken, np.arange(len(taken) + 1))
        else:
            rows = packing.pack(lengths, self.max_length, seed=self.seed, epoch=epoch, num_rows=self.num_rows)
            self.rows = packing.Rows(taken[rows.examples], rows.starts)
        release_freed_memory()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        parts = [self.examples[int(number)] for number in self.rows[index]]
        if self.max_length is None:
            return parts[0]
        for part in parts:
            part["labels"][0] = IGNORE_INDEX  # else the example before it would be trained to predict it
        row = {name: np.concatenate([part[name] for part in parts]) for name in ("input_ids", "labels")}
        return row | {"position_ids": np.concatenate([np.arange(len(part["input_ids"])) for part in parts])}

    def count_tokens(self, rows: Iterable[int]) -> int:
        """Return how many tokens these rows hold, without padding."""
        return sum(self.examples.count_tokens(self.rows[int(row)]) for row in rows)

    @property
    def fill(self) -> float | None:
        """Share of the packed rows' room that holds tokens; None when there is no packing."""
        return self.num_tokens / (max(1, len(self)) * self.max_length) if self.max_length else None


def _read_statistics(ids: np.ndarray, in_loss: np.ndarray, starts: np.ndarray, stop_ids: Sequence[int], found) -> None:
    is_first = np.zeros(len(ids), bool)
    is_last = np.zeros(len(ids), bool)
    is_first[starts[:-1]] = is_last[starts[1:] - 1] = True
    opens = in_loss & (is_first | ~np.roll(in_loss, 1))
    closes = np.flatnonzero(in_loss & (is_last | ~np.roll(in_loss, -1)))
    found["trained"] = np.add.reduceat(in_loss, starts[:-1], dtype=np.int64)
    found["replies"] = np.add.reduceat(opens, starts[:-1], dtype=np.int64)
    last_of_row = np.cumsum(found["replies"]) - 1
    first_of_row = last_of_row - found["replies"] + 1
    found["prompt"] = np.flatnonzero(opens)[first_of_row] - starts[:-1]
    found["stops"] = np.isin(ids[closes[last_of_row]], stop_ids)


def prepare(
    files: Sequence[str],
    renderer: Renderer,
    *,
    max_length: int,
    encoding: str = "utf-8",
    reasoning: str = "auto",
    preference: str | None = None,
    cache_dir: str = CACHE_DIR,
    num_workers: int | None = None,
    say: Callable[[str], None] = print,
) -> tuple[Examples, dict]:
    """Read, render and label every conversation of `files`, once for the same content; return examples and ledger.

    The key covers the bytes of the files, the tokenizer, the chat format, `max_length` and this code, so nothing stale
    can be read. One process builds, others with the same folder, on any machine, wait. It starts `num_workers`
    workers, by default one for each core up to what the data is worth; they change no byte of the result.

    The ledger counts for each file `in` = `kept` + each way to be lost, and among the kept those that lost turns or
    were cut; `first` names the first place of each; `not_read` and `notes` count fields by file. `sources` counts the
    same by the conversations' source; `source_names` are those that the examples' origins number.
    """
    reading = {"encoding": encoding, "reasoning": reasoning, "preference": preference}
    before = _sizes_and_times(files)
    key = _cache_key(files, renderer, f"{max_length} {reading}")
    folder = Path(cache_dir).expanduser() / key
    if not folder.exists():
        settings = {"max_length": max_length, "reading": reading, "num_workers": num_workers, "before": before}
        with _name_full_disk(folder.parent):
            _build_once(files, renderer, folder, say=say, **settings)
    ledger = json.loads((folder / "ledger.json").read_text(encoding="utf-8"))
    starts = np.load(folder / "starts.npy")
    origins = np.load(folder / "origins.npy")
    kinds = (("input_ids", "<i4"), ("in_loss", "?"))
    mapped = [np.memmap(folder / name, kind, "r") if starts[-1] else np.zeros(0, kind) for name, kind in kinds]
    return Examples(*mapped, starts, origins), ledger


def _cache_key(files: Sequence[str], renderer: Renderer, settings: str) -> str:
    package = Path(__file__).parent.parent
    code = [
        path.read_bytes()
        for folder in ("opendata", "format", "dataset")
        for path in sorted(package.glob(f"{folder}/*.py"))
    ]
    parts = [*file_hashes(files).items(), renderer.fingerprint(), settings, metadata.version("tokenizers")]
    return hashlib.sha256(b"".join([json.dumps(parts).encode(), *code])).hexdigest()[:32]


def _sizes_and_times(files: Sequence[str]) -> list[tuple[int, int]]:
    """Return the size of each file in bytes, and when it was written in ns."""
    return [(status.st_size, status.st_mtime_ns) for status in map(os.stat, files)]


def _build_once(files: Sequence[str], renderer: Renderer, folder: Path, *, say: Callable, **settings) -> None:
    """Build the cache, or wait for the process that does; ValueError with its reason when that one failed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_suffix(".lock")
    failure = folder.with_suffix(".failed")
    waited_for = []

    def wait_for(holder: dict) -> None:
        waited_for.append(holder)
        say(f"waiting for process {holder.get('pid')} on {holder.get('host')}, which tokenises the same data")

    while True:
        with hold_lock(lock, on_wait=wait_for):
            if folder.name in os.listdir(folder.parent):  # a listing is new, where a network file system caches names
                return
            if waited_for and failure.is_file():
                raise ValueError(failure.read_text(encoding="utf-8"))
            failure.unlink(missing_ok=True)
            remove_abandoned(folder)
            try:
                with _name_full_disk(folder.parent):
                    return _build(files, renderer, folder, say=say, **settings)
            except (ValueError, OSError) as error:
                if not is_held(lock):  # frozen for so long that another process took over: wait for that one
                    continue
                with contextlib.suppress(OSError):
                    write_text(failure, str(error))
                raise


@contextlib.contextmanager
def _name_full_disk(folder: Path) -> Iterator[None]:
    """Raise ValueError, with the flag that names another folder, when the block finds the disk full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(f"--cache_dir {folder}: {error.strerror}; free space there, or name another folder") from error


def _build(
    files: Sequence[str],
    renderer: Renderer,
    folder: Path,
    *,
    max_length: int,
    reading: dict,
    num_workers: int | None,
    before: list[tuple[int, int]],
    say: Callable,
) -> None:
    """Tokenise into a folder beside, and rename it; once more without the fast encoder if that was wrong."""
    num_bytes = sum(map(os.path.getsize, files))
    settings = {"max_length": max_length, "reading": reading, "num_workers": choose_num_workers(num_workers, num_bytes)}
    with stage_folder(folder) as staged:
        if files:
            encoder = _choose_encoder(files, renderer, reading, num_bytes)
            release_freed_memory()  # 100 MiB, of making the encoder's tables
            processes = f", in {settings['num_workers']} processes" if settings["num_workers"] > 1 else ""
            say(f"tokenising {len(files)} files with {encoder}{processes}")
        try:
            _write(files, renderer, staged, **settings)
        except DifferentIds as error:
            say(f"{renderer.encoder} is wrong at {error}; starting again without it")
            renderer.use_slow_encoder()
            _write(files, renderer, staged, **settings)
        for file, then, now in zip(files, before, _sizes_and_times(files), strict=True):
            if then != now:
                raise ValueError(f"{file}: was changed while it was read; run again when it is complete")


def _choose_encoder(files: Sequence[str], renderer: Renderer, reading: dict, num_bytes: int) -> str:
    """Choose the fastest encoder that proves right, also on the first conversations; return its name.

    It is the slow one if the tokenizer fails on one of those: that names the record when its turn comes.
    """
    sample = _read_first(files, renderer, reading)
    try:
        return renderer.use_bulk_encoder(sample, num_bytes)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # a panic of a Rust library is no Exception
        return renderer.use_slow_encoder()


def _read_first(files: Sequence[str], renderer: Renderer, reading: dict) -> list[Conversation]:
    """Return the first conversations, on which a bulk encoder must prove itself."""
    found = read_conversations(files, encoding=reading["encoding"], **reading_options(renderer, reading))
    readable = (conversation for conversation, error, *_place in found if error is None)
    return list(itertools.islice(readable, PROOF_SIZE))


class DifferentIds(Exception):
    """The bulk encoder and the plain one disagree on a conversation."""


def _write(
    files: Sequence[str], renderer: Renderer, folder: Path, *, max_length: int, reading: dict, num_workers: int
) -> None:
    ledger = new_ledger(files, max_length)
    lengths = array("q", [0])
    origins = [np.zeros(0, ORIGIN)]
    numbers = {}
    counts = {file: FieldCounts() for file in files}
    with (
        _make_workers(num_workers, renderer, max_length=max_length, reading=reading) as workers,
        open(folder / "input_ids", "wb") as ids,
        open(folder / "in_loss", "wb") as in_loss,
        tqdm(unit=" conversations", disable=None, leave=False) as progress,
    ):
        tasks = _make_tasks(files, reading["encoding"], parse=num_workers == 1)
        for (file, _piece), part in map_pieces(workers, tasks):
            if part.different:
                raise DifferentIds(part.different)
            ids.write(part.input_ids.astype("<i4", copy=False))
            in_loss.write(part.in_loss)
            lengths.frombytes(part.lengths.tobytes())
            origins.append(_renumber(part, numbers))
            merge_ledger(ledger, part.ledger)
            counts[file].add(part.counts)
            progress.update(part.ledger["files"][file]["in"])
    np.save(folder / "starts.npy", np.cumsum(np.frombuffer(lengths, dtype=np.int64)))
    np.save(folder / "origins.npy", np.concatenate(origins))
    ledger["source_names"] = list(numbers)
    _count_fields(ledger, counts, renderer, reading)
    add_up(ledger)
    (folder / "ledger.json").write_text(json.dumps(ledger, ensure_ascii=False), encoding="utf-8")
    release_freed_memory()


def _make_workers(num_workers: int, renderer: Renderer, **settings) -> Workers:
    if num_workers == 1:
        return Workers(1, partial(make_tokeniser, lambda: renderer, **settings))
    make_function = partial(make_tokeniser, pack_renderer(renderer), **settings)
    stand_in = make_tokeniser(partial(copy, renderer), **settings)
    renderer.free_encoder()  # the stand-in holds it until the workers have started
    return Workers(num_workers, make_function, stand_in)


def _make_tasks(files: Sequence[str], encoding: str, *, parse: bool) -> Iterator[Work]:
    return (Work(file, piece) for file in files for piece in cut_pieces(file, encoding, parse=parse))


def _renumber(part: Part, numbers: dict[str, int]) -> np.ndarray:
    """Return a part's origins with the numbers that its sources have in the whole data."""
    table = np.array([numbers.setdefault(name, len(numbers)) for name in part.source_names], np.int32)
    if len(part.origins):
        part.origins["source"] = table[part.origins["source"]]
    return part.origins


def _count_fields(ledger: dict, counts: dict[str, FieldCounts], renderer: Renderer, reading: dict) -> None:
    """Put the fields of all files into the ledger, and the thoughts for which the chat format has no place."""
    ledger["notes"] = {file: dict(+found.notes) for file, found in counts.items() if +found.notes}
    ledger["not_read"] = {file: dict(found.unread) for file, found in counts.items() if found.unread}
    if reading["reasoning"] != "drop" and not renderer.keeps_reasoning:
        ledger["thoughts_without_a_place"] = sum(found.notes["reasoning_dropped"] for found in counts.values())


def file_hashes(files: Sequence[str]) -> dict[str, str]:
    """Return the sha256 of each file's bytes."""
    return {file: hash_file(file) for file in files}
