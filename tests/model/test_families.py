"""A sample of benchmarks/families.py: one type for each way of keeping documents apart, and each kind of mixer."""

import re

import pytest

from benchmarks.families import causal_types, is_right, measure, to_chinese
from tests.conftest import ROOT

PACKING = {
    "qwen3": "one attention call for each",
    "gpt_oss": "transformers' own mask (eager)",
    "qwen3_5_text": "transformers' own mask (sdpa); Qwen3_5GatedDeltaNet run once per document",
    "lfm2": "one attention call for each; Lfm2ShortConv run once per document",
    "bamba": "transformers' own mask (sdpa); BambaMixer run once per document",
    "minimax": "one attention call for each; MiniMaxLightningAttention run once per document",
    "inkling_text": "running the model once per document",
    "doge": "transformers' own mask (sdpa)",
}


ROWS_JOIN = ("qwen3", "gpt_oss", "doge")


@pytest.mark.slow
@pytest.mark.parametrize("kind", PACKING)
def test_a_packed_row_has_the_gradient_of_its_documents_alone_also_with_checkpointing(kind):
    found = measure(kind)
    assert is_right(found), found
    assert found["packing"] == PACKING[kind]
    assert found["loss"].startswith("loss in chunks")
    assert found["replies"] == ("equal, rows join" if kind in ROWS_JOIN else "equal, in turn")


def test_types_that_are_causal_language_models_are_measured():
    assert {"qwen3", "bloom", "mamba2", "gpt_oss"} <= set(causal_types())
    assert len(causal_types()) >= 115


def table_of(page: str) -> list[list[str]]:
    """The cells of each type's row, without the first column's."""
    rows = [line.strip("|").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows[1:]]


def test_the_sums_of_the_page_are_those_of_its_table_and_the_readme_gives_them():
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    rows = [row for row in table_of(page) if len(row) == 8]
    right = [row for row in rows if not row[1].startswith("refused")]
    near = [row for row in right if max(float(cell) for cell in row[2:4] if cell[0].isdigit()) < 1.05e-6]
    expected = [
        len(rows),
        len(near),
        sum(row[4].startswith("loss in chunks") for row in right),
        sum(float(row[5].strip("%")) >= 99 for row in right),
        sum(row[6].startswith("equal") for row in right),
    ]
    assert [int(number) for number in re.findall(r"^\* (\d+) ", page, re.MULTILINE)] == expected
    assert to_chinese(page) == (ROOT / "docs" / "zh" / "families.md").read_text(encoding="utf-8")
    for name, family in (("README.md", "* Families: "), ("README.zh.md", "* 家族：")):
        (line,) = (line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if line.startswith(family))
        assert "families.md" in line
        assert [int(number) for number in re.findall(r"(?<!\d)\d+(?![\d%])", line)] == expected, line
