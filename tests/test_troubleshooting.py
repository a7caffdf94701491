"""docs/troubleshooting.md has a row for each message with which the code refuses something, and no row without one."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGES = ["docs/troubleshooting.md", "docs/zh/troubleshooting.md"]
SOURCES = sorted([*(ROOT / "sft").glob("**/*.py"), ROOT / "train.py", ROOT / "web_demo.py"])
ERRORS = ("ValueError", "FileNotFoundError", "UserError", "RemoteError")
OF_RECORDS = ("RecordError", "NotChosen")
# Errors that another function of ours catches, and replaces by its own message; a user never gets them as they are.
INNER_FILES = {"sft/format/reply.py", "sft/chat/openai_client.py"}
INNER_MESSAGES = {"no definitions", "a block is not closed", "… is not JSON"}


def text_of(node: ast.expr) -> str:
    """The text of a string expression, with … for each value that is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return "…"


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@cache
def calls(path: Path) -> list[tuple[str, list[ast.expr]]]:
    return [(ast.unparse(node.func), node.args) for node in nodes_of(path) if isinstance(node, ast.Call)]


def refusals() -> list[tuple[str, str]]:
    """(file, message) of each error or problem whose message has two words of its own."""
    found = []
    for path in SOURCES:
        for function, arguments in calls(path):
            if arguments and (function in ERRORS or function.endswith("problems.append")):
                message = text_of(arguments[0])
                if re.search(r"\w{2,}\W+\w{2,}", message.replace("…", "")):
                    found.append((str(path.relative_to(ROOT)), message))
    return [(name, message) for name, message in found if name not in INNER_FILES and message not in INNER_MESSAGES]


def reasons() -> set[str]:
    """The short codes of records that are refused."""
    return {
        text_of(arguments[0])
        for path in SOURCES
        for function, arguments in calls(path)
        if function in OF_RECORDS and len(arguments) == 2 and text_of(arguments[0]) != "…"
    } - {"…s"}  # images, videos, audios


@cache
def strings() -> set[str]:
    nodes = [node for path in SOURCES for node in nodes_of(path)]
    return {text_of(node) for node in nodes if isinstance(node, ast.JoinedStr | ast.Constant | ast.BinOp)}


def rows(page: str) -> list[str]:
    """The messages and reason codes in the first columns of the tables."""
    lines = re.findall(r"^\| (`.*?`) \|", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    return [fragment for line in lines for fragment in re.findall(r"`([^`]+)`", line)]


@cache
def pattern(fragment: str) -> re.Pattern:
    return re.compile(re.escape(fragment).replace("…", ".*"), re.DOTALL)


def fits(fragment: str, message: str) -> bool:
    return pattern(fragment).search(message) is not None


@pytest.mark.parametrize("page", PAGES)
def test_each_message_has_a_row(page):
    known = rows(page)
    assert [(name, text) for name, text in refusals() if not any(fits(row, text) for row in known)] == []


@pytest.mark.parametrize("page", PAGES)
def test_each_reason_of_a_rejected_record_has_a_row(page):
    assert reasons() - set(rows(page)) == set()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_each_row_has_its_message(page):
    texts = strings()
    made = {"images", "videos", "audios", "problem:"}
    assert [row for row in rows(page) if row not in made and not any(fits(row, text) for text in texts)] == []
