"""Contamination: which questions of a suite occur, in whole or in a long part, in the training data.

A text is compared by its words, and Chinese by its characters, without case, width and punctuation. A question is in
the data when a message of it holds 13 words of the question in a row (as for GPT-3, Brown et al. 2020), or 20 Chinese
characters, which say about as much; a shorter question must be there whole, and one too short is not looked for.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

from sft.opendata.cleaning import HAN, has_han
from sft.opendata.conversation import read_conversations
from sft.opendata.files import list_files

# of a question in a row
WORDS = 13
CHARACTERS = 20
ANCHOR = 5  # tokens by which a run is looked up; shorter questions are not looked for
_TOKEN = re.compile(rf"[{HAN}]|[^\W_{HAN}]+")


def split_tokens(text: str) -> list[str]:
    """Return Chinese characters one by one, and words and numbers of other scripts."""
    return _TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())


class Overlap:
    """An index of the runs of a suite's questions, as large as the suite; the data streams past it."""

    def __init__(self, questions: Iterable[tuple[str, Sequence[str]]]):
        """Take (id, texts) of each question; one text that is found is enough."""
        self.runs: dict[tuple[str, ...], list[tuple[tuple[str, ...], str]]] = {}
        self.looked_for: set[str] = set()
        for name, texts in questions:
            for text in texts:
                for run in _runs(split_tokens(text)):
                    self.looked_for.add(name)
                    self.runs.setdefault(run[:ANCHOR], []).append((run, name))

    def find(self, text: str) -> set[str]:
        """Return the ids of the questions that a text holds."""
        seen = split_tokens(text)
        places = list(zip(*(seen[start:] for start in range(ANCHOR)), strict=False))
        if self.runs.keys().isdisjoint(places):
            return set()
        found = set()
        for place, anchor in enumerate(places):
            for run, name in self.runs.get(anchor, ()):
                if name not in found and tuple(seen[place : place + len(run)]) == run:
                    found.add(name)
        return found


def _runs(question: list[str]) -> Iterator[tuple[str, ...]]:
    num_han = sum(map(has_han, question))
    length = min(CHARACTERS if num_han > len(question) / 2 else WORDS, len(question))
    if length >= ANCHOR:
        for start in range(len(question) - length + 1):
            yield tuple(question[start : start + length])


def find_overlap(
    questions: Iterable[tuple[str, Sequence[str]]], paths: Sequence[str], *, encoding: str = "utf-8"
) -> dict:
    """Stream the data past the questions; return what was found of each, where first, and how much was read."""
    index = Overlap(questions)
    found = {}
    counts = {"conversations": 0, "unreadable": 0}
    files = list(dict.fromkeys(file for path in paths for file in list_files(path)))
    for conversation, error, file, line in read_conversations(files, encoding=encoding):
        counts["unreadable" if error else "conversations"] += 1
        for message in conversation["messages"] if conversation else ():
            for name in index.find(message["content"]) - found.keys():
                found[name] = f"{file} line {line}"
    return {"found": found, "looked_for": len(index.looked_for), **counts}


def overlap_lines(found: dict) -> str:
    """Return what `find_overlap` found, for people."""
    text = (
        f"In the training data: {len(found['found'])} of {found['looked_for']} questions that are long enough to tell"
    )
    text += f" ({found['conversations']:,} conversations read, {found['unreadable']:,} unreadable)."
    return text + "".join(f"\n* {name}: {place}" for name, place in sorted(found["found"].items()))
