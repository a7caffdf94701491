"""Fine-tune a chat model: arguments -> tokenizer, format -> data -> model -> Trainer -> save.

    python train.py --model_name_or_path Qwen/Qwen2.5-0.5B --data_path data_proj/opendata --output_dir runs/my_run

base_run.sh and ds_all.sh call this file with the usual settings. `python train.py --help` lists every flag.
"""

import math
import os
import shlex
import signal
import sys
import time
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from sft.model import load as models

os.environ.setdefault(*models.PATIENT_THREADS)
if __name__ == "__main__":  # a shell starts what runs in the background with SIGINT ignored
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # transformers 5.23 and accelerate 1.15 import these wherever they find them: a second at every start.
    sys.modules |= dict.fromkeys(models.unused_packages([*sys.argv, *os.environ]))

import torch
import transformers
from transformers import HfArgumentParser, PrinterCallback, ProgressCallback, TrainerCallback, set_seed

from sft.chat.reply import Chat, Reply
from sft.chat.rows import NotFinite
from sft.chat.sampling import GREEDY
from sft.checkpoint import save as checkpoints
from sft.checkpoint.save import check_unchanged, find_checkpoint, unsealed
from sft.dataset.collate import Collator
from sft.dataset.dataset import (
    CACHE_DIR,
    Examples,
    TrainingRows,
    batches,
    check_losses,
    file_hashes,
    find_files,
    ledger_lines,
    prepare,
)
from sft.dataset.mixture import mix, mixture_table
from sft.evaluate import quick
from sft.format.contract import check_contract
from sft.format.render import Renderer
from sft.launch.processes import LOST, STOPPED, Agreed, Guard, Stopped
from sft.model import attention, loss
from sft.opendata.conversation import read_conversations
from sft.preview import dry_run
from sft.preview import measure as probe
from sft.preview.preflight import check_arguments, deepspeed_config, paint
from sft.report.run_page import (
    PAGE,
    RunPage,
    mfu_of_a_token,
    plot_losses,
    provenance,
    rates,
    render_page,
    replies_entry,
    summarise,
    without_secrets,
    write_card,
    write_json,
    write_text,
)
from sft.train.trainer import Trainer, group_sources

LORA_FLAGS = ("lora_rank", "lora_alpha", "lora_dropout")
FIXED_PROMPTS = ("你好", "Hello", "写一首关于春天的诗", "What is the capital of France?")


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "A local model folder or a hub model."})
    dtype: str = field(
        default="auto", metadata={"help": "Type of the weights: auto is fp32 masters (LoRA: frozen base in bf16)."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa or flash_attention_2."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    lora: bool = field(
        default=False, metadata={"help": "Train LoRA adapters on all linear layers instead of all weights."}
    )
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapters; twice the rank is usual."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout in the adapters."})
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: keep the frozen base in 4 bits (CUDA)."})


@dataclass
class DataArguments:
    data_path: list[str] | None = field(
        default=None,
        metadata={
            "help": "Files, folders or globs, canonical or raw; an eval.json beside train.json is held out. "
            "belle.json@2x: seen twice per epoch; @0.5x: half of it, another half in the next."
        },
    )
    replay_path: list[str] | None = field(
        default=None, metadata={"help": "Data of an earlier stage, of which each epoch takes a share again."}
    )
    replay_share: float = field(
        default=0.0, metadata={"help": "Share of an epoch's tokens that comes from --replay_path, as 0.1."}
    )
    eval_data_path: list[str] | None = field(default=None, metadata={"help": "Held-out files; never trained on."})
    encoding: str = field(default="utf-8", metadata={"help": "Encoding of the data files."})
    chat_format: str = field(
        default="auto", metadata={"help": "auto, blossom, chatml, alpaca, mistral, or base (its own)."}
    )
    max_length: int = field(default=2048, metadata={"help": "Longest row, in tokens."})
    packing: bool = field(
        default=True, metadata={"help": "Fill each row with whole conversations, kept apart; a batch counts rows."}
    )
    cache_dir: str = field(default=CACHE_DIR, metadata={"help": "Where tokenised data is kept, by content."})
    max_lost: float = field(
        default=0.05, metadata={"help": "Stop when a larger share of the conversations would be lost."}
    )
    num_reply_prompts: int = field(
        default=12,
        metadata={"help": "Questions of the data answered at the end for the stop rate, beside four fixed prompts."},
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Longest reply before and after training, in tokens."})
    eval_replies: bool = field(
        default=True, metadata={"help": "At each evaluation, reply to the four fixed prompts for the run page."}
    )
    eval_quick: bool = field(
        default=False, metadata={"help": "Ask the quick check's questions before and after, as sft.evaluate does."}
    )


class Data(NamedTuple):
    """What goes in; `times` are those per epoch of each training file, `ledgers` the accounts of "train" and "eval"."""

    times: dict[str, float | None]
    eval_files: list[str]
    examples: Examples
    held_out: Examples
    ledgers: dict[str, dict]


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' own, with defaults for fine-tuning."""

    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate; LoRA likes ten times as much."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(
        default=0.03, metadata={"help": "Steps of warm-up, or a share of all steps when below 1."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between log lines."})
    save_total_limit: int | None = field(default=3, metadata={"help": "Checkpoints to keep."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide non-finite losses from the log."})
    include_num_input_tokens_seen: str = field(
        default="non_padding", metadata={"help": "Count tokens, padding left out."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Not used: rows hold what the model takes."})
    allow_changed: str | None = field(
        default=None, metadata={"help": "What may differ from the checkpoint that is resumed: fields, with commas."}
    )
    rank_timeout: float = field(
        default=90, metadata={"help": "Seconds without a sign of life after which a frozen process ends the run."}
    )
    max_shard_size: str = field(default="5GB", metadata={"help": "Largest file of weights that is written."})
    offload: bool = field(
        default=False, metadata={"help": "Under DeepSpeed, keep the optimizer (ZeRO-3: the weights too) on the CPU."}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Show and check what the run would do, without reading the weights."}
    )
    probe_steps: int = field(
        default=0,
        metadata={
            "help": "A dry run that then measures memory and time: so many steps (3 or more) on the real model, the "
            "rows that take most memory first; nothing of them is kept."
        },
    )
    gpu: str | None = field(
        default=None, metadata={"help": "The GPUs that a dry run judges, as in 80GBx8; else those of this machine."}
    )


def main(arguments: Sequence[str] | None = None) -> None:
    started = time.time()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    with Guard(lasting=__name__ == "__main__") as guard:
        groups = parse_arguments(arguments)
        try:
            if groups[-1].dry_run:
                run_dry(*groups, guard)
            else:
                run(*groups, guard, started=started)
        except Stopped as stop:
            guard.stage = "done"
            say(f"{stop}; {guard.continue_with}")
            sys.exit(STOPPED)
        except RuntimeError as error:
            if not (lost := guard.find_lost(error)):
                raise
            guard.stage = "done"
            print(f"train.py: rank {guard.rank}: {lost}; {guard.continue_with}", file=sys.stderr, flush=True)
            sys.exit(LOST)


def run(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    training_arguments: TrainingArguments,
    guard: Guard,
    *,
    started: float,
) -> None:
    """Train from the base or the newest sealed checkpoint, and save the model; `guard` has the last word."""
    again = command_to_continue()
    guard.hold(training_arguments.output_dir, timeout=training_arguments.rank_timeout, continue_with=again)
    checkpoint = checkpoint_to_resume(training_arguments, guard)
    set_seed(training_arguments.seed)
    model_arguments.model_name_or_path = models.absolute(model_arguments.model_name_or_path)
    models.check_window(
        model_arguments.model_name_or_path,
        data_arguments.max_length,
        trust_remote_code=model_arguments.trust_remote_code,
    )
    _tokenizer, renderer = load_renderer(model_arguments, data_arguments)
    data = load_data(renderer, data_arguments)
    for ledger in data.ledgers.values():
        check_losses(ledger, data_arguments.max_lost)
    rows = make_rows(data, data_arguments, training_arguments, processes=training_arguments.world_size)
    record = {
        **provenance(),
        "model": model_arguments.model_name_or_path,
        "chat_format": renderer.name,
        "seed": training_arguments.seed,
        "data": {"train": file_hashes(data.times), "eval": file_hashes(data.eval_files)},
        "mixture": [] if rows.mixture.is_plain else mixture_table(rows.mixture, data.examples.lengths),
        "ledger": data.ledgers,
    }
    groups, processes = (model_arguments, data_arguments, training_arguments), training_arguments.world_size
    fingerprint = fingerprint_of(*groups, renderer, record, data.times, world_size=processes)
    changed = check_unchanged(checkpoint, fingerprint, training_arguments.allow_changed, say)

    names = {part: ledger["source_names"] for part, ledger in data.ledgers.items()}
    trainer = set_up(
        *groups,
        renderer,
        rows,
        data.held_out,
        largest_id=max(data.examples.largest_id, data.held_out.largest_id),
        guard=guard,
        fingerprint=fingerprint,
        sources=group_sources([(data.examples, names["train"]), (data.held_out, names.get("eval", ()))]),
    )
    record |= describe(trainer.model, renderer, fingerprint)
    if checkpoint:
        trainer.continue_from(checkpoint, changed)
    say_opening(trainer, renderer, data, rows)
    questions = answerable(pick_questions(list(data.times), data_arguments), renderer, trainer.model)
    fixed = questions[: len(FIXED_PROMPTS)]
    before = reply_all(trainer, renderer, fixed, data_arguments.max_new_tokens)
    check_again = quick_check(trainer, renderer, data_arguments)
    trainer.add_callback(run_page(trainer, renderer, record, fixed, before, data_arguments))
    guard.stage = "training"
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = last_evaluation(trainer)
    guard.finish_training()
    after = reply_all(trainer, renderer, questions, data_arguments.max_new_tokens)
    trainer.save_final()
    if trainer.is_world_process_zero():
        record |= check_again()
        finish(trainer, record, metrics, questions, before, after, seconds=time.time() - started)
        trainer.publish()


def run_dry(
    model_arguments: ModelArguments, data_arguments: DataArguments, arguments: TrainingArguments, guard: Guard
) -> None:
    """Do what a run does up to its first step, weights left out; print it, write it as a page, exit 2 on a problem.

    With --probe_steps the weights are read then, and those steps made and measured.
    """
    path, trust = models.absolute(model_arguments.model_name_or_path), model_arguments.trust_remote_code
    report = dry_run.Report(shlex.join(without_secrets(sys.argv)))
    if arguments.probe_steps:  # beside the output, so that nothing is touched there
        folder = f"{arguments.output_dir.rstrip('/')}.probe"
        guard.hold(folder, timeout=arguments.rank_timeout, continue_with="nothing was kept of the probe")
    config = models.load_config(path, trust_remote_code=trust)
    report.check(models.check_window, path, data_arguments.max_length, trust_remote_code=trust)
    dry_run.check_weights(report, path)
    tokenizer, renderer = load_renderer(model_arguments, data_arguments)
    data = load_data(renderer, data_arguments)
    for ledger in data.ledgers.values():
        report.check(check_losses, ledger, data_arguments.max_lost)
    dry_run.check_held_out(report, data.times, data_arguments.data_path)
    used_ids = [*renderer.stop_ids, *renderer.control_ids]
    largest = max(data.examples.largest_id, data.held_out.largest_id)
    report.check(dry_run.check_rows, config, tokenizer, path, used_ids=used_ids, largest_id=largest)
    dry_run.describe_tokenizer(report, renderer, list(data.times), data_arguments.encoding, lora=model_arguments.lora)
    groups = (model_arguments, data_arguments, arguments)
    settings = {**vars(arguments), **vars(model_arguments), **vars(data_arguments)}
    if len(data.examples):
        processes = dry_run.count_processes(settings)
        rows = make_rows(data, data_arguments, arguments, processes=processes)
        trained = dry_run.describe_all_data(report, data, rows.mixture, renderer.stop_ids)["trained"]
        steps, counted = dry_run.describe_run(report, config, rows, trained, settings)
        if arguments.resume_from_checkpoint:
            record = {**provenance(), "data": {"train": file_hashes(data.times)}}
            new = fingerprint_of(*groups, renderer, record, data.times, world_size=processes)
            dry_run.describe_resume(report, look_for_checkpoint(arguments), new, num_rows=len(rows), settings=settings)
    show_report(report, tokenizer, arguments.output_dir)
    if not arguments.probe_steps:
        return say("no problem found; nothing was trained, and the weights were not read")
    output_dir, arguments.output_dir = arguments.output_dir, str(guard.folder)
    heaviest, *_ = dry_run.heaviest_rows(rows, trained)
    watch = measure(*groups, renderer, rows, heaviest, largest_id=largest, guard=guard)
    probe.describe(report, watch.timed(), guard.gather(watch.peak), steps=steps, counted=counted)
    show_report(report, tokenizer, output_dir, since=-1)
    say("no problem found; nothing was kept of these steps")


def show_report(report: dry_run.Report, tokenizer, output_dir: str, *, since: int = 0) -> None:
    """Print the report, or its sections `since` one; write it as a page; exit 2 when it has a problem."""
    page = Path(f"{output_dir.rstrip('/')}.dry_run.html")
    if int(os.environ.get("RANK", 0)) == 0:
        dry_run.write_page(report, tokenizer, page)
    say(dry_run.as_text(report, tokenizer, since=since))
    say(f"as a page: {page}")
    if report.problems:
        fail([f"problem: {problem}" for problem in report.problems])


def measure(
    model_arguments, data_arguments, arguments, renderer, rows, heaviest, *, largest_id: int, guard: Guard
) -> probe.Stopwatch:
    """Make the steps of a probe, and keep nothing of them; return the watch that has measured them."""
    set_seed(arguments.seed)
    arguments.max_steps, arguments.train_sampling_strategy = arguments.probe_steps, "sequential"
    for name in ("save_strategy", "eval_strategy", "logging_strategy"):
        setattr(arguments, name, type(getattr(arguments, name))("no"))
    arguments.report_to, arguments.push_to_hub, arguments.load_best_model_at_end = [], False, False
    watch = probe.Stopwatch()
    shares = (arguments.train_batch_size, arguments.gradient_accumulation_steps, arguments.world_size)
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    own = dry_run.updates_of(len(rows), shares, seed=seed).order(0)
    trainer = set_up(
        model_arguments,
        data_arguments,
        arguments,
        renderer,
        probe.FirstRows(rows, heaviest, own, steps=arguments.probe_steps, per_update=math.prod(shares)),
        (),
        largest_id=largest_id,
        guard=guard,
        fingerprint={},
    )
    trainer.pop_callback(PrinterCallback)
    trainer.add_callback(watch)
    trainer.train()
    return watch


# --- arguments ----------------------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Parse, and exit with every mistake at once before anything is loaded."""
    parser = Parser((ModelArguments, DataArguments, TrainingArguments), prog="train.py", allow_abbrev=False)
    parser.set_defaults(eval_strategy=None)
    given, unknown = parser.parse_known_args(sys.argv[1:] if arguments is None else list(arguments))
    given = vars(given)
    problems = parser.problems + [f"unknown argument {name}" for name in unknown if name.startswith("--")]
    problems += [f"unknown argument {name}" for name in unknown if not problems]
    given["dry_run"] |= given["probe_steps"] > 0
    problems += check_arguments(given)
    if problems:
        fail(problems)
    try:
        given["eval_strategy"] = given["eval_strategy"] or "epoch"
        if given["hub_token"]:  # transformers would pickle it into every checkpoint
            os.environ["HF_TOKEN"], given["hub_token"] = given["hub_token"], None
        if given["disable_tqdm"] is None:
            given["disable_tqdm"] = not sys.stderr.isatty()
        on_cpu = given["use_cpu"] or not torch.cuda.is_available()
        if given["deepspeed"]:
            given["deepspeed"] = deepspeed_config(given["deepspeed"], offload=given["offload"], pin_memory=not on_cpu)
        given |= models.choose_compute(bf16=given["bf16"], fp16=given["fp16"], use_cpu=on_cpu)
        if given["use_liger_kernel"] and on_cpu:
            raise ValueError("--use_liger_kernel: its kernels are Triton's and need a GPU; leave the flag out")
        config = given["deepspeed"]
        if given["dry_run"] and not given["probe_steps"]:
            given |= {"deepspeed": None, "use_cpu": on_cpu}
        elif given["deepspeed"] and on_cpu:
            given |= {"accelerator_config": start_deepspeed_on_cpu(), "use_cpu": True}
        elif on_cpu:
            given["use_cpu"] = True
        groups = []
        for group in (ModelArguments, DataArguments, TrainingArguments):
            names = {entry.name for entry in fields(group) if entry.init}
            groups.append(group(**{name: value for name, value in given.items() if name in names}))
        groups[-1].deepspeed = config  # a dry run starts no processes, and shows what they would hold
    except (ValueError, TypeError, ImportError) as error:
        fail([str(error)])
    return tuple(groups)


class Parser(HfArgumentParser):
    """Collects what it can't read instead of stopping at the first."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.problems: list[str] = []

    def _get_values(self, action, arg_strings):
        try:
            return super()._get_values(action, arg_strings)
        except ArgumentError as error:
            self.problems.append(str(error).removeprefix("argument "))
            return action.default

    def error(self, message: str) -> None:
        fail([*self.problems, message])


def fail(problems: Sequence[str], *, everywhere: bool = False) -> None:
    """Print each problem on a line, from the first process or from `everywhere`, and exit with code 2."""
    rank = int(os.environ.get("RANK", 0))
    if rank == 0 or everywhere:
        for problem in problems:
            print(f"train.py: {f'rank {rank}: ' if rank else ''}{problem}", file=sys.stderr, flush=True)
    sys.exit(2)


def start_deepspeed_on_cpu() -> dict:
    """Let accelerate run DeepSpeed without a GPU, over gloo; return the accelerator_config that goes with it.

    For accelerate 1.15 and deepspeed 0.19: accelerate knows no DeepSpeed backend for a CPU, so the state is made here.
    """
    for name, value in (
        ("ACCELERATE_USE_DEEPSPEED", "true"),
        ("DS_ACCELERATOR", "cpu"),
        ("ACCELERATE_TORCH_DEVICE", "cpu"),
    ):
        os.environ[name] = value
    from accelerate import PartialState

    PartialState(backend="gloo")
    return {"use_configured_state": True}


def complete(arguments: TrainingArguments, held_out: Examples) -> TrainingArguments:
    """Fill in what depends on the data and the machine: there is nothing to evaluate without held-out rows."""
    if not len(held_out) and arguments.eval_strategy != "no":
        say("no held-out data, so nothing is evaluated; give --eval_data_path, or an eval.json beside train.json")
        arguments.eval_strategy = transformers.IntervalStrategy.NO
    arguments.label_names = ["labels"]
    arguments.dataloader_pin_memory &= torch.cuda.is_available()
    return arguments


# --- continuing ---------------------------------------------------------------------------------------------------


def checkpoint_to_resume(arguments: TrainingArguments, guard: Guard) -> str | None:
    """Return the checkpoint to continue from, the same on all ranks, after clearing what a killed run left."""
    found, leftovers = None, []
    if guard.rank == 0:
        leftovers = checkpoints.clear_leftovers(Path(arguments.output_dir))
        found = look_for_checkpoint(arguments)
    (checkpoint, lines, problem), leftovers = guard.from_first((found, leftovers))
    for line in [*leftovers, *lines]:
        say(line)
    if problem:
        raise Agreed(problem)
    return checkpoint


def look_for_checkpoint(arguments: TrainingArguments) -> tuple[str | None, list[str], str | None]:
    """Return the checkpoint to continue from: the named one, or with "auto" the newest that is what was sealed.

    And lines to say, and what is wrong with the named one. Nothing is changed.
    """
    named, folder = arguments.resume_from_checkpoint, arguments.output_dir
    if named in ("auto", "True", "true"):
        checkpoint, skipped = find_checkpoint(folder)
        what = f"resuming from {checkpoint}" if checkpoint else f"no checkpoint in {folder}; starting anew"
        return checkpoint, [*skipped, what], None
    problem = unsealed(Path(named)) if named else None
    wrong = f"--resume_from_checkpoint {named}: {problem}; use auto, or name another checkpoint"
    return named, [], wrong if problem else None


def fingerprint_of(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    arguments: TrainingArguments,
    renderer: Renderer,
    record: dict,
    times: dict[str, float | None],
    *,
    world_size: int,
) -> dict:
    """Return what the run depends on, for its checkpoints: flags, data, format, base, processes, versions."""
    files = record["data"]["train"]
    names = [Path(file).name for file in files]
    names = names if len(set(names)) == len(names) else list(files)
    zero = (arguments.deepspeed or {}).get("zero_optimization", {})
    return checkpoints.fingerprint(
        {**vars(arguments), **vars(data_arguments), **vars(model_arguments)},
        versions={**record["versions"], "device": torch.cuda.get_device_name() if arguments.n_gpu else "cpu"},
        data=dict(zip(names, files.values(), strict=True)),
        times_per_epoch={name: often for name, often in zip(names, times.values(), strict=True) if often != 1},
        chat_format={"name": renderer.name, "fingerprint": renderer.fingerprint()},
        base=checkpoints.hash_base(model_arguments.model_name_or_path) or model_arguments.model_name_or_path,
        world_size=world_size,
        zero_stage=zero.get("stage", 0),
    )


def command_to_continue() -> str:
    """Return how to go on: what was typed is the launcher's; this starts the same processes from the same folder."""
    words, flag = without_secrets(sys.argv), "--resume_from_checkpoint"
    words = [w for place, w in enumerate(words) if flag not in (w, words[place - 1]) and not w.startswith(f"{flag}=")]
    command, processes = shlex.join([*words, flag, "auto"]), os.environ.get("LOCAL_WORLD_SIZE")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        command = f"torchrun --standalone --nproc_per_node {processes} {command}"
    elif processes:
        command = f"NUM_GPUS={processes} {sys.executable} -m sft.launch {command}"
    else:
        command = f"{sys.executable} {command}"
    return f"continue with: cd {shlex.quote(os.getcwd())} && {command}"


# --- tokenizer and model ------------------------------------------------------------------------------------------


def load_renderer(model_arguments: ModelArguments, data_arguments: DataArguments):
    """Load the tokenizer, bind the chat format to it, and stop if training and serving would differ."""
    tokenizer = models.load_tokenizer(
        model_arguments.model_name_or_path, trust_remote_code=model_arguments.trust_remote_code
    )
    renderer = Renderer(tokenizer, data_arguments.chat_format)
    problems = check_contract(renderer)
    if problems:
        raise ValueError(
            f"chat format {renderer.name!r} doesn't fit this tokenizer: {'; '.join(problems[:3])}; "
            "choose another --chat_format"
        )
    tokenizer.chat_template = renderer.chat_template
    return tokenizer, renderer


def load_data(renderer: Renderer, data_arguments: DataArguments) -> Data:
    """Find and tokenise the files to train on and those held out."""
    times, eval_files = find_files(
        data_arguments.data_path, data_arguments.eval_data_path or (), data_arguments.replay_path or ()
    )
    settings = {name: getattr(data_arguments, name) for name in ("max_length", "encoding", "cache_dir")}
    examples, ledger = prepare(list(times), renderer, say=say, **settings)
    held_out, eval_ledger = prepare(eval_files, renderer, say=say, **settings)
    ledgers = {"train": ledger} | ({"eval": eval_ledger} if eval_files else {})
    return Data(times, eval_files, examples, held_out, ledgers)


def make_rows(data: Data, data_arguments: DataArguments, arguments: TrainingArguments, *, processes: int):
    """Return the rows of the run, as many in every epoch that it can reach."""
    kept = {file: counts.get("kept", 0) for file, counts in data.ledgers["train"]["files"].items()}
    share, seed = data_arguments.replay_share, arguments.seed
    mixture = mix(data.times, kept, data.examples.lengths, replay_share=share, seed=seed)
    max_length = data_arguments.max_length if data_arguments.packing else None
    rows = TrainingRows(data.examples, max_length, seed=seed, mixture=mixture)
    if not (mixture.changes and max_length):
        return rows
    taken = arguments.max_steps * processes * arguments.train_batch_size * arguments.gradient_accumulation_steps
    epochs = taken / max(1, len(rows)) + 1 if arguments.max_steps > 0 else arguments.num_train_epochs
    return TrainingRows(data.examples, max_length, seed=seed, mixture=mixture, epochs=math.ceil(epochs))


def build_model(model_arguments: ModelArguments, arguments: TrainingArguments, tokenizer, renderer: Renderer):
    """Load the base (fp32 masters), add the adapters if asked, and set the stop ids."""
    compute = "bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else "float32"
    model = models.load_model(
        model_arguments.model_name_or_path,
        dtype=model_arguments.dtype,
        compute=compute,
        lora=model_arguments.lora,
        load_in_4bit=model_arguments.load_in_4bit,
        attn_implementation=model_arguments.attn_implementation,
        trust_remote_code=model_arguments.trust_remote_code,
    )
    if not model_arguments.lora:
        return model
    return models.add_lora(
        model,
        rank=model_arguments.lora_rank,
        alpha=model_arguments.lora_alpha,
        dropout=model_arguments.lora_dropout,
        untrained_ids=models.untrained_ids(tokenizer, renderer),
        gradient_checkpointing=bool(
            arguments.gradient_checkpointing or getattr(arguments, "activation_checkpointing", False)
        ),
    )


def set_up(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    arguments: TrainingArguments,
    renderer: Renderer,
    rows,
    held_out: Examples,
    *,
    largest_id: int,
    **options,
) -> Trainer:
    """Return a trainer of the base, ready for its first step; `largest_id` is the largest token of the data."""
    tokenizer, path = renderer.tokenizer, model_arguments.model_name_or_path
    model = build_model(model_arguments, arguments, tokenizer, renderer)
    used_ids = [*renderer.stop_ids, *renderer.control_ids]
    models.check_rows(model, tokenizer, path, used_ids=used_ids, largest_id=largest_id)
    models.set_generation_config(model, tokenizer, renderer.stop_ids)
    model.save_pretrained = partial(model.save_pretrained, max_shard_size=arguments.max_shard_size)
    notes = prepare_model(model, packing=data_arguments.packing, liger=arguments.use_liger_kernel)
    arguments.use_liger_kernel = False  # done; transformers would put its loss over ours
    arguments, length = complete(arguments, held_out), data_arguments.max_length
    trainer = build_trainer(model, arguments, tokenizer, rows, held_out, max_length=length, **options)
    trainer.add_callback(SelfTest(trainer, notes, packing=data_arguments.packing))
    return trainer


def prepare_model(model, *, packing: bool, liger: bool = False) -> list[str]:
    """Keep packed documents apart, compute the loss in chunks, use Liger's kernels if asked; return what was done."""
    notes = [models.use_liger_kernels(model)] if liger else []
    return notes + ([attention.isolate_documents(model)] if packing else []) + [loss.use_chunked_loss(model)]


class SelfTest(TrainerCallback):
    """Prove on the real model, in its compute type, that packed rows and the loss in chunks are what they stand for."""

    def __init__(self, trainer: Trainer, notes: list[str], *, packing: bool):
        self.trainer, self.notes, self.packing = trainer, notes, packing

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        for note in self.notes:
            say(note)
        if self.trainer.broken:  # the first step says so, and names its rows
            return
        low = args.bf16 or args.fp16
        exact = not low and all(parameter.dtype == torch.float32 for parameter in model.parameters())
        dtype = torch.bfloat16 if args.bf16 else torch.float16
        with torch.autocast(args.device.type, dtype=dtype, enabled=low):
            loss.self_test(model, exact=exact)
            if self.packing:
                apart, _reach = attention.self_test(model, exact=exact)
                say(f"self-test: logits of a packed row are within {apart:.0e} of its documents alone")


# --- training -----------------------------------------------------------------------------------------------------


def build_trainer(model, arguments, tokenizer, rows, held_out: Examples, *, max_length: int, **options) -> Trainer:
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=held_out if len(held_out) else None,
        # On a GPU one length for all packed rows: flex attention compiles for it once.
        data_collator=Collator(tokenizer.pad_token_id, packed_length=max_length if torch.cuda.is_available() else None),
        processing_class=tokenizer,
        say=say,
        **options,
    )
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(ProgressWithSpeed)
    return trainer


class ProgressWithSpeed(ProgressCallback):
    """The progress bar, with the loss and the tokens per second beside it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=logs, **kwargs)
        if self.training_bar is not None and "loss" in (logs or {}):
            speed = logs.get("train_tokens_per_second", 0)
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}, {speed:,.0f} tokens/s")


def last_evaluation(trainer: Trainer) -> dict[str, float]:
    """Return the metrics on the held-out rows after the last step, evaluating only if that was not just done."""
    if trainer.eval_dataset is None or trainer.args.eval_strategy == "no":
        return {}
    last = next((entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry), {})
    return last if last.get("step") == trainer.state.global_step else trainer.evaluate()


# --- what a person sees -------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Print once, from the first process."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, flush=True)


def say_opening(trainer: Trainer, renderer: Renderer, data: Data, dataset: TrainingRows) -> None:
    """Print what goes in: ledger, one row with its trained tokens, mixture, tokens, steps, parameters."""
    arguments, tokens = trainer.args, int(data.examples.lengths.sum())
    rows = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    steps = trainer.updates.in_all(arguments.num_train_epochs, arguments.max_steps)
    trainable, total = models.count_parameters(trainer.model)
    for name, ledger in zip(("data", "held out"), data.ledgers.values(), strict=False):
        say("\n".join(f"{name}: {line}" for line in ledger_lines(ledger)))
    say(f"first row, trained tokens marked (chat format {renderer.name}):")
    say(paint(renderer.tokenizer, **data.examples[0]))
    if not dataset.mixture.is_plain:
        for file, there, often, taken, _tokens, share in mixture_table(dataset.mixture, data.examples.lengths)[1:]:
            say(f"mixture: {file}: an epoch takes {taken} of {there} conversations ({often}x), {share} of its tokens")
    if dataset.fill:
        say(f"packed: {len(dataset):,} rows, {dataset.fill:.1%} full")
    trained = data.examples.num_trained_tokens
    say(f"tokens: {tokens:,}, trained {trained:,} ({trained / tokens:.0%})")
    per_update = dataset.num_tokens * rows // len(dataset)
    shares = (
        f"{arguments.train_batch_size} x {arguments.gradient_accumulation_steps} x {arguments.world_size} processes"
    )
    say(f"steps: {steps:,} of {rows} rows ({shares}), about {per_update:,} tokens; stop ids: {renderer.stop_ids}")
    say(f"parameters: {total:,}, trained {trainable:,} ({trainable / total:.1%})")


def user(question: str) -> dict[str, str]:
    return {"role": "user", "content": question}


def pick_questions(files: Sequence[str], data_arguments: DataArguments) -> list[tuple[str, list[str]]]:
    """Return (question, its answers in the data): the fixed prompts, then some of the data, from every file."""
    answers: dict[str, list[str]] = {}
    share = math.ceil(data_arguments.num_reply_prompts / len(files))
    chosen = []
    for file in files:
        pool = []
        for conversation, error, _file, _line in read_conversations([file], encoding=data_arguments.encoding):
            if error is None and [message["role"] for message in conversation["messages"]] == ["user", "assistant"]:
                question, answer = (message["content"].strip() for message in conversation["messages"])
                answers.setdefault(question, []).append(answer)
                if len(question) <= 200:
                    pool.append(question)
            if len(pool) >= 1000:
                break
        chosen += pool[:: max(1, len(pool) // share)][:share] if share else []
    questions = dict.fromkeys([*FIXED_PROMPTS, *chosen[: data_arguments.num_reply_prompts]])
    return [(question, answers.get(question, [])) for question in questions]


def answerable(questions: list, renderer: Renderer, model) -> list:
    """Return the questions that leave room for a reply in the model's context window."""
    window = models.context_window(model.config) or math.inf
    return [pair for pair in questions if len(renderer.prompt([user(pair[0])])) < window]


def reply_all(trainer: Trainer, renderer: Renderer, questions: list, max_new_tokens: int) -> list[Reply]:
    """Reply greedily to each question, on the first process; nothing under ZeRO-3, where each rank holds a part."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        say("replies: not shown under ZeRO-3; ask the saved model with python -m sft.chat")
        return []
    if not trainer.is_world_process_zero():
        return []
    model = trainer.model.to(trainer.args.device)
    sampling = replace(GREEDY, max_new_tokens=max_new_tokens)
    chat = Chat(model, renderer)
    asked = [[user(question)] for question, _answers in questions]
    try:
        return [reply for batch in batches(asked, 8) for reply in chat.reply_batch(batch, sampling)]
    except NotFinite as error:  # training itself says where such a number comes from
        say(f"replies: none, {error}")
        return []


def quick_check(trainer: Trainer, renderer: Renderer, data_arguments: DataArguments) -> Callable[[], dict]:
    """With --eval_quick, ask the quick check's questions; return what asks them again and compares, for run.json."""
    asked = quick.questions() if data_arguments.eval_quick else []
    pairs = answerable([(question["prompt"], question) for question in asked], renderer, trainer.model)
    before = reply_all(trainer, renderer, pairs, data_arguments.max_new_tokens) if pairs else []

    def again() -> dict:
        after = reply_all(trainer, renderer, pairs, data_arguments.max_new_tokens) if before else []
        if not after:
            return {}
        found = quick.compare([question for _prompt, question in pairs], after, before)
        say(f"\nquick check, before training (base) and after (tuned):\n{quick.table(found['rows'])}")
        return {"quick": found}

    return again


def describe(model, renderer: Renderer, fingerprint: dict) -> dict:
    """Return what run.json, the run page and the model card tell of the model and the settings."""
    trained, total = models.count_parameters(model)
    example = [user("1+1等于几？"), {"role": "assistant", "content": "2"}]
    known = ("data", "base", "chat_format") + (() if hasattr(model, "peft_config") else LORA_FLAGS)
    return {
        "parameters": {"all": total, "trained": trained},
        "device": fingerprint["told"]["device"],
        "settings": {name: value for name, value in fingerprint["exact"].items() if name not in known},
        "example": renderer.text(example),
    }


def run_page(trainer: Trainer, renderer: Renderer, record: dict, fixed: list, before: list, data_arguments) -> RunPage:
    """Return what keeps report.html up to date, from before the first step on."""
    arguments, questions = trainer.args, [question for question, _answers in fixed]
    mfu = None
    if arguments.bf16 or arguments.fp16:
        mfu = mfu_of_a_token(trainer.model, device=record["device"], world_size=arguments.world_size)
    return RunPage(
        Path(arguments.output_dir),
        record,
        before=replies_entry(0, questions, before) if before else None,
        questions=questions,
        reply=partial(reply_all, trainer, renderer, fixed, data_arguments.max_new_tokens)
        if before and data_arguments.eval_replies
        else None,
        mfu=mfu,
    )


def finish(
    trainer: Trainer, record: dict, metrics: dict, questions: list, before: list, after: list, *, seconds: float
) -> None:
    """Write run.json, the run page, the model card and training_loss.png, show the replies, and sum the run up."""
    folder, history, steps = Path(trainer.args.output_dir), trainer.state.log_history, trainer.state.global_step
    plot_losses(history, folder / "training_loss.png")
    summary = {
        "steps": steps,
        **summarise(history),
        "seconds": round(seconds, 1),
        "tokens_seen": trainer.state.num_input_tokens_seen,
        **{name: metrics[name] for name in ("eval_loss", "eval_perplexity", "eval_token_accuracy") if name in metrics},
    }
    if after:
        known = [(reply.text, answers) for reply, (_question, answers) in zip(after, questions, strict=True) if answers]
        summary |= rates(after)
        summary["replies_as_in_data"] = f"{sum(text in answers for text, answers in known)} of {len(known)}"
        fixed = [question for question, _answers in questions[: len(before)]]
        history.append(replies_entry(steps, fixed, after[: len(before)]))
    replies = [
        {"question": question, "answers_in_data": answers, "after": new.text, "ended": new.ended}
        | ({"before": before[number].text} if number < len(before) else {})
        for number, ((question, answers), new) in enumerate(zip(questions, after, strict=False))
    ]
    record = {**record, "metrics": summary, "replies": replies, "log_history": history}
    write_json(folder / "run.json", record)
    write_text(folder / PAGE, render_page(record, folder, step=steps, steps=steps, finished=True))
    write_card(folder, record)
    for reply in replies[: len(before)]:
        say(f"\n> {reply['question']}\n  before: {reply['before'][:80]!r}\n  after:  {reply['after']}")
    say("\ndone: " + ", ".join(f"{name} {_short(value)}" for name, value in summary.items() if value is not None))
    say(f"the run, its curves and replies: {folder / PAGE}")
    say(f"chat with it: python -m sft.chat --model_path {folder}")


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)):
            raise
        remedies = "lower --per_device_train_batch_size or --max_length, add --gradient_checkpointing, or use ds_all.sh"
        fail([f"out of memory ({str(error).splitlines()[0]}); {remedies}"], everywhere=True)
    except (ValueError, OSError) as error:
        fail(str(error).splitlines(), everywhere=getattr(error, "alone", False))
