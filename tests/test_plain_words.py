"""The project's language: sentences have a noun as their subject, and words are those of the field."""

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT

THIS = Path(__file__)
PYTHON = [
    path
    for pattern in ("*.py", "sft/**/*.py", "tests/**/*.py", "benchmarks/*.py")
    for path in sorted(ROOT.glob(pattern))
    if path != THIS
]
CHINESE_PAGES = [*sorted(ROOT.glob("docs/zh/*.md")), ROOT / "README.zh.md"]
PAGES = [*sorted(ROOT.glob("docs/*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
NOTEBOOKS = [ROOT / "infer.ipynb", ROOT / "data_proj" / "process_data.ipynb"]
SCRIPTS = [*sorted(ROOT.glob("*.sh")), *sorted(ROOT.glob("recipes/*.sh")), *sorted(ROOT.glob("benchmarks/*.sh"))]
HTML = sorted(ROOT.glob("sft/**/*.html"))

# A pronoun at the start of a sentence that isn't a question. Lower case counts only at the start of a whole text.
PRONOUN = re.compile(
    r"(?:(?:^|[.!?:;]\s+|\n\s*\n\s*)(?:What|Whatever|Who|Whoever|Where|There|Nothing|Nobody)"
    r"|\A(?:what|whatever|who|whoever|where|there|nothing|nobody))\b(?![^.\n]*\?)"
)
HOME_MADE = re.compile(
    r"\b(?:last word|doors?|(?:go|goes|going|went) on|let(?:s|ting)? go|(?:un)?seal(?:s|ed|ing)?|told|stretch(?:es|ed)?"
    r"|settle[sd]?|nobody|whoever|whatever|in good order|paid twice|hopeless|patient|as if nothing|without a word"
    r"|worth a look|speaks?|knows?|for want of|where to go on"
    r"|(?:stands?|stood|standing)(?!-in| in for| for|ard))\b",
    re.IGNORECASE,
)
HOME_MADE_CHINESE = re.compile(r"旋钮|死掉|死了|杀死|不声不响|互不相知|孪生|没有声息|一个字也不|看见自己|说出两者")
OLD_NAMES = re.compile(r"\b(?:WAYS|LET_GO_EVERY|FAR|LEAKED|HOPELESS|Agreed|from_first|agree_to_stop)\b")
TEST_NAME = re.compile(r"test_(?:what|whatever|who|whoever|where|there|nothing|nobody)_")


@cache
def syntax(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def docstrings_and_messages(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of each docstring, and of each other string of four words or more in the product's code."""
    is_test = path.is_relative_to(ROOT / "tests")
    parts = {id(value) for node in ast.walk(syntax(path)) if isinstance(node, ast.JoinedStr) for value in node.values}
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node):
                parts.add(id(node.body[0].value))
                yield getattr(node, "lineno", 1), re.sub(r"(?<!\n)\n(?!\n)\s*", " ", text)
        elif is_test:
            continue  # a test's strings are data
        elif isinstance(node, ast.JoinedStr):
            text = "".join(value.value if isinstance(value, ast.Constant) else "{}" for value in node.values)
            yield from [(node.lineno, text)] if len(text.split()) >= 4 else []
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield from [(node.lineno, node.value)] if len(node.value.split()) >= 4 else []


def comments(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of each block of comments."""
    block, last = [], 0
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type != tokenize.COMMENT:
            continue
        if block and token.start[0] != last + 1:
            yield last, " ".join(block)
            block = []
        block.append(token.string.lstrip("# "))
        last = token.start[0]
    if block:
        yield last, " ".join(block)


def lines_of_page(text: str) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of the lines outside code blocks, without the marks of headings, bullets and tables."""
    is_code = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            is_code = not is_code
        elif not is_code:
            yield number, re.sub(r"`[^`]*`", "`code`", line).lstrip("|*#>- ")


def dialect(texts: Iterator[tuple[int, str]]) -> list[tuple[int, str, str]]:
    return [
        (line, found[0].strip(), text)
        for line, text in texts
        for found in (PRONOUN.search(text), HOME_MADE.search(text))
        if found
    ]


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_messages_and_comments_are_plain(path):
    assert dialect([*docstrings_and_messages(path), *comments(path)]) == []
    assert OLD_NAMES.findall(path.read_text(encoding="utf-8")) == []


def test_names_of_tests_are_plain():
    for path in PYTHON:
        for node in ast.walk(syntax(path)):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                assert not TEST_NAME.match(node.name), f"{path.name}: {node.name}"
                assert not HOME_MADE.search(node.name.replace("_", " ")), f"{path.name}: {node.name}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_are_plain(path):
    assert dialect(lines_of_page(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("path", CHINESE_PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_chinese_pages_are_plain(path):
    assert HOME_MADE_CHINESE.findall(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_plain(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown":
            assert dialect(lines_of_page("".join(cell["source"]))) == []


@pytest.mark.parametrize("path", [*SCRIPTS, *HTML], ids=lambda path: path.name)
def test_scripts_and_html_pages_are_plain(path):
    text = path.read_text(encoding="utf-8")
    found = (
        re.findall(r"#\s(.*)|\"([^\"]{20,})\"", text) if path.suffix == ".sh" else re.findall(r"(\"[^\"]{20,}\")", text)
    )
    texts = ["".join(part).strip('" ') for part in found]
    assert dialect(enumerate(texts)) == []


@pytest.mark.parametrize(
    "text, expected",
    [
        ("What is kept is counted.", ["What"]),
        ("Keep it. Nothing else is read.", [". Nothing"]),
        ("where data is kept", ["where"]),
        ("What happens if a rank is lost?", []),
        ("The run goes on.", ["goes on"]),
        ("A stand-in for the standard model; `{eos}` stands for a token.", []),
    ],
)
def test_the_dialect_is_found(text, expected):
    assert [word for _line, word, _text in dialect([(1, text)])] == expected


PRODUCT = [path for path in PYTHON if not path.is_relative_to(ROOT / "tests")]


def is_product_with_condition(node: ast.AST) -> bool:
    """Whether a list, tuple or text is multiplied with a condition, where an `if` would say it."""
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)):
        return False
    holds = isinstance(node.right, ast.Compare | ast.BoolOp) or ast.unparse(node.right).startswith(("bool(", "not "))
    return holds and isinstance(node.left, ast.List | ast.Tuple | ast.Constant)


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_line_has_one_condition(path):
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.IfExp):
            inner = [each for part in (node.test, node.body, node.orelse) for each in ast.walk(part)]
            assert not any(isinstance(each, ast.IfExp) for each in inner), f"line {node.lineno}: nested conditionals"
        assert not is_product_with_condition(node), f"line {node.lineno}: write an if"


def is_two_statements(node: ast.AST) -> bool:
    """Whether `a, b = x, y` assigns values that have no name in common with the targets, so that it is no swap."""
    if not (
        isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)
    ):
        return False
    sides = [
        {ast.unparse(each) for each in ast.walk(side) if isinstance(each, ast.Name | ast.Attribute | ast.Subscript)}
        for side in (node.targets[0], node.value)
    ]
    return not sides[0] & sides[1] and not any(isinstance(value, ast.Starred) for value in node.value.elts)


FOLDERS = ("chat", "checkpoint", "dataset", "evaluate", "export", "launch", "report", "web")


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_line_has_one_assignment(folder):
    for path in (ROOT / "sft" / folder).glob("*.py"):
        for node in ast.walk(syntax(path)):
            is_constant = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).strip("()_")[:1].isupper()
            assert is_constant or not is_two_statements(node), f"{path.name} line {node.lineno}"
