"""Rows of a base's token embedding, read from its safetensors files alone: which tokens was it trained on?

A row that no training text reached is zero or tiny, or is equal to other such rows: weight decay shrinks it, or a tied
head gives all of them the same gradients ("Fishing for Magikarp", arXiv 2405.05417). Ids without a token have such
rows too.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sft.base import find_folder, find_weights

EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|word_embeddings|tok_embeddings|embed_in|wte|embedding)\.weight$")
FLOAT_DTYPES = ("F32", "F16", "BF16", "F64")
NUM_COMPARED_ROWS = 128
TINY_SHARE = 0.1  # of the median length of rows
# Of a row's length, up to which another row counts as equal. In SmolLM2-135M-Instruct untrained rows are 0.0003 apart,
# those of its two control tokens 0.12 from them and from each other (dev/LOG.md).
MAX_DISTANCE = 0.03


class Embedding(NamedTuple):
    """A matrix (rows, hidden) in a safetensors file."""

    num_rows: int
    file: Path
    name: str

    def read(self, ids: Sequence[int]) -> np.ndarray:
        """Return the rows of `ids` in fp32, (ids, hidden); no other part of the file is read."""
        from safetensors import safe_open

        with safe_open(self.file, framework="pt") as stream:
            return stream.get_slice(self.name)[list(ids)].float().numpy()


class Training(NamedTuple):
    """Tokens whose rows were never trained; with `has_example`, other such rows show that the rest is trained."""

    untrained_ids: list[int]
    has_example: bool


def find_embedding(model: str) -> Embedding | None:
    """Return the token embedding of a base whose whole safetensors files are on this machine, or None."""
    from safetensors import SafetensorError, safe_open

    folder = find_folder(model)
    found = []
    for file in find_weights(folder) if folder else ():
        with suppress(OSError, SafetensorError), safe_open(file, framework="pt") as stream:
            for name in filter(EMBEDDING.search, stream.keys()):
                matrix = stream.get_slice(name)
                if matrix.get_dtype() in FLOAT_DTYPES and len(matrix.get_shape()) == 2:
                    found.append(Embedding(matrix.get_shape()[0], file, name))
    return max(found, default=None)


def find_untrained(model: str, ids: Sequence[int], *, num_tokens: int, others: Sequence[int] = ()) -> Training | None:
    """Judge the rows of `ids`: None where the base's files can't be read.

    They are compared with rows of ordinary tokens, with each other, with those from `num_tokens` (the vocabulary with
    its added tokens) on, and with those of `others`, added tokens that may be untrained.
    """
    embedding = find_embedding(model)
    if embedding is None or not ids or max(ids) >= embedding.num_rows:
        return None
    others = [token_id for token_id in others if token_id < embedding.num_rows][:NUM_COMPARED_ROWS]
    ordinary = embedding.read(_spread(0, min(num_tokens, embedding.num_rows)))
    spare = embedding.read([*others, *_spread(num_tokens, embedding.num_rows)])
    rows = embedding.read(ids)
    usual = float(np.median(np.linalg.norm(ordinary, axis=1)))
    examples = spare[_find_unused(spare, spare, usual)]
    unused = _find_unused(rows, rows, usual) | _find_unused(rows, examples, usual)
    return Training([token_id for token_id, bad in zip(ids, unused, strict=True) if bad], len(examples) > 1)


def _spread(begin: int, end: int) -> list[int]:
    return np.unique(np.linspace(begin, end - 1, NUM_COMPARED_ROWS, dtype=int)).tolist() if end > begin else []


def _find_unused(rows: np.ndarray, others: np.ndarray, usual: float) -> np.ndarray:
    """Return which rows are tiny or as good as equal to one of the others, (rows,); in the same matrix, another one."""
    lengths = np.linalg.norm(rows, axis=1)
    distances = np.zeros((len(rows), len(others)), rows.dtype)
    for number, row in enumerate(rows):  # one at a time: all pairs of 256 rows of 8192 numbers take 2 GB
        distances[number] = np.linalg.norm(others - row, axis=1)
    if rows is others:
        np.fill_diagonal(distances, np.inf)
    is_equal = (distances <= MAX_DISTANCE * lengths[:, None]).any(axis=1)
    return ~(lengths > TINY_SHARE * usual) | is_equal
