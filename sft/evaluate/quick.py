"""The quick check: questions with answers that code can judge, asked offline, the base beside the tuned model.

Open questions for the stop rate, repetition, length and the language of the reply; questions with a form that the reply
must keep; sums with one right answer; and the loss on held-out conversations. Greedy, so the same model says the same.
"""

import json
import math
import random
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from sft.chat.reply import Chat, Reply
from sft.dataset.dataset import prepare
from sft.dataset.mixture import find_files
from sft.files import CACHE_DIR
from sft.format.tokens import IGNORE_INDEX
from sft.opendata.cleaning import HAN, count_han
from sft.report.markdown import table
from sft.report.measures import repetition

QUESTIONS = Path(__file__).with_name("suites") / "quick" / "questions.jsonl"
NUM_SUMS = 12  # in each language
RESAMPLES = 1000
MAX_CONVERSATIONS = 500  # of the held-out ones, evenly spaced, whose loss is taken
SHARES = ("stop_rate", "language", "format", "arithmetic")  # of questions; the other measures are means
SIDES = ("base", "tuned", "difference")


def questions(seed: int = 0) -> list[dict]:
    """Return the questions of the project and the sums that `seed` draws: {"id", "language", "prompt", ...}.

    "check" is the form that a reply must keep, "answer" the number that it must end in.
    """
    with open(QUESTIONS, encoding="utf-8") as stream:
        written = [json.loads(line) for line in stream]
    return written + [sum_ for language in ("zh", "en") for sum_ in _sums(language, seed)]


_SUMS = (
    ("{a} + {b} = ?", "{a} + {b} = ?", lambda a, b: a + b),
    ("{a} 减去 {b} 等于多少？", "What is {a} minus {b}?", lambda a, b: a - b),
    ("{b} 乘以 7 等于多少？", "What is {b} times 7?", lambda a, b: b * 7),
    (
        "一盒有 {b} 支铅笔，买了 3 盒又送出 5 支，还剩几支？",
        "A box holds {b} pencils. After buying 3 boxes and giving away 5 pencils, how many are left?",
        lambda a, b: b * 3 - 5,
    ),
)


def _sums(language: str, seed: int) -> list[dict]:
    draw = random.Random(f"{language} {seed}")
    found = []
    for number in range(NUM_SUMS):
        chinese, english, solve = _SUMS[number % len(_SUMS)]
        values = {"a": draw.randint(30, 99), "b": draw.randint(3, 29)}
        text = (chinese + "只输出阿拉伯数字。" if language == "zh" else english + " Output the number only.").format(
            **values
        )
        answer = solve(**values)
        found.append({"id": f"{language}-sum-{number + 1}", "language": language, "prompt": text, "answer": answer})
    return found


# --- scores by rule ------------------------------------------------------------------------------------------


def language_of(text: str) -> str | None:
    """Return zh or en, whichever has more: Chinese characters or Latin words; None for neither."""
    han = count_han(text)
    words = len(re.findall(r"[A-Za-z]{2,}", text))
    if han == words == 0:
        return None
    return "zh" if han > words else "en"


def count_units(text: str) -> int:
    """Count a text's length as a person does: Chinese characters, and words or numbers of other scripts."""
    return len(re.findall(rf"[{HAN}]|[^\W_{HAN}]+(?:['’-][^\W_{HAN}]+)*", text))


def last_number(text: str) -> float | None:
    """Return the last number of a reply (1,234 and full-width digits too), None where there is none."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", unicodedata.normalize("NFKC", text).replace("−", "-"))
    return float(found[-1].replace(",", "")) if found else None


_KINDS = {"string": str, "integer": int, "array": list}


def _parse_json(text: str) -> object:
    fenced = re.fullmatch(r"```(?:json)?\n(.*)\n```", text, re.DOTALL)
    try:
        return json.loads(fenced.group(1) if fenced else text)
    except (ValueError, RecursionError):
        return None


def _is_json_object(text: str, kinds: dict[str, str]) -> bool:
    found = _parse_json(text)
    if not isinstance(found, dict) or set(found) != set(kinds):
        return False
    return all(isinstance(found[key], _KINDS[kind]) and found[key] is not True for key, kind in kinds.items())


def _has_items(text: str, num: int) -> bool:
    lines = [line for line in text.splitlines() if line.strip()]
    return len(lines) == num and all(re.match(r"\s*(?:\d+[.、)）]|[-*•])\s*\S", line) for line in lines)


def _bare(text: str) -> str:
    return text.strip(" \n\t.。!！?？\"'“”‘’,，").casefold()


CHECKS: dict[str, Callable] = {
    "json": _is_json_object,
    "json_items": lambda text, num: isinstance(found := _parse_json(text), list) and len(found) == num,
    "items": _has_items,
    "lines": lambda text, num: len([line for line in text.splitlines() if line.strip()]) == num,
    "max_units": lambda text, num: count_units(text) <= num,
    "min_units": lambda text, num: count_units(text) >= num,
    "contains": lambda text, words: all(word.casefold() in text.casefold() for word in words),
    "excludes": lambda text, words: not any(word.casefold() in text.casefold() for word in words),
    "one_of": lambda text, words: _bare(text) in words,
    "starts": lambda text, words: text.startswith(words),
    "ends": lambda text, words: _bare(text).endswith(words.casefold()),
    "language": lambda text, language: language_of(text) == language,
    "capitals": lambda text, _yes: text.isupper(),
}


def is_in_form(text: str, check: dict) -> bool:
    """Tell whether a reply keeps the form that its question asks for; an empty one keeps none."""
    text = text.strip()
    return bool(text) and all(CHECKS[name](text, wanted) for name, wanted in check.items())


def score_reply(question: dict, reply: Reply) -> dict[str, float]:
    """Return what a reply scores in each measure that its question is meant for."""
    scores = {"stop_rate": float(reply.ended), "repetition": repetition(reply.answer)}
    if "check" in question:
        scores["format"] = float(is_in_form(reply.answer, question["check"]))
    elif "answer" in question:
        scores["arithmetic"] = float(last_number(reply.answer) == question["answer"])
    else:
        scores["language"] = float(language_of(reply.answer) == question["language"])
        scores["length"] = float(reply.num_tokens)
    return scores


# --- numbers with their uncertainty -------------------------------------------------------------------------------


def bootstrap(groups: Sequence[Sequence], statistics: Callable, *, seed: int = 0) -> list[list[float]]:
    """Return the 95% interval of each of `statistics(groups)`, the items drawn anew within their group.

    A statistic of a draw may be None (no question with a score); the interval is empty if all are.
    """
    draw = random.Random(seed)
    rounds = [statistics([draw.choices(group, k=len(group)) for group in groups]) for _ in range(RESAMPLES)]
    found = [sorted(value for value in values if value is not None) for values in zip(*rounds, strict=True)]
    return [[values[len(values) // 40], values[-1 - len(values) // 40]] if values else [] for values in found]


def wilson(values: Sequence[float]) -> list[float]:
    """Return the 95% interval of a share (Wilson 1927), which is honest about 0 of 15 and 15 of 15 too."""
    size = len(values)
    share = fmean(values)
    z = 1.959964
    middle = (share + z * z / (2 * size)) / (1 + z * z / size)
    reach = z / (1 + z * z / size) * (share * (1 - share) / size + z * z / (4 * size * size)) ** 0.5
    return [max(0.0, middle - reach), min(1.0, middle + reach)]


def _row(measure: str, language: str, tuned: list, base: list | None, mean: Callable = fmean) -> dict:
    def interval(items: list, statistic: Callable) -> list[float]:
        return bootstrap([items], lambda groups: [statistic(groups[0])])[0]

    def alone(items: list) -> list[float]:
        return [mean(items), *(wilson(items) if measure in SHARES else interval(items, mean))]

    def apart(pairs: Sequence) -> float:
        return mean([pair[0] for pair in pairs]) - mean([pair[1] for pair in pairs])

    row = {"measure": measure, "language": language, "questions": len(tuned), "tuned": alone(tuned)}
    if base:
        row["base"] = alone(base)
        if len(base) == len(tuned):
            pairs = list(zip(tuned, base, strict=True))
            between = newcombe(row) if measure in SHARES else interval(pairs, apart)
            row["difference"] = [apart(pairs), *between]
    row["shown"] = {side: _shown(measure, row[side]) for side in SIDES if side in row}
    return row


def newcombe(row: dict) -> list[float]:
    """Return the 95% interval of the difference of two shares from theirs (Newcombe 1998, method 10)."""
    (new, low, high) = row["tuned"]
    (old, old_low, old_high) = row["base"]
    below = math.hypot(new - low, old_high - old)
    above = math.hypot(high - new, old - old_low)
    return [new - old - below, new - old + above]


def per_token(items: Sequence[tuple[float, int]]) -> float:
    """Return the mean loss of a token from (sum, tokens) of each conversation."""
    return sum(total for total, _num in items) / sum(num for _total, num in items)


def compare_replies(
    asked: Sequence[dict],
    tuned: Sequence[Reply],
    base: Sequence[Reply] | None = None,
    losses: tuple[list, list | None] | None = None,
) -> dict:
    """Return {"rows", "answers"}: each measure in each language with its 95% interval, and every reply.

    A row holds [value, low, high] as "tuned", and where a base was asked the same, "base" and their "difference";
    "shown" holds the same for people.
    """
    scores = [
        [score_reply(*pair) for pair in zip(asked, replies, strict=True)] if replies else []
        for replies in (tuned, base)
    ]
    rows = []
    for measure in ("stop_rate", "repetition", "language", "format", "arithmetic", "length"):
        for language in ("zh", "en"):
            of_tuned, of_base = (
                [
                    one[measure]
                    for one, q in zip(side, asked, strict=False)
                    if measure in one and q["language"] == language
                ]
                for side in scores
            )
            if of_tuned:
                rows.append(_row(measure, language, of_tuned, of_base))
    if losses:
        rows.append(_row("held_out_loss", "", *losses, mean=per_token))
    answers = [
        {**question, "tuned": new.answer, "tuned_ended": new.ended, "scores": score}
        | ({"base": base[number].answer, "base_ended": base[number].ended} if base else {})
        for number, (question, new, score) in enumerate(zip(asked, tuned, scores[0], strict=True))
    ]
    return {"rows": rows, "answers": answers}


def quick_table(rows: Sequence[dict]) -> str:
    """Return the rows as a Markdown table."""
    sides = [side for side in SIDES if any(side in row for row in rows)]
    lines = []
    for row in rows:
        name = f"{row['measure']} {row['language']}".strip()
        lines.append([name, str(row["questions"]), *(row["shown"].get(side, "") for side in sides)])
    return table(["measure", "questions", *sides], lines)


def _shown(measure: str, numbers: Sequence[float]) -> str:
    scale, form = (100, ".1f") if measure in (*SHARES, "repetition") else (1, ".4g")
    value, low, high = (format(scale * number, form) for number in numbers)
    return f"{value}{'%' if scale == 100 else ''} [{low}, {high}]"


# --- the held-out loss --------------------------------------------------------------------------------------------


def held_out_losses(chat: Chat, paths: Sequence[str], *, max_length: int, cache_dir: str = CACHE_DIR) -> list[tuple]:
    """Return (summed loss in nats, trained tokens) of each conversation, evenly spaced if there are too many."""
    import torch

    from sft.dataset.collate import Collator
    from sft.model.loss import use_chunked_loss

    files = find_files([], paths)[1]
    length = min(max_length, chat.context_window or max_length)
    examples, _ledger = prepare(files, chat.renderer, max_length=length, cache_dir=cache_dir)
    if not len(examples):
        raise ValueError(f"--eval_data_path {' '.join(paths)}: no conversation in it can be scored")
    use_chunked_loss(chat.model)
    collate = Collator(chat.renderer.tokenizer.pad_token_id)
    found = []
    for index in range(0, len(examples), -(-len(examples) // MAX_CONVERSATIONS)):
        batch = {name: values.to(chat.model.device) for name, values in collate([examples[index]]).items()}
        num = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        with torch.inference_mode():
            found.append((float(chat.model(**batch).loss) * num, num))
    return found
