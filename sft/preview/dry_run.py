"""Report on a run from config, tokenizer and data alone: `train.py --dry_run`.

The weights are never read. The report is printed and written as a page; its problems are faults that would stop the
run, or spoil it without an error.
"""

import csv
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from sft.checkpoint.manifest import PROGRESS
from sft.checkpoint.resume import check_unchanged
from sft.dataset.dataset import TrainingRows
from sft.dataset.sampler import Updates
from sft.launch.deepspeed import zero_stage
from sft.launch.processes import Guard
from sft.model import load as models
from sft.model.adapters import untrained_ids
from sft.opendata.files import EVAL, describe_skipped, split_suffix
from sft.preview.activations import count_activations
from sft.preview.data import describe_all_data, describe_tokenizer, heaviest_rows
from sft.preview.memory import (
    MIN_ROW_TOKENS,
    RESERVE,
    disk_of_checkpoint,
    disk_of_model,
    estimate_memory,
    fits_best,
    full_logits,
    gib,
    has_room,
    longest_rows,
    plan_table,
)
from sft.preview.report import Report, Section, show_report
from sft.preview.shape import FULL, LORA, ONE, QLORA, ZERO2, ZERO3, Plan, Shape, Step, read_shape
from sft.preview.twin import optimizer_name, try_on_twin
from sft.train.callbacks import can_keep_outputs, is_checkpointing
from sft.train.setup import (
    Data,
    Gpus,
    Run,
    count_processes,
    count_row_groups,
    describe_processes,
    find_gpus,
    find_named_checkpoint,
    find_other_base,
    fingerprint_of,
)
from sft.workers import release_freed_memory

MAX_RATE_RATIO = 4.0  # of a learning rate to what is published, after scaling
COUNTED_OPTIMIZERS = {"adamw_torch", "adamw_torch_fused", "adamw_apex_fused"}  # two moments in fp32
PUBLISHED_RUNS = Path(__file__).with_name("published.csv")  # that recipes/ and docs/recipes.md follow


def show_run(report: Report, run: Run, data: Data, guard: Guard, build_trainer: Callable) -> None:
    """Describe and check a run, print the report, and write it as a page; exit 2 when it has a problem.

    A tiny twin of the model goes through the run, but for one with --probe_steps: its real model does.
    """
    settings = run.settings
    if check_files(report, run.model_path):
        report.check(models.check_weights, run.model_path, trust_remote_code=settings.model.trust_remote_code)
    check_held_out(report, run.files.times, settings.data.data_path)
    report.notes += describe_skipped(run.files.skipped)
    describe_tokenizer(report, run)
    if data.rows is not None:
        trained = describe_all_data(report, data, run.renderer.stop_ids)["trained"].copy()  # without the other columns
        report.steps, report.step_bytes = describe_run(report, run, data.rows, trained)
        release_freed_memory()
        if settings.training.resume_from_checkpoint:
            describe_resume(report, run, num_rows=len(data.rows))
        if not settings.training.probe_steps and settings.training.world_size == 1:
            try_on_twin(report, run, data, guard, build_trainer)
    show_report(report, run)


def check_files(report: Report, path: str) -> bool:
    """Say whether a local folder's files of weights are whole, by name and safetensors header; a run needs them."""
    folder = Path(path)
    num_problems = len(report.problems)
    if not folder.is_dir():
        return False
    named = {file.name for file in [*folder.glob("*.safetensors"), *folder.glob("*.bin")]}
    if not named:
        report.notes.append(f"{path}: there are no weights in this folder, and a run needs them")
        return False
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
    return len(report.problems) == num_problems


def check_held_out(report: Report, files: Sequence[str], data_path: Sequence[str]) -> None:
    """An eval.json that was not asked for by name, and has no train.json beside it, would be trained on."""
    for file in files:
        if Path(file).name == EVAL and not any(Path(split_suffix(path)[0]).name == EVAL for path in data_path):
            report.problems.append(
                f"{file}: would be trained on, as there is no train.json beside it; put that there, or name the files"
            )


def describe_run(report: Report, run: Run, rows: TrainingRows, trained: np.ndarray) -> tuple[int, int]:
    """Add steps, memory and disk of a run. `trained` are the trained tokens of each example.

    Returns the number of steps, and the bytes that one takes.
    """
    flags = run.settings.model
    config = models.load_config(run.model_path, trust_remote_code=flags.trust_remote_code)
    steps = describe_steps(report, run, rows, model_type=config.model_type)
    how = {"variant": flags.lora_variant, "router": flags.lora_router, "dropout": flags.lora_dropout}
    shape = report.check(read_shape, config, trust_remote_code=flags.trust_remote_code, **how)
    if shape is None:
        return steps, 0
    if flags.lora:
        lines = [f"{shape.adapters.share:.1%} of the layers' weights are adapted", *shape.adapters.notes]
        report.sections.append(Section("adapters", shape.adapters.table(), lines))
    gpus = find_gpus(run.settings.training.gpu)
    step = _heaviest_step(run, rows, trained, gpus)
    plan = _plan_of(run)
    report.notes += find_uncounted_optimizer(optimizer_name(run.settings.training))
    counted = report.check(describe_memory, report, shape, step, plan, gpus)
    describe_disk(report, shape, step, plan, run, steps=steps)
    return steps, counted or 0


def _plan_of(run: Run) -> Plan:
    """Return how the run trains its weights, and over how many processes."""
    flags = run.settings.model
    training = run.settings.training
    method = FULL
    if flags.lora:
        method = QLORA if flags.load_in_4bit else LORA
    launcher = {2: ZERO2, 3: ZERO3}.get(zero_stage(training), ONE)
    return Plan(method, launcher, training.offload, count_processes(training))


def _heaviest_step(run: Run, rows: TrainingRows, trained: np.ndarray, gpus: Gpus) -> Step:
    """Return the step that takes most memory."""
    flags = run.settings.model
    training = run.settings.training
    batch = training.per_device_train_batch_size
    _order, row_tokens, row_trained = heaviest_rows(rows, trained)
    longest = int(rows.examples.lengths.max())
    length = rows.max_length if rows.max_length and gpus.on_gpu else int(row_tokens.max())
    return Step(
        rows=batch,
        length=length,
        trained=int(np.resize(row_trained, batch).sum()),
        documents=tuple(size for size in (longest, length - longest) if size) * batch,
        packing=rows.max_length is not None,
        checkpointing=is_checkpointing(training),
        accumulation=training.gradient_accumulation_steps,
        half=bool(training.bf16 or training.fp16 or training.gpu),
        lora_rank=flags.lora_rank,
        lora_variant=flags.lora_variant,
        lora_dropout=flags.lora_dropout,
        lora_token_rows=len(untrained_ids(run.renderer.tokenizer, run.renderer)),
        device="cuda" if gpus.on_gpu else "cpu",
        keeps_in=gpus.bytes_each if gpus.on_gpu and can_keep_outputs(training) else 0,
        shared=training.sequence_parallel_size,
        activation_offload=training.activation_offload,
    )


def count_saves(training, steps: int) -> int:
    """Return how many checkpoints a run of so many steps saves."""
    if training.save_strategy == "no":
        return 0
    if training.save_strategy == "epoch":
        return math.ceil(training.num_train_epochs)
    every = training.save_steps if training.save_steps >= 1 else math.ceil(training.save_steps * steps)
    return steps // max(1, int(every))


def updates_of(num_rows: int, training, *, batch_size: int | None = None, seed: int = 0) -> Updates:
    """Return the updates of a run of so many rows; `batch_size`: of a process with several GPUs, those of all."""
    return Updates(
        num_rows,
        batch_size=batch_size or training.per_device_train_batch_size,
        accumulation=training.gradient_accumulation_steps,
        world_size=count_row_groups(training),
        rank=0,
        seed=seed,
        drop_last=training.dataloader_drop_last,
    )


def describe_resume(report: Report, run: Run, *, num_rows: int) -> None:
    """Add which checkpoint would be resumed and what is left; flags and data that changed and may not are problems."""
    training = run.settings.training
    checkpoint, lines, wrong = find_named_checkpoint(training.resume_from_checkpoint, run.output_dir)
    report.sections.append(Section("resume", [], lines))
    if wrong:
        report.problems.append(wrong)
    if wrong or not checkpoint:
        return
    if problem := find_other_base(run, checkpoint):
        report.problems.append(problem)
    try:
        check_unchanged(checkpoint, fingerprint_of(run), training.allow_changed, lines.append)
    except ValueError as error:
        report.problems += str(error).splitlines()
    progress = json.loads((Path(checkpoint) / PROGRESS).read_text(encoding="utf-8"))
    made = progress["updates"]
    taken = progress["taken"]
    if progress["num_rows"] != num_rows:
        taken = taken * num_rows // progress["num_rows"]
    updates = updates_of(num_rows, training)
    epochs = training.num_train_epochs
    left = updates.left(epochs, training.max_steps, epoch=progress["epoch"], taken=taken, made=made)
    lines.append(f"{checkpoint} would be continued: {made:,} steps are made, {left:,} are left")
    if not left:
        report.notes.append(f"{checkpoint}: no step is left; the model would be saved as it is")


def describe_steps(report: Report, run: Run, rows: TrainingRows, *, model_type: str = "") -> int:
    """Add what an update holds and how many there are, beside published runs; return their number."""
    training = run.settings.training
    lora = run.settings.model.lora
    num_rows = len(rows)
    updates = updates_of(num_rows, training)
    per_update = updates.rows_per_update
    steps = updates.in_all(training.num_train_epochs, training.max_steps)
    section = Section("steps")
    if rows.fill is not None:
        each = rows.num_examples / num_rows
        section.lines.append(f"packed: {num_rows:,} rows, {rows.fill:.1%} full, {each:.1f} conversations each")
    tokens, conversations = (count * per_update / num_rows for count in (rows.num_tokens, rows.num_examples))
    section.lines.append(
        f"an update: {per_update} rows ({updates.batch_size} x {updates.accumulation} x "
        f"{describe_processes(training)}), "
        f"about {tokens:,.0f} tokens, {conversations:,.0f} conversations"
    )
    warm_up = training.get_warmup_steps(steps)
    rate = training.learning_rate
    schedule = getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)
    section.lines.append(f"updates: {steps:,}; learning rate {rate:g} after {warm_up:,} of warm-up, then {schedule}")
    section.lines += published_lines(lora=lora, model_type=model_type)
    report.sections.append(section)
    if num_rows < per_update:
        report.notes.append(
            f"an update would take {per_update} rows, and there are {num_rows:,}: it takes those there are"
        )
    if warm_up >= steps:
        report.problems.append(
            f"--warmup_steps {training.warmup_steps:g}: the run has {steps:,} updates, so its learning rate would not "
            "be reached"
        )
    report.notes += _compare_recipes(rate, min(conversations, rows.num_examples), lora)
    return steps


def read_published(*, lora: bool) -> list[dict[str, str]]:
    """Return the published runs of a method. A batch counts conversations, with `row_tokens` rows of so many tokens."""
    with open(PUBLISHED_RUNS, encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["learning_rate"]]
    return [row for row in rows if row["method"] == ("lora" if lora else "full")]


def published_lines(*, lora: bool, model_type: str) -> list[str]:
    """Return a line for each published run of this type of model; of every type where it has none."""
    runs = read_published(lora=lora)
    lines = []
    for row in [row for row in runs if model_type in row["types"].split()] or runs:
        name = f"{row['run']} ({row['lora']})" if row["lora"] else row["run"]
        rate = row["learning_rate"]
        batch = row["batch"] or "-"
        epochs = row["epochs"] or "-"
        source = row["source"]
        if size := row["row_tokens"]:
            lines.append(f"  published: {name}, {rate} at {batch} rows of {size} tokens, {epochs} epochs ({source})")
        else:
            lines.append(f"  published: {name}, {rate} at {batch} conversations, {epochs} epochs ({source})")
    return lines


def _compare_recipes(learning_rate: float, conversations: float, lora: bool) -> list[str]:
    """A rate goes with the square root of the batch under Adam (arXiv 2205.10287); far from all is worth a word."""
    runs = [row for row in read_published(lora=lora) if row["batch"] and not row["row_tokens"]]
    scaled = [float(row["learning_rate"]) * math.sqrt(conversations / int(row["batch"])) for row in runs]
    if min(scaled) / MAX_RATE_RATIO <= learning_rate <= max(scaled) * MAX_RATE_RATIO:
        return []
    span = f"{min(scaled):.1e} to {max(scaled):.1e}"
    method = "LoRA" if lora else "full fine-tuning"
    return [
        f"--learning_rate {learning_rate:g}: published {method} scaled to {conversations:,.0f} conversations is {span}"
    ]


def find_uncounted_optimizer(name: str) -> list[str]:
    """Return a note on an optimizer whose states are not AdamW's two moments in fp32: 8-bit, paged, Adafactor."""
    if name in COUNTED_OPTIMIZERS:
        return []
    return [
        f"memory: the optimizer is counted as AdamW with 8 bytes a trained parameter; --optim {name} takes another "
        "number, which --probe_steps measures"
    ]


def describe_memory(report: Report, shape: Shape, step: Step, plan: Plan, gpus: Gpus) -> int:
    """Add what the chosen way needs on each GPU, and all other ways beside it; what does not fit is a problem.

    Returns the bytes of the chosen way at its peak.
    """
    parts, host = estimate_memory(shape, step, plan)
    size = gpus.bytes_each
    table = [["part", "on each GPU" if step.device == "cuda" else "on each process", "formula"]]
    table += [[part.name, gib(part.bytes), part.formula] for part in parts]
    table += [[f"{part.name}, in RAM", gib(part.bytes), part.formula] for part in host]
    if not any(part.name == "activations" for part in parts):
        report.notes.append("memory: the activations of this type are not counted; --probe_steps measures them")
    full = full_logits(shape, step)
    checkpointing = "with" if step.checkpointing else "without"
    lines = [
        f"{shape.parameters:,} parameters; {step.rows} rows of {step.length:,} tokens, {checkpointing} checkpointing",
        f"a loss over all logits would take {gib(full.bytes)}: {full.formula}",
        f"{gpus.name}: {gpus.count} x {gib(size)}, of which {gib(RESERVE)} stay free for CUDA and gaps",
    ]
    report.sections.append(Section(f"memory: {plan}", table, lines))
    best = fits_best(shape, replace(step, checkpointing=True), size, gpus.count)
    other = Section("memory: other ways", plan_table(shape, step, size, gpus.count))
    other.lines += _describe_longest_rows(shape, step, plan, size)
    other.lines.append(
        f"all weights fit with: {best or 'none of these on one machine'} (with --gradient_checkpointing)"
    )
    report.sections.append(other)
    if not has_room(parts, size):
        remedy = "use more GPUs, SEQUENCE_PARALLEL, --lora or a shorter --max_length"
        if best:
            remedy = f"use {best} with --gradient_checkpointing"
        if step.device != "cuda":
            remedy += "; --gpu 80GBx8 judges it for other machines"
        taken = gib(parts[-1].bytes)
        report.problems.append(f"out of memory: {plan} takes {taken} of {gib(size)} ({gpus.name}); {remedy}")
    return parts[-1].bytes


def _describe_longest_rows(shape: Shape, step: Step, plan: Plan, gpu_bytes: int) -> list[str]:
    """Say under DeepSpeed how long a row may be, and from which length on GPUs must share it."""
    if plan.launcher == ONE or step.device != "cuda" or count_activations(shape, step, plan) is None:
        return []
    found = longest_rows(shape, step, plan, gpu_bytes)
    if not found:
        return [f"{plan}: a row of {MIN_ROW_TOKENS:,} tokens does not fit"]
    lengths = ", ".join(f"{length:,} tokens with SEQUENCE_PARALLEL={shared}" for shared, length in found)
    return [f"{plan}, one row in a batch, with checkpointing: the longest that fits has {lengths}"]


def describe_disk(report: Report, shape: Shape, step: Step, plan: Plan, run: Run, *, steps: int) -> None:
    """Add what a checkpoint and the whole run take; more than is free is a problem, if the run is to be here."""
    training = run.settings.training
    saves = count_saves(training, steps)
    each = disk_of_checkpoint(shape, step, plan)
    model = disk_of_model(shape, step, plan)
    at_once = min(saves, (training.save_total_limit or saves) + 1)
    needed = at_once * each.bytes + model.bytes
    folder = Path(run.output_dir).expanduser().absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    lines = [
        f"a checkpoint: {gib(each.bytes)}, {each.formula}",
        f"the run: {gib(needed)}: {at_once} of its {saves:,} checkpoints at a time, and the model ({model.formula})",
        f"free on this disk: {gib(free)}",
    ]
    report.sections.append(Section("disk", [], lines))
    if needed > free:
        line = f"--output_dir {run.output_dir}: {gib(needed)} are needed and {gib(free)} free; lower --save_total_limit"
        if training.gpu:  # the run is for another machine
            report.notes.append(line)
        else:
            report.problems.append(line)
