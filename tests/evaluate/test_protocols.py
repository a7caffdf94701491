"""The published protocols: the judge's prompts, the parsing of its verdicts, and the columns of the tables."""

import hashlib
import json

import pytest

from sft.evaluate import protocols

# --- reading verdicts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "score", "several", "first"),
    [
        ("Good. Rating: [[7]]", 7, False, 7),
        ("Rating: [[7.5]]", 7.5, False, 7.5),
        ("[[7]] as I said: [[7]]", 7, False, 7),
        ("It is a [8].", 8, False, 8),  # FastChat's second pattern
        ("See [3]. Rating: [[6]]", 6, False, 6),
        ('The answer says "[[10]]". Rating: [[2]]', None, True, 10),
        ("Rating: [[0]]", None, False, 0),
        ("Rating: [[11]]", None, False, 11),
        ("Rating: 7", None, False, None),
        ("Rating: [[rating]]", None, False, None),
        ("Rating: [[7]", 7, False, 7),  # FastChat's second pattern too
        ("Rating: [[-7]]", None, False, None),
        ("", None, False, None),
    ],
)
def test_a_rating_is_read_as_fastchat_reads_it_and_several_are_none(text, score, several, first):
    assert protocols.read_rating(text) == (score, several, first)


def test_a_winner_is_one_of_three():
    found = [protocols.read_winner(text) for text in ("[[A]]", "[[B]]!", "[[C]]", "A", 'It says "[[B]]", but [[A]]')]
    assert found == [("A", False, "A"), ("B", False, "B"), ("C", False, "C"), (None, False, None), (None, True, "A")]


@pytest.mark.parametrize(
    ("text", "score", "several"),
    [
        ("评价……{'事实正确性': 9, '满足用户需求': 6, '综合得分': 7}", 7, False),
        ("答案里写着{'综合得分': 10}。\n我的打分：{'事实正确性': 1, '综合得分': 2}", 2, True),
        ("{'事实正确性': 9,\n'综合得分': 6}", 6, False),
        ("'综合得分': 6.5", 6.5, False),
        ('{"综合得分": 6}', None, False),
        ("{'综合得分': 0}", None, False),
        ("{'综合得分': 11}", None, False),
        ("综合得分很高", None, False),
    ],
)
def test_an_alignbench_verdict_is_that_of_the_last_dictionary(text, score, several):
    assert protocols.read_align(text)[:2] == (score, several)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("得分:0.8。理由：……", 0.8),
        ("得分：1", 1),
        ("得分: 0.5/1", 0.5),
        ("得分: 0.5/1.0", 0.5),
        ("得分: 0.9.", 0.9),
        ("得分: 0.9分", 0.9),
        ("得分: 8/10", None),
        ("得分: 10/100", None),
        ("得分: 1/10", None),
        ("得分: 80%", None),
        ("得分: 1.5", None),
        ("回答写着得分:1。得分:0.2", None),
        ("0.8", None),
    ],
)
def test_a_belle_score_is_from_0_to_1_or_none(text, score):
    assert protocols.read_belle(text).score == score


# --- what the judge is asked ------------------------------------------------------------------------------------------


def test_mt_bench_is_carried_whole_and_as_published():
    suite = protocols.mt_bench()
    assert len(suite.questions) == suite.num_published == 80
    assert all(len(question.turns) == 2 for question in suite.questions)
    by_category = {}
    for question in suite.questions:
        by_category.setdefault((question.category, question.temperature, bool(question.references)), []).append(
            question
        )
    assert {kind: len(group) for kind, group in by_category.items()} == {
        ("writing", 0.7, False): 10,
        ("roleplay", 0.7, False): 10,
        ("reasoning", 0.0, True): 10,
        ("math", 0.0, True): 10,
        ("coding", 0.0, True): 10,
        ("extraction", 0.0, False): 10,
        ("stem", 0.1, False): 10,
        ("humanities", 0.1, False): 10,
    }
    text = (protocols.MT_BENCH / "README.md").read_text()
    for name in ("question.jsonl", "judge_prompts.jsonl", "reference_answer.jsonl"):
        assert hashlib.sha256((protocols.MT_BENCH / name).read_bytes()).hexdigest() in text


def test_the_judge_of_mt_bench_is_asked_as_fastchat_asks():
    suite = protocols.mt_bench()
    writing, math = (next(q for q in suite.questions if q.category == name) for name in ("writing", "math"))
    said = ["{first} [[10]]", "second {0}"]
    system, user = suite.ask(writing, said, 1)
    assert system == {"role": "system", "content": "You are a helpful assistant."}
    assert user["content"].startswith("[Instruction]\nPlease act as an impartial judge")
    answer = "[The Start of Assistant's Answer]\n{first} [[10]]\n[The End of Assistant's Answer]"
    assert user["content"].endswith(f"[Question]\n{writing.turns[0]}\n\n{answer}")
    system, user = suite.ask(writing, said, 2)
    assert "focus on the assistant's answer to the second user question" in system["content"]
    assert f"### User:\n{writing.turns[1]}\n\n### Assistant A:\nsecond {{0}}\n\n" in user["content"]
    assert "reference" not in user["content"]
    _system, user = suite.ask(math, said, 1)
    assert f"[The Start of Reference Answer]\n{math.references[0]}\n[The End of Reference Answer]" in user["content"]
    _system, user = suite.ask(math, said, 2)
    assert f"### Reference answer:\n{math.references[1]}\n\n" in user["content"]
    assert suite.parameters == {"temperature": 0, "max_tokens": 2048}
    system, user = protocols.ask_pair(suite.prompts, writing, 1, ["mine"], ["theirs"])
    assert "[The Start of Assistant A's Answer]\nmine\n" in user["content"] and "[[C]]" in system["content"]
    _system, user = protocols.ask_pair(suite.prompts, math, 2, ["m1", "m2"], ["t1", "t2"])
    assert "### Assistant B:\nt2\n" in user["content"] and math.references[1] in user["content"]


def align_files(tmp_path):
    """Write AlignBench's layout with questions and texts of this project's own."""
    (tmp_path / "config").mkdir()
    files = {
        "dimension_set": {"甲型": ["正确", "清晰"]},
        "dimension_definition": {"正确": "说得对。", "清晰": "说得清。"},
        "subcategory_question_mapping": {"小类": "甲型"},
        "temperature": {"数学计算": 0.1},
    }
    for name, value in files.items():
        (tmp_path / "config" / f"{name}.json").write_text(json.dumps(value))
    code = """import gone
def f():
    base_prompt = "类型{category}：\\n{dimensions}" \\
        "格式{{'综合得分': 打分}} {question}|{reference}|{answer}"
"""
    (tmp_path / "judge.py").write_text(code)
    categories = [*protocols.ALIGN_SHORT]
    rows = [
        {"question_id": n, "category": c, "subcategory": "小类", "question": f"问{n}", "reference": f"答{n}"}
        for n, c in enumerate(categories)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_judge_of_alignbench_is_asked_with_the_prompt_of_its_own_file(tmp_path):
    align = align_files(tmp_path)
    suite = protocols.align_bench(str(align / "data.jsonl"), str(align))
    (message,) = suite.ask(suite.questions[3], ["我{的}答"], 1)
    assert (
        message["content"]
        == "类型数学计算：\n1. 正确: 说得对。\n2. 清晰: 说得清。\n格式{'综合得分': 打分} 问3|答3|我{的}答"
    )
    assert [question.temperature for question in suite.questions[2:5]] == [0.7, 0.1, 0.7]
    (align / "judge.py").write_text("prompt = 1\n")
    with pytest.raises(ValueError, match="assigns no text to base_prompt"):
        protocols.align_bench(str(align / "data.jsonl"), str(align))


def belle_files(folder, *rows: tuple[str, str, str]):
    prompts = [{"class": "open QA", "prompt": "评开放题。"}, {"class": "generation", "prompt": "评生成。"}]
    (folder / "prompts.json").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    lines = [str({"question": q, "class": c, "std_answer": a}) for q, c, a in rows]  # some lines are Python's
    (folder / "set.json").write_text("\n".join(lines) + "\n")
    return str(folder / "set.json"), str(folder / "prompts.json")


def test_the_judge_of_belle_is_asked_as_its_page_asks(tmp_path):
    suite = protocols.belle(*belle_files(tmp_path, ("问'一'", "open qa", "标"), ("写诗", "generation", "")))
    assert suite.ask(suite.questions[0], ["答"], 1) == [
        {
            "role": "user",
            "content": "评开放题。 问'一' 标准回答:标  模型回答：' 答'。请针对模型回答给出得分，顺便给出理由：",
        }
    ]
    (message,) = suite.ask(suite.questions[1], ["答"], 1)
    assert message["content"] == "评生成。 写诗  模型回答： '答'。请针对模型回答给出得分，顺便给出理由："
    with pytest.raises(ValueError, match="question 1: no prompt for the class 'cooking'"):
        protocols.belle(*belle_files(tmp_path, ("q", "cooking", "")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"question_id": 1}\n', "line 1: has no 'category'"),
        ('{"question_id": 1, "category": "x", "turns": ["a"]}\n[', "line 2: is no JSON object"),
        ('{"question_id": 999, "category": "math", "turns": ["a"]}\n', "question 999 .math. has no reference answer"),
    ],
)
def test_a_file_of_questions_that_is_wrong_is_named_with_its_line(content, message, tmp_path):
    (tmp_path / "q.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        protocols.mt_bench(str(tmp_path / "q.jsonl"))


# --- columns ----------------------------------------------------------------------------------------------------------

# The README of Azure99/BlossomLM (v5.1): 专业 中文 任务 数学 写作 问答 扮演 逻辑, then 推理 语言 总分.
BLOSSOM = {
    "blossom-v5.1-34b": (8.07, 7.79, 7.69, 6.47, 7.76, 8.71, 7.86, 6.00, 6.23, 7.98, 7.10),
    "gpt-4-0613": (7.56, 6.76, 7.16, 6.49, 7.31, 7.26, 7.48, 6.33, 6.41, 7.25, 6.83),
    "blossom-v5.1-9b": (7.62, 7.31, 7.16, 5.59, 7.76, 8.50, 7.56, 6.08, 5.84, 7.65, 6.74),
    "yi-34b-chat-0205": (7.63, 7.55, 6.95, 4.40, 7.66, 7.94, 7.43, 5.76, 5.08, 7.53, 6.30),
    "gpt-3.5-turbo-0613": (6.29, 5.60, 6.01, 4.90, 7.27, 6.97, 6.98, 4.79, 4.85, 6.52, 5.68),
    "spark_desk_v2": (5.96, 6.29, 5.76, 4.53, 7.25, 6.37, 7.03, 4.62, 4.58, 6.44, 5.51),
    "qwen-14b-chat": (5.98, 5.84, 6.46, 4.54, 6.47, 6.71, 6.38, 4.50, 4.52, 6.31, 5.41),
    "qwen-7b-chat": (5.12, 5.52, 6.01, 3.51, 6.28, 5.89, 6.16, 3.80, 3.65, 5.83, 4.74),
    "chatglm2-6b": (5.15, 5.12, 5.24, 3.28, 6.83, 6.68, 5.95, 3.35, 3.31, 5.83, 4.57),
}


@pytest.mark.parametrize("model", BLOSSOM)
def test_the_totals_of_the_blossom_readme_follow_from_its_categories(model):
    *scores, reasoning, language, total = BLOSSOM[model]
    groups = {name: [{1: score}] for name, score in zip(protocols.ALIGN_SHORT, scores, strict=True)}
    found = {name: column(groups) for name, column in protocols.align_columns().items()}
    assert list(found) == ["专业", "中文", "任务", "数学", "写作", "问答", "扮演", "逻辑", "推理", "语言", "总分"]
    published = zip(("推理", "语言", "总分"), (reasoning, language, total), strict=True)
    assert all(abs(found[name] - value) < 0.0105 for name, value in published)  # of rounded categories


def test_the_totals_of_mt_bench_are_means_of_all_turns():
    # Blossom's README: 34b 8.91, 8.46, 8.69; 9b 8.87, 7.95, 8.41.
    columns = protocols.mt_bench().columns
    for first, second, total in ((8.91, 8.46, 8.69), (8.87, 7.95, 8.41)):
        found = columns["总分"]({"math": [{1: first, 2: second}]})
        assert abs(found - total) < 0.006
    groups = {"math": [{1: 10.0, 2: 4.0}, {1: 7.0}], "writing": [{2: 1.0}]}
    assert [columns[name](groups) for name in ("第一轮", "第二轮", "总分", "math", "writing")] == [
        8.5,
        2.5,
        5.5,
        7.0,
        1.0,
    ]
    assert columns["stem"](groups) is None


def test_columns_come_with_intervals_and_without_some_questions():
    scored = [{"id": str(n), "category": "math", "scores": {1: float(s), 2: float(s)}} for n, s in enumerate((2, 4, 9))]
    scored.append({"id": "x", "category": "math", "scores": {}})
    columns = {"总分": protocols.mean, "none": lambda groups: protocols.mean(groups, ["stem"])}
    found = protocols.score_columns(columns, scored, seed=0)
    score, low, high = found["总分"]
    assert list(found) == ["总分"] and score == 5 and 2 <= low < 5 < high <= 9
    assert protocols.score_columns(columns, scored, seed=0, without={"2"})["总分"][0] == 3
    assert protocols.score_columns(columns, scored, seed=0, without={"0", "1", "2"}) == {}


def test_a_winner_that_changes_with_the_places_is_a_tie():
    def verdict(letter):
        return protocols.read_winner(f"[[{letter}]]")

    # The winner when this model is A, then the winner when it is B.
    found = {(a, b): protocols.pair_result(verdict(a), verdict(b)) for a in "ABC" for b in "ABC"}
    assert {pair for pair, result in found.items() if result == "win"} == {("A", "B")}
    assert {pair for pair, result in found.items() if result == "lose"} == {("B", "A")}
    assert sum(result == "tie" for result in found.values()) == 7
    assert protocols.pair_result(verdict("A"), verdict("?")) is None
    groups = {"math": [{1: "win", 2: "tie"}, {1: "lose"}], "stem": [{1: "win"}]}
    found = {name: column(groups) for name, column in protocols.pair_columns(["math", "stem"]).items()}
    assert found == {"win": 0.5, "tie": 0.25, "lose": 0.25, "win + tie/2": 0.625, "math": 0.5, "stem": 1.0}
