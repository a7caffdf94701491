"""Judged suites by their published protocols: MT-Bench, AlignBench, BELLE's eval set; and two models side by side.

A suite is its questions, the judge's prompt, a reader of its verdict, and the columns of the published table. The
sources are FastChat's llm_judge (0.2.36), AlignBench's judge.py and show_result.py, and BELLE's eval folder.
"""

import ast
import json
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from sft.evaluate.quick import bootstrap

MT_BENCH = Path(__file__).with_name("suites") / "mt_bench"


class Verdict(NamedTuple):
    """The verdict in a judge's text: its score, None for no rating or several; `first` is the protocol's choice."""

    score: float | str | None
    several: bool = False
    first: float | str | None = None

    @classmethod
    def of_ratings(cls, ratings: Sequence[float], lowest: float, highest: float) -> "Verdict":
        """Take the first rating; several that differ, or one outside the scale, are no score."""
        first = ratings[0] if ratings else None
        several = len(set(ratings)) > 1
        is_score = first is not None and not several and lowest <= first <= highest
        return cls(first if is_score else None, several, first)


@dataclass(frozen=True)
class Question:
    id: str
    category: str
    turns: tuple[str, ...]
    temperature: float
    references: tuple[str, ...] = ()
    subcategory: str = ""


@dataclass(frozen=True)
class Suite:
    """`ask(question, answers, turn)` gives the judge's messages; `columns` take groups of scored questions."""

    questions: list[Question]
    ask: Callable[[Question, Sequence[str], int], list[dict]]
    read: Callable[[str], Verdict]
    columns: dict[str, Callable[[dict], float | None]]
    parameters: dict
    num_published: int
    forged: str  # pattern of a verdict, for answers that contain one
    repeat_empty: int = 0  # times that an empty answer is asked for again
    prompts: dict = field(default_factory=dict)
    against: dict[str, list[str]] | None = None  # another model's answers by question id, to compare with


def read_lines(path: str | Path, fields: Collection[str]) -> list[dict]:
    """Read JSON Lines (some of BELLE's lines are Python literals) that must have `fields`."""
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            try:
                row = ast.literal_eval(line)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                raise ValueError(f"{path} line {number}: is no JSON object") from None
        missing = [name for name in fields if not isinstance(row, dict) or name not in row]
        if missing:
            raise ValueError(f"{path} line {number}: has no {missing[0]!r}; is it the suite's file?")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: is empty")
    return rows


def _messages(prompt: dict, fields: dict) -> list[dict]:
    text = prompt["prompt_template"].format(**fields)
    return [{"role": "system", "content": prompt["system_prompt"]}, {"role": "user", "content": text}]


# --- the mean scores of a published table ---------------------------------------------------------------------------


def mean(groups: dict, categories: Collection[str] | None = None, turn: int | None = None) -> float | None:
    """Return the mean score of all questions of `categories`; `groups` holds {turn: score} of each, by category."""
    chosen = groups if categories is None else categories
    scores = [score for c in chosen for item in groups.get(c, ()) for t, score in item.items() if turn in (None, t)]
    return fmean(scores) if scores else None


def mean_of_means(groups: dict, categories: Collection[str]) -> float | None:
    means = [mean(groups, [category]) for category in categories]
    return None if not means or None in means else fmean(means)


def category_columns(categories: Iterable[str]) -> dict[str, Callable]:
    return {name: partial(mean, categories=[name]) for name in categories}


def score_columns(columns: dict, scored: Sequence[dict], *, seed: int, without: Collection[str] = ()) -> dict:
    """Return {column: [score, low, high]}, questions drawn anew within their categories; `without` leaves some out."""
    groups: dict[str, list] = {}
    for item in scored:
        if item["scores"] and item["id"] not in without:
            groups.setdefault(item["category"], []).append(item["scores"])

    def values(drawn: Sequence[Sequence]) -> list[float | None]:
        of = dict(zip(groups, drawn, strict=True))
        return [column(of) for column in columns.values()]

    drawn = list(groups.values())
    found = zip(columns, values(drawn), bootstrap(drawn, values, seed=seed), strict=True)
    return {name: [value, *interval] for name, value, interval in found if value is not None}


# --- MT-Bench -------------------------------------------------------------------------------------------------------

MT_TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
MT_TEMPERATURES |= dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0)
WITH_REFERENCE = ("math", "reasoning", "coding")
_RATINGS = (r"\[\[(\d+\.?\d*)\]\]", r"\[(\d+\.?\d*)\]")


def read_rating(text: str) -> Verdict:
    """Read [[5]], or [5] if there is none. FastChat takes the first; several that differ are no verdict."""
    found = re.findall(_RATINGS[0], text) or re.findall(_RATINGS[1], text)
    return Verdict.of_ratings([float(rating) for rating in found], 1, 10)


def read_winner(text: str) -> Verdict:
    """Read [[A]], [[B]] or [[C]] (tie). FastChat looks for them in this order; several are no verdict."""
    found = [letter for letter in "ABC" if f"[[{letter}]]" in text]
    first = found[0] if found else None
    return Verdict(first if len(found) == 1 else None, len(found) > 1, first)


def mt_fields(question: Question, answers: dict[str, Sequence[str]]) -> dict:
    """Return what fills a prompt of FastChat's; the names of `answers` are "answer", or "answer_a" and "answer_b".

    Prompts of the first turn ask for "question" and "answer", those of the second for "question_1" and so on.
    """
    first = {"question": question.turns[0], **{name: said[0] for name, said in answers.items()}}
    numbered = {"question": question.turns, "ref_answer": question.references, **answers}
    return first | {f"{name}_{number}": text for name in numbered for number, text in enumerate(numbered[name], 1)}


def _mt_prompt(prompts: dict, kind: str, question: Question, turn: int) -> dict:
    version = "v2" if kind == "pair" else "v1"
    if question.category in WITH_REFERENCE:
        version = "math-v1"
    name = f"{kind}-{version}"
    return prompts[name + ("-multi-turn" if turn == 2 else "")]


def mt_bench(questions: str | None = None, judge_prompts: str | None = None, references: str | None = None) -> Suite:
    """MT-Bench: two turns, each graded alone from 1 to 10; with GPT-4's reference for math, reasoning and coding."""
    prompts = load_pair_prompts(judge_prompts)
    rows = read_lines(questions or MT_BENCH / "question.jsonl", ("question_id", "category", "turns"))
    kept = read_lines(references or MT_BENCH / "reference_answer.jsonl", ("question_id", "choices"))
    known = {row["question_id"]: tuple(row["choices"][0]["turns"]) for row in kept}
    asked = []
    for row in rows:
        number = row["question_id"]
        category = row["category"]
        needed = known.get(number) if category in WITH_REFERENCE else ()
        if needed is None or (needed and len(needed) < len(row["turns"])):
            raise ValueError(f"question {number} ({category}) has no reference answer; name them with --references")
        temperature = MT_TEMPERATURES.get(category, 0.7)
        asked.append(Question(str(number), category, tuple(row["turns"]), temperature, needed))
    return Suite(
        asked,
        lambda q, said, turn: _messages(_mt_prompt(prompts, "single", q, turn), mt_fields(q, {"answer": said})),
        read_rating,
        {"第一轮": partial(mean, turn=1), "第二轮": partial(mean, turn=2), "总分": mean}
        | category_columns(question.category for question in asked),
        {"temperature": 0, "max_tokens": 2048},
        num_published=80,
        forged=_RATINGS[0],
        prompts=prompts,
    )


def load_pair_prompts(path: str | None = None) -> dict[str, dict]:
    """Return FastChat's judge prompts by name."""
    rows = read_lines(path or MT_BENCH / "judge_prompts.jsonl", ("name", "system_prompt", "prompt_template"))
    return {row["name"]: row for row in rows}


def ask_pair(prompts: dict, question: Question, turn: int, first: Sequence[str], second: Sequence[str]) -> list[dict]:
    """Return the messages that ask which of two models answers better."""
    prompt = _mt_prompt(prompts, "pair", question, turn)
    return _messages(prompt, mt_fields(question, {"answer_a": first, "answer_b": second}))


# --- AlignBench -----------------------------------------------------------------------------------------------------

ALIGN_LANGUAGE = ("专业能力", "中文理解", "基本任务", "文本写作", "综合问答", "角色扮演")
ALIGN_REASONING = ("数学计算", "逻辑推理")
# The order and the short names of the Blossom README's table.
ALIGN_SHORT = {
    "专业能力": "专业",
    "中文理解": "中文",
    "基本任务": "任务",
    "数学计算": "数学",
    "文本写作": "写作",
    "综合问答": "问答",
    "角色扮演": "扮演",
    "逻辑推理": "逻辑",
}


def align_columns() -> dict[str, Callable]:
    """A category's mean; 推理 and 语言 are means of categories, and 总分 is the mean of these two."""
    reasoning, language = (partial(mean_of_means, categories=names) for names in (ALIGN_REASONING, ALIGN_LANGUAGE))

    def total(groups: dict) -> float | None:
        means = (reasoning(groups), language(groups))
        return None if None in means else fmean(means)

    columns = {ALIGN_SHORT[name]: column for name, column in category_columns(ALIGN_SHORT).items()}
    return columns | {"推理": reasoning, "语言": language, "总分": total}


def read_align(text: str) -> Verdict:
    """Read '综合得分' of the last dictionary; without one, the first '综合得分' anywhere; from 1 to 10."""
    found = re.search(r"{(.*?)}(?![^{]*{)", text)
    ratings = dict(re.findall(r"'(.*?)': (\d+)", found.group(1))) if found else {}
    anywhere = re.findall(r"'综合得分': (\d+(?:\.\d{1,2})?)", text)
    chosen = [ratings["综合得分"]] if ratings.get("综合得分") else anywhere[:1]
    verdict = Verdict.of_ratings([float(rating) for rating in chosen], 1, 10)
    return verdict._replace(several=len(set(anywhere)) > 1)


def align_bench(questions: str, judge_prompts: str) -> Suite:
    """AlignBench: one turn, judged in several dimensions against a reference; `judge_prompts` is its repository.

    The prompt is a constant in its judge.py, which is parsed, not run.
    """
    folder = Path(judge_prompts)
    template = published_constant(folder / "judge.py", "base_prompt")
    names = ("dimension_set", "dimension_definition", "subcategory_question_mapping", "temperature")
    sets, definitions, kinds, temperatures = (
        json.loads((folder / "config" / f"{name}.json").read_text(encoding="utf-8")) for name in names
    )
    asked = []
    for row in read_lines(questions, ("question_id", "category", "subcategory", "question", "reference")):
        if kinds.get(row["subcategory"]) not in sets:
            raise ValueError(f"{questions}: question {row['question_id']}: no dimensions for {row['subcategory']!r}")
        turns = (row["question"],)
        references = (row["reference"],)
        temperature = temperatures.get(row["category"], 0.7)
        asked.append(
            Question(str(row["question_id"]), row["category"], turns, temperature, references, row["subcategory"])
        )

    def ask(question: Question, said: Sequence[str], _turn: int) -> list[dict]:
        chosen = sets[kinds[question.subcategory]]
        lines = "".join(f"{number}. {name}: {definitions[name]}\n" for number, name in enumerate(chosen, 1))
        fields = {"question": question.turns[0], "reference": question.references[0], "answer": said[0]}
        return [{"role": "user", "content": template.format(category=question.category, dimensions=lines, **fields)}]

    parameters = {"temperature": 0}
    prompts = load_pair_prompts()
    columns = align_columns()
    return Suite(asked, ask, read_align, columns, parameters, 683, "综合得分", repeat_empty=3, prompts=prompts)


def published_constant(path: Path, name: str) -> str:
    """Return the text that a Python file assigns to `name`, without running it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            text = getattr(node.value, "value", None)
            if isinstance(text, str):
                return text
    raise ValueError(f"{path}: assigns no text to {name}; is it AlignBench's?")


# --- BELLE ----------------------------------------------------------------------------------------------------------

WITHOUT_ANSWER = ("generation", "brainstorming", "rewrite")
_SCORE = r"得分\s*[:：]\s*(\d+(?:\.\d+)?)(?!\d|\.\d|\s*[%％]|\s*/\s*(?!1(?:\.0)?(?!\d)))"


def read_belle(text: str) -> Verdict:
    """Read 得分: 0.8, from 0 to 1; several that differ are no verdict (BELLE leaves the reading to people)."""
    return Verdict.of_ratings([float(score) for score in re.findall(_SCORE, text)], 0, 1)


def belle(questions: str, judge_prompts: str) -> Suite:
    """BELLE's eval set: one turn, a prompt for each class, graded from 0 to 1; answered greedily."""
    prompts = {row["class"].casefold(): row["prompt"] for row in read_lines(judge_prompts, ("class", "prompt"))}
    asked = []
    for number, row in enumerate(read_lines(questions, ("question", "class", "std_answer")), 1):
        category = row["class"].casefold()
        if category not in prompts:
            raise ValueError(f"{questions}: question {number}: no prompt for the class {row['class']!r}")
        asked.append(Question(str(number), category, (row["question"],), 0.0, (row["std_answer"],)))

    def ask(question: Question, said: Sequence[str], _turn: int) -> list[dict]:
        start = f"{prompts[question.category]} {question.turns[0]} "
        end = "。请针对模型回答给出得分，顺便给出理由："
        if question.category in WITHOUT_ANSWER:
            text = f"{start} 模型回答： '{said[0]}'{end}"
        else:
            text = f"{start}标准回答:{question.references[0]}  模型回答：' {said[0]}'{end}"
        return [{"role": "user", "content": text}]

    columns = category_columns(question.category for question in asked)
    columns |= {"mean of classes": lambda groups: mean_of_means(groups, list(groups)), "总分": mean}
    parameters = {"temperature": 0.0, "max_tokens": 3000}
    return Suite(asked, ask, read_belle, columns, parameters, len(asked), "得分", prompts=load_pair_prompts())


def compare_with(suite: Suite, answers: dict[str, list[str]]) -> Suite:
    """Have the judge say which of two models answers better; `answers` are the other one's, by question id."""
    columns = pair_columns(question.category for question in suite.questions)
    return replace(suite, read=read_winner, columns=columns, against=answers)


def pair_result(first: Verdict, swapped: Verdict) -> str | None:
    """Return win, tie or lose of the model that is A first and B then; a winner that depends on the order is a tie."""
    if first.score is None or swapped.score is None:
        return None
    results = {"A": "win", "B": "lose", "C": "tie"}[first.score], {"A": "lose", "B": "win", "C": "tie"}[swapped.score]
    return results[0] if results[0] == results[1] else "tie"


def pair_columns(categories: Iterable[str]) -> dict[str, Callable]:
    """Shares of wins, ties and losses, and the win rate with a tie as half a win: in all, and of each category."""

    def worth(of: dict, chosen: Collection[str] | None = None) -> Callable:
        return lambda groups: mean(
            {name: [{t: of.get(r, 0.0) for t, r in item.items()} for item in items] for name, items in groups.items()},
            chosen,
        )

    half = {"win": 1.0, "tie": 0.5}
    columns = {name: worth({name: 1.0}) for name in ("win", "tie", "lose")} | {"win + tie/2": worth(half)}
    return columns | {name: worth(half, [name]) for name in categories}
