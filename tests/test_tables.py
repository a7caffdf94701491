"""Tables for a terminal."""

from sft.tables import align_columns


def test_the_first_column_is_aligned_left_the_others_right_and_chinese_takes_two_columns():
    assert align_columns([["source", "tokens"], ["谈话", "5"], ["longer name", ""]]) == [
        "source       tokens",
        "谈话              5",
        "longer name",
    ]
    assert align_columns([]) == []
