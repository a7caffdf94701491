"""Tables for a terminal."""

from sft.tables import align


def test_the_first_column_is_aligned_left_the_others_right_and_chinese_takes_two_columns():
    assert align([["source", "tokens"], ["谈话", "5"], ["longer name", ""]]) == [
        "source       tokens",
        "谈话              5",
        "longer name",
    ]
    assert align([]) == []
