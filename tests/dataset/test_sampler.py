"""Which rows each process takes: all of them once, for any number of processes and any point of resuming."""

import numpy as np
import pytest

from sft.dataset.sampler import EMPTY, Updates, WithEmpty
from sft.format.tokens import IGNORE_INDEX


def updates(rank: int = 0, *, rows: int = 5, batch_size: int = 1, accumulation: int = 2, world_size: int = 2, **more):
    sizes = {"batch_size": batch_size, "accumulation": accumulation, "world_size": world_size}
    return Updates(rows, rank=rank, seed=1, **sizes, **more)


def test_the_last_update_is_filled_with_empty_rows():
    a, b, c, d, e = updates().order(0).tolist()
    assert list(updates(0)) == [[a], [c], [e], [EMPTY]]
    assert list(updates(1)) == [[b], [d], [EMPTY], [EMPTY]]
    assert len(updates(0)) == 4


def test_the_rows_of_a_last_update_are_shared_out_evenly():
    last = updates(rows=17, batch_size=8, accumulation=2).batches_at(0, 0)
    assert [[len(batch) for batch in rank] for rank in last] == [[5, 4], [4, 4]]


def test_rows_are_shuffled_anew_in_each_epoch_and_the_same_in_each_process():
    orders = [updates(rank, rows=50).order(epoch).tolist() for epoch in (0, 1) for rank in (0, 1)]
    assert orders[0] == orders[1] != orders[2] == orders[3]
    assert sorted(orders[0]) == sorted(orders[2]) == list(range(50))
    assert updates(rows=5, shuffle=False).order(3).tolist() == [0, 1, 2, 3, 4]


def test_the_rows_of_an_update_are_those_of_one_process_with_the_same_batch():
    alone = updates(batch_size=4, accumulation=1, world_size=1, rows=23)
    for place, taken in enumerate(range(0, 23, 4)):
        whole = list(alone)[place]
        parts = [rows for rank in updates(rows=23).batches_at(0, taken) for batch in rank for rows in batch]
        assert sorted(row for row in parts if row != EMPTY) == sorted(whole)


@pytest.mark.parametrize("before", [(1, 1, 2), (2, 3, 1), (4, 1, 4)])
@pytest.mark.parametrize("after", [(1, 1, 2), (3, 2, 1), (1, 4, 4)])
@pytest.mark.parametrize("num_updates", [0, 1, 3])
def test_another_batch_or_world_size_resumes_without_repeating_or_losing_a_row(before, after, num_updates):
    def make(sizes, rank=0):
        batch_size, accumulation, world_size = sizes
        return updates(rank, rows=53, batch_size=batch_size, accumulation=accumulation, world_size=world_size)

    taken = num_updates * make(before).rows_per_update
    seen = make(before).order(0)[:taken].tolist()
    for rank in range(after[2]):
        resumed = make(after, rank)
        skipped = resumed.start_at(0, taken) * resumed.accumulation
        batches = list(resumed)
        assert len(batches) == len(resumed)
        assert all(batch == [EMPTY] for batch in batches[:skipped])
        seen += [row for batch in batches[skipped:] for row in batch if row != EMPTY]
    assert sorted(seen) == list(range(53))


def test_only_the_epoch_of_the_resume_begins_late():
    resumed = updates(rows=8, world_size=1, batch_size=2, accumulation=1)
    assert resumed.start_at(1, 6) == 3
    resumed.set_epoch(1)
    assert list(resumed)[:3] == [[EMPTY]] * 3
    resumed.set_epoch(2)
    assert sorted(row for batch in resumed for row in batch) == list(range(8))


def test_an_epoch_is_over_when_all_rows_are_taken():
    assert [updates(rows=5).is_over(taken) for taken in (0, 4, 5, 8)] == [False, False, True, True]
    assert [updates(rows=9, drop_last=True).is_over(taken) for taken in (4, 8)] == [False, True]


def test_an_empty_row_has_a_token_and_no_label():
    rows = [{"input_ids": np.array([5, 6]), "labels": np.array([5, 6]), "position_ids": np.array([0, 1])}]
    empty = WithEmpty(rows)[EMPTY]
    assert {name: values.tolist() for name, values in empty.items()} == {
        "input_ids": [5],
        "labels": [IGNORE_INDEX],
        "position_ids": [0],
    }
    assert rows[0]["labels"].tolist() == [5, 6]
    assert WithEmpty(rows)[0] is rows[0]


def test_an_epoch_is_set_once():
    told = []
    rows = updates(on_epoch=told.append)
    for epoch in (0, 0, 1, 1, 2):
        rows.set_epoch(epoch)
    assert told == [1, 2]


def test_the_updates_of_a_run_and_those_that_are_left_are_counted():
    """5 rows in updates of 2: 3 an epoch; after 4 rows of the second epoch 1 is left of it, and 3 of the third."""
    all_rows = updates(rows=5, batch_size=2, accumulation=1, world_size=1)
    assert (all_rows.in_all(3), all_rows.in_all(1.5), all_rows.in_all(3, max_steps=7)) == (9, 5, 7)
    assert all_rows.left(3, -1, epoch=1, taken=4, made=5) == 4
    assert all_rows.left(3, 7, epoch=1, taken=4, made=5) == 2
    assert all_rows.left(1, -1, epoch=1, taken=4, made=5) == 0
