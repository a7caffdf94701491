"""Flags -> Run: all inputs of a training before its model is loaded; made once, for training and dry run."""

import copy
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import transformers

from sft.base import check_base
from sft.checkpoint.manifest import find_checkpoint, find_damage, has_optimizer
from sft.checkpoint.resume import make_fingerprint, read_fingerprint
from sft.checkpoint.save import recover_checkpoint
from sft.dataset.dataset import Examples, TrainingRows, file_hashes
from sft.dataset.mixture import find_files, mix
from sft.format.contract import check_contract, check_saved, check_variables, pick_conversations
from sft.format.render import Renderer
from sft.launch.deepspeed import zero_stage
from sft.launch.processes import Guard, UserError
from sft.model import fusion
from sft.model import load as models
from sft.opendata.files import find_skipped
from sft.report.measures import mfu_of_a_token
from sft.report.provenance import package_versions, without_secrets
from sft.report.text import say
from sft.train import sequence_parallel
from sft.train.arguments import Settings
from sft.train.checks import check_against_config, parse_gpu

NUM_PROBES_OF_A_KIND = 4  # conversations of each kind in a file on which train = serve is checked
USUAL_MFU = 0.4  # model FLOPs utilisation of a training step


@dataclass(frozen=True)
class Files:
    """The data files of a run. `times`: how often an epoch sees each training file (None: replay, by its share).

    `skipped` are files of the given folders whose names are not those of data.
    """

    times: Mapping[str, float | None]
    held_out: Sequence[str]
    skipped: Sequence[str] = ()

    @cached_property
    def train_hashes(self) -> dict[str, str]:
        return file_hashes(self.times)

    @cached_property
    def held_out_hashes(self) -> dict[str, str]:
        return file_hashes(self.held_out)


@dataclass(frozen=True)
class Run:
    """A run as its flags ask for it. `model_path`: a local folder, absolute, or a model of the hub."""

    model_path: str
    renderer: Renderer
    settings: Settings
    files: Files
    output_dir: str
    seed: int


class Data(NamedTuple):
    """The tokenised data of a run; `ledgers` are the accounts of "train" and "eval", `rows` None without examples."""

    examples: Examples
    held_out: Examples
    ledgers: dict[str, dict]
    rows: TrainingRows | None

    def with_source_names(self) -> list[tuple[Examples, Sequence[str]]]:
        """Return the examples to train on and those held out, each with the names of its sources."""
        names = [self.ledgers.get(part, {}).get("source_names", ()) for part in ("train", "eval")]
        return [(self.examples, names[0]), (self.held_out, names[1])]


def prepare_run(settings: Settings, check: Callable, *, checkpoint: str | None, today: date) -> Run:
    """Find the model and the files, load the tokenizer, and bind the chat format to it; `check` calls a check.

    A chat template may write `today` into prompts, one date on all ranks; a run that resumes keeps its
    checkpoint's, and with "auto" its chat format too.
    """
    path = models.absolute(settings.model.model_name_or_path)
    trust_remote_code = settings.model.trust_remote_code
    models.load_config(path, trust_remote_code=trust_remote_code)  # a broken one ends a dry run too
    check(check_against_config, settings, path)
    if settings.training.sequence_parallel_size > 1:
        check(check_sharing, settings, path)
    data = settings.data
    trained = find_trained_format(checkpoint)
    renderer = load_renderer(
        path,
        trained.get("name", "auto") if data.chat_format == "auto" else data.chat_format,
        trust_remote_code=trust_remote_code,
        template_kwargs=json.loads(data.template_kwargs) or None,
        today=date.fromisoformat(trained["date"]) if "date" in trained else today,
        train_turns=data.train_turns,
    )
    times, held_out = find_files(data.data_path, data.eval_data_path or (), data.replay_path or ())
    skipped = find_skipped([*data.data_path, *(data.eval_data_path or ()), *(data.replay_path or ())])
    training = settings.training
    return Run(path, renderer, settings, Files(times, held_out, skipped), training.output_dir, training.seed)


def check_sharing(settings: Settings, path: str) -> None:
    """Raise ValueError when these processes can't share the rows of the model; its weights are not read."""
    parts = settings.training.sequence_parallel_size
    trusted = settings.model.trust_remote_code
    sequence_parallel.check_processes(parts, count_processes(settings.training))
    config = models.load_config(path, trust_remote_code=trusted)
    options = {"trust_remote_code": True} if trusted else {}
    if settings.model.attn_implementation:
        options["attn_implementation"] = settings.model.attn_implementation
    sequence_parallel.check_model(config, parts=parts, max_length=settings.data.max_length, options=options)


def load_renderer(model_path: str, chat_format: str, *, trust_remote_code: bool, **options) -> Renderer:
    """Load the tokenizer, bind the chat format to it, and stop if training and serving would differ."""
    tokenizer = models.load_tokenizer(model_path, trust_remote_code=trust_remote_code)
    renderer = Renderer(tokenizer, chat_format, **options)
    check_variables(renderer, options["template_kwargs"])
    if problems := check_contract(renderer):
        raise ValueError(
            f"chat format {renderer.name!r} doesn't fit this tokenizer: {'; '.join(problems[:3])}; "
            "choose another --chat_format"
        )
    tokenizer.chat_template = renderer.chat_template
    return renderer


def pick_probes(run: Run) -> list[dict]:
    """Return conversations of the training data on which train = serve is checked: some of each kind in each file."""
    data = run.settings.data
    keeps = data.reasoning != "drop" and run.renderer.keeps_reasoning
    reading = {"encoding": data.encoding, "preference": data.preference, "reasoning": "keep" if keeps else "drop"}
    return pick_conversations(list(run.files.times), NUM_PROBES_OF_A_KIND, **reading)


def check_probes(run: Run) -> int:
    """Return on how many conversations of the data train = serve was checked; ValueError if it isn't so."""
    probes = pick_probes(run)
    if problems := check_contract(run.renderer, probes):
        raise ValueError(f"chat format {run.renderer.name!r} on this data: {'; '.join(problems[:3])}")
    return len(probes)


def check_saved_folder(run: Run) -> str:
    """Read the saved tokenizer again, and compare it with training on the data's own conversations; return a line.

    ValueError names what a server would do otherwise than training did.
    """
    probes = pick_probes(run)
    tokenizer = models.load_tokenizer(run.output_dir, trust_remote_code=run.settings.model.trust_remote_code)
    if problems := check_saved(tokenizer, run.renderer, probes):
        raise ValueError(
            f"{run.output_dir}: the model is saved, but its tokenizer and chat template are not those of the "
            f"training: {'; '.join(problems[:3])}; don't serve it from this folder"
        )
    return f"saved folder: train = serve, checked on {len(probes):,} conversations of the data"


def find_trained_format(checkpoint: str | None) -> dict:
    """Return the name of the chat format that a checkpoint was trained with, and the date that its template wrote."""
    return read_fingerprint(checkpoint)["exact"].get("chat_format", {}) if checkpoint else {}


def check_token_ids(run: Run, largest_id: int) -> None:
    """Raise ValueError when the data or the chat format has a token for which the model has no embedding row."""
    config = models.load_config(run.model_path, trust_remote_code=run.settings.model.trust_remote_code)
    used_ids = [*run.renderer.stop_ids, *run.renderer.control_ids]
    model = SimpleNamespace(config=config)
    models.check_rows(model, run.renderer.tokenizer, run.model_path, used_ids=used_ids, largest_id=largest_id)


def lay_out_rows(run: Run, examples: Examples, ledger: dict) -> TrainingRows:
    """Return the rows of the run: as many in every epoch that it can reach."""
    data = run.settings.data
    training = run.settings.training
    num_rows = {file: counts.get("kept", 0) + counts.get("further_rows", 0) for file, counts in ledger["files"].items()}
    mixture = mix(run.files.times, num_rows, examples.lengths, replay_share=data.replay_share, seed=run.seed)
    max_length = data.max_length if data.packing else None
    rows = TrainingRows(examples, max_length, seed=run.seed, mixture=mixture)
    if not (mixture.changes and max_length):
        return rows
    per_update = training.train_batch_size * training.gradient_accumulation_steps * count_row_groups(training)
    epochs = training.num_train_epochs
    if training.max_steps > 0:
        epochs = training.max_steps * per_update / max(1, len(rows)) + 1
    return TrainingRows(examples, max_length, seed=run.seed, mixture=mixture, epochs=math.ceil(epochs))


def count_processes(training) -> int:
    """Return the processes that share an update; in a dry run those that the launcher would start.

    Without a launcher a dry run counts one, or under DeepSpeed one for each GPU that it judges.
    """
    if not training.dry_run:
        return training.world_size
    launched = int(os.environ.get("NUM_PROCESSES") or os.environ.get("WORLD_SIZE") or 0)
    if launched or not training.deepspeed:
        return launched or 1
    return find_gpus(training.gpu).count


def count_row_groups(training) -> int:
    """Return how many groups of processes take rows of their own in an update: the data-parallel size."""
    return max(1, count_processes(training) // training.sequence_parallel_size)


def describe_processes(training) -> str:
    """Return, as in "8 processes" or "4 groups of 2 processes", what multiplies the rows of a process."""
    parts = training.sequence_parallel_size
    return f"{count_row_groups(training)} " + ("processes" if parts == 1 else f"groups of {parts} processes")


class Gpus(NamedTuple):
    """The GPUs that a dry run judges, or without any the machine's memory."""

    bytes_each: int
    count: int
    name: str
    on_gpu: bool


def find_gpus(gpu: str | None) -> Gpus:
    """Return the GPUs of `--gpu`, else those of this machine, else its memory."""
    if gpu:
        return Gpus(*parse_gpu(gpu), f"--gpu {gpu}", True)
    if count := torch.cuda.device_count():
        return Gpus(torch.cuda.get_device_properties(0).total_memory, count, torch.cuda.get_device_name(), True)
    return Gpus(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), 1, "this machine's memory", False)


def trainer_arguments(run: Run, held_out: Examples):
    """Return a copy of the trainer's flags with what depends on data and machine filled in."""
    arguments = copy.copy(run.settings.training)
    if not len(held_out) and arguments.eval_strategy != "no":
        say("no held-out data, so nothing is evaluated; give --eval_data_path, or an eval.json beside train.json")
        arguments.eval_strategy = transformers.IntervalStrategy.NO
    arguments.label_names = ["labels"]
    arguments.dataloader_pin_memory &= torch.cuda.is_available()
    arguments.use_liger_kernel = False  # our model has them already; transformers would replace our loss by theirs
    return arguments


def find_circumstances(run: Run, data: Data, model) -> fusion.Circumstances:
    """Return what the choice of fused kernels depends on."""
    training = run.settings.training
    on_gpu = torch.cuda.is_available() and not training.use_cpu
    return fusion.Circumstances(
        on_gpu=on_gpu,
        half=training.bf16 or training.fp16,
        lora=run.settings.model.lora,
        zero_stage=zero_stage(training) if training.deepspeed else None,
        world_size=training.world_size * max(1, training.n_gpu),
        accumulation=training.gradient_accumulation_steps,
        seconds=estimate_seconds(run, data, model, torch.cuda.get_device_name()) if on_gpu else None,
    )


def estimate_seconds(run: Run, data: Data, model, device: str) -> float | None:
    """Return about how long training takes at 40% of the GPU's peak; None for a GPU whose peak is not known."""
    training = run.settings.training
    share_of_peak = mfu_of_a_token(model, device=device, world_size=1)
    if share_of_peak is None:
        return None
    tokens = training.num_train_epochs * data.examples.lengths.sum() / training.world_size
    if (steps := getattr(training, "planned_steps", training.max_steps)) > 0:
        rows = steps * training.train_batch_size * training.gradient_accumulation_steps
        longest = run.settings.data.max_length if run.settings.data.packing else data.examples.lengths.mean()
        tokens = rows * longest
    return float(tokens * share_of_peak / USUAL_MFU)


# --- resume -------------------------------------------------------------------------------------------------------


def open_output_dir(training, guard: Guard) -> str | None:
    """Lock the output folder, remove what a killed run left in it, and return the checkpoint to resume from, if any.

    A dry run leaves the folder alone; one that measures steps locks a folder beside it.
    """
    if training.dry_run:
        if training.probe_steps:
            folder = f"{training.output_dir.rstrip('/')}.probe"
            guard.lock_output_dir(folder, timeout=training.rank_timeout, resume_command="the probe's files are deleted")
        checkpoint, _lines, problem = find_named_checkpoint(training.resume_from_checkpoint, training.output_dir)
        return None if problem else checkpoint
    guard.lock_output_dir(training.output_dir, timeout=training.rank_timeout, resume_command=command_to_resume())
    found = None
    leftovers = []
    if guard.rank == 0:
        leftovers = recover_checkpoint(Path(training.output_dir))
        found = find_named_checkpoint(training.resume_from_checkpoint, training.output_dir)
    (checkpoint, lines, problem), leftovers = guard.broadcast((found, leftovers))
    for line in [*leftovers, *lines]:
        say(line)
    if problem:
        raise UserError(problem)
    return checkpoint


def find_named_checkpoint(named: str | None, output_dir: str) -> tuple[str | None, list[str], str | None]:
    """Return the checkpoint to resume from: the named one, or with "auto" the newest complete one of the output folder.

    And lines to say, and what is wrong with the named one. Changes nothing.
    """
    checkpoint = named
    lines = []
    problem = None
    if named in ("auto", "True", "true"):
        checkpoint, skipped = find_checkpoint(output_dir)
        found = f"resuming from {checkpoint}" if checkpoint else f"no checkpoint in {output_dir}; starting anew"
        lines = [*skipped, found]
    elif named:
        problem = find_damage(Path(named))
    if checkpoint and not problem and not has_optimizer(Path(checkpoint)):
        problem = f"{checkpoint} has no optimizer states (--save_only_model); give it as --model_name_or_path"
        return checkpoint, lines, f"--resume_from_checkpoint {named}: {problem}"
    wrong = f"--resume_from_checkpoint {named}: {problem}; use auto, or name another checkpoint"
    return checkpoint, lines, wrong if problem else None


def find_other_base(run: Run, checkpoint: str | None) -> str | None:
    """Return how the run's base differs from the one that a checkpoint was trained from, or None."""
    if checkpoint is None:
        return None
    options = {"remedy": "name it with --model_name_or_path", "cache_dir": run.settings.data.cache_dir}
    try:
        check_base(checkpoint, run.model_path, say=say, **options)
    except ValueError as error:
        if "base" not in (run.settings.training.allow_changed or "").replace(" ", "").split(","):
            return str(error)
        say(f"allowed: {error}")
    return None


def check_base_unchanged(run: Run, checkpoint: str | None, guard: Guard) -> None:
    """Raise UserError on all ranks where a run would resume with another base; rank 0 reads the files."""
    if problem := guard.broadcast(find_other_base(run, checkpoint) if guard.rank == 0 else None):
        raise UserError(problem)


def command_to_resume() -> str:
    """Return the command that resumes this run: with the same number of processes, from the same working folder."""
    flag = "--resume_from_checkpoint"
    typed = without_secrets(sys.argv)
    words = [
        word
        for place, word in enumerate(typed)
        if flag not in (word, typed[place - 1]) and not word.startswith(f"{flag}=")
    ]
    command = shlex.join([*words, flag, "auto"])
    processes = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")  # the deepspeed launcher's name
    if "TORCHELASTIC_RUN_ID" in os.environ:
        command = f"torchrun --standalone --nproc_per_node {processes} {command}"
    elif processes:
        command = f"NUM_GPUS={processes} {sys.executable} -m sft.launch {command}"
    else:
        command = f"{sys.executable} {command}"
    return f"continue with: cd {shlex.quote(os.getcwd())} && {command}"


def fingerprint_of(run: Run) -> dict:
    """Return what the run depends on, for its checkpoints: flags, data, format, base, processes, versions."""
    training = run.settings.training
    hashes = run.files.train_hashes
    names = [Path(file).name for file in hashes]
    if len(set(names)) < len(names):
        names = list(hashes)
    device = torch.cuda.get_device_name() if training.n_gpu else "cpu"
    times = run.files.times.values()
    dated = {"date": run.renderer.today.isoformat()} if run.renderer.writes_date else {}
    return make_fingerprint(
        run.settings.same_on_resume(),
        versions={**package_versions(), "device": device},
        data=dict(zip(names, hashes.values(), strict=True)),
        times_per_epoch={name: often for name, often in zip(names, times, strict=True) if often != 1},
        chat_format={"name": run.renderer.name, "fingerprint": run.renderer.fingerprint()} | dated,
        world_size=count_processes(training),
        zero_stage=zero_stage(training),
    )
