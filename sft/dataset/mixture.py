"""Which examples an epoch takes: `--data_path belle.json@2x orca.json@0.5x`, and a fixed share of replay."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sft.opendata.files import EVAL, TRAIN, list_files, split_suffix

MAX_TIMES_PER_EPOCH = 10_000  # that an epoch sees a file


def find_files(
    data_path: Sequence[str], eval_data_path: Sequence[str] = (), replay_path: Sequence[str] = ()
) -> tuple[dict[str, float | None], list[str]]:
    """Return (training files, each with how often an epoch sees its examples, held-out files).

    `belle.json@2x` is seen twice; a file of `replay_path` has None, its share decides. Beside a train.json, eval.json
    is held out and never trained on. Raises ValueError when a path holds nothing, or when a file is there twice with
    different times, or on both sides.
    """
    named = [(file, times) for path in data_path for file, times in _with_times(path)]
    named += [(file, None) for path in replay_path for file in list_files(path)]
    held_out = [file for path in eval_data_path for file in list_files(path)]
    names = {file for file, _times in named}
    beside = [file for file in names if Path(file).name == EVAL and str(Path(file).with_name(TRAIN)) in names]
    train: dict[str, tuple[str, float | None]] = {}
    for file, times in named:
        if file not in beside and train.setdefault(os.path.realpath(file), (file, times))[1] != times:
            other = train[os.path.realpath(file)][1]
            asked = " and as ".join("replay" if often is None else f"@{often:g}x" for often in (other, times))
            raise ValueError(f"{file}: is asked for as {asked}; name it once")
    if both := train.keys() & {os.path.realpath(file) for file in held_out}:
        raise ValueError(
            f"{min(both)}: is in --data_path and in --eval_data_path; a held-out file must not be trained on"
        )
    return dict(train.values()), held_out + sorted(beside)


def _with_times(text: str) -> list[tuple[str, float]]:
    path, suffix = split_suffix(text)
    times = float(suffix[:-1]) if re.fullmatch(r"\d+(\.\d+)?x", suffix) else 0.0
    if suffix and not times:
        hint = "; for a sample use sft.opendata" if re.fullmatch(r"\d+(\.\d+)?%?", suffix) else ""
        raise ValueError(f"{text}: {suffix!r}: write the times per epoch, as in {path}@2x or {path}@0.5x{hint}")
    if times > MAX_TIMES_PER_EPOCH:
        raise ValueError(f"{text}: at most {MAX_TIMES_PER_EPOCH:,} times per epoch")
    return [(file, times or 1.0) for file in list_files(path)]


@dataclass(frozen=True)
class Part:
    """The examples `start` to `stop` of one file, each seen `times` in an epoch, on average."""

    file: str
    start: int
    stop: int
    times: float
    replayed: bool = False

    @property
    def num_taken(self) -> int:
        """Examples per epoch, the same in every one."""
        return max(1, round(self.times * (self.stop - self.start))) if self.stop > self.start else 0


class Mixture:
    """`mixture.take(epoch)`: the numbers of the examples of an epoch, by file; a pure function of seed and epoch.

    Every file has an endless queue, one permutation of its examples after the other, and each epoch takes the next
    ones: 0.5x is another half in the second epoch, 2x every example twice. Three examples at 0.67x, in three epochs:

        queue [2 0 1] [1 2 0] ...    taken  [2 0], [1 1], [2 0]
    """

    def __init__(self, parts: Sequence[Part], *, seed: int):
        self.parts = parts
        self.seed = seed
        self.is_plain = all(part.times == 1 for part in parts)  # every example once
        self.changes = any(part.times != int(part.times) for part in parts)  # from epoch to epoch

    def take(self, epoch: int) -> np.ndarray:
        """Return the numbers of the examples of an epoch, counted from 0; an example may be there more than once."""
        taken = [self._take(part, number, epoch) for number, part in enumerate(self.parts)]
        return np.concatenate([np.zeros(0, np.int64), *taken])

    def _take(self, part: Part, number: int, epoch: int) -> np.ndarray:
        size = part.stop - part.start
        count = part.num_taken
        if count == size:
            return np.arange(part.start, part.stop)
        begin = epoch * count
        end = (epoch + 1) * count
        rounds = range(begin // size, -(-end // size)) if count else ()
        queue = [np.random.default_rng([self.seed, number, turn, 2]).permutation(size) for turn in rounds]
        first = rounds.start * size if count else 0
        return part.start + np.concatenate([np.zeros(0, np.int64), *queue])[begin - first : end - first]


def mix(
    times: Mapping[str, float | None], kept: Mapping[str, int], lengths: np.ndarray, *, replay_share: float, seed: int
) -> Mixture:
    """Return the mixture of files whose examples follow each other, `kept[file]` of each.

    `times[file]` is how often an epoch sees an example of it; None for a replayed file: together those give
    `replay_share` of the epoch's tokens. `lengths` is the tokens of each example.
    """
    edges = np.concatenate([[0], np.cumsum([kept[file] for file in times])]).tolist()
    starts = np.concatenate([[0], np.cumsum(lengths)])
    spans = {file: (edges[place], edges[place + 1]) for place, file in enumerate(times)}
    tokens = {file: int(starts[stop] - starts[start]) for file, (start, stop) in spans.items()}
    new = sum(tokens[file] * often for file, often in times.items() if often is not None)
    old = sum(tokens[file] for file, often in times.items() if often is None)
    if replay_share and not old:
        raise ValueError(
            "--replay_path: none of its conversations is kept, so no share of the tokens could come from it"
        )
    again = new * replay_share / (1 - replay_share) / old if old else 0.0
    parts = [
        Part(file, *spans[file], again if often is None else often, replayed=often is None)
        for file, often in times.items()
    ]
    return Mixture(parts, seed=seed)


def mixture_table(mixture: Mixture, lengths: np.ndarray) -> list[list[str]]:
    """Return what an epoch takes of each file, the header first; shares are of tokens."""
    means = [float(lengths[part.start : part.stop].sum()) / max(1, part.stop - part.start) for part in mixture.parts]
    tokens = [part.num_taken * mean for part, mean in zip(mixture.parts, means, strict=True)]
    table = [["file", "conversations", "times per epoch", "taken per epoch", "tokens per epoch", "share"]]
    for part, count in zip(mixture.parts, tokens, strict=True):
        name = f"{part.file} (replay)" if part.replayed else part.file
        times = f"{part.times:.3g}" if part.times < 100 else f"{part.times:,.0f}"
        row = [f"{part.stop - part.start:,}", times, f"{part.num_taken:,}", f"{count:,.0f}"]
        table.append([name, *row, f"{count / max(1.0, sum(tokens)):.1%}"])
    return table
