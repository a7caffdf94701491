"""Exams by lm-eval, with the saved chat template: its published tasks, or tasks of your own as .json files."""

import json
from pathlib import Path

from sft.base import base_of_adapter, check_base
from sft.evaluate.results import open_output, write_results
from sft.model.load import load_tokenizer
from sft.report.markdown import cell, table


def run_exam(options, settings: dict) -> None:
    """Evaluate `--tasks` by lm-eval's own API, on a model folder or on the completions of an endpoint."""
    try:
        import lm_eval
    except ImportError as error:
        raise ValueError(f"--suite lm-eval: {error}; pip install lm-eval==0.4.13") from None
    tasks = [read_task(name) for name in options.tasks.split(",")]
    if options.model_path and not load_tokenizer(options.model_path).chat_template:
        raise ValueError(f"--model_path {options.model_path}: has no chat template; train.py saves one with its models")
    open_output(Path(options.output_dir), settings)
    model, arguments = _model_of(options)
    found = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=tasks,
        num_fewshot=options.num_fewshot,
        batch_size=options.batch_size,
        device=options.device,
        limit=options.limit,
        apply_chat_template=True,
    )
    results = {name: found.get(name) for name in ("results", "versions", "n-shot", "n-samples")}
    samples = [{"task": task, **sample} for task, rows in found["samples"].items() for sample in rows]
    tables = f"# lm-eval of {options.model_path or options.model}\n\n{exam_table(results['results'])}\n"
    write_results(Path(options.output_dir), _as_json(results), tables, _as_json(samples))


def read_task(name: str) -> str | dict:
    """Return a task for lm-eval: one of its names, or the settings in a .json file, whose data lies beside it."""
    if not name.endswith(".json"):
        return name
    path = Path(name)
    task = json.loads(path.read_text(encoding="utf-8"))
    files = task.get("dataset_kwargs", {}).get("data_files", {})
    beside = {split: str(path.absolute().parent / file) for split, file in files.items()}
    return {**task, "dataset_kwargs": {"data_files": beside}}


def _model_of(options) -> tuple[str, dict]:
    """Return lm-eval's name of the kind of model, and its arguments."""
    if options.base_url:
        url = f"{options.base_url.rstrip('/')}/completions"
        tokenizer = options.model_path or options.model
        return "local-completions", {"model": options.model, "base_url": url, "tokenizer": tokenizer}
    arguments = {"pretrained": options.model_path, "trust_remote_code": options.trust_remote_code}
    if base := base_of_adapter(options.model_path):
        check_base(options.model_path, base)
        arguments |= {"pretrained": base, "peft": options.model_path, "tokenizer": options.model_path}
    return "hf", arguments


def exam_table(results: dict[str, dict]) -> str:
    """Return each metric of each task, with its standard error where lm-eval gives one."""
    rows = []
    for task, values in results.items():
        for name, value in values.items():
            if isinstance(value, float) and "_stderr" not in name:
                error = values.get(name.replace(",", "_stderr,", 1))
                shown = f"{error:.4f}" if isinstance(error, float) else ""
                rows.append([cell(task), cell(name), f"{value:.4f}", shown])
    return table(["task", "metric", "value", "±"], rows, num_names=2)


def _as_json(value):
    """Return a value of JSON's types; others become text."""
    return json.loads(json.dumps(value, default=str))
