"""Markdown for results and model cards holds any text."""

from sft.report.markdown import cell, fence, short, table


def test_numbers_have_four_digits_or_commas():
    assert [short(value) for value in (0.123456, 12345.6, 1234567, True, "a")] == [
        "0.1235",
        "12,346",
        "1,234,567",
        "True",
        "a",
    ]


def test_a_cell_is_one_line_without_markup():
    assert cell("a|b <i> `c`") == r"a\|b \<i> \`c\`"
    assert cell("two\nlines [x](y) *b* _c_ \\") == r"two lines \[x](y) \*b\* \_c\_ \\"


def test_a_table_has_names_to_the_left_and_numbers_to_the_right():
    assert table(["task", "metric", "value"], [["a", "b", "1 [0, 2]"]], num_names=2) == (
        "| task | metric | value |\n|---|---|--:|\n| a | b | 1 [0, 2] |"
    )


def test_a_code_block_holds_backticks():
    assert fence("a\n```\nb") == "````text\na\n```\nb\n````"
