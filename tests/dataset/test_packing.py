"""Packing: every example once and whole, full rows, and the same rows again for the same seed and epoch."""

import tracemalloc

import numpy as np
import pytest

from sft.dataset.dataset import Examples, TrainingRows
from sft.dataset.packing import pack


def belle_like(num: int, max_length: int = 2048) -> np.ndarray:
    random = np.random.default_rng(7)
    return np.clip(random.lognormal(np.log(262) - 0.9**2 / 2, 0.9, num).astype(int), 8, max_length)


def as_lists(rows) -> list[list[int]]:
    return [rows[index].tolist() for index in range(len(rows))]


def one_by_one(lengths: list[int], max_length: int) -> list[list[int]]:
    """The textbook form: each example, longest first, into the fullest row that has room."""
    rows = []
    for length in sorted(lengths, reverse=True):
        with_room = [row for row in rows if sum(row) + length <= max_length]
        if with_room:
            max(with_room, key=sum).append(length)
        else:
            rows.append([length])
    return rows


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([], []),
        ([8], [[8]]),
        ([5, 3, 4, 4], [[4, 4], [5, 3]]),
        ([5, 3, 4, 3], [[4, 3], [5, 3]]),
        ([6, 2, 2, 2, 2], [[2, 2, 2], [6, 2]]),
        ([1] * 17, [[1], [1] * 8, [1] * 8]),
        ([8, 8, 7, 1, 1], [[1], [7, 1], [8], [8]]),
    ],
)
def test_small_cases_are_packed_as_written_out(lengths, expected):
    rows = pack(lengths, 8, seed=0, epoch=0)
    assert sorted([lengths[example] for example in row] for row in as_lists(rows)) == expected


@pytest.mark.parametrize("case", range(60))
def test_the_rows_are_as_full_as_those_of_the_textbook_form(case):
    random = np.random.default_rng(case)
    max_length = int(random.integers(1, 60))
    lengths = random.integers(1, max_length + 1, int(random.integers(0, 200))).tolist()
    rows = as_lists(pack(lengths, max_length, seed=case, epoch=3))
    assert sorted(example for row in rows for example in row) == list(range(len(lengths)))
    tokens = sorted(sum(lengths[example] for example in row) for row in rows)
    assert tokens == sorted(map(sum, one_by_one(lengths, max_length)))  # which of two equally full rows is left open


def test_belle_like_lengths_fill_the_rows():
    lengths = belle_like(100_000)
    rows = pack(lengths, 2048, seed=1, epoch=0)
    tokens = np.add.reduceat(lengths[rows.examples], rows.starts[:-1])
    assert tokens.max() <= 2048
    assert np.array_equal(np.sort(rows.examples), np.arange(len(lengths)))
    assert tokens.sum() / (2048 * len(rows)) > 0.999


def test_the_same_seed_and_epoch_give_the_same_rows_and_others_give_others():
    lengths = belle_like(500)
    first = as_lists(pack(lengths, 2048, seed=1, epoch=0))
    assert as_lists(pack(lengths.tolist(), 2048, seed=1, epoch=0)) == first
    for seed, epoch in ((1, 1), (2, 0), (0, 1)):
        other = as_lists(pack(lengths, 2048, seed=seed, epoch=epoch))
        assert len(other) == len(first)
        assert sorted(map(sorted, other)) != sorted(map(sorted, first))
        assert [len(row) for row in other] != [len(row) for row in first]


def test_rows_have_their_number_and_end():
    rows = pack([4, 4, 4], 8, seed=0, epoch=0)
    assert (len(rows), len(list(rows))) == (2, 2)
    with pytest.raises(IndexError):
        rows[2]


@pytest.mark.parametrize("lengths", [[9], [3, 0]])
def test_an_example_that_is_too_long_or_empty_is_our_own_mistake(lengths):
    with pytest.raises(AssertionError, match="empty or too long"):
        pack(lengths, 8, seed=0, epoch=0)


def test_rows_and_statistics_of_an_example_take_few_bytes():
    """Of millions of examples: rows keep one int32 each; packing them took 64 bytes an example, the statistics 25."""
    num_examples = 50_000
    starts = np.arange(num_examples + 1) * 20
    examples = Examples(np.zeros(starts[-1], np.int32), np.ones(starts[-1], bool), starts)
    tracemalloc.start()
    try:
        rows = TrainingRows(examples, 2048, seed=0)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert rows.rows.examples.dtype == np.int32
    assert kept / num_examples < 6 and peak / num_examples < 40
    assert examples.row_statistics([0]).itemsize == 13
