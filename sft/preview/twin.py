"""A tiny twin of the model goes through everything that the run does, on the CPU, without the weights.

The twin has the model's class and config at two layers of each kind and small sizes, random weights and the model's own
vocabulary. Code, tokenizer and data are the run's own: a run that is refused for its type is refused here with the same
line.
"""

import contextlib
import copy
import importlib.util
import io
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import PrinterCallback, set_seed
from transformers.utils import cached_file

from sft.chat.reply import load_chat
from sft.chat.sampling import GREEDY
from sft.dataset.dataset import Examples, TrainingRows
from sft.format.contract import probe_tool_conversations
from sft.format.tokens import IGNORE_INDEX
from sft.launch.deepspeed import zero_stage
from sft.launch.processes import Guard, Stopped
from sft.model import load as models
from sft.model.shrink import make_random, relative_distance, shrink_config
from sft.opendata.fields import RecordError
from sft.preview.report import Report, Section
from sft.preview.shape import build_model
from sft.train.losses import group_sources
from sft.train.setup import Data, Run
from sft.train.summary import store_base

NUM_EXAMPLES = 6  # of the data, the first ones
EXAMPLE_TOKENS = 48  # of an example, the last ones; more than a twin's windows
NUM_REPLY_TOKENS = 4
# Relative, of the reopened twin's logits from those of the trained one: in fp32, and where its weights are bf16.
MAX_LOGIT_DISTANCE = 1e-4
MAX_LOGIT_DISTANCE_BF16 = 5e-2
NEEDS_GPU = r"8bit|4bit|paged|bnb|apex|npu|anyprecision|rmsprop_bnb"  # optimizers
REST = {  # flags of the run that a twin's single step leaves out
    **{"resume_from_checkpoint": None, "deepspeed": None, "use_cpu": True, "report_to": [], "push_to_hub": False},
    **{"fused_kernels": "none", "sequence_parallel_size": 1, "fp16": False, "tf32": None},
    **{"max_steps": 1, "warmup_steps": 0, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 2},
    **{"save_steps": 1, "eval_steps": 1, "eval_delay": 0, "eval_on_start": False, "disable_tqdm": True},
    **{"dataloader_num_workers": 0, "dataloader_persistent_workers": False, "dataloader_prefetch_factor": None},
    "dry_run": False,
}


def try_on_twin(report: Report, run: Run, data: Data, guard: Guard, build_trainer: Callable) -> None:
    """Train, save and reopen a tiny twin of the run's model, and let it reply; what fails is a problem."""
    config = models.load_config(run.model_path, trust_remote_code=run.settings.model.trust_remote_code)
    kind = config.model_type
    output = io.StringIO()
    parts = Parts()
    section = Section("tiny twin")
    with tempfile.TemporaryDirectory(prefix="sft-twin-") as folder:
        names = {f"{folder}/base": run.model_path, f"{folder}/run": run.output_dir}
        try:
            described = write_twin(run, config, Path(folder) / "base")
        except Exception as error:  # a config that can't be shrunk fails in many ways
            reason = f"{type(error).__name__}: {_to_message(error, names)}"
            report.notes.append(f"{kind}: no tiny twin can be made of this config: {reason}")
            return
        few = _few_of(data, run.seed)
        try:
            with contextlib.redirect_stdout(output), torch.random.fork_rng(devices=[]):
                _go_through(_run_of_twin(run, folder), few, guard, build_trainer, parts)
        except Stopped:
            raise
        except ValueError as error:  # a run stops with the same line
            if (line := _to_message(error, names)) not in report.problems:
                report.problems.append(line)
        except Exception as error:  # a type fails in its own ways
            reason = f"{type(error).__name__}: {_to_message(error, names)}"
            report.problems.append(f"{kind}: {parts.began[-1][0]} fails on a tiny twin: {reason}")
        finally:
            guard.stage = "loading"
    section.table = [*parts.table(), *([part, "not tried on a CPU", ""] for part in _left_out(run, config))]
    section.lines = [described, *_lines_of(output.getvalue())]
    report.sections.append(section)


class Parts:
    """The parts of a run that a twin goes through, with the time at which each began."""

    def __init__(self):
        self.began = [("making it", time.monotonic())]
        self.is_over = False

    def begin(self, *names: str) -> None:
        self.began.append((", ".join(names), time.monotonic()))

    def table(self) -> list[list[str]]:
        """Rows of: part, passed or failed, seconds. Without `is_over` the last part failed."""
        ends = [began for _name, began in self.began[1:]] + [time.monotonic()]
        results = ["passed"] * (len(ends) - 1) + ["passed" if self.is_over else "failed"]
        seconds = [f"{end - began:.1f}" for (_name, began), end in zip(self.began, ends, strict=True)]
        rows = [list(row) for row in zip([name for name, _began in self.began], results, seconds, strict=True)]
        return [["part", "result", "seconds"], *rows, ["all", "", f"{ends[-1] - self.began[0][1]:.1f}"]]


def write_twin(run: Run, config, folder: Path) -> str:
    """Write a random twin of the run's base into a folder, with the files beside its config; return a line on it."""
    config = shrink_config(config, keep_vocabulary=True)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    model = make_random(lambda: build_model(config, torch.float32, run.settings.model.trust_remote_code))
    model.save_pretrained(folder)
    for file in _files_beside(run.model_path):
        shutil.copy(file, folder / file.name)
    layers = model.config.get_text_config().num_hidden_layers
    size = sum(weight.numel() for weight in model.parameters())
    return f"{type(model).__name__} with {layers} layers, {size:,} random weights"


def _files_beside(path: str) -> list[Path]:
    """Return the code and generation settings of a base: a local folder's or those of the hub."""
    generation = cached_file(
        path,
        "generation_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return [*Path(path).glob("*.py"), *([Path(generation)] if generation else [])]


def _run_of_twin(run: Run, folder: str) -> Run:
    """Return the run with the twin as its base, cut down to a step that is evaluated and saved."""
    training = copy.copy(run.settings.training)
    flags = copy.copy(run.settings.model)
    output = f"{folder}/run"
    given = bool(training.gpu) and not training.fp16
    for name, value in {**REST, "output_dir": output, "bf16": training.bf16 or given}.items():
        setattr(training, name, value)
    for name, steps in (("save_strategy", "steps"), ("eval_strategy", "steps"), ("logging_strategy", "no")):
        before = getattr(training, name)
        setattr(training, name, before if before == "no" else type(before)(steps))
    if re.search(NEEDS_GPU, optimizer_name(training)):
        training.optim = type(training.optim)("adamw_torch")
    if (training.metric_for_best_model or "").removeprefix("eval_").startswith("loss/"):
        training.metric_for_best_model = "loss"  # the few examples may lack the source
    training.__dict__.pop("_setup_devices", None)  # of a GPU; the device is found anew
    flags.load_in_4bit = False
    if "flash" in (flags.attn_implementation or ""):
        flags.attn_implementation = None
    data = copy.copy(run.settings.data)
    data.cache_dir = f"{folder}/cache"
    settings = replace(run.settings, training=training, model=flags, data=data)
    return replace(run, model_path=f"{folder}/base", settings=settings, output_dir=output)


def optimizer_name(training) -> str:
    return str(getattr(training.optim, "value", training.optim))


def _few_of(data: Data, seed: int) -> Data:
    """Return the ends of the first examples, in rows of two where the run packs."""
    few = _take_ends(data.examples)
    rows = TrainingRows(few, 2 * EXAMPLE_TOKENS if data.rows.max_length else None, seed=seed)
    return data._replace(examples=few, held_out=_take_ends(data.held_out), rows=rows)


def _take_ends(examples: Examples) -> Examples:
    """Return the last tokens of the first examples: a reply ends in them."""
    chosen = range(min(NUM_EXAMPLES, len(examples)))
    rows = [{name: of[-EXAMPLE_TOKENS:] for name, of in examples[number].items()} for number in chosen]
    ids, labels = (
        np.concatenate([np.zeros(0, np.int32), *(row[name] for row in rows)]) for name in ("input_ids", "labels")
    )
    starts = np.cumsum([0, *(len(row["input_ids"]) for row in rows)])
    return Examples(ids.astype(np.int32), labels != IGNORE_INDEX, starts, examples.origins[: len(rows)])


# --- the run ------------------------------------------------------------------------------------------------------


def _go_through(run: Run, data: Data, guard: Guard, build_trainer: Callable, parts: Parts) -> None:
    """Do what a run does with a model."""
    training = run.settings.training
    parts.begin("loading", *(["adapters"] if run.settings.model.lora else []))
    set_seed(run.seed)
    assert training.device.type == "cpu"
    sources = group_sources(data.with_source_names())
    trainer = build_trainer(run, data, guard=guard, fingerprint={}, sources=sources)
    trainer.pop_callback(PrinterCallback)
    store_base(trainer, run)
    further = ["an evaluation"] if trainer.args.eval_strategy != "no" else []
    further += ["a checkpoint"] if training.save_strategy != "no" else []
    parts.begin("self-tests", "a step", *further)
    trainer.train()
    parts.begin("saving")
    trainer.save_final()
    parts.begin("reopening")
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    exact = all(weight.dtype == torch.float32 for weight in trained.parameters())
    dtype = "float32" if exact else "bfloat16"
    trust = run.settings.model.trust_remote_code
    chat = load_chat(run.output_dir, device="cpu", dtype=dtype, trust_remote_code=trust)
    _compare_logits(trained, chat.model, data.examples[0]["input_ids"], exact=exact)
    parts.begin("a reply")
    question = [{"role": "user", "content": "Hello"}]
    try:
        chat.prompt_ids(question)
    except RecordError:  # a chat template may demand tools
        chat.tools = next(probe["tools"] for probe in probe_tool_conversations() if "tools" in probe)
    chat.reply(question, replace(GREEDY, max_new_tokens=NUM_REPLY_TOKENS))
    parts.is_over = True


@torch.no_grad()
def _compare_logits(trained, reopened, ids: np.ndarray, *, exact: bool) -> None:
    """Raise ValueError when the saved model is another one than the one that was trained."""
    tokens = torch.from_numpy(ids.astype(np.int64))[None]
    expected, found = (model.eval()(input_ids=tokens).logits for model in (trained, reopened))
    apart = relative_distance(found, expected)
    if not apart < (MAX_LOGIT_DISTANCE if exact else MAX_LOGIT_DISTANCE_BF16):
        name = type(reopened).__name__
        raise ValueError(f"{name}: the saved model's logits are {apart:.1e} from those of the trained one")


# --- what is said of it -------------------------------------------------------------------------------------------


def _to_message(error: Exception, names: dict[str, str]) -> str:
    """Return an error as one line, in which the run's own folders stand for those of the twin (`names`)."""
    text = str(error)
    for of_twin, of_run in names.items():
        text = text.replace(of_twin, of_run)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(lines) if isinstance(error, ValueError) else (lines or ["no reason given"])[0]


def _lines_of(output: str) -> list[str]:
    """Return the lines in which a run says how it packs and computes its loss, and what its self-tests found."""
    wanted = ("documents are kept apart", "loss ", "self-test", "LoRA ")
    return [line for line in output.splitlines() if line.startswith(wanted)]


def _left_out(run: Run, config) -> list[str]:
    """Return what of this run a CPU can't try."""
    training = run.settings.training
    flags = run.settings.model
    stored = getattr(config, "quantization_config", None)
    method = stored.get("quant_method", "") if isinstance(stored, dict) else ""
    stage = zero_stage(training)
    parts = {
        "4-bit weights (QLoRA)": flags.load_in_4bit,
        f"the base's quantised weights ({method})": stored is not None,
        f"--attn_implementation {flags.attn_implementation}": "flash" in (flags.attn_implementation or ""),
        f"--optim {optimizer_name(training)}": re.search(NEEDS_GPU, optimizer_name(training)),
        f"DeepSpeed ZeRO-{stage}": stage,
        f"--fused_kernels {training.fused_kernels}": training.fused_kernels in ("liger", "compile"),
        f"--sequence_parallel_size {training.sequence_parallel_size}": training.sequence_parallel_size > 1,
        "--fp16": training.fp16,
        **{f"kernels of {name}": importlib.util.find_spec(name) for name in ("fla", "causal_conv1d", "mamba_ssm")},
    }
    return [part for part, is_left_out in parts.items() if is_left_out]
