"""Padding."""

import numpy as np

from sft.collate import PaddingCollator


def test_rows_are_padded_on_the_right_and_masked_by_position():
    examples = [
        {"input_ids": np.array([5, 2], dtype=np.int32), "labels": np.array([-100, 2], dtype=np.int32)},
        {"input_ids": np.array([5, 6, 2], dtype=np.int32), "labels": np.array([-100, 6, 2], dtype=np.int32)},
    ]
    batch = PaddingCollator(pad_token_id=2, multiple_of=4)(examples)
    assert batch["input_ids"].tolist() == [[5, 2, 2, 2], [5, 6, 2, 2]]
    assert batch["labels"].tolist() == [[-100, 2, -100, -100], [-100, 6, 2, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
