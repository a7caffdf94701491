"""Raw files -> cleaned, de-duplicated and split canonical files, and a ledger of it all."""

import contextlib
import functools
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from sft.files import exchange_names, lock_stream, move_files, open_whole, sync_folder
from sft.opendata.cleaning import (
    RULES,
    NearDuplicates,
    band_keys,
    clean_messages,
    digest_conversation,
    is_held_out,
    shingles,
)
from sft.opendata.conversation import read_record
from sft.opendata.fields import FieldCounts, NotChosen, RecordError, check_choices
from sft.opendata.files import (
    EVAL,
    LEDGER,
    REJECTS,
    TRAIN,
    LinesFile,
    Samples,
    Source,
    Work,
    check_sources,
    count_bytes,
    find_skipped,
    map_pieces,
    resolve_inputs,
)
from sft.opendata.records import RawRecord, WrongCut
from sft.workers import Workers, choose_num_workers

STAGING = ".opendata.tmp"
LOCK = "lock"
SPILL = "samples"


# --- From raw records to outcomes: the work of a worker process


class Kept(NamedTuple):
    """A record that is kept: `line` is the JSON to write, newline and all."""

    line: bytes
    digest: int
    in_eval: bool
    num_characters: int
    changed: tuple[str, ...]
    band_keys: tuple[int, ...]


class Reject(NamedTuple):
    """A record that is lost. `kind` is malformed or cleaning; `line` is the JSON to write."""

    kind: str
    reason: str
    line: bytes


class Outcomes(NamedTuple):
    """The fates of the records of a piece. `kept` has a column for each field of Kept: rows take longer to pickle."""

    kept: Kept
    rejects: list[Reject]
    counts: FieldCounts


def process_piece(
    task: Work, *, rules: Collection[str], reading: dict[str, str | None], eval_share: float, near: bool
) -> Outcomes | None:
    """Read, clean and serialise the records of a piece of a file; None for a range that was wrongly cut."""
    counts = FieldCounts()
    options = {"source": task.name, "counts": counts, **reading}
    try:
        found = [_process_record(raw, options, rules, eval_share, near) for raw in task.split()]
    except WrongCut:
        return None
    rejects = [outcome for outcome in found if isinstance(outcome, Reject)]
    kept = [outcome for outcome in found if isinstance(outcome, Kept)] if rejects else found
    columns = zip(*kept, strict=True) if kept else [()] * len(Kept._fields)
    return Outcomes(Kept(*map(list, columns)), rejects, counts)


def _process_record(
    raw: RawRecord, options: dict, rules: Collection[str], eval_share: float, near: bool
) -> Kept | Reject:
    kind = "malformed"
    try:
        conversation = read_record(raw.parse(), line=raw.place, **options)
        kind = "cleaning"
        conversation["messages"], changed = clean_messages(conversation["messages"], rules)
    except RecordError as error:
        kind = "cleaning" if isinstance(error, NotChosen) else kind
        reject = {"file": options["source"], "line": raw.line, "kind": kind, "reason": error.reason}
        reject |= {"message": str(error), "raw": raw.raw}
        # Escapes keep what is no text: undecodable bytes and lone surrogates.
        return Reject(kind, error.reason, _to_line(reject, ensure_ascii=True))
    return Kept(
        line=_to_line(conversation),
        digest=digest_conversation(conversation),
        in_eval=is_held_out(conversation, eval_share),
        num_characters=sum([len(message["content"]) for message in conversation["messages"]]),
        changed=tuple(changed),
        band_keys=band_keys(shingles(conversation)) if near else (),
    )


def _to_line(value: dict, *, ensure_ascii: bool = False) -> bytes:
    return f"{json.dumps(value, ensure_ascii=ensure_ascii)}\n".encode()


# --- The ledger of a file


COUNTED = ("train", "eval", "duplicates", "near_duplicates", "not_sampled")
NAMES = {"train": TRAIN, "eval": EVAL}  # of the files that conversations are written to


@dataclass
class FileLedger:
    """Outcomes of one file's records; `lengths` counts kept conversations by their number of characters."""

    counts: Counter = field(default_factory=Counter)
    dropped: Counter = field(default_factory=Counter)
    rejected: Counter = field(default_factory=Counter)
    changed: Counter = field(default_factory=Counter)
    notes: Counter = field(default_factory=Counter)
    not_read: Counter = field(default_factory=Counter)
    lengths: Counter = field(default_factory=Counter)

    def count(self, found: Outcomes, ways: Sequence[str]) -> None:
        """Add the outcomes of a piece; `ways` says of each kept record: train, eval, duplicates or near_duplicates."""
        written = [way in ("train", "eval") for way in ways]
        self.counts["in"] += len(ways) + len(found.rejects)
        self.counts.update(ways)
        self.lengths.update(itertools.compress(found.kept.num_characters, written))
        self.changed.update(itertools.chain(*itertools.compress(found.kept.changed, written)))
        for reject in found.rejects:
            (self.rejected if reject.kind == "malformed" else self.dropped)[reject.reason] += 1
        self.notes.update(found.counts.notes)
        self.not_read.update(found.counts.unread)

    def __add__(self, other: "FileLedger") -> "FileLedger":
        return FileLedger(
            *(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True))
        )

    def as_dict(self) -> dict[str, Any]:
        row = {name: self.counts[name] for name in ("in", *COUNTED)}
        row |= {"dropped": dict(self.dropped), "rejected": dict(self.rejected)}
        assert row["in"] == sum(row[name] for name in COUNTED) + self.dropped.total() + self.rejected.total(), row
        row |= {"changed": dict(self.changed), "notes": dict(+self.notes), "not_read": dict(self.not_read)}
        return row | {"characters": {f"p{percent}": _percentile(self.lengths, percent) for percent in (50, 90, 99)}}


def _percentile(lengths: Counter, percent: int) -> int:
    """The smallest length that `percent` of the conversations do not exceed."""
    wanted = lengths.total() * percent / 100
    seen = 0
    for length in sorted(lengths):
        seen += lengths[length]
        if seen >= wanted:
            return length
    return 0


# --- The run


def build_opendata(
    inputs: Iterable[str],
    *,
    output: str,
    overwrite: bool = False,
    report: str | None = None,
    without: Collection[str] = (),
    near_duplicates: float | None = None,
    eval_share: float = 0.02,
    encoding: str = "utf-8",
    reasoning: str = "auto",
    preference: str | None = None,
    seed: int = 42,
    max_rejected: float = 0.01,
    workers: int | None = None,
) -> dict[str, Any]:
    """Turn raw files into train.json, eval.json, rejects.jsonl and ledger.json in `output`; return the ledger.

    `without` names cleaning rules to leave out. Raises ValueError with one line per mistake before anything is written.
    `output` changes only when all is done, and only these four files. Ask `sft.opendata.find_problem`
    whether they can be used.
    """
    report = report or os.path.join(output, LEDGER)
    targets = {name: os.path.join(output, name) for name in (TRAIN, EVAL, REJECTS)} | {LEDGER: report}
    skip = {os.path.abspath(path) for path in targets.values()}
    inputs = list(inputs)
    sources, mistakes = resolve_inputs(inputs, skip=skip)
    mistakes += check_sources(sources, encoding)
    mistakes += _check_settings(without, near_duplicates, eval_share, max_rejected, workers)
    mistakes += check_choices(reasoning, preference)
    mistakes += _check_targets(targets, overwrite) if output else ["--output: is empty; name a folder"]
    if mistakes or not sources:
        raise ValueError("\n".join(mistakes or ["no input: name a file, a folder, a glob, a data set or --mix"]))
    rules = tuple(rule for rule in RULES if rule not in without)
    reading = {"reasoning": reasoning, "preference": preference}
    options = {"rules": rules, "reading": reading, "eval_share": eval_share, "near": near_duplicates is not None}
    settings = {"max_rejected": max_rejected, "near_duplicates": near_duplicates, "encoding": encoding, "seed": seed}
    settings |= {"eval_share": eval_share, **reading, "rules": rules}
    make_function = functools.partial(functools.partial, process_piece, **options)
    num_workers = choose_num_workers(workers, count_bytes(sources))
    with _staging(output) as folder, Workers(num_workers, make_function) as started:
        staged = _StagedFiles(folder, sources, near_duplicates)
        _read_sources(sources, started, staged, seed=seed, encoding=encoding)
        ledger = {"settings": settings, "skipped_files": find_skipped(inputs), **staged.close()}
        if mistakes := _check_targets(targets, overwrite):
            raise ValueError("\n".join(mistakes))
        _move_into_place(folder, targets, json.dumps(ledger, ensure_ascii=False, indent=2, sort_keys=True) + "\n")
    return ledger


def _check_settings(
    without: Collection[str], near: float | None, eval_share: float, max_rejected: float, workers: int | None
) -> list[str]:
    unknown = [name for name in without if name not in RULES]
    mistakes = {
        f"no such cleaning rule: {', '.join(unknown)}; there are {', '.join(RULES)}": unknown,
        f"--eval_share {eval_share}: give a share from 0 up to, but without, 1": not 0 <= eval_share < 1,
        f"--max_rejected {max_rejected}: give a share from 0 to 1": not 0 <= max_rejected <= 1,
        f"--near_duplicates {near}: give a similarity above 0 and up to 1, such as 0.8": near is not None
        and not 0 < near <= 1,
        "--near_duplicates needs rensa; run: pip install rensa": near is not None and find_spec("rensa") is None,
        f"--preprocessing_num_workers {workers}: give at least 1": workers is not None and workers < 1,
    }
    return [message for message, wrong in mistakes.items() if wrong]


def _check_targets(targets: dict[str, str], overwrite: bool) -> list[str]:
    mistakes = []
    existing = [path for path in targets.values() if os.path.lexists(path)]
    if existing and not overwrite:
        mistakes.append(f"{', '.join(existing)}: already there; use --overwrite to replace, or another --output")
    mistakes += [f"{path}: is a folder, and a file has to go there" for path in existing if os.path.isdir(path)]
    for folder in dict.fromkeys(os.path.dirname(os.path.abspath(path)) for path in targets.values()):
        while not os.path.lexists(folder):
            folder = os.path.dirname(folder)
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
            mistakes.append(f"{folder}: can't be written to; choose another --output or --report")
    return mistakes


@contextlib.contextmanager
def _staging(output: str) -> Iterator[str]:
    """A hidden folder in `output` to write in, locked. Files of a killed run in it are overwritten, then removed.

    It is inside and not beside `output` so that moving a file into place never crosses to another disk.
    """
    created = not os.path.isdir(output)
    folder = os.path.join(output, STAGING)
    try:
        os.makedirs(folder, exist_ok=True)
        lock = open(os.path.join(folder, LOCK), "w")  # noqa: SIM115
    except OSError as error:
        raise ValueError(f"{output}: can't be written to ({error.strerror}); choose another --output") from error
    with lock:
        lock_stream(lock, f"{output}: another run is writing there; wait, or choose another --output")
        try:
            yield folder
        finally:
            for name in (TRAIN, EVAL, REJECTS, SPILL, LOCK):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(folder, name))
            with contextlib.suppress(OSError):
                os.rmdir(folder)
                if created:
                    os.rmdir(output)


def _move_into_place(folder: str, targets: dict[str, str], ledger: str) -> None:
    """Move the files from staging, the ledger last: it holds the digests of the others.

    The ledger may go to another disk, so it is written there first: if that disk is full, nothing has been replaced.
    """
    try:
        os.makedirs(os.path.dirname(os.path.abspath(targets[LEDGER])), exist_ok=True)
        with open_whole(targets[LEDGER]) as stream:
            stream.write(ledger)
            stream.flush()
            move_files(Path(folder), Path(targets[TRAIN]).parent, (TRAIN, EVAL, REJECTS))
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or targets[LEDGER]) from error
    sync_folder(Path(targets[LEDGER]).parent)


class _StagedFiles:
    """The files that a run writes into `folder`, the ledgers of its sources, and the first record of each reason."""

    def __init__(self, folder: str, sources: list[Source], near_duplicates: float | None):
        self.folder = Path(folder)
        self.ledgers = {source.name: FileLedger() for source in sources}
        self._first: dict[str, str] = {}
        self._writers = {name: LinesFile(self.folder / name) for name in (TRAIN, EVAL, REJECTS)}
        self._digests: set[int] = set()
        self._near = None if near_duplicates is None else NearDuplicates(near_duplicates)

    def add(self, source_name: str, found: Outcomes) -> None:
        """Write the outcomes of a piece where they belong, and count them."""
        self._writers[REJECTS].write([reject.line for reject in found.rejects])
        for reason, line in ((reject.reason, reject.line) for reject in found.rejects):
            if reason not in self._first:
                reject = json.loads(line)
                self._first[reason] = f"{source_name} line {reject['line']}: {reject['message']}"
        self.ledgers[source_name].count(found, self._write(found))

    def _write(self, found: Outcomes) -> list[str]:
        """Write the conversations that are no duplicates; return what each counts as."""
        kept = found.kept
        ways = ["eval" if in_eval else "train" for in_eval in kept.in_eval]
        for number, digest in enumerate(kept.digest):
            if digest in self._digests:
                ways[number] = "duplicates"
                continue
            self._digests.add(digest)
            if self._near:
                writer = self._writers[NAMES[ways[number]]]
                line = kept.line[number]
                if self._near.find_or_add(kept.band_keys[number], line, writer.file, writer.num_bytes):
                    ways[number] = "near_duplicates"
                else:
                    writer.write([line])
        if not self._near:
            for way, name in NAMES.items():
                self._writers[name].write(
                    [line for line, its_way in zip(kept.line, ways, strict=True) if its_way == way]
                )
        return ways

    def close(self) -> dict[str, Any]:
        """Close the files; return the part of the ledger that tells what was read and written."""
        outputs = {name: writer.close() for name, writer in self._writers.items()}
        if not outputs[TRAIN]["records"] and outputs[EVAL]["records"]:
            # So little was kept that all of it is held out: train on that.
            exchange_names(self.folder / TRAIN, self.folder / EVAL)
            outputs[TRAIN], outputs[EVAL] = outputs[EVAL], outputs[TRAIN]
            for ledger in self.ledgers.values():
                ledger.counts["train"] = ledger.counts.pop("eval", 0)
        return {
            "files": {name: ledger.as_dict() for name, ledger in self.ledgers.items()},
            "total": sum(self.ledgers.values(), FileLedger()).as_dict(),
            "first": self._first,
            "outputs": outputs,
        }


def _read_sources(sources: list[Source], workers: Workers, staged: _StagedFiles, *, seed: int, encoding: str) -> None:
    """Let the workers read and clean every source in canonical order, and stage what comes out."""
    progress = _open_progress_bar()
    with progress or contextlib.nullcontext(), open(staged.folder / SPILL, "w+b") as spill:
        samples = Samples(sources, spill, seed=seed, encoding=encoding)
        parse = workers.num_workers == 1
        tasks = (Work(source.name, piece) for source in sources for piece in samples.cut(source, parse=parse))
        for (name, _piece), found in map_pieces(workers, tasks):
            staged.add(name, found)
            if progress:
                progress.set_postfix_str(name, refresh=False)
                progress.update(len(found.kept.line) + len(found.rejects))
    for name, num in samples.num_left_out.items():
        staged.ledgers[name].counts.update({"in": num, "not_sampled": num})


def _open_progress_bar() -> Any:
    """Return a progress bar where stderr is a terminal, else None: importing tqdm would double the start-up time."""
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    return tqdm(unit=" records", leave=False)
