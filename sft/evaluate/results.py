"""The folder of an evaluation: its settings, every answer, the numbers as JSON and the tables as Markdown."""

import json
from collections.abc import Sequence
from pathlib import Path

from sft.files import write_json, write_text

SETTINGS = "evaluation.json"
ANSWERS = "answers.jsonl"
CALLS = "calls.jsonl"
RESULTS = "results.json"
TABLES = "results.md"


def open_output(folder: Path, settings: dict) -> None:
    """Create the folder of a new evaluation; an existing one must have the same settings, and is resumed."""
    path = folder / SETTINGS
    if path.exists():
        _check_settings(path, settings)
    elif folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ValueError(f"--output_dir {folder}: is not empty, and not an evaluation's; choose another folder")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)


def _check_settings(path: Path, settings: dict) -> None:
    try:
        old = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(f"{path}: can't be read; choose another --output_dir") from None
    for name, value in settings.items():
        if old.get(name) != value:
            raise ValueError(
                f"--output_dir {path.parent}: its evaluation has {name} {old.get(name)}, not {value}; choose another "
                "folder"
            )


def write_results(folder: Path, results: dict, tables: str, answers: Sequence[dict]) -> None:
    write_text(folder / ANSWERS, "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers))
    write_json(folder / RESULTS, results)
    write_text(folder / TABLES, tables)
    print(f"\n{tables}\nwritten to {folder / TABLES}, {RESULTS} and {ANSWERS}", flush=True)
