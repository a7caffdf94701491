"""Evaluate a chat model: the quick check offline, judged suites over an OpenAI-compatible endpoint, exams by lm-eval.

    python -m sft.evaluate --suite quick --model_path RUN/model --base_path BASE --output_dir runs/quick
    JUDGE_API_KEY=… python -m sft.evaluate --suite mt-bench --model_path RUN/model \\
        --judge_base_url https://api.openai.com/v1 --judge_model gpt-4 --output_dir runs/mt-bench
    python -m sft.evaluate --suite lm-eval --tasks ceval-valid,gsm8k --model_path RUN/model --output_dir runs/exams

Requests, answers and results are kept in `--output_dir`; rerun the same command to resume.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from sft.base import hash_model
from sft.chat.reply import Chat, Reply, add_model_flags, load_chat, model_options
from sft.chat.sampling import GREEDY
from sft.dataset.dataset import MAX_LENGTH
from sft.dataset.mixture import find_files
from sft.dataset.tokenise import batches
from sft.evaluate import judge, quick
from sft.evaluate.endpoint import Calls, Endpoint, api_key, find_url_problem, read_calls
from sft.evaluate.exam import run_exam
from sft.evaluate.overlap import find_overlap, overlap_lines
from sft.evaluate.protocols import Suite, align_bench, belle, compare_with, mt_bench
from sft.evaluate.results import ANSWERS, CALLS, open_output, write_results
from sft.files import CACHE_DIR

JUDGED = ("mt-bench", "align-bench", "belle")
QUICK_NEW_TOKENS = 256
# A resumed evaluation must have the same value of these flags; the others change its speed only.
SAME_FLAGS = "suite model_path base_path chat_format base_url model judge_base_url judge_model questions judge_prompts "
SAME_FLAGS += "references judgments compare tasks num_fewshot max_new_tokens limit seed template_kwargs "
SAME_FLAGS += "thinking"
ONLY_FOR = {
    ("quick",): "base_path eval_data_path",
    ("quick", *JUDGED): "train_data_path",
    JUDGED: "dry_run compare judge_model questions judge_prompts",
    ("mt-bench",): "references judgments",
    ("lm-eval",): "tasks num_fewshot",
}
NEW_TOKENS_HELP = f"longest answer (default: {judge.MAX_TOKENS} in judged suites, else {QUICK_NEW_TOKENS})"
POSITIVE = ("batch_size", "max_new_tokens", "limit", "max_length", "concurrency", "requests_per_minute", "timeout")
NOT_NEGATIVE = ("retries", "verdict_retries", "backoff", "max_missing", "num_fewshot")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sft.evaluate", description="Evaluate a chat model.")
    add = parser.add_argument
    add("--suite", required=True, choices=("quick", *JUDGED, "lm-eval"))
    add("--output_dir", required=True, help="a new folder, or that of the same evaluation to resume")
    add("--dry_run", action="store_true", help="judged suites: say what would be sent, and send nothing")
    model = parser.add_argument_group("the model")
    add = model.add_argument
    add("--model_path", help="a folder that train.py wrote, any model folder, or a hub model")
    add("--base_path", help="quick: the base that it is compared with")
    add("--base_url", help="judged suites: an endpoint that answers instead (key: MODEL_API_KEY)")
    add("--model", help="the model's name at --base_url")
    add_model_flags(model, "chat_format", "device", "trust_remote_code", "template_kwargs", "thinking")
    add("--batch_size", type=int, default=8, help="questions answered at a time by a local model")
    add("--max_new_tokens", type=int, help=NEW_TOKENS_HELP)
    calls = parser.add_argument_group("the judge and the endpoints")
    add = calls.add_argument
    add("--judge_base_url", help="the judge's endpoint, as in https://api.openai.com/v1 (JUDGE_API_KEY)")
    add("--judge_model", help="the judge's name there")
    add("--compare", help="the folder of another model's evaluation: the judge says who answers better")
    add("--judgments", help="MT-Bench: verdicts that FastChat kept (gpt-4_single.jsonl), read anew, offline")
    add("--concurrency", type=int, default=8, help="requests at a time")
    add("--requests_per_minute", type=float, help="most requests sent in a minute, to each endpoint")
    add("--timeout", type=float, default=180, help="seconds that a request may take")
    add("--retries", type=int, default=6, help="further tries of a request that fails")
    add("--backoff", type=float, default=1.0, help="seconds before the first of them, then twice as long")
    add("--verdict_retries", type=int, default=2, help="times that a judge without a verdict is asked again")
    add("--max_missing", type=int, default=0, help="answers, and verdicts, to do without")
    add("--cache", help="the file of all calls (default: calls.jsonl in --output_dir)")
    add("--prices", type=float, nargs=2, help="of the model: for a million tokens in, and out")
    add("--judge_prices", type=float, nargs=2, help="of the judge")
    data = parser.add_argument_group("questions and data")
    add = data.add_argument
    add("--questions", help="the suite's questions (AlignBench, BELLE: their own file)")
    add("--judge_prompts", help="AlignBench: its repository's folder; BELLE: eval_prompt.json")
    add("--references", help="MT-Bench: reference answers for other --questions")
    add("--limit", type=int, help="only this many questions, the first ones")
    add("--train_data_path", nargs="+", help="the training data: questions that occur in it are listed")
    add("--encoding", default="utf-8", help="of the training data")
    add("--eval_data_path", nargs="+", help="quick: held-out conversations whose loss is taken")
    add("--max_length", type=int, default=MAX_LENGTH, help="quick: longest held-out conversation, in tokens")
    add("--cache_dir", default=CACHE_DIR, help="folder for tokenised data, by content")
    add("--tasks", help="lm-eval: names of tasks, or .json files of your own, with commas")
    add("--num_fewshot", type=int, help="lm-eval: examples before each question")
    add("--seed", type=int, default=0, help="of the sums, of sampling and of the intervals")
    return parser


def _find_problems(options: argparse.Namespace) -> list[str]:
    given = {name: value for name, value in vars(options).items() if value is not None and value is not False}
    found = [f"--{name} {given[name]}: must be positive" for name in POSITIVE if not given.get(name, 1) > 0]
    found += [f"--{name} {given[name]}: must not be negative" for name in NOT_NEGATIVE if not given.get(name, 0) >= 0]
    for suites, names in ONLY_FOR.items():
        wrong = [] if options.suite in suites else given.keys() & set(names.split())
        found += [f"--{name} is for --suite {' or '.join(suites)}" for name in sorted(wrong)]
    judged = options.suite in JUDGED and not options.judgments
    if options.base_url and not options.model:
        found.append("--base_url needs --model, the model's name there")
    if not options.judgments and not options.model_path and not (options.base_url and options.suite != "quick"):
        found.append(
            f"--suite {options.suite} needs --model_path" + ("" if options.suite == "quick" else " or --base_url")
        )
    for flag in ("judge_base_url", "judge_model") if judged else ():
        if not getattr(options, flag):
            found.append(f"--suite {options.suite} needs --{flag}")
    for flag in ("questions", "judge_prompts") if options.suite in ("align-bench", "belle") else ():
        if not getattr(options, flag):
            found.append(f"--suite {options.suite} needs --{flag}: its licence does not let us carry it")
    if options.suite == "lm-eval" and not options.tasks:
        found.append("--suite lm-eval needs --tasks")
    for flag in ("base_url", "judge_base_url"):
        if (url := getattr(options, flag)) and (problem := find_url_problem(f"--{flag}", url)):
            found.append(problem)
    return found


# --- answers of the model -----------------------------------------------------------------------------------------


def _endpoint(options: argparse.Namespace, base_url: str, model: str, name: str) -> Endpoint:
    names = ("concurrency", "requests_per_minute", "timeout", "retries", "backoff")
    return Endpoint(base_url, model, key=api_key(base_url, name), **{name: getattr(options, name) for name in names})


# --- judged suites ------------------------------------------------------------------------------------------------


def load_suite(options: argparse.Namespace) -> Suite:
    if options.suite == "mt-bench":
        suite = mt_bench(options.questions, options.judge_prompts, options.references)
    else:
        load = align_bench if options.suite == "align-bench" else belle
        suite = load(options.questions, options.judge_prompts)
    ids = [question.id for question in suite.questions]
    if twice := [name for name in ids if ids.count(name) > 1]:
        raise ValueError(f"--questions {options.questions}: question {twice[0]} is in it twice")
    return replace(suite, questions=suite.questions[: options.limit])


def read_others(folder: str, suite: Suite) -> dict[str, list[str]]:
    """Return the answers that another evaluation of the same questions kept."""
    with open(Path(folder) / ANSWERS, encoding="utf-8") as stream:
        kept = {row["id"]: row["answers"] for row in map(json.loads, stream) if "answers" in row}
    missing = [question.id for question in suite.questions if len(kept.get(question.id, ())) < len(question.turns)]
    if missing:
        raise ValueError(f"--compare {folder}: has no answer to question {missing[0]}; is it of the same suite?")
    return kept


def run_judged(options: argparse.Namespace, settings: dict) -> None:
    """Print the requests and their cost, then answer the questions, judge the answers and write the results."""
    suite = load_suite(options)
    folder = Path(options.output_dir)
    overlap = _overlap(options, [(question.id, question.turns) for question in suite.questions])
    if options.judgments:
        rows, names = judge.read_judgments(suite, options.judgments, options.model)
        open_output(folder, settings)
    else:
        if options.compare:
            suite = compare_with(suite, read_others(options.compare, suite))
        judging = _endpoint(options, options.judge_base_url, options.judge_model, "JUDGE_API_KEY")
        source = _endpoint(options, options.base_url, options.model, "MODEL_API_KEY") if options.base_url else None
        say_plan(options, suite, judging, source)
        if options.dry_run:
            print("dry run: nothing was sent", flush=True)
            return
        source = source or _local_model(options)
        open_output(folder, settings)
        rows = answer_and_judge(options, suite, judging, source)
        name = options.model if options.base_url else options.model_path
        names = {"model": name, "compared_with": options.compare, "judge": options.judge_model}
    found = judge.judged_results(suite, rows, overlap, seed=options.seed)
    found = {"suite": options.suite, **names, **found}
    write_results(folder, found, judge.judged_tables(found), rows)


def say_plan(options: argparse.Namespace, suite: Suite, judging: Endpoint, source: Endpoint | None) -> None:
    """Print how many requests go to which endpoint, and their cost."""
    known = read_calls(options.cache)
    if len(suite.questions) != suite.num_published:
        print(f"note: {len(suite.questions)} questions, {suite.num_published} were published", flush=True)
    if source:
        judge.say_answers_cost(suite, source, known, options.max_new_tokens, options.prices)
    judge.say_verdicts_cost(suite, judging, known, options.judge_prices)
    print(f"questions, references and answers go to {options.judge_base_url}", flush=True)


def answer_and_judge(
    options: argparse.Namespace, suite: Suite, judging: Endpoint, source: judge.LocalModel | Endpoint
) -> list[dict]:
    """Return a row for each question: its answers, verdicts and scores. Answers and verdicts are kept as they come."""
    max_missing = options.max_missing
    tries = options.verdict_retries
    with closing(Calls(options.cache)) as calls:
        answers = judge.answer_all(suite, source, calls, max_tokens=options.max_new_tokens, max_missing=max_missing)
        judge.say_verdicts_cost(suite, judging, calls.found, options.judge_prices, answers)
        verdicts = judge.ask_for_verdicts(suite, judging, calls, answers, tries=tries, max_missing=max_missing)
    return judge.judged_rows(suite, answers, verdicts)


def _local_model(options: argparse.Namespace) -> judge.LocalModel:
    identity = hash_model(options.model_path, cache_dir=options.cache_dir) or options.model_path
    chat = load_chat(options.model_path, **model_options(options))
    return judge.LocalModel(chat, identity, batch_size=options.batch_size, seed=options.seed)


def _overlap(options: argparse.Namespace, questions: list[tuple[str, Sequence[str]]]) -> dict | None:
    paths = options.train_data_path
    return find_overlap(questions, paths, encoding=options.encoding) if paths else None


# --- quick --------------------------------------------------------------------------------------------------------


def answer_quick(chat: Chat, asked: Sequence[dict], options: argparse.Namespace) -> list[Reply]:
    sampling = replace(GREEDY, max_new_tokens=options.max_new_tokens)
    replies = []
    for batch in batches(([{"role": "user", "content": question["prompt"]}] for question in asked), options.batch_size):
        replies += chat.reply_batch(batch, sampling)
        print(f"\r{len(replies)} of {len(asked)} answered", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return replies


def run_quick(options: argparse.Namespace, settings: dict) -> None:
    """Ask the model, and the base if one is named, the same questions; write the comparison."""
    asked = quick.questions(options.seed)[: options.limit]
    overlap = _overlap(options, [(question["id"], [question["prompt"]]) for question in asked])
    find_files([], options.eval_data_path or ())
    replies = []
    losses = []
    for path in filter(None, (options.model_path, options.base_path)):
        chat = load_chat(path, **model_options(options))
        open_output(Path(options.output_dir), settings)
        replies.append(answer_quick(chat, asked, options))
        if options.eval_data_path:
            limits = {"max_length": options.max_length, "cache_dir": options.cache_dir}
            losses.append(quick.held_out_losses(chat, options.eval_data_path, **limits))
    replies = [*replies, None][:2]
    found = quick.compare_replies(asked, *replies, [*losses, None][:2] if losses else None)
    results = {"suite": "quick", "model": options.model_path, "base": options.base_path, "rows": found["rows"]}
    heading = f"# Quick check of {options.model_path}" + (f" beside {options.base_path}" if options.base_path else "")
    tables = f"{heading}\n\n{quick.quick_table(found['rows'])}\n\n"
    tables += "In brackets the 95% interval over the questions. Greedy, no judge; questions in suites/quick.\n"
    if overlap:
        results["overlap"] = overlap
        results["rows_without_overlap"] = clean = rows_without_overlap(asked, replies, overlap)
        tables += f"\n{overlap_lines(overlap)}\n\nWithout them:\n\n{quick.quick_table(clean)}\n"
    write_results(Path(options.output_dir), results, tables, found["answers"])


def rows_without_overlap(asked: Sequence[dict], replies: Sequence[list | None], overlap: dict) -> list[dict]:
    """Return the rows of the questions that are not in the training data."""
    kept = [index for index, question in enumerate(asked) if question["id"] not in overlap["found"]]
    sides = ([side[index] for index in kept] if side else None for side in (asked, *replies))
    return quick.compare_replies(*sides)["rows"]


RUNS: dict[str, Callable] = {"quick": run_quick, "lm-eval": run_exam, **dict.fromkeys(JUDGED, run_judged)}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if problems := _find_problems(options):
        sys.exit("\n".join(f"sft.evaluate: {problem}" for problem in problems))
    settings = {name: getattr(options, name) for name in SAME_FLAGS.split()}
    options.cache = Path(options.cache or Path(options.output_dir) / CALLS)
    default = judge.MAX_TOKENS if options.suite in JUDGED else QUICK_NEW_TOKENS
    options.max_new_tokens = options.max_new_tokens or default
    try:
        RUNS[options.suite](options, settings)
    except (ValueError, OSError) as error:
        sys.exit(f"sft.evaluate: {error}")
    except KeyboardInterrupt:
        sys.exit("sft.evaluate: stopped; rerun the same command to resume, answers are not asked again")
