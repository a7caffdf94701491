"""Lengths of examples -> rows of at most `max_length` tokens, each example whole and in exactly one row."""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

# The examples of each row in a group of equal rows: (length, number) pairs, longest first.
Pattern = tuple[tuple[int, int], ...]


class Rows:
    """`rows[i]` is the numbers of the examples in row i, longest first; two flat arrays, however many rows."""

    def __init__(self, examples: np.ndarray, starts: np.ndarray):
        self.examples = examples
        self.starts = starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.examples[self.starts[index] : self.starts[index + 1]]


def pack(lengths: Sequence[int] | np.ndarray, max_length: int, *, seed: int, epoch: int, num_rows: int = 0) -> Rows:
    """Pack examples of `lengths` tokens into rows of at most `max_length`, best fit decreasing over all of them.

    A pure function of its arguments. `seed` and `epoch` choose which of the examples of one length go together, and the
    order of the rows; the shape of the rows depends on the lengths alone:

        pack([5, 3, 4, 3], 8, ...)  ->  rows {0, 1 or 3} and {2, 3 or 1}, in either order

    When that makes less than `num_rows`, some rows are cut in two until there are so many (at most one per example).
    """
    lengths = np.asarray(lengths, dtype=np.int32)
    assert lengths.size == 0 or 0 < lengths.min() <= lengths.max() <= max_length, "an example is empty or too long"
    random = np.random.default_rng([seed, epoch])
    shuffled = random.permutation(len(lengths)).astype(np.int32)
    by_length = shuffled[np.argsort(lengths[shuffled], kind="stable")]
    counts = np.bincount(lengths, minlength=1)
    examples, sizes = _fill(_best_fit_decreasing(counts, max_length), by_length, np.cumsum(counts) - counts)
    rows = _reorder(examples, sizes, random.permutation(len(sizes)))
    assert num_rows <= len(examples), "more rows than examples"
    if num_rows > len(rows):
        inside = np.setdiff1d(np.arange(len(examples)), rows.starts)
        rows.starts = np.sort(np.append(rows.starts, random.permutation(inside)[: num_rows - len(rows)]))
    return rows


def count_rows(lengths: np.ndarray, max_length: int) -> int:
    """Return how many rows `pack` makes of examples of `lengths` tokens; it is the same for every seed."""
    groups = _best_fit_decreasing(np.bincount(lengths, minlength=1), max_length)
    return sum(num_rows for _pattern, num_rows in groups)


def _best_fit_decreasing(counts: np.ndarray, max_length: int) -> list[tuple[Pattern, int]]:
    """Return (pattern, number of rows) groups for `counts[length]` examples of each length.

    Examples of one length are alike, and so are rows of one pattern: whole groups are placed at a time, which gives the
    rows that placing one example after the other into the fullest row with room would give, in far fewer steps.
    """
    by_room: dict[int, list[tuple[Pattern, int]]] = defaultdict(list)
    rooms: list[int] = []  # the keys of by_room, sorted

    def put(pattern: Pattern, room: int, num_rows: int) -> None:
        if num_rows:
            if room not in by_room:
                insort(rooms, room)
            by_room[room].append((pattern, num_rows))

    def take(length: int, left: int) -> tuple[Pattern, int, int]:
        place = bisect_left(rooms, length)
        if place == len(rooms):
            return (), max_length, left
        room = rooms[place]
        group = by_room[room].pop()
        if not by_room[room]:
            del by_room[room], rooms[place]
        return group[0], room, group[1]

    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            pattern, room, num_rows = take(length, left)
            fitting = room // length
            full = min(num_rows, left // fitting)
            rest = left - full * fitting if full < num_rows else 0
            put((*pattern, (length, fitting)), room - fitting * length, full)
            put((*pattern, (length, rest)), room - rest * length, int(rest > 0))
            if pattern:
                put(pattern, room, num_rows - full - int(rest > 0))
            left -= full * fitting + rest
    return [group for groups in by_room.values() for group in groups]


def _fill(groups: list[tuple[Pattern, int]], by_length: np.ndarray, begin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Put examples, taken in the order of `by_length`, into the groups; return them row by row, and each row's size."""
    blocks = [by_length[:0]]
    sizes = [begin[:0]]
    begin = begin.tolist()
    for pattern, num_rows in groups:
        columns = []
        for length, times in pattern:
            end = begin[length] + num_rows * times
            columns.append(by_length[begin[length] : end].reshape(num_rows, times))
            begin[length] = end
        block = np.concatenate(columns, axis=1)
        blocks.append(block.ravel())
        sizes.append(np.full(num_rows, block.shape[1]))
    return np.concatenate(blocks), np.concatenate(sizes)


def _reorder(examples: np.ndarray, sizes: np.ndarray, order: np.ndarray) -> Rows:
    old_starts = np.cumsum(sizes) - sizes
    new_sizes = sizes[order]
    starts = np.concatenate([[0], np.cumsum(new_sizes)]).astype(np.int64)
    places = np.repeat((old_starts[order] - starts[:-1]).astype(np.int32), new_sizes)
    places += np.arange(len(examples), dtype=np.int32)
    return Rows(examples[places], starts)
