"""A judged evaluation: the model's answers, a judge's verdicts on them, and the tables of both.

The answers come from a model in this process or behind an endpoint. Both classes have `asked`, which makes a request as
it is hashed and kept, and `ask_all`.
"""

import itertools
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from sft.chat.reply import Chat
from sft.chat.sampling import Sampling
from sft.dataset.tokenise import batches
from sft.evaluate.endpoint import Calls, Endpoint, estimate_cost, key_of
from sft.evaluate.overlap import overlap_lines
from sft.evaluate.protocols import (
    Question,
    Suite,
    Verdict,
    ask_pair,
    pair_result,
    read_lines,
    score_columns,
)
from sft.report.templates import load_template

MAX_TOKENS = 1024  # of an answer, as in FastChat
# Typical lengths in tokens, for the estimate of the cost.
ANSWER_TOKENS = 300
VERDICT_TOKENS = 250


class LocalModel:
    """Answers in batches; an answer is kept by the model's bytes (`identity`) and what it was asked."""

    def __init__(self, chat: Chat, identity: str, *, batch_size: int, seed: int):
        self.chat = chat
        self.identity = identity
        self.batch_size = batch_size
        self.seed = seed

    def asked(self, messages: Sequence[dict], attempt: int = 0, **parameters) -> dict:
        asked = {"weights": self.identity, "format": self.chat.renderer.fingerprint(), "messages": list(messages)}
        if self.chat.thinking is not None:
            asked["thinking"] = self.chat.thinking
        return asked | {"seed": self.seed, "attempt": attempt, **parameters}

    def ask_all(self, requests: Sequence[dict], calls: Calls, what: str) -> list[dict | None]:
        """Answer what is not in `calls`; batches and their seeds are the same however often the work was stopped."""
        done = 0
        for temperature in dict.fromkeys(request["temperature"] for request in requests):
            for batch in batches((r for r in requests if r["temperature"] == temperature), self.batch_size):
                if any(key_of(request) not in calls.found for request in batch):
                    self._answer(batch, temperature, calls)
                done += len(batch)
                print(f"\r{done} of {len(requests)} {what}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        return [calls.found[key_of(request)] for request in requests]

    def _answer(self, batch: Sequence[dict], temperature: float, calls: Calls) -> None:
        import torch

        fitting = []
        for request in batch:
            try:
                self.chat.prompt_ids(request["messages"])
                fitting.append(request)
            except ValueError:  # no room in the context window: an empty answer, which is counted
                calls.keep(key_of(request), request, {"text": "", "finish": "too_long", "tokens": None})
        if not fitting:
            return
        torch.manual_seed(int(key_of(fitting[0])[:12], 16))
        # As FastChat does: temperature 0 is greedy, and transformers' own top_k is the only other limit.
        sampling = Sampling(temperature, top_p=1.0, repetition_penalty=1.0, max_new_tokens=batch[0]["max_tokens"])
        replies = self.chat.reply_batch([request["messages"] for request in fitting], sampling)
        for request, reply in zip(fitting, replies, strict=True):
            if (key := key_of(request)) not in calls.found:
                finish = "stop" if reply.ended else "length"
                calls.keep(key, request, {"text": reply.answer, "finish": finish, "tokens": [0, reply.num_tokens]})


def answer_all(
    suite: Suite, source: LocalModel | Endpoint, calls: Calls, *, max_tokens: int, max_missing: int
) -> dict[str, list[str]]:
    """Ask the model every turn of every question; return its answers by question id, "" for one that is missing."""
    said: dict[str, list[str]] = {question.id: [] for question in suite.questions}
    for turn in range(max(len(question.turns) for question in suite.questions)):
        left = [question for question in suite.questions if len(question.turns) > turn]
        for attempt in range(1 + suite.repeat_empty):
            requests = [_new_request(source, q, said[q.id][:turn], max_tokens, attempt) for q in left]
            replies = source.ask_all(requests, calls, f"answers to turn {turn + 1}")
            _check_missing("answers", replies, max_missing)
            for question, reply in zip(left, replies, strict=True):
                said[question.id][turn:] = [reply["text"] if reply else ""]
            left = [question for question in left if not said[question.id][turn].strip()]
            if not left:
                break
    return said


def _check_missing(what: str, found: Sequence, max_missing: int) -> None:
    missing = sum(one is None for one in found)
    if missing > max_missing:
        raise ValueError(
            f"{missing} {what} are missing; rerun the same command to resume, answers are not asked again; where the "
            f"endpoint refuses them for good, --max_missing {missing} does without them"
        )


def _new_request(source, question: Question, said: Sequence[str], max_tokens: int, attempt: int = 0) -> dict:
    messages = [{"role": "user", "content": question.turns[0]}]
    for answer, text in zip(said, question.turns[1:], strict=False):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": text}]
    return source.asked(messages, attempt, temperature=question.temperature, max_tokens=max_tokens)


def verdict_requests(suite: Suite, answers: dict) -> list[tuple[Question, int, list[dict]]]:
    """Return (question, turn, the judge's messages); of two models also with places changed."""
    asked = []
    for question in suite.questions:
        mine = answers[question.id]
        for turn in range(1, min(len(question.turns), 2) + 1):
            if suite.against is None:
                prompts = [suite.ask(question, mine, turn)]
            else:
                pairs = list(itertools.permutations((mine, suite.against[question.id])))
                prompts = [ask_pair(suite.prompts, question, turn, *pair) for pair in pairs]
            asked += [(question, turn, prompt) for prompt in prompts]
    return asked


def ask_for_verdicts(
    suite: Suite, endpoint: Endpoint, calls: Calls, answers: dict, *, tries: int, max_missing: int
) -> list[tuple[Question, int, list[str], Verdict]]:
    """Return (question, turn, the judge's texts, its verdict) of each request; without a verdict it is asked again."""
    asked = verdict_requests(suite, answers)
    texts: list[list[str]] = [[] for _ in asked]
    verdicts: list[Verdict | None] = [None] * len(asked)
    missing = list(range(len(asked)))
    for attempt in range(tries + 1):
        requests = [endpoint.asked(asked[index][2], attempt, **suite.parameters) for index in missing]
        replies = endpoint.ask_all(requests, calls, f"verdicts, try {attempt + 1}")
        for index, reply in zip(missing, replies, strict=True):
            verdicts[index] = suite.read(reply["text"]) if reply else None
            texts[index] += [reply["text"]] if reply else []
        missing = [index for index in missing if verdicts[index] and verdicts[index].score is None]
        if not missing:
            break
    _check_missing("verdicts", verdicts, max_missing)
    found = zip(asked, texts, verdicts, strict=True)
    return [(question, turn, said, verdict or Verdict(None)) for (question, turn, _), said, verdict in found]


# --- the cost --------------------------------------------------------------------------------------------


def say_cost(what: str, endpoint: Endpoint, requests: Sequence[dict], known: dict, reply: int, prices) -> None:
    """Say what is still to be sent, and with `prices` (for a million tokens in, and out) what it may cost."""
    numbers = estimate_cost(requests, known.__contains__, reply=reply)
    text = f"{what} from {endpoint.base_url}: {numbers['requests']:,} requests to send, about {numbers['in']:,} tokens "
    text += f"in and {numbers['out']:,} out (at most {numbers['at_most']:,})"
    if prices:
        low, high = ((numbers["in"] * prices[0] + numbers[key] * prices[1]) / 1e6 for key in ("out", "at_most"))
        text += f"; about {low:.2f}, at most {high:.2f}"
    print(text, flush=True)


def say_answers_cost(suite: Suite, endpoint: Endpoint, known: dict, max_tokens: int, prices) -> None:
    guess = "x" * 4 * ANSWER_TOKENS
    requests = [
        _new_request(endpoint, q, [guess] * turn, max_tokens) for q in suite.questions for turn in range(len(q.turns))
    ]
    say_cost("answers", endpoint, requests, known, ANSWER_TOKENS, prices)


def say_verdicts_cost(suite: Suite, endpoint: Endpoint, known: dict, prices, answers: dict | None = None) -> None:
    """Like `say_cost`; without `answers` they are guessed."""
    guessed = {q.id: ["x" * 4 * ANSWER_TOKENS] * len(q.turns) for q in suite.questions}
    asked = verdict_requests(suite, answers or guessed)
    requests = [endpoint.asked(messages, **suite.parameters) for _question, _turn, messages in asked]
    say_cost("verdicts", endpoint, requests, known, VERDICT_TOKENS, prices)


# --- results ------------------------------------------------------------------------------------------------------


def judged_rows(suite: Suite, answers: dict, verdicts: Sequence[tuple]) -> list[dict]:
    """Return of each question its answers, its verdicts, and its scores by turn; a pair's two verdicts make one."""
    rows = {q.id: _new_row(q, answers[q.id]) for q in suite.questions}
    for (name, turn), found in itertools.groupby(verdicts, lambda each: (each[0].id, each[1])):
        said = [(texts, verdict) for _question, _turn, texts, verdict in found]
        parts = [verdict for _texts, verdict in said]
        score = pair_result(*parts) if suite.against else parts[0].score
        _add_verdicts(rows[name], turn, score, score if suite.against else parts[0].first, said)
    return list(rows.values())


def read_judgments(suite: Suite, path: str, model: str | None) -> tuple[list[dict], dict]:
    """Read the verdicts of one model that FastChat kept anew; return the questions' rows, and who judged whom.

    `kept_otherwise` counts the verdicts whose kept score is not what FastChat's reading (the first rating) gives.
    """
    kept = read_lines(path, ("question_id", "model", "judge", "judgment", "turn"))
    models = sorted({line["model"] for line in kept})
    if model not in models and (model or len(models) > 1):
        raise ValueError(f"--judgments {path}: holds {', '.join(models)}; name one with --model")
    chosen = [line for line in kept if line["model"] == (model or models[0])]
    rows = {q.id: _new_row(q, []) for q in suite.questions}
    differ = 0
    for line in chosen:
        if str(line["question_id"]) not in rows:
            raise ValueError(f"--judgments {path}: question {line['question_id']} is not one of the suite's")
        verdict = suite.read(line["judgment"])
        # The published averages go by the first rating, and such a verdict can't be asked for again.
        said = [([line["judgment"]], verdict)]
        _add_verdicts(rows[str(line["question_id"])], line["turn"], verdict.first, verdict.first, said)
        differ += line.get("score", verdict.first) != (-1 if verdict.first is None else verdict.first)
    names = {"model": model or models[0], "compared_with": None, "judge": chosen[0]["judge"][0]}
    return list(rows.values()), {**names, "kept_otherwise": differ}


def _new_row(question: Question, answers: list[str]) -> dict:
    row = {"id": question.id, "category": question.category, "turns": question.turns, "answers": answers}
    return row | {"scores": {}, "first_ratings": {}, "verdicts": []}


def _add_verdicts(row: dict, turn: int, score, first, said: list[tuple[list[str], Verdict]]) -> None:
    row["scores"] |= {turn: score} if score is not None else {}
    row["first_ratings"] |= {turn: first} if first is not None else {}
    row["verdicts"] += [{"turn": turn, "texts": texts, **verdict._asdict()} for texts, verdict in said]


def judged_results(suite: Suite, rows: Sequence[dict], overlap: dict | None, *, seed: int) -> dict:
    """Return the columns with their intervals, and the questions with missing or doubtful verdicts."""
    verdicts = [(row["id"], verdict) for row in rows for verdict in row["verdicts"]]
    said = [(row["id"], text) for row in rows for text in row["answers"]]
    found = {
        "columns": score_columns(suite.columns, rows, seed=seed),
        "questions": len(rows),
        "verdicts": len(verdicts),
        "asked_again": sum(max(0, len(verdict["texts"]) - 1) for _name, verdict in verdicts),
        "unsettled": sorted({name for name, verdict in verdicts if verdict["score"] is None}),
        "several_ratings": sorted({name for name, verdict in verdicts if verdict["several"]}),
        "empty_answers": sorted({name for name, text in said if not text.strip()}),
        "answers_like_verdicts": sorted({name for name, text in said if re.search(suite.forged, text)}),
    }
    if any(row["scores"] != row["first_ratings"] for row in rows):  # the published code takes the first rating
        first = [{**row, "scores": row["first_ratings"]} for row in rows]
        found["columns_by_first_rating"] = score_columns(suite.columns, first, seed=seed)
    if overlap:
        clean = score_columns(suite.columns, rows, seed=seed, without=overlap["found"])
        found |= {"overlap": overlap, "columns_without_overlap": clean}
    return found


def judged_tables(found: dict) -> str:
    """Return the results as Markdown: the row of the published table, then each column with its interval."""
    name = Path(found["model"]).parent.name if found["model"].endswith("/model") else found["model"]
    more = {"by the first rating": "columns_by_first_rating", "without those in the data": "columns_without_overlap"}
    return load_template("judged.md", Path(__file__).parent).render(
        found=found,
        name=name,
        form="%.3f" if found["compared_with"] else "%.2f",
        more={title: found[key] for title, key in more.items() if key in found},
        overlap=overlap_lines(found["overlap"]) if "overlap" in found else "",
    )
