"""Cleaning rules one by one, and duplicates."""

import random

import pytest

from sft.opendata.cleaning import RULES, band_keys, clean_messages, count_han, has_han
from sft.opendata.fields import RecordError
from tests.opendata.make import build, read_lines, write


def talk(*turns):
    """`talk("u: hi", "a: hello")` as messages."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[turn[0]], "content": turn[3:]} for turn in turns]


def without(*names):
    return [rule for rule in RULES if rule not in names]


def dropped(messages, rules=RULES):
    with pytest.raises(RecordError) as caught:
        clean_messages(messages, rules)
    return caught.value.reason


def test_strip_edges_strips_both_ends_of_each_text():
    messages = talk("u: \n q ", "a: \n\n a\n b \u3000")
    assert clean_messages(messages) == (talk("u: q", "a: a\n b"), ["strip_edges"])
    assert clean_messages(messages, without("strip_edges")) == (messages, [])


def test_cut_at_empty_turn_keeps_what_comes_before():
    for empty in (("u: q2", "a: "), ("u: ", "a: a2"), ("u: q2", "u: ", "a: a2")):
        messages = talk("s: ", "u: q", "a: a.", *empty, "u: q3", "a: a3")
        assert clean_messages(messages) == (talk("u: q", "a: a."), ["cut_at_empty_turn"])
        assert dropped(messages, without("cut_at_empty_turn")) in ("empty", "role_order")
    assert dropped(talk("u: q", "a: ", "u: q2", "a: a2")) == "empty"
    assert dropped([]) == "empty"


def test_fix_roles_merges_moves_and_trims():
    messages = talk("a: hello", "u: q", "s: s1", "u: more", "a: a1", "a: a2", "s: s2", "u: bye")
    assert clean_messages(messages) == (talk("s: s1\ns2", "u: q\nmore", "a: a1\na2"), ["fix_roles"])
    assert dropped(messages, without("fix_roles")) == "role_order"
    assert dropped(talk("u: q")) == "role_order"
    assert dropped(talk("a: a", "u: q")) == "role_order"


def test_fix_roles_merges_neighbours_only_if_that_does_not_change_what_is_learned():
    messages = talk("u: q", "a: a1", "a: a2", "u: q2", "a: a3")
    messages[1]["train"] = False
    assert dropped(messages) == "loss_switch"
    messages[2]["train"] = False
    assert clean_messages(messages)[0][1] == {"role": "assistant", "content": "a1\na2", "train": False}


@pytest.mark.parametrize(
    "reply",
    [
        "作为一个AI语言模型，我无法提供实时信息。",
        "作为一个人工智能语言模型，我没有感情。",
        "抱歉，作为一名人工智能助手，我不能这样做。",
        "作为语言模型，无法回答。",
        "我是ChatGPT，很高兴认识你。",
        "我是一个由OpenAI训练的大型语言模型。",
        "我是由OpenAI开发的。",
        "我是一个语言AI，看不到图片。",
        "As an AI language model, I cannot do that.",
        "I'm sorry, but as an AI I don't have feelings.",
        "I am ChatGPT.",
        "I'm just an AI assistant.",
        "I was trained by OpenAI.",
    ],
)
def test_drop_self_identity_drops_claims_in_the_first_person(reply):
    assert dropped(talk("u: hello", f"a: {reply}")) == "self_identity"
    clean_messages(talk("u: hello", f"a: {reply}"), without("drop_self_identity"))


@pytest.mark.parametrize(
    ("question", "reply"),
    [
        ("ChatGPT是什么？", "ChatGPT是由OpenAI开发的聊天机器人。"),
        ("What is ChatGPT?", "ChatGPT is a language model trained by OpenAI."),
        ("他做什么？", "他作为人工智能领域的专家，写了很多书。"),
        ("What did she do?", "As an AI researcher, she studied language models."),
        ("翻译：我是ChatGPT", "I am ChatGPT."),
        ("写一句话", "如果我是一个人工智能，世界会怎样？"),
        ("Who are you in the story?", "I am a teacher and I aim to help."),
    ],
)
def test_drop_self_identity_leaves_the_subject_alone(question, reply):
    clean_messages(talk(f"u: {question}", f"a: {reply}"))


PROSE_ZH = "这是一段比较长的文字，它一直写下去，描述了很多很多的事情，然后忽然就在这个地方停住了没有"
PROSE_EN = (
    "This is a rather long text. It goes on and on about a number of things, and then it just stops in the middle of"
)


@pytest.mark.parametrize(
    "reply",
    ["```python\nx = 1", "1. one\n2. two\n3.", "甲、乙、", "one, two,", PROSE_ZH, PROSE_EN, f"Short.\n{PROSE_EN}"],
)
def test_drop_cut_off_drops_what_stops_in_the_middle(reply):
    assert dropped(talk("u: q", f"a: {reply}"), without("drop_language_mismatch")) == "cut_off"
    clean_messages(talk("u: q", f"a: {reply}"), without("drop_cut_off"))


@pytest.mark.parametrize(
    "reply",
    [
        "```python\nx = 1\n```",
        "Use ``` to open a block.",
        "42",
        "Paris",
        "(5 + 8 + 10 + 12) / 4 = 8.75",
        PROSE_ZH + "。",
        PROSE_EN + " it.",
        PROSE_EN + " https://example.com/page",
        PROSE_EN + " #travel",
        '"The only way to do great work is to love what you do, every day, and never settle." - Steve Jobs',
        "1. Infinity\n2. A very long film title without any punctuation that goes on for more than eighty characters",
    ],
)
def test_drop_cut_off_leaves_whole_replies_alone(reply):
    clean_messages(talk("u: q", f"a: {reply}"))


def test_drop_cut_off_looks_at_the_last_reply_only():
    clean_messages(talk("u: q", "a: one, two,", "u: go on", "a: three."))


def test_drop_language_mismatch_goes_both_ways_and_keeps_requested_languages():
    english = "This is a long English answer that nobody had asked for."
    assert dropped(talk("u: 请介绍一下北京的历史。", f"a: {english}")) == "language_mismatch"
    assert dropped(
        talk("u: Please tell me about the long history of Beijing.", "a: 北京是一座有三千多年历史的城市。")
    ) == ("language_mismatch")
    for question in (
        "请翻译这句话：你好世界和平",
        "用英文介绍一下北京的历史。",
        "写一个排序的函数给我看看",
        "用opulent一词造句给我看看",
    ):
        clean_messages(talk(f"u: {question}", f"a: {english}"))
    clean_messages(talk("u: Translate into Chinese: good morning to all of you", "a: 大家早上好，祝你们愉快。"))
    clean_messages(talk("u: 请计算一下这个算式的结果", "a: 12 + 30 = 42"))
    clean_messages(talk("u: 请给我看一个例子好吗", "a: ```\none two three four five six seven eight nine\n```"))


@pytest.mark.parametrize(
    "line",
    [
        "Human: x",
        "Assistant: x",
        "User: x",
        "用户：x",
        "助手: x",
        "|Human|: x",
        "|Bot|: x",
        "### Instruction:",
        "<|im_start|>user",
    ],
)
def test_drop_role_words_drops_a_line_that_begins_like_a_turn(line):
    assert dropped(talk("u: q", f"a: fine\n{line}")) == "role_words"
    clean_messages(talk(f"u: fine\n{line}", "a: ok"))
    clean_messages(talk("u: q", f"a: he said {line}"))


def test_a_chinese_character_is_an_ideograph_of_any_block_and_no_kana_mark_or_hexagram():
    assert [char for char in "中㐀〇豈𠀀𲎯" if not has_han(char)] == []
    assert [char for char in "aあー，。1９䷀한" if has_han(char)] == []
    assert count_han("中文 and 𠀀䷀") == 3


# --- Duplicates


def test_near_duplicates_are_verified_by_what_they_share(tmp_path):
    base = "".join(random.Random(0).choices("的一是不了在人有我他这个们中来上大为和国", k=200))
    rows = [
        {"instruction": "q", "output": base[::-1] + "。"},
        {"instruction": "q", "output": base + "。"},
        {"instruction": "q", "output": base[:-3] + "好好好。"},
        {"instruction": "q", "output": base[:120] + "。"},
    ]
    ledger = build(write(tmp_path / "a.json", rows), tmp_path / "out", near_duplicates=0.8)
    assert (ledger["total"]["train"], ledger["total"]["near_duplicates"]) == (3, 1)
    assert [row["id"] for row in read_lines(tmp_path / "out/train.json")] == ["a.json:1", "a.json:2", "a.json:4"]


def share_of_candidates(similarity, num_pairs=400):
    """The share of pairs of sets, each pair with exactly this Jaccard similarity, that have a band key in common."""
    found = 0
    for pair in range(num_pairs):
        grams = [f"{pair}-{number}" for number in range(200)]
        num_common = round(200 * similarity)
        half = (200 - num_common) // 2
        left, right = set(grams[: num_common + half]), set(grams[:num_common] + grams[num_common + half :])
        assert len(left & right) / len(left | right) == similarity
        found += bool(set(enumerate(band_keys(left))) & set(enumerate(band_keys(right))))
    return found / num_pairs


def test_the_bands_find_nearly_all_pairs_with_a_similarity_of_eight_tenths_and_few_with_five():
    assert share_of_candidates(0.8) > 0.97
    assert 0.12 < share_of_candidates(0.5) < 0.32
