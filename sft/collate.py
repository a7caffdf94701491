"""Examples -> a padded batch of tensors."""

from collections.abc import Sequence

import numpy as np
import torch

from sft.chat_format import IGNORE_INDEX


class PaddingCollator:
    """Pad examples on the right to one length, a multiple of `multiple_of` tokens (tensor cores like 8).

    Returns `input_ids`, `labels` and `attention_mask`, each (batch, length) int64. The mask follows positions, not
    ids, so pad may be the same token as eos.
    """

    def __init__(self, pad_token_id: int, multiple_of: int = 8):
        self.pad_token_id, self.multiple_of = pad_token_id, multiple_of

    def __call__(self, examples: Sequence[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        longest = max(len(example["input_ids"]) for example in examples)
        length = -(-longest // self.multiple_of) * self.multiple_of
        batch = {
            "input_ids": np.full((len(examples), length), self.pad_token_id, dtype=np.int64),
            "labels": np.full((len(examples), length), IGNORE_INDEX, dtype=np.int64),
            "attention_mask": np.zeros((len(examples), length), dtype=np.int64),
        }
        for row, example in enumerate(examples):
            end = len(example["input_ids"])
            batch["input_ids"][row, :end] = example["input_ids"]
            batch["labels"][row, :end] = example["labels"]
            batch["attention_mask"][row, :end] = 1
        return {name: torch.from_numpy(values) for name, values in batch.items()}
