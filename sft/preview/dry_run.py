"""What a run would do, from config, tokenizer and data alone: `train.py --dry_run`.

The weights are never read. The report is printed and written as a page; its problems are what would fail, or go wrong
without a word.
"""

import itertools
import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from sft.checkpoint.manifest import PROGRESS
from sft.checkpoint.resume import check_unchanged
from sft.dataset.dataset import Examples, TrainingRows
from sft.dataset.ledger import EXPLAINED, LOST, WAYS, ledger_lines
from sft.dataset.mixture import mixture_table
from sft.dataset.sampler import Updates
from sft.format.contract import check_contract
from sft.format.render import Renderer
from sft.model import load as models
from sft.opendata.conversation import read_conversations
from sft.opendata.files import EVAL, describe_skipped, split_suffix
from sft.preview.memory import (
    FULL,
    LORA,
    ONE,
    QLORA,
    RESERVE,
    ZERO2,
    ZERO3,
    Plan,
    Shape,
    Step,
    disk_of_checkpoint,
    disk_of_model,
    estimate,
    fits,
    fits_best,
    full_logits,
    gib,
    plan_table,
    read_shape,
)
from sft.report.run_page import without_secrets
from sft.report.text import align, paint, say, split_by_loss
from sft.train.arguments import fail, parse_gpu
from sft.train.setup import Data, Run, count_processes, find_named_checkpoint, fingerprint_of


@dataclass
class Section:
    """A part of the report: a table, its first row the header, and lines below."""

    title: str
    table: list[list[str]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What a dry run found. `problems`: the run would fail, or go wrong without a word. `notes`: worth a look."""

    command: str = field(default_factory=lambda: shlex.join(without_secrets(sys.argv)))
    sections: list[Section] = field(default_factory=list)
    samples: list[tuple[str, np.ndarray, np.ndarray]] = field(default_factory=list)  # title, input_ids, labels
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    steps: int = 0  # of the run
    step_bytes: int = 0  # counted for one step on each GPU

    def check(self, function, *arguments, **options):
        """Call a check of a real run; what it would stop for becomes a problem."""
        try:
            return function(*arguments, **options)
        except ValueError as error:
            self.problems.append("; ".join(line.strip() for line in str(error).splitlines()))
            return None


BARS = " ▁▂▃▄▅▆▇█"
# Published runs: name, learning rate, conversations per update, epochs, source.
RECIPES = {
    False: (
        ("BELLE-7B (BLOOMZ)", 3e-6, 64, 3, "huggingface.co/BelleGroup/BELLE-7B-1M"),
        ("Stanford Alpaca 7B", 2e-5, 128, 3, "github.com/tatsu-lab/stanford_alpaca, README"),
        ("Vicuna 13B", 2e-5, 128, 3, "github.com/lm-sys/FastChat, README"),
        ("Yi-34B-Chat", 1e-5, 64, 2, "arXiv 2403.04652"),
        ("Zephyr 7B", 2e-5, 128, 1, "github.com/huggingface/alignment-handbook, recipes/zephyr-7b-beta/sft"),
        ("Tülu 3 8B", 5e-6, 128, 2, "github.com/allenai/open-instruct, docs/tulu3.md"),
        ("LIMA 65B", 1e-5, 32, 15, "arXiv 2305.11206"),
    ),
    True: (
        ("Guanaco 7B (QLoRA)", 2e-4, 16, None, "github.com/artidoro/qlora, scripts/finetune_guanaco_7b.sh"),
        ("Alpaca-LoRA 7B", 3e-4, 128, 3, "github.com/tloen/alpaca-lora, finetune.py"),
    ),
}
CHECKED = 100  # conversations of the data on which train = serve is checked
FAR = 4.0  # times beyond what is published, after scaling
LEAKED = 0.05  # share of the held-out questions that may stand in the training data
SHOWN_IN_A_TERMINAL = 400  # tokens of a row


def show_run(report: Report, run: Run, data: Data) -> None:
    """Describe and check a run, print the report, and write it as a page; exit 2 when it has a problem."""
    settings = run.settings
    check_weights(report, run.model_path)
    check_held_out(report, run.files.times, settings.data.data_path)
    report.notes += describe_skipped(run.files.skipped)
    files, encoding = list(run.files.times), settings.data.encoding
    describe_tokenizer(report, run.renderer, files, encoding, lora=settings.model.lora)
    if data.rows is not None:
        trained = describe_all_data(report, data, run.renderer.stop_ids)["trained"]
        report.steps, report.step_bytes = describe_run(report, run, data.rows, trained)
        if settings.training.resume_from_checkpoint:
            describe_resume(report, run, num_rows=len(data.rows))
    show_report(report, run)


def show_report(report: Report, run: Run, *, since: int = 0) -> None:
    """Print the report, or its sections `since` one; write it as a page; exit 2 when it has a problem."""
    page, tokenizer = Path(f"{run.output_dir.rstrip('/')}.dry_run.html"), run.renderer.tokenizer
    if int(os.environ.get("RANK", 0)) == 0:
        write_page(report, tokenizer, page)
    say(as_text(report, tokenizer, since=since))
    say(f"as a page: {page}")
    if report.problems:
        fail([f"problem: {problem}" for problem in report.problems])
    measured = run.settings.training.probe_steps
    if since:
        say("no problem found; nothing was kept of these steps")
    elif not measured:
        say("no problem found; nothing was trained, and the weights were not read")


def describe_tokenizer(report: Report, renderer: Renderer, files: Sequence[str], encoding: str, *, lora: bool) -> None:
    """Check train = serve and the stop contract on conversations of the data, and say what ends a reply."""
    sample, named = [], 0
    for file in files:
        readable = read_conversations([file], encoding=encoding)
        found = (item[0]["messages"] for item in itertools.islice(readable, CHECKED) if item[0] is not None)
        served = [messages for messages in found if _is_served(renderer, messages)][: max(1, CHECKED // len(files))]
        sample += [messages for messages in served if not renderer.names_control(messages)]
        named += len(served)
    named -= len(sample)
    report.problems += [f"chat format {renderer.name!r}: {problem}" for problem in check_contract(renderer, sample)]
    name = renderer.tokenizer.convert_ids_to_tokens
    stops = ", ".join(f"{name(stop)} ({stop})" for stop in renderer.stop_ids)
    pad = renderer.tokenizer.pad_token_id
    lines = [f"chat format {renderer.name}; a reply ends in {stops}; pad is {name(pad)} ({pad})"]
    lines.append(f"chosen because: {renderer.reason}")
    if renderer.writes_date:
        report.notes.append(
            f"the chat template writes the date: training uses {renderer.today}; a server's prompts differ in that line"
        )
    lines.append(f"train = serve: checked on {len(sample):,} conversations of the data, and on those that are built in")
    if named:
        report.notes.append(
            f"{named:,} conversations write a control token, which training keeps as plain text; a server that renders "
            "with the saved template may read it as the token"
        )
    if pad in renderer.stop_ids:
        report.notes.append("pad is a stop token, which does no harm here: padding is masked by position")
    unseen = models.untrained_ids(renderer.tokenizer, renderer)
    if unseen and lora:
        rows = ", ".join(map(name, unseen))
        report.notes.append(f"LoRA: the base may never have seen {rows}; their embedding and head rows are trained too")
    report.sections.append(Section("chat format", [], lines))


def _is_served(renderer: Renderer, messages: list[dict]) -> bool:
    """Whether a conversation would be kept, and each of its replies has a prompt: a user's message before it."""
    roles = [message["role"] for message in messages]
    asked = all(before == "user" for before, role in zip(["", *roles], roles, strict=False) if role == "assistant")
    return asked and roles[-1] == "assistant" and renderer.render_or_reason(messages).outcome in WAYS


def check_weights(report: Report, path: str) -> None:
    """Look for the weights of a local folder, by name and safetensors header: a run needs them, and a dry run not."""
    from safetensors import SafetensorError, safe_open

    folder = Path(path)
    if not folder.is_dir():
        return
    named = {file.name for file in [*folder.glob("*.safetensors"), *folder.glob("*.bin")]}
    if not named:
        report.notes.append(f"{path}: there are no weights in this folder, and a run needs them")
        return
    index = folder / "model.safetensors.index.json"
    if index.is_file() and "model.safetensors" not in named:
        try:
            named |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            report.problems.append(f"{index}: is no index of weights; fetch the model again")
    if missing := sorted(name for name in named if not (folder / name).is_file()):
        report.problems.append(f"{path}: {len(missing)} files of weights are missing, {missing[0]} for one")
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="np"):
                pass
        except SafetensorError as error:
            report.problems.append(f"{file}: is not whole ({error}); fetch it again")


def check_held_out(report: Report, files: Sequence[str], data_path: Sequence[str]) -> None:
    """An eval.json that was not asked for by name, and has no train.json beside it, would be trained on."""
    for file in files:
        if Path(file).name == EVAL and not any(Path(split_suffix(path)[0]).name == EVAL for path in data_path):
            line = "would be trained on, as there is no train.json beside it; put that there, or name the files"
            report.problems.append(f"{file}: {line}")


def describe_all_data(report: Report, data: Data, stop_ids: Sequence[int]) -> np.ndarray:
    """Add the data to train on and the held-out data, with rows; return the statistics of the examples."""
    mixture = data.rows.mixture
    examples, held_out, ledger = data.examples, data.held_out, data.ledgers["train"]
    facts, eval_facts = examples.facts(stop_ids), held_out.facts(stop_ids)
    describe_data(report, "training data", examples, ledger, facts)
    if not mixture.is_plain:
        report.sections.append(Section("mixture", mixture_table(mixture, examples.lengths)))
    if len(held_out):
        describe_data(report, "held-out data", held_out, data.ledgers["eval"], eval_facts)
    check_stops(report, facts, examples.origins)
    check_leaks(report, examples, held_out, facts, eval_facts)
    pick_samples(report, examples, facts, ledger["source_names"])
    return facts


def heaviest_rows(rows: TrainingRows, trained: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows' numbers, those that take most memory first, their tokens and their trained ones, each (rows,).

    Padded, that are the longest; packed rows are about as long as each other, and the loss takes the trained tokens.
    """
    sums = [np.concatenate([[0], np.cumsum(of[rows.rows.examples])]) for of in (rows.examples.lengths, trained)]
    tokens, trained = (np.diff(summed[rows.rows.starts]) for summed in sums)
    order = np.lexsort((tokens, trained) if rows.max_length else (trained, tokens))[::-1]
    return order, tokens[order], trained[order]


def describe_run(report: Report, run: Run, rows: TrainingRows, trained: np.ndarray) -> tuple[int, int]:
    """Add steps, memory and disk of a run. `trained` are the trained tokens of each example.

    Returns the number of steps, and the bytes that one takes.
    """
    settings = run.settings.by_name()
    config = models.load_config(run.model_path, trust_remote_code=settings["trust_remote_code"])
    on_gpu = bool(settings["gpu"]) or count_gpus() > 0
    gpu, where = _gpu_of(settings["gpu"])
    zero = (settings["deepspeed"] or {}).get("zero_optimization", {}).get("stage", 0)
    batch, processes = settings["per_device_train_batch_size"], count_processes(run.settings.training)
    _order, row_tokens, row_trained = heaviest_rows(rows, trained)
    steps = describe_schedule(
        report,
        num_examples=rows.num_examples,
        num_rows=len(rows),
        tokens=rows.num_tokens,
        fill=rows.fill,
        rows=(batch, settings["gradient_accumulation_steps"], processes),
        epochs=settings["num_train_epochs"],
        max_steps=settings["max_steps"],
        warmup=settings["warmup_steps"],
        learning_rate=settings["learning_rate"],
        schedule=getattr(settings["lr_scheduler_type"], "value", settings["lr_scheduler_type"]),
        lora=settings["lora"],
        drop_last=settings["dataloader_drop_last"],
    )
    longest = int(rows.examples.lengths.max())
    length = rows.max_length if rows.max_length and on_gpu else int(row_tokens.max())
    step = Step(
        rows=batch,
        length=length,
        trained=int(np.resize(row_trained, batch).sum()),
        documents=tuple(size for size in (longest, length - longest) if size) * batch,
        packing=rows.max_length is not None,
        checkpointing=bool(settings["gradient_checkpointing"]),
        accumulation=settings["gradient_accumulation_steps"],
        half=bool(settings["bf16"] or settings["fp16"] or settings["gpu"]),
        lora_rank=settings["lora_rank"],
        device="cuda" if on_gpu else "cpu",
    )
    method = QLORA if settings["load_in_4bit"] else LORA if settings["lora"] else FULL
    plan = Plan(method, {2: ZERO2, 3: ZERO3}.get(zero, ONE), settings["offload"], processes)
    shape = report.check(read_shape, config, trust_remote_code=settings["trust_remote_code"])
    if shape is None:
        return steps, 0
    counted = report.check(describe_memory, report, shape, step, plan, gpu=gpu, where=where)
    every, strategy = settings["save_steps"], getattr(settings["save_strategy"], "value", settings["save_strategy"])
    saves = {"no": 0, "epoch": math.ceil(settings["num_train_epochs"])}.get(strategy)
    saves = steps // max(1, int(every if every >= 1 else math.ceil(every * steps))) if saves is None else saves
    kept, folder = settings["save_total_limit"] or saves, settings["output_dir"]
    describe_disk(report, shape, step, plan, output_dir=folder, saves=saves, kept=kept, is_here=not settings["gpu"])
    return steps, counted or 0


def _gpu_of(text: str | None) -> tuple[tuple[int, int], str]:
    """Return (bytes, number) of the GPUs of `--gpu`, else of this machine, else its memory; and what that is."""
    if text:
        return parse_gpu(text), f"--gpu {text}"
    if count := count_gpus():
        import torch

        return (torch.cuda.get_device_properties(0).total_memory, count), torch.cuda.get_device_name()
    return (os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), 1), "this machine's memory"


def count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def describe_data(report: Report, name: str, examples: Examples, ledger: dict, facts: np.ndarray) -> None:
    """Add a table of the sources of `examples`, and the ledger's lines."""
    header = ["source", "in", "kept", "shortened", "lost", "replies", "tokens", "trained", "p5", "median", "p95"]
    section = Section(name, [[*header, "longest", f"lengths to {ledger['max_length']:,}", "end in stop"]])
    numbers = {source: number for number, source in enumerate(ledger["source_names"])}
    for source, counted in ledger["sources"].items():
        chosen = examples.origins["source"] == numbers.get(source, -1)
        section.table.append([source, *_row(counted, examples.lengths[chosen], facts[chosen], ledger["max_length"])])
    if len(section.table) > 2:
        every = np.ones(len(examples), bool)
        section.table.append(
            ["all", *_row(ledger["total"], examples.lengths[every], facts[every], ledger["max_length"])]
        )
    section.lines = ledger_lines(ledger)
    report.sections.append(section)


def _row(counted: dict, lengths: np.ndarray, facts: np.ndarray, max_length: int) -> list[str]:
    lost = sum(counted.get(reason, 0) for reason in LOST)
    shortened = counted.get("cut", 0) + counted.get("turns_dropped", 0)
    row = [f"{counted['in']:,}", f"{len(lengths):,}", f"{shortened:,}", f"{lost:,}"]
    if not len(lengths):
        return [*row, *[""] * 9]
    tokens, edges = int(lengths.sum()), np.percentile(lengths, [5, 50, 95])
    row += [f"{facts['replies'].sum():,}", f"{tokens:,}", f"{facts['trained'].sum() / tokens:.0%}"]
    row += [f"{edge:,.0f}" for edge in edges]
    return [*row, f"{lengths.max():,}", histogram(lengths, max_length), f"{facts['stops'].mean():.1%}"]


def histogram(lengths: np.ndarray, max_length: int, bins: int = 12) -> str:
    """Return bars for the lengths from 0 to `max_length` tokens: a blank is none, the lowest bar at least one."""
    counts, _edges = np.histogram(lengths, bins, (0, max_length + 1))
    heights = np.ceil(counts / counts.max() * (len(BARS) - 1)).astype(int)
    return "".join(BARS[height] for height in heights)


def check_stops(report: Report, facts: np.ndarray, origins: np.ndarray) -> None:
    """A whole conversation must end in the stop token; if most are cut, the model learns to go on without end."""
    whole = origins["way"] != WAYS.index("cut")
    if not facts["stops"][whole].all():
        number = int((~facts["stops"][whole]).sum())
        report.problems.append(f"{number:,} whole rows end without the stop token; choose another --chat_format")
    if len(facts) and facts["stops"].mean() < 0.5:
        share = f"{facts['stops'].mean():.0%} of the rows teach the stop token"
        report.problems.append(f"only {share}: the model would not learn to stop; raise --max_length")


def check_leaks(report: Report, train: Examples, held_out: Examples, facts: np.ndarray, eval_facts: np.ndarray) -> None:
    """Find held-out questions that are trained on too: their loss says nothing about new ones."""
    if not len(held_out):
        return
    wanted: dict[bytes, list[int]] = {}
    for index, size in enumerate(eval_facts["prompt"].tolist()):
        wanted.setdefault(held_out[index]["input_ids"][:size].tobytes(), []).append(index)
    whole = {held_out[index]["input_ids"].tobytes() for index in range(len(held_out))}
    asked, same = set(), 0
    for index in np.flatnonzero(np.isin(facts["prompt"], np.unique(eval_facts["prompt"]))).tolist():
        ids = train[index]["input_ids"]
        asked.update(wanted.get(ids[: facts["prompt"][index]].tobytes(), ()))
        same += ids.tobytes() in whole
    line = f"held-out questions that are trained on too: {len(asked):,} of {len(held_out):,} ({same:,} whole rows)"
    report.sections[-1].lines.append(line)
    if len(asked) > LEAKED * len(held_out):
        report.problems.append(f"{line}; the held-out loss would be too good. Split anew with sft.opendata")


def pick_samples(report: Report, examples: Examples, facts: np.ndarray, names: Sequence[str]) -> None:
    """Choose rows to show: the first, the longest, the one of most replies, a shortened one, one of each source."""
    if not len(examples):
        return
    ways, sources = examples.origins["way"], examples.origins["source"]
    chosen = {}
    wanted = {"first": 0, "longest": examples.lengths.argmax(), "most replies": facts["replies"].argmax()}
    for title, index in wanted.items():
        chosen[int(index)] = ", ".join(filter(None, [chosen.get(int(index)), title]))
    for way in (1, 2):
        if (ways == way).any():
            chosen.setdefault(int((ways == way).argmax()), EXPLAINED[WAYS[way]])
    for number in range(min(len(names), 20)):
        chosen.setdefault(int((sources == number).argmax()), "first of its source")
    for index, title in chosen.items():
        row, source = examples[index], names[sources[index]]
        title = (
            f"{title}: row {index:,} of {source}, {len(row['input_ids']):,} tokens, {facts['trained'][index]:,} trained"
        )
        report.samples.append((title, row["input_ids"], row["labels"]))


def updates_of(num_rows: int, rows: tuple[int, int, int], *, seed: int = 0, drop_last: bool = False) -> Updates:
    """Return the updates of a run of so many rows; `rows` of one: batch, accumulation, processes."""
    batch_size, accumulation, processes = rows
    shares = {"batch_size": batch_size, "accumulation": accumulation, "world_size": processes}
    return Updates(num_rows, **shares, rank=0, seed=seed, drop_last=drop_last)


def describe_resume(report: Report, run: Run, *, num_rows: int) -> None:
    """Add which checkpoint would be resumed and what is left; flags and data that changed and may not are problems."""
    training, settings = run.settings.training, run.settings.by_name()
    new = fingerprint_of(run)
    checkpoint, lines, wrong = find_named_checkpoint(training.resume_from_checkpoint, run.output_dir)
    report.sections.append(Section("resume", [], lines))
    if wrong:
        report.problems.append(wrong)
    if wrong or not checkpoint:
        return
    try:
        check_unchanged(checkpoint, new, settings["allow_changed"], lines.append)
    except ValueError as error:
        report.problems += str(error).splitlines()
    progress = json.loads((Path(checkpoint) / PROGRESS).read_text(encoding="utf-8"))
    exact, taken = new["exact"], progress["taken"]
    if progress["num_rows"] != num_rows:
        taken = taken * num_rows // progress["num_rows"]
    rows = (exact["per_device_train_batch_size"], exact["gradient_accumulation_steps"], exact["world_size"])
    updates = updates_of(num_rows, rows, drop_last=settings["dataloader_drop_last"])
    made, epochs, most = progress["updates"], settings["num_train_epochs"], settings["max_steps"]
    left = updates.left(epochs, most, epoch=progress["epoch"], taken=taken, made=made)
    lines.append(f"{checkpoint} would be continued: {made:,} steps are made, {left:,} are left")
    if not left:
        report.notes.append(f"{checkpoint}: no step is left; the model would be saved as it is")


def describe_schedule(
    report: Report,
    *,
    num_examples: int,
    num_rows: int,
    tokens: int,
    fill: float | None,
    rows: tuple[int, int, int],
    epochs: float,
    max_steps: int,
    warmup: float,
    learning_rate: float,
    schedule: str,
    lora: bool,
    drop_last: bool = False,
) -> int:
    """Add what an update holds and how many there are; return their number. `rows`: batch, accumulation, processes."""
    per_update = math.prod(rows)
    updates = updates_of(num_rows, rows, drop_last=drop_last)
    steps = updates.in_all(epochs, max_steps)
    shares = f"{rows[0]} x {rows[1]} x {rows[2]} processes"
    section = Section("steps")
    if fill is not None:
        section.lines.append(
            f"packed: {num_rows:,} rows, {fill:.1%} full, {num_examples / num_rows:.1f} conversations each"
        )
    taken, conversations = tokens * per_update / num_rows, num_examples * per_update / num_rows
    section.lines.append(
        f"an update: {per_update} rows ({shares}), about {taken:,.0f} tokens, {conversations:,.0f} conversations"
    )
    warm = math.ceil(warmup * steps) if warmup < 1 else int(warmup)
    section.lines.append(
        f"updates: {steps:,}; learning rate {learning_rate:g} after {warm:,} of warm-up, then {schedule}"
    )
    for name, rate, batch, times, source in RECIPES[lora]:
        section.lines.append(
            f"  published: {name}, {rate:g} at {batch} conversations, {times or '-'} epochs ({source})"
        )
    report.sections.append(section)
    if num_rows < per_update:
        report.notes.append(
            f"an update would take {per_update} rows, and there are {num_rows:,}: it takes those there are"
        )
    if warm >= steps:
        report.problems.append(
            f"--warmup_steps {warmup:g}: the run has {steps:,} updates, so its learning rate would not be reached"
        )
    report.notes += _compare_recipes(learning_rate, min(conversations, num_examples), lora)
    return steps


def _compare_recipes(learning_rate: float, conversations: float, lora: bool) -> list[str]:
    """A rate goes with the square root of the batch under Adam (arXiv 2205.10287); far from all is worth a word."""
    scaled = [rate * math.sqrt(conversations / batch) for _name, rate, batch, *_ in RECIPES[lora]]
    if min(scaled) / FAR <= learning_rate <= max(scaled) * FAR:
        return []
    span = f"{min(scaled):.1e} to {max(scaled):.1e}"
    method = "LoRA" if lora else "full fine-tuning"
    return [
        f"--learning_rate {learning_rate:g}: published {method} scaled to {conversations:,.0f} conversations is {span}"
    ]


def describe_memory(report: Report, shape: Shape, step: Step, plan: Plan, *, gpu: tuple[int, int], where: str) -> int:
    """Add what the chosen way needs on each GPU, and all other ways beside it; what does not fit is a problem.

    Returns the bytes of the chosen way at its peak.
    """
    parts, host = estimate(shape, step, plan)
    size, count = gpu
    table = [["part", f"on each {'GPU' if step.device == 'cuda' else 'process'}", "formula"]]
    table += [[part.name, gib(part.bytes), part.formula] for part in parts]
    table += [[f"{part.name}, in RAM", gib(part.bytes), part.formula] for part in host]
    if not any(part.name == "activations" for part in parts):
        report.notes.append("memory: the activations of experts are not counted; --probe_steps measures them")
    full = full_logits(shape, step)
    checkpointing = "with" if step.checkpointing else "without"
    lines = [
        f"{shape.parameters:,} parameters; {step.rows} rows of {step.length:,} tokens, {checkpointing} checkpointing",
        f"a loss over all logits would take {gib(full.bytes)}: {full.formula}",
        f"{where}: {count} x {gib(size)}, of which {gib(RESERVE)} stay free for CUDA and gaps",
    ]
    report.sections.append(Section(f"memory: {plan}", table, lines))
    best = fits_best(shape, replace(step, checkpointing=True), size, count)
    other = Section("memory: other ways", plan_table(shape, step, size, count))
    other.lines.append(
        f"all weights fit with: {best or 'none of these on one machine'} (with --gradient_checkpointing)"
    )
    report.sections.append(other)
    if not fits(parts, size):
        report.problems.append(
            f"out of memory: {plan} takes {gib(parts[-1].bytes)} of {gib(size)} ({where}); "
            + (
                f"use {best} with --gradient_checkpointing"
                if best
                else "use more GPUs, --lora or a shorter --max_length"
            )
            + ("" if step.device == "cuda" else "; --gpu 80GBx8 judges it for other machines")
        )
    return parts[-1].bytes


def describe_disk(
    report: Report, shape: Shape, step: Step, plan: Plan, *, output_dir: str, saves: int, kept: int, is_here: bool
) -> None:
    """Add what a checkpoint and the whole run take; more than is free is a problem, if the run is to be here."""
    each, model = disk_of_checkpoint(shape, step, plan), disk_of_model(shape, step, plan)
    at_once = min(saves, kept + 1)
    needed, folder = at_once * each.bytes + model.bytes, Path(output_dir).expanduser().absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    lines = [
        f"a checkpoint: {gib(each.bytes)}, {each.formula}",
        f"the run: {gib(needed)}: {at_once} of its {saves:,} checkpoints at a time, and the model ({model.formula})",
        f"free on this disk: {gib(free)}",
    ]
    report.sections.append(Section("disk", [], lines))
    if needed > free:
        line = f"--output_dir {output_dir}: {gib(needed)} are needed and {gib(free)} free; lower --save_total_limit"
        (report.problems if is_here else report.notes).append(line)


# --- how it is shown ----------------------------------------------------------------------------------------------


def as_text(report: Report, tokenizer, *, since: int = 0) -> str:
    """Return the report for a terminal, from a section on; long rows are cut in the middle."""
    lines = []
    for title, ids, labels in report.samples if not since else ():
        lines += [f"== {title}", *_paint_ends(tokenizer, ids, labels), ""]
    for section in report.sections[since:]:
        lines += [f"== {section.title}", *align(section.table), *section.lines, ""]
    lines += [f"note: {note}" for note in report.notes if not since]
    return "\n".join(lines)


def _paint_ends(tokenizer, ids: np.ndarray, labels: np.ndarray) -> list[str]:
    half = SHOWN_IN_A_TERMINAL // 2
    if len(ids) <= 2 * half:
        return [paint(tokenizer, ids, labels)]
    left_out = f"[… {len(ids) - 2 * half:,} tokens …]"
    return [paint(tokenizer, ids[:half], labels[:half]), left_out, paint(tokenizer, ids[-half:], labels[-half:])]


def write_page(report: Report, tokenizer, path: Path) -> None:
    """Write the report as one HTML file that needs nothing else."""
    import jinja2

    template = Path(__file__).with_name("dry_run.html").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
    samples = [(title, split_by_loss(tokenizer, ids, labels)) for title, ids, labels in report.samples]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page.render(report=report, samples=samples), encoding="utf-8")
