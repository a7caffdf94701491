"""Text for a terminal: tables with aligned columns, and whether there is colour."""

import os
import sys
import unicodedata
from collections.abc import Sequence


def align_columns(table: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table of cells for a terminal: the first column to the left, the others to the right."""
    if not table:
        return []
    widths = [max(map(display_width, column)) for column in zip(*table, strict=True)]
    lines = []
    for first, *others in table:
        cells = [first + " " * (widths[0] - display_width(first))]
        cells += [" " * (width - display_width(text)) + text for text, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def display_width(text: str) -> int:
    """Return the columns of a terminal that a text takes: two for a Chinese character."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def has_colour() -> bool:
    """Whether the output is a terminal that shows colours (https://no-color.org)."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ
