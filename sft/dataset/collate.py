"""Examples or packed rows -> a batch of tensors."""

from collections.abc import Sequence

import numpy as np
import torch

from sft.format.tokens import IGNORE_INDEX


class Collator:
    """Pad examples, or packed rows, on the right to a multiple of `multiple_of` tokens (tensor cores like 8).

    Returns `input_ids`, `labels` and, for examples, `attention_mask`, each (batch, length) int64. The mask follows
    positions, not ids, so pad may be the same token as eos. Packed rows keep their `position_ids` instead and get no
    mask, as a mask would join the documents; what pads them is one more document, without labels. `packed_length` pads
    all of them to one length.
    """

    def __init__(self, pad_token_id: int, multiple_of: int = 8, packed_length: int | None = None):
        self.pad_token_id = pad_token_id
        self.multiple_of = multiple_of
        self.packed_length = packed_length

    def __call__(self, examples: Sequence[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        packed = "position_ids" in examples[0]
        longest = max(len(example["input_ids"]) for example in examples)
        if packed and self.packed_length:
            longest = self.packed_length
        length = -(-longest // self.multiple_of) * self.multiple_of
        shape = (len(examples), length)
        last = "position_ids" if packed else "attention_mask"
        batch = {
            "input_ids": np.full(shape, self.pad_token_id, dtype=np.int64),
            "labels": np.full(shape, IGNORE_INDEX, dtype=np.int64),
            last: np.zeros(shape, dtype=np.int64),
        }
        for row, example in enumerate(examples):
            end = len(example["input_ids"])
            batch["input_ids"][row, :end] = example["input_ids"]
            batch["labels"][row, :end] = example["labels"]
            batch[last][row, :end] = example[last] if packed else 1
            if packed:
                batch[last][row, end:] = np.arange(length - end)
        return {name: torch.from_numpy(values) for name, values in batch.items()}
