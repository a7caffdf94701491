"""Jinja templates of the pages and the model card, with their filters; the pages' sentences in Chinese."""

import json
import re
import shlex
from functools import lru_cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sft.report.markdown import cell, fence, short

FOLDER = Path(__file__).parent
CHINESE = FOLDER / "chinese.json"  # English templates with their Chinese ones; holes are {named}
SEPARATORS = (("\n", "\n"), ("; ", "；"), (": ", "："), (", ", "，"))


@lru_cache
def load_template(name: str, folder: Path = FOLDER):
    environment = Environment(
        loader=FileSystemLoader([folder, FOLDER]),
        autoescape=name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": short, "fence": fence, "cell": cell, "shell": shlex.join}
    environment.filters["chinese"] = lambda text: find_chinese(text) or text
    return environment.get_template(name)


@lru_cache
def find_chinese(text: str) -> str | None:
    """Return a line or a table cell in Chinese, or None: by its template, else part by part.

    Values in the holes of a template are translated too: `memory: all weights, ZeRO-2` is three entries.
    """
    indent, text = re.match(r"(\s*)(.*)", text, re.DOTALL).groups()
    for pattern, chinese in _load_patterns():
        if found := pattern.fullmatch(text):
            values = {name: find_chinese(value) or value for name, value in found.groupdict().items()}
            return indent + chinese.format(**values)
    for separator, chinese in SEPARATORS:
        head, found, tail = text.partition(separator)
        if found and (first := find_chinese(head)) and (rest := find_chinese(tail)):
            return indent + first + chinese + rest
    return None


@lru_cache
def _load_patterns() -> list[tuple[re.Pattern, str]]:
    """Return (pattern of the English text, Chinese template) pairs, those with most fixed text first."""
    table = json.loads(CHINESE.read_text(encoding="utf-8"))
    found = []
    for english, chinese in table.items():
        pieces = re.split(r"\{(\w+)\}", english)
        pattern = "".join(f"(?P<{piece}>.*?)" if i % 2 else re.escape(piece) for i, piece in enumerate(pieces))
        found.append((sum(map(len, pieces[::2])), re.compile(pattern, re.DOTALL), chinese))
    found.sort(key=lambda entry: -entry[0])
    return [(pattern, chinese) for _size, pattern, chinese in found]
