"""Fine-tune a chat model: flags -> run -> data -> model -> trainer -> train -> save. Read it from top to bottom.

    python train.py --model_name_or_path Qwen/Qwen2.5-0.5B --data_path data_proj/opendata --output_dir runs/my_run

base_run.sh and ds_all.sh call this file with the usual settings. `python train.py --help` lists every flag.
"""

import math
import operator
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial

from sft.launch.environment import finish_imports, prepare_imports
from sft.model import load as models

os.environ.setdefault(*models.PASSIVE_OPENMP_WAIT)
if __name__ == "__main__":
    prepare_imports()

import torch
import transformers
from transformers import set_seed

from sft.checkpoint.resume import check_unchanged, describe_resume
from sft.dataset.collate import Collator
from sft.dataset.dataset import MAX_LENGTH, prepare
from sft.dataset.ledger import check_losses, find_thinking_default
from sft.files import CACHE_DIR, MAX_SHARD_SIZE
from sft.launch.processes import LOST, STOPPED, Guard, Stopped
from sft.model import adapters, attention, fusion, kernels, loss
from sft.preview.dry_run import show_run
from sft.preview.measure import measure_steps
from sft.preview.report import Report
from sft.report.text import say
from sft.train import sequence_parallel
from sft.train.arguments import fail, flag, parse_arguments
from sft.train.callbacks import KEEP_CHOICES, KeepOutputs, SelfTest, is_checkpointing, offload_activations
from sft.train.checks import check_held_out_metrics
from sft.train.losses import group_sources
from sft.train.setup import (
    Data,
    Run,
    check_base_unchanged,
    check_probes,
    check_token_ids,
    find_circumstances,
    fingerprint_of,
    lay_out_rows,
    open_output_dir,
    prepare_run,
    trainer_arguments,
)
from sft.train.summary import (
    Replies,
    check_and_push,
    last_evaluation,
    make_record,
    run_page,
    say_opening,
    store_base,
    write_results,
)
from sft.train.trainer import Trainer

# The flags that say how data files become tokens.
READING = ("max_length", "encoding", "reasoning", "preference", "cache_dir")

# flag(default, help, ...) is a field; its metadata has the help, the limits that sft.train.arguments checks (at_least,
# above, at_most, below), and resume="same" where a checkpoint is resumed only with the same value.


@dataclass
class ModelArguments:
    model_name_or_path: str | None = flag(None, "A local model folder or a hub model.")
    dtype: str = flag("auto", "Type of the weights: auto is fp32 masters (LoRA: frozen base in bf16).", resume="same")
    attn_implementation: str | None = flag(None, "eager, sdpa or flash_attention_2.", resume="same")
    trust_remote_code: bool = flag(False, "Run code that comes with the model.")
    lora: bool = flag(False, "Train LoRA adapters on the layers' matrices instead of all weights.", resume="same")
    lora_rank: int = flag(16, "Rank of the adapters.", at_least=1, resume="same")
    lora_alpha: int = flag(32, "Scale of the adapters; twice the rank is usual.", at_least=1, resume="same")
    lora_dropout: float = flag(0.05, "Dropout in the adapters.", at_least=0, below=1, resume="same")
    lora_variant: str = flag("lora", "lora, rslora (scale alpha / sqrt(rank)) or dora.", resume="same unless default")
    lora_router: bool = flag(False, "Adapt the routers of a mixture of experts too.", resume="same unless default")
    load_in_4bit: bool = flag(False, "QLoRA: keep the frozen base in 4 bits (CUDA).", resume="same")


@dataclass
class DataArguments:
    data_path: list[str] | None = flag(
        None,
        "Files, folders or globs, canonical or raw; an eval.json beside train.json is held out. "
        "belle.json@2x: seen twice per epoch; @0.5x: half of it, another half in the next.",
    )
    replay_path: list[str] | None = flag(None, "Data of an earlier stage, of which each epoch takes a share again.")
    replay_share: float = flag(
        0.0, "Share of an epoch's tokens that comes from --replay_path, as 0.1.", at_least=0, below=1, resume="same"
    )
    eval_data_path: list[str] | None = flag(None, "Held-out files; never trained on.")
    encoding: str = flag("utf-8", "Encoding of the data files.", resume="same")
    reasoning: str = flag(
        "auto",
        "Thoughts: keep or drop them; auto keeps them, and stops where the chat format has no place for them.",
        resume="same unless default",
    )
    preference: str | None = flag(
        None,
        "chosen: learn the chosen replies of preference data, which is refused without it.",
        resume="same unless default",
    )
    chat_format: str = flag("auto", "auto, blossom, chatml, alpaca, mistral, or base (its own).")
    template_kwargs: str = flag(
        "{}", "Further variables of the model's own chat template, as a JSON object.", resume="same unless default"
    )
    train_turns: str = flag(
        "all", "Replies that are trained: all, or the last one of each conversation.", resume="same unless default"
    )
    max_length: int = flag(MAX_LENGTH, "Longest row, in tokens.", at_least=1, resume="same")
    packing: bool = flag(
        True, "Fill each row with whole conversations, kept apart; a batch counts rows.", resume="same"
    )
    cache_dir: str = flag(CACHE_DIR, "Folder for tokenised data, by content.")
    preprocessing_num_workers: int | None = flag(
        None, "Processes that prepare the data; by default all cores, and fewer for little data.", at_least=1
    )
    max_lost: float = flag(0.05, "Stop when a larger share of the conversations would be lost.", at_least=0, at_most=1)
    num_reply_prompts: int = flag(
        12, "Questions of the data answered at the end for the stop rate, beside four fixed prompts.", at_least=0
    )
    max_new_tokens: int = flag(128, "Longest reply before and after training, in tokens.", at_least=1)
    eval_replies: bool = flag(True, "At each evaluation, reply to the four fixed prompts for the run page.")
    eval_quick: bool = flag(False, "Ask the quick check's questions before and after, as sft.evaluate does.")


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' own, with defaults for fine-tuning."""

    learning_rate: float = flag(1e-5, "Peak learning rate; LoRA likes ten times as much.", above=0, resume="same")
    lr_scheduler_type: str = flag("cosine", "Schedule of the learning rate.", resume="same")
    warmup_steps: float = flag(0.03, "Steps of warm-up, or a share of all when below 1.", at_least=0, resume="same")
    logging_steps: float = flag(10, "Steps between log lines.", above=0)
    save_total_limit: int | None = flag(3, "Checkpoints to keep.", at_least=1)
    logging_nan_inf_filter: bool = flag(False, "Hide non-finite losses from the log.")
    include_num_input_tokens_seen: str = flag("non_padding", "Count tokens, padding left out.")
    remove_unused_columns: bool = flag(False, "Not used: rows hold what the model takes.")
    allow_changed: str | None = flag(None, "Fields that may differ from the resumed checkpoint, with commas.")
    rank_timeout: float = flag(90, "Seconds without a sign of life after which a frozen process ends the run.", above=0)
    fused_kernels: str = flag(
        "auto",
        "How norms, activations and rotary positions are fused; auto: on a GPU by Liger's kernels, else compiled in "
        "long runs.",
        choices=fusion.CHOICES,
        resume="same unless default",
    )
    max_shard_size: str = flag(MAX_SHARD_SIZE, "Largest file of weights that is written.")
    sequence_parallel_size: int = flag(
        1, "GPUs that share each packed row, for rows too long for one.", at_least=1, resume="same unless default"
    )
    activation_offload: bool = flag(
        False, "With --gradient_checkpointing, keep the input of each layer on the CPU until the backward pass."
    )
    checkpoint_keep: str = flag("auto", "Checkpointed layers keep what fits, or inputs alone.", choices=KEEP_CHOICES)
    offload: bool = flag(False, "Under DeepSpeed, keep the optimizer (ZeRO-3: the weights too) on the CPU.")
    dry_run: bool = flag(False, "Show and check what the run would do, without reading the weights.")
    probe_steps: int = flag(
        0,
        "A dry run that then measures memory and time: so many steps (3 or more) on the real model, the "
        "rows that take most memory first; their results are not kept.",
    )
    gpu: str | None = flag(None, "The GPUs that a dry run judges, as in 80GBx8; else those of this machine.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags, prepare the run and its data, and train; with --dry_run show and check what would be done."""
    started = time.time()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    with Guard(lasting=__name__ == "__main__") as guard:
        settings = parse_arguments((ModelArguments, DataArguments, TrainingArguments), arguments)
        report = Report() if settings.training.dry_run else None
        check = operator.call if report is None else report.check
        try:
            checkpoint = open_output_dir(settings.training, guard)
            run = prepare_run(settings, check, checkpoint=checkpoint, today=guard.broadcast(date.today()))
            data = load_data(run, check)
            if report is None:
                train(run, data, checkpoint, guard, started=started)
            else:
                preview(run, data, report, guard)
        except Stopped as stop:
            guard.stage = "done"
            say(f"{stop}; {guard.resume_command}")
            sys.exit(STOPPED)
        except RuntimeError as error:
            if not (lost := guard.find_lost_rank(error)):
                raise
            guard.stage = "done"
            print(f"train.py: rank {guard.rank}: {lost}; {guard.resume_command}", file=sys.stderr, flush=True)
            sys.exit(LOST)


def load_data(run: Run, check: Callable) -> Data:
    """Tokenise the files, check what is lost, and lay out the rows of each epoch; `check` calls a check."""
    settings = run.settings.data
    limits = {name: getattr(settings, name) for name in READING}
    limits["num_workers"] = settings.preprocessing_num_workers
    examples, ledger = prepare(list(run.files.times), run.renderer, say=say, **limits)
    held_out, held_out_ledger = prepare(run.files.held_out, run.renderer, say=say, **limits)
    ledgers = {"train": ledger} | ({"eval": held_out_ledger} if run.files.held_out else {})
    for name, counted in ledgers.items():
        if name == "train" or counted["total"]["in"]:  # an empty eval.json: nothing is held out
            check(check_losses, counted, settings.max_lost)
    run.renderer.thinking = find_thinking_default(ledger)
    check(check_probes, run)
    check(check_token_ids, run, max(examples.largest_id, held_out.largest_id))
    data = Data(examples, held_out, ledgers, lay_out_rows(run, examples, ledger) if len(examples) else None)
    sources = group_sources(data.with_source_names())
    names = sources.held_out_names if sources else ()
    check(check_held_out_metrics, run.settings.training, names, num_held_out=len(held_out))
    return data


def preview(run: Run, data: Data, report: Report, guard: Guard) -> None:
    """Show and check what `train` would do, without the weights; exit 2 on a problem.

    With --probe_steps the weights are read after that, and a few steps made and measured, of which nothing is kept.
    """
    show_run(report, run, data, guard, build_trainer)
    if run.settings.training.probe_steps:
        measure_steps(report, run, data, guard, build_trainer)


def train(run: Run, data: Data, checkpoint: str | None, guard: Guard, *, started: float) -> None:
    """Train from the base or from a checkpoint, and save the model; `guard` handles signals and lost ranks."""
    set_seed(run.seed)
    fingerprint = fingerprint_of(run)
    # On the CPU: preparing may take longer than NCCL waits in the next collective.
    guard.check_same({**fingerprint["exact"], "held-out data": run.files.held_out_hashes})
    check_base_unchanged(run, checkpoint, guard)
    changed = check_unchanged(checkpoint, fingerprint, run.settings.training.allow_changed, say)
    if checkpoint:
        deterministic = run.settings.training.full_determinism
        say(describe_resume(changed, on_gpu=run.settings.training.n_gpu > 0, deterministic=deterministic))
    trainer = build_trainer(
        run, data, guard=guard, fingerprint=fingerprint, sources=group_sources(data.with_source_names())
    )
    if checkpoint:
        trainer.continue_from(checkpoint, changed)
    base = store_base(trainer, run)
    say_opening(trainer, run, data)
    record = make_record(run, data, trainer.model, fingerprint)
    replies = Replies(trainer, run)
    trainer.add_callback(run_page(trainer, run, record, replies))
    guard.stage = "training"
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = last_evaluation(trainer)
    guard.end_training()
    replies.ask_all()
    trainer.save_final()
    if trainer.is_world_process_zero():
        record |= {"base": base.wait(), **replies.compare_quick()}
        write_results(trainer, run, record, metrics, replies, seconds=time.time() - started)
        check_and_push(trainer, run)


def build_trainer(run: Run, data: Data, **options) -> Trainer:
    """Keep packed documents apart, compute the loss in chunks, and return a trainer that is ready for its first step.

    `options` are those of `sft.train.trainer.Trainer`.
    """
    settings, model, tokenizer = run.settings, build_model(run), run.renderer.tokenizer
    notes = [attention.isolate_documents(model)] if settings.data.packing else []
    notes.append(loss.use_chunked_loss(model))
    if settings.training.activation_offload:
        notes.append(offload_activations(model))
    notes += fusion.fuse(model, settings.training.fused_kernels, find_circumstances(run, data, model))
    # On a GPU one length for all packed rows: flex attention compiles for it once.
    packed_length = settings.data.max_length if torch.cuda.is_available() else None
    parts = settings.training.sequence_parallel_size
    collate = Collator(tokenizer.pad_token_id, multiple_of=math.lcm(8, parts), packed_length=packed_length)
    if parts > 1:
        notes.append(sequence_parallel.share_rows(model, parts))
        collate = sequence_parallel.Shares(collate, parts, model.shared_row.part)
    trainer = Trainer(
        model=model,
        args=trainer_arguments(run, data.held_out),
        train_dataset=data.rows,
        eval_dataset=data.held_out if len(data.held_out) else None,
        data_collator=collate,
        processing_class=tokenizer,
        **options,
    )
    if settings.training.full_determinism:
        kernels.make_determinism_fast()
    trainer.add_callback(SelfTest(trainer, notes, packing=settings.data.packing))
    trainer.add_callback(KeepOutputs(model, max_length=settings.data.max_length))
    return trainer


def build_model(run: Run):
    """Load the base (fp32 masters), add the adapters if asked, and set the stop ids."""
    flags, training, renderer = run.settings.model, run.settings.training, run.renderer
    compute = "float16" if training.fp16 else "float32"
    if training.bf16:
        compute = "bfloat16"
    model = models.load_model(
        run.model_path,
        dtype=flags.dtype,
        compute=compute,
        lora=flags.lora,
        load_in_4bit=flags.load_in_4bit,
        attn_implementation=flags.attn_implementation,
        trust_remote_code=flags.trust_remote_code,
    )
    if flags.lora:
        how = {"variant": flags.lora_variant, "dropout": flags.lora_dropout}
        plan = adapters.plan_adapters(model, router=flags.lora_router, **how)
        say("\n".join(plan.lines()))
        model = adapters.add_lora(
            model,
            plan=plan,
            rank=flags.lora_rank,
            alpha=flags.lora_alpha,
            untrained_ids=adapters.untrained_ids(renderer.tokenizer, renderer),
            gradient_checkpointing=is_checkpointing(training),
            **how,
        )
    models.set_generation_config(model, renderer.tokenizer, renderer.stop_ids)
    model.save_pretrained = partial(model.save_pretrained, max_shard_size=training.max_shard_size)
    return model


if __name__ == "__main__":
    finish_imports()
    try:
        main()
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)):
            raise
        remedies = "lower --per_device_train_batch_size or --max_length, add --gradient_checkpointing, or use ds_all.sh"
        fail([f"out of memory ({str(error).splitlines()[0]}); {remedies}"], printed_by="all")
    except (ValueError, OSError) as error:
        fail(str(error).splitlines(), printed_by=getattr(error, "printed_by", "machines"))
