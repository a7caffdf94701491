"""Does it answer well? The quick check offline, judged suites over any OpenAI-compatible endpoint, exams by lm-eval.

    python -m sft.evaluate --suite quick --model_path RUN/model --base_path BASE --output_dir runs/quick

What was asked, answered and found is kept in `--output_dir`: results.md, results.json and answers.jsonl.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sft import quick
from sft.chat import GREEDY, Chat, Reply, load_chat
from sft.chat_format import FORMAT_NAMES
from sft.dataset import CACHE_DIR, batches
from sft.report import write_json, write_text

SUITES = ("quick",)
RESULTS, TABLES, ANSWERS, SETTINGS = "results.json", "results.md", "answers.jsonl", "settings.json"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sft.evaluate", description="Evaluate a chat model.")
    parser.add_argument("--suite", required=True, choices=SUITES)
    parser.add_argument("--output_dir", required=True, help="a new folder, or that of the same evaluation to continue")
    model = parser.add_argument_group("the model")
    model.add_argument("--model_path", help="a folder that train.py wrote, any model folder, or a hub model")
    model.add_argument("--base_path", help="quick: the base that it is compared with")
    model.add_argument("--chat_format", default="auto", choices=FORMAT_NAMES)
    model.add_argument("--device", help="cuda, cuda:1, cpu ... (default: a GPU if there is one)")
    model.add_argument("--batch_size", type=int, default=8, help="questions answered at a time by a local model")
    model.add_argument("--max_new_tokens", type=int, help="longest answer (default: 1024 in judged suites, else 256)")
    model.add_argument("--trust_remote_code", action="store_true")
    data = parser.add_argument_group("questions and data")
    data.add_argument("--limit", type=int, help="only this many questions, the first ones")
    data.add_argument("--eval_data_path", nargs="+", help="quick: held-out conversations whose loss is taken")
    data.add_argument("--max_length", type=int, default=2048, help="quick: longest held-out conversation, in tokens")
    data.add_argument("--cache_dir", default=CACHE_DIR, help="where tokenised data is kept, by content")
    data.add_argument("--seed", type=int, default=0, help="of the sums, of sampling and of the intervals")
    return parser


def _problems(options: argparse.Namespace) -> list[str]:
    found = [
        f"--{name} {value}: must be at least 1"
        for name, value in vars(options).items()
        if name in ("batch_size", "max_new_tokens", "limit", "max_length") and value is not None and value < 1
    ]
    if options.suite == "quick" and not options.model_path:
        found.append("--suite quick needs --model_path")
    return found


# --- the output folder --------------------------------------------------------------------------------------------


def open_output(folder: Path, settings: dict) -> None:
    """Make the folder of a new evaluation; an old one must be of the same settings, so that it is continued."""
    path = folder / SETTINGS
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in settings if old.get(name) != settings[name]]
        if changed:
            name = changed[0]
            raise ValueError(
                f"--output_dir {folder}: holds an evaluation with {name} {old.get(name)}, not {settings[name]}; "
                "choose another folder"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--output_dir {folder}: is not empty, and not an evaluation's; choose another folder")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)


def write_results(folder: Path, results: dict, tables: str, answers: Sequence[dict]) -> None:
    lines = [json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers]
    write_text(folder / ANSWERS, "".join(lines))
    write_json(folder / RESULTS, results)
    write_text(folder / TABLES, tables)
    print(f"\n{tables}\nwritten to {folder / TABLES}, {RESULTS} and {ANSWERS}", flush=True)


# --- quick --------------------------------------------------------------------------------------------------------


def answer_quick(chat: Chat, asked: Sequence[dict], options: argparse.Namespace) -> list[Reply]:
    sampling = replace(GREEDY, max_new_tokens=options.max_new_tokens or 256)
    prompts = [[{"role": "user", "content": question["prompt"]}] for question in asked]
    replies = []
    for batch in batches(prompts, options.batch_size):
        replies += chat.reply_batch(batch, sampling)
        print(f"\r{len(replies)} of {len(prompts)} answered", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return replies


def run_quick(options: argparse.Namespace) -> None:
    asked = quick.questions(options.seed)[: options.limit]
    replies, losses = [], []
    for path in filter(None, (options.model_path, options.base_path)):
        chat = load_chat(
            path,
            chat_format=options.chat_format,
            device=options.device,
            trust_remote_code=options.trust_remote_code,
        )
        replies.append(answer_quick(chat, asked, options))
        if options.eval_data_path:
            settings = {"max_length": options.max_length, "cache_dir": options.cache_dir}
            losses.append(quick.held_out_losses(chat, options.eval_data_path, **settings))
    second = len(replies) == 2
    found = quick.compare(
        asked,
        replies[0],
        replies[1] if second else None,
        (losses[0], losses[1] if second else None) if losses else None,
    )
    heading = f"# Quick check of {options.model_path}" + (f" beside {options.base_path}" if second else "")
    note = "In brackets the 95% interval over the questions. Greedy, no judge; questions in suites/quick."
    results = {"suite": "quick", "model": options.model_path, "base": options.base_path, "rows": found["rows"]}
    tables = f"{heading}\n\n{quick.table(found['rows'])}\n\n{note}\n"
    write_results(Path(options.output_dir), results, tables, found["answers"])


RUNS = {"quick": run_quick}
UNCHANGED = ("suite", "model_path", "base_path", "chat_format", "max_new_tokens", "limit", "seed")


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if problems := _problems(options):
        sys.exit("\n".join(f"sft.evaluate: {problem}" for problem in problems))
    try:
        open_output(Path(options.output_dir), {name: getattr(options, name) for name in UNCHANGED})
        RUNS[options.suite](options)
    except (ValueError, OSError) as error:
        sys.exit(f"sft.evaluate: {error}")


if __name__ == "__main__":
    main()
