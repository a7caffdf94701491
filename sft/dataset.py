"""Canonical or raw files -> tokenised examples in flat arrays, and the account of every conversation on the way."""

import hashlib
import itertools
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from sft.chat_format import Renderer
from sft.conversation import RecordError, list_files, read_conversations
from sft.opendata import EVAL, TRAIN

BATCH_SIZE = 1000  # conversations per call of the tokenizer: enough to keep its threads busy, little memory
LOST = ("rejected", "prompt_too_long", "no_trained_token", "boundary")


class Examples:
    """Tokenised examples; `examples[i]` is {"input_ids", "labels"}, each (length,) int32, labels unshifted."""

    def __init__(self, input_ids: np.ndarray, labels: np.ndarray, starts: np.ndarray):
        self._input_ids, self._labels, self._starts = input_ids, labels, starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        span = slice(self._starts[index], self._starts[index + 1])
        return {"input_ids": self._input_ids[span], "labels": self._labels[span]}

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per example, (examples,)."""
        return np.diff(self._starts)

    @property
    def num_trained_tokens(self) -> int:
        return int((self._labels >= 0).sum())


def find_files(data_path: Sequence[str], eval_data_path: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Return (training files, held-out files); beside a train.json, eval.json is held out and never trained on.

    Raises ValueError when a path holds nothing, or when a file is on both sides.
    """
    train = [file for path in data_path for file in list_files(path)]
    held_out = [file for path in eval_data_path for file in list_files(path)]
    beside = [file for file in train if Path(file).name == EVAL and str(Path(file).with_name(TRAIN)) in train]
    train = [file for file in dict.fromkeys(train) if file not in beside]
    both = {str(Path(file).resolve()) for file in train} & {str(Path(file).resolve()) for file in held_out}
    if both:
        raise ValueError(
            f"{min(both)}: is in --data_path and in --eval_data_path; a held-out file must not be trained on"
        )
    return train, held_out or beside


def tokenise(
    files: Sequence[str], renderer: Renderer, *, max_length: int, encoding: str = "utf-8"
) -> tuple[Examples, dict]:
    """Read, render and label every conversation of `files`; return the examples and the ledger.

    The ledger counts for each file `in` = `kept` + each way to be lost, and among the kept those that lost turns or
    were cut; `first` names the first place of each loss.
    """
    ledger = {"max_length": max_length, "files": {file: Counter() for file in files}, "first": {}}
    input_ids, labels, starts = array("i"), array("i"), array("q", [0])
    for batch in batches(_readable(files, ledger, encoding), BATCH_SIZE):
        for (file, line, _messages), rendered in zip(batch, _render(batch, renderer, max_length), strict=True):
            kept = len(rendered.input_ids) > 0
            _count(ledger, file, line, "kept" if kept else rendered.outcome)
            if not kept:
                continue
            if rendered.outcome != "whole":
                _count(ledger, file, line, rendered.outcome)
            input_ids.frombytes(rendered.input_ids.tobytes())
            labels.frombytes(rendered.labels.tobytes())
            starts.append(len(input_ids))
    arrays = (np.frombuffer(values, dtype=kind) for values, kind in ((input_ids, "i4"), (labels, "i4"), (starts, "i8")))
    _settle(ledger)
    return Examples(*arrays), ledger


def _readable(files: Sequence[str], ledger: dict, encoding: str) -> Iterable[tuple[str, int, list[dict]]]:
    for conversation, error, file, line in read_conversations(files, encoding=encoding):
        ledger["files"][file]["in"] += 1
        if error is None:
            yield file, line, conversation["messages"]
        else:
            _count(ledger, file, line, "rejected", str(error))


def batches(items: Iterable, size: int) -> Iterable[list]:
    """Cut a stream into lists of at most `size` (itertools.batched needs Python 3.12)."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _render(batch: list, renderer: Renderer, max_length: int) -> list:
    conversations = [messages for _file, _line, messages in batch]
    try:
        return renderer.render_batch(conversations, max_length=max_length)
    except RecordError:
        return [renderer.render_or_reason(messages, max_length=max_length) for messages in conversations]


def _count(ledger: dict, file: str, line: int, outcome: str, why: str = "") -> None:
    ledger["files"][file][outcome] += 1
    if outcome != "kept":
        ledger["first"].setdefault(outcome, f"{file} line {line}" + (f": {why}" if why else ""))


def _settle(ledger: dict) -> None:
    total = Counter()
    for counts in ledger["files"].values():
        total.update(counts)
    assert total["in"] == total["kept"] + sum(total[reason] for reason in LOST), f"the ledger doesn't add up: {total}"
    ledger["files"] = {file: dict(counts) for file, counts in ledger["files"].items()}
    ledger["total"] = dict(total)


def ledger_lines(ledger: dict) -> list[str]:
    """Say in a few lines what went in, what was kept, and where each kind of loss happened first."""
    total = defaultdict(int, ledger["total"])
    lines = [f"{total['in']:,} conversations in {len(ledger['files'])} files, {total['kept']:,} kept"]
    for reason in ("turns_dropped", "cut", *LOST):
        if total[reason]:
            lines.append(f"  {EXPLAINED[reason]}: {total[reason]:,} (first: {ledger['first'][reason]})")
    return lines


EXPLAINED = {
    "turns_dropped": "kept without their last turns, which did not fit max_length",
    "cut": "kept with their only answer cut at max_length (no stop token taught)",
    "rejected": "lost, not a conversation",
    "prompt_too_long": "lost, the prompt alone fills max_length",
    "no_trained_token": "lost, no token to train on",
    "boundary": "lost, a token reaches over the start of a reply",
}


def check_losses(ledger: dict, max_lost: float) -> None:
    """Raise ValueError when nothing is left, or when more than the share `max_lost` of the conversations is lost."""
    total = defaultdict(int, ledger["total"])
    lost = total["in"] - total["kept"]
    summary = "\n".join(ledger_lines(ledger))
    if not total["kept"]:
        raise ValueError(f"no conversation to train on in {', '.join(ledger['files']) or 'the given files'}\n{summary}")
    if lost > max_lost * total["in"]:
        raise ValueError(
            f"{lost:,} of {total['in']:,} conversations would be lost, more than --max_lost {max_lost:g}; "
            f"clean the data with sft.opendata, raise --max_length or raise --max_lost\n{summary}"
        )


def file_hashes(files: Sequence[str]) -> dict[str, str]:
    """Return the sha256 of each file's bytes."""
    hashes = {}
    for file in files:
        with open(file, "rb") as stream:
            hashes[file] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes
