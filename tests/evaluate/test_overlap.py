"""Questions that occur in the training data, and those that only look like it."""

import gzip
import json

from sft.evaluate.overlap import Overlap, find_overlap, split_tokens

LONG = (
    "Compose an engaging travel blog post about a recent trip to Hawaii, highlighting cultural experiences and sights"
)
CHINESE = "请你以一位资深编辑的身份，为下面这篇关于环境保护的文章写一段不超过一百字的评语，并指出两个优点。"
WORDS = LONG.split()


def found(question: str, text: str) -> bool:
    return bool(Overlap([("q", [question])]).find(text))


def test_words_and_characters_are_compared_without_case_width_and_punctuation():
    assert split_tokens("Ｈello, it's 你好！a-b") == ["hello", "it", "s", "你", "好", "a", "b"]
    assert found(LONG, "x " + LONG.upper().replace(",", " --") + " y")
    assert found(CHINESE, CHINESE.replace("，", " ").replace("。", "\n"))


def test_thirteen_words_in_a_row_are_found_and_twelve_are_not():
    assert len(WORDS) == 17
    assert found(LONG, "so: " + " ".join(WORDS[2:15]) + " and more")
    assert not found(LONG, "so: " + " ".join(WORDS[2:14]) + " and more")
    assert not found(LONG, " ".join([*WORDS[:8], "other", *WORDS[8:]]))


def test_twenty_chinese_characters_in_a_row_are_found_and_nineteen_are_not():
    text = "".join(split_tokens(CHINESE))
    assert found(CHINESE, "前文" + text[5:25] + "后文")
    assert not found(CHINESE, "前文" + text[5:24] + "后文")


def test_a_short_question_must_be_there_whole_and_a_tiny_one_is_not_looked_for():
    index = Overlap(
        [("capital", ["What is the capital of France?"]), ("tiny", ["Prove the theorem."]), ("zh", ["介绍一下西湖"])]
    )
    assert index.looked_for == {"capital", "zh"}
    assert index.find("Q: what is the capital of france, please? 请介绍一下西湖。") == {"capital", "zh"}
    assert index.find("What is the capital of Germany? Prove the theorem. 介绍一下东湖") == set()


def test_every_message_of_every_raw_form_is_read_and_the_first_place_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"instruction": "hi", "output": "no"}\nbroken\n' + json.dumps({"instruction": "hi", "output": LONG}) + "\n"
    )
    with gzip.open(tmp_path / "b.json.gz", "wt") as stream:
        json.dump([{"conversations": [{"from": "human", "value": CHINESE}, {"from": "gpt", "value": LONG}]}], stream)
    questions = [("one", ["never asked anywhere in the data", LONG]), ("two", [CHINESE]), ("three", ["a b c d e f g"])]
    result = find_overlap(questions, [str(tmp_path), str(tmp_path / "a.jsonl")])
    assert result == {
        "found": {"one": f"{tmp_path}/a.jsonl line 3", "two": f"{tmp_path}/b.json.gz line 1"},
        "looked_for": 3,
        "conversations": 3,
        "unreadable": 1,
    }
