"""Rows of a base's token embedding, read from its safetensors files alone: which tokens was it trained on?

    header of model.safetensors: {"model.embed_tokens.weight": {"dtype": "BF16", "shape": [151936, 896], …}}
    then one read a row; the other weights are never touched

A row that no training text reached is zero or tiny, or is like the other such rows: weight decay shrinks it, or a tied
head pushes all of them in one direction ("Fishing for Magikarp", arXiv 2405.05417). An id without a token has one too.
"""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sft.base import find_folder, find_weights

EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|word_embeddings|tok_embeddings|embed_in|wte|embedding)\.weight$")
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}
MAX_HEADER_BYTES = 100 << 20
NUM_COMPARED_ROWS = 128
TINY_SHARE = 0.1  # of the median length of rows
MIN_LIKENESS = 0.98  # cosine from which two rows are the same but for rounding


class Embedding(NamedTuple):
    """A matrix (rows, hidden) in a safetensors file; `begin` is the offset of its first byte."""

    file: Path
    begin: int
    dtype: str
    num_rows: int
    hidden: int

    def read(self, ids: Sequence[int]) -> np.ndarray:
        """Return the rows of `ids` in fp32, (ids, hidden)."""
        kind = np.dtype(DTYPES[self.dtype])
        size, rows = self.hidden * kind.itemsize, []
        with open(self.file, "rb") as stream:
            for token_id in ids:
                stream.seek(self.begin + token_id * size)
                rows.append(np.frombuffer(stream.read(size), kind))
        found = np.stack(rows) if rows else np.zeros((0, self.hidden), kind)
        if self.dtype == "BF16":  # the upper half of fp32
            return (found.astype(np.uint32) << 16).view(np.float32)
        return found.astype(np.float32)


class Training(NamedTuple):
    """Tokens whose rows were never trained; `has_example` says that other such rows prove the rest to be trained."""

    untrained_ids: list[int]
    has_example: bool


def find_embedding(model: str) -> Embedding | None:
    """Return the token embedding of a base whose safetensors files are on this machine, or None."""
    folder = find_folder(model)
    found = []
    for file in find_weights(folder) if folder else ():
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            found += _list_embeddings(file)
    return max(found, key=lambda embedding: embedding.num_rows, default=None)


def _list_embeddings(file: Path) -> list[Embedding]:
    if file.suffix != ".safetensors":
        return []
    with open(file, "rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > MAX_HEADER_BYTES:
            return []
        header = json.loads(stream.read(size))
    return [
        Embedding(file, 8 + size + entry["data_offsets"][0], entry["dtype"], *entry["shape"])
        for name, entry in header.items()
        if EMBEDDING.search(name) and entry["dtype"] in DTYPES and len(entry["shape"]) == 2
    ]


def find_untrained(model: str, ids: Sequence[int], *, num_tokens: int) -> Training | None:
    """Judge the rows of `ids` by rows of ordinary tokens, by each other, and by the rows from `num_tokens` on.

    None where the base's files can't be read. `num_tokens` is the size of the vocabulary with the added tokens.
    """
    embedding = find_embedding(model)
    if embedding is None or not ids or max(ids) >= embedding.num_rows:
        return None
    try:
        ordinary = embedding.read(_spread(0, min(num_tokens, embedding.num_rows)))
        spare = embedding.read(_spread(num_tokens, embedding.num_rows))
        rows = embedding.read(ids)
    except (OSError, ValueError):  # a file that is cut off
        return None
    usual = float(np.median(np.linalg.norm(ordinary, axis=1)))
    is_tiny = ~(np.linalg.norm(rows, axis=1) > TINY_SHARE * usual)
    is_like_another = (_likeness(rows, rows) - np.eye(len(ids)) >= MIN_LIKENESS).any(axis=1)
    untrained = is_tiny | is_like_another
    has_example = len(spare) > 1 and _are_untrained(spare, usual)
    if has_example:
        untrained |= _likeness(rows, spare.mean(axis=0, keepdims=True))[:, 0] >= MIN_LIKENESS
    return Training([token_id for token_id, bad in zip(ids, untrained, strict=True) if bad], has_example)


def _spread(begin: int, end: int) -> list[int]:
    return np.unique(np.linspace(begin, end - 1, NUM_COMPARED_ROWS, dtype=int)).tolist() if end > begin else []


def _likeness(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the cosine of each row with each other one, (rows, others); of a zero row 0."""
    lengths = [np.maximum(np.linalg.norm(each, axis=1, keepdims=True), 1e-30) for each in (rows, others)]
    return (rows / lengths[0]) @ (others / lengths[1]).T


def _are_untrained(rows: np.ndarray, usual: float) -> bool:
    is_tiny = not (np.linalg.norm(rows, axis=1) > TINY_SHARE * usual).any()
    return is_tiny or bool((_likeness(rows, rows.mean(axis=0, keepdims=True)) >= MIN_LIKENESS).all())
