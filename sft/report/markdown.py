"""Values, tables and code blocks in Markdown, for results and model cards."""

import re
from collections.abc import Sequence


def short(value) -> str:
    """Return a number with four digits of a fraction, or with commas if it is whole; other values as text."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def cell(value) -> str:
    """Return a value for a cell of a table: one line, with Markdown's characters escaped."""
    text = " ".join(short(value).split()).replace("\\", "\\\\")
    return re.sub(r"([|<`*_\[])", r"\\\1", text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, num_names: int = 1) -> str:
    """Return a table of Markdown texts; the first `num_names` columns are aligned left, the others right."""
    rule = "|" + "---|" * num_names + "--:|" * (len(header) - num_names)
    first, *others = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return "\n".join([first, rule, *others])


def fence(text: str, language: str = "text") -> str:
    """Return text as a code block; its marks are longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}{language}\n{text.strip()}\n{marks}"
