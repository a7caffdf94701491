"""Padding."""

import numpy as np

from sft.dataset.collate import Collator


def test_rows_are_padded_on_the_right_and_masked_by_position():
    examples = [
        {"input_ids": np.array([5, 2], dtype=np.int32), "labels": np.array([-100, 2], dtype=np.int32)},
        {"input_ids": np.array([5, 6, 2], dtype=np.int32), "labels": np.array([-100, 6, 2], dtype=np.int32)},
    ]
    batch = Collator(pad_token_id=2, multiple_of=4)(examples)
    assert batch["input_ids"].tolist() == [[5, 2, 2, 2], [5, 6, 2, 2]]
    assert batch["labels"].tolist() == [[-100, 2, -100, -100], [-100, 6, 2, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]


def test_packed_rows_keep_their_positions_and_get_no_mask():
    row = {"input_ids": np.array([5, 2, 6]), "labels": np.array([-100, 2, -100]), "position_ids": np.array([0, 1, 0])}
    batch = Collator(pad_token_id=2, multiple_of=4)([row, {name: values[:2] for name, values in row.items()}])
    assert list(batch) == ["input_ids", "labels", "position_ids"]
    assert batch["input_ids"].tolist() == [[5, 2, 6, 2], [5, 2, 2, 2]]
    assert batch["labels"].tolist() == [[-100, 2, -100, -100], [-100, 2, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 0], [0, 1, 0, 1]]
    assert Collator(pad_token_id=2, multiple_of=4, packed_length=6)([row])["input_ids"].shape == (1, 8)
