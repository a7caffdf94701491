"""The report's page: both languages, and tables that fit a window of 1,100 pixels."""

from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest

from sft.dataset.ledger import new_ledger
from sft.preview.data import describe_data
from sft.preview.report import Report, Section, write_page

LONG_NAME = "an-organisation/with_a_data_set_of_a_very_long_name_that_has_no_spaces-v1.5-stage2_{}"


class ManyTokens(SimpleNamespace):
    """Examples of 30 sources, each of 10,000 conversations of up to 131,072 tokens."""

    def __len__(self) -> int:
        return len(self.lengths)


def report_of_many_sources() -> Report:
    names = [LONG_NAME.format(number) for number in range(30)]
    random = np.random.default_rng(0)
    origins = np.zeros(300_000, [("source", "i4"), ("way", "i1")])
    origins["source"] = np.arange(300_000) % 30
    examples = ManyTokens(lengths=random.integers(1_000, 131_072, 300_000), origins=origins)
    facts = np.zeros(300_000, [("replies", "i8"), ("trained", "i8"), ("stops", "?")])
    facts["replies"], facts["trained"], facts["stops"] = 1_234, examples.lengths // 2, True
    counts = {"in": 1_234_567, "kept": 1_234_567, "cut": 1_000_000, "rejected": 100_000}
    ledger = new_ledger([f"/data/opendata/{name}/train.json" for name in names], 131_072)
    ledger |= {"source_names": names, "sources": dict.fromkeys(names, counts), "total": {**counts, "in": 37_037_010}}
    ledger["first"] = dict.fromkeys(("cut", "rejected"), f"/data/opendata/{names[3]}/train.json line 1234567")
    report = Report(command="train.py " + " ".join(names), notes=[f"{names[0]}: there are no weights in this folder"])
    describe_data(report, "training data", examples, ledger, facts)
    return report


@pytest.fixture
def page(tmp_path):
    """Return a function that writes the page of a report, with one row, and returns its path."""

    def write(report: Report):
        tokenizer = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
        ids = np.arange(3_000)
        report.samples.append(("first: row 0 of made up, 3,000 tokens, 3,000 trained", ids, ids))
        write_page(report, tokenizer, tmp_path / "page.html")
        return tmp_path / "page.html"

    return write


def test_each_sentence_is_there_in_both_languages(page):
    problem = "only 3% of the rows teach the stop token: the model would not learn to stop; raise --max_length"
    report = Report(command="train.py", problems=[problem])
    report.notes.append("pad is a stop token, which does no harm here: padding is masked by position")
    report.sections.append(Section("memory: LoRA, one process", [["part", "formula"], ["weights", "4 bytes x 3M"]]))
    text = page(report).read_text(encoding="utf-8")
    for chinese in (
        "只有 3% 的行包含停止符：模型学不会停止；请调大 --max_length",
        "填充符也是停止符，这里没有影响：填充按位置屏蔽",
        "显存：LoRA，单进程",
        "4 字节 × 3M",
        "首条：made up 的第 0 行，3,000 个 token，其中 3,000 个参与训练",
    ):
        assert f'<span class="zh" lang="zh">{chinese}</span>' in text
    assert "为英文" not in text


@pytest.mark.slow
@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_all_tables_fit_a_window_of_1100_pixels(browser, page, locale):
    report = report_of_many_sources()
    formula = "2 x 65,536 rows of logits x 2 bytes + 12 bytes x 1.24B (head)"
    table = [["part", "on each GPU", "formula"], ["loss, in RAM", "1,234.5 GiB", formula]]
    report.sections.append(Section("memory: all weights, ZeRO-3 with offload", table))
    with closing(browser.new_context(locale=locale, viewport={"width": 1100, "height": 800})) as context:
        tab = context.new_page()
        tab.goto(page(report).as_uri())
        assert tab.locator("table").count() == 2
        for element in [tab.locator("html"), *tab.locator("table").all(), *tab.locator("td").all()[:14]]:
            width, inner = element.evaluate("element => [element.scrollWidth, element.clientWidth]")
            assert width <= inner, element.inner_text()[:80]
        edges = tab.evaluate("[...document.querySelectorAll('table')].map(it => it.getBoundingClientRect().right)")
        assert max(edges) <= 1100 - 16
