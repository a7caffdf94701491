"""Text for a terminal: lines printed once, rows with their trained tokens."""

import os

import numpy as np

from sft.format.tokens import IGNORE_INDEX
from sft.tables import has_colour

GREEN = "\033[32m"
DIM = "\033[2m"
RESET = "\033[0m"


def say(text: str) -> None:
    """Print once, from the first process."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, flush=True)


def paint(tokenizer, input_ids: np.ndarray, labels: np.ndarray, *, colour: bool | None = None) -> str:
    """Return a row as text, its trained tokens in green, or in ⟦ ⟧ where there is no colour (a pipe, NO_COLOR)."""
    colour = has_colour() if colour is None else colour
    trained, plain = ((GREEN, RESET), (DIM, RESET)) if colour else (("⟦", "⟧"), ("", ""))
    parts = [(text, trained if in_loss else plain) for text, in_loss in split_by_loss(tokenizer, input_ids, labels)]
    return "".join(before + text + after for text, (before, after) in parts)


def split_by_loss(tokenizer, input_ids: np.ndarray, labels: np.ndarray) -> list[tuple[str, bool]]:
    """Return a row as (text, whether it is in the loss), cut where that changes."""
    if not len(input_ids):
        return []
    in_loss = np.asarray(labels) != IGNORE_INDEX
    edges = np.flatnonzero(np.diff(in_loss)) + 1
    parts = zip(np.split(np.asarray(input_ids), edges), np.split(in_loss, edges), strict=True)
    return [(tokenizer.decode(ids.tolist()), bool(flags[0])) for ids, flags in parts]
