"""What stays of a run beside the model: run.json, the loss curve, the run page and the model card."""

import json
import math
import re
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import torch
from huggingface_hub import ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from transformers import TrainerCallback

from sft.chat.reply import Reply
from sft.checkpoint.save import PAGE
from sft.files import write_text
from sft.model.load import count_parameters
from sft.opendata.cleaning import HAN, has_han
from sft.report.markdown import cell, fence, short

PROJECT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "deepspeed", "peft", "datasets")
CARD, OUR_CARD = "README.md", "<!-- written by train.py -->"
PAGE_SECONDS = 30  # between two pages that are written at log lines
CHART = {"width": 640, "height": 220, "left": 64, "bottom": 196, "top": 10, "right": 616}  # in SVG units
MAX_POINTS = 1000  # of a line in a chart
# Dense bf16 or fp16 with fp32 sums, FLOP/s, from NVIDIA's data sheets and (GeForce) architecture whitepapers.
PEAK_FLOPS = {
    r"H[18]00 PCIe": 756e12,
    r"H100 NVL": 835e12,
    r"H[12]00|H800|GH200": 989e12,
    r"A[18]00\b": 312e12,
    r"L40S": 362e12,
    r"L4\b": 121e12,
    r"A10\b": 125e12,
    r"V100-SXM": 125e12,
    r"V100": 112e12,
    r"T4\b": 65e12,
    r"RTX 4090\b(?! D| Laptop)": 165e12,
    r"RTX 3090\b(?! Ti| Laptop)": 71e12,
}
# As the publishers say; the README's paragraph on licences.
LICENCES = {
    "blossom": "Apache-2.0",
    "belle": "its repository says research use only, its hub pages GPL-3.0; settle that before you ship the model",
}


def provenance() -> dict:
    """Return the command, the versions and the git commit (None outside a checkout)."""
    command = without_secrets([sys.executable, *sys.argv])
    return {"command": command, "versions": package_versions(), "git_commit": _git_commit()}


def package_versions() -> dict[str, str | None]:
    """Return the version of Python and of each of PACKAGES, None where it is not installed."""
    versions = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def without_secrets(command: list[str]) -> list[str]:
    """Return a command line with the values of token flags left out."""
    shown = []
    for word in command:
        secret = bool(shown) and re.fullmatch(r"--\w*token", shown[-1])
        shown.append("***" if secret else re.sub(r"^(--\w*token)=.*", r"\1=***", word))
    return shown


def _git_commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=PROJECT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def plot_losses(log_history: list[dict], path: Path) -> None:
    """Draw training and held-out loss over the steps as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    for key, label, marker in (("loss", "training", ""), ("eval_loss", "held out", "o")):
        points = points_of(log_history, key)
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=3)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, format="png")
    pyplot.close(figure)


def points_of(log_history: list[dict], key: str) -> list[tuple[int, float]]:
    """Return (step, value) of every log entry that has `key`."""
    return [(entry["step"], entry[key]) for entry in log_history if key in entry]


# --- what is measured ---------------------------------------------------------------------------------------------


def repetition(text: str) -> float:
    """Share of a reply's 4-grams that stood in it before (seq-rep-4, Welleck et al. 2020); Chinese by character."""
    words = re.findall(rf"[{HAN}]|[^\W{HAN}]+|[^\w\s]", text)
    grams = list(zip(*(words[start:] for start in range(4)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def rates(replies: Sequence[Reply]) -> dict[str, float]:
    """Share of replies that ended by themselves, and the mean of their repetition."""
    return {
        "stop_rate": sum(reply.ended for reply in replies) / len(replies),
        "repetition_rate": sum(repetition(reply.text) for reply in replies) / len(replies),
    }


def replies_entry(step: int, questions: Sequence[str], replies: Sequence[Reply]) -> dict:
    """Return the log entry of what the model said at a step; a checkpoint keeps it with the log."""
    said = [{"question": q, "reply": r.text, "ended": r.ended} for q, r in zip(questions, replies, strict=False)]
    return {"step": step, **rates(replies), "replies": said}


def peak_flops(device: str) -> float | None:
    """Return the FLOP/s that a GPU reaches at most in bf16 or fp16, None where it is not known."""
    return next((peak for pattern, peak in PEAK_FLOPS.items() if re.search(rf"\b{pattern}", device)), None)


def mfu_of_a_token(model, *, device: str, world_size: int) -> float | None:
    """Return the model FLOPs utilisation at one token per second; None where the device's peak is not known.

    A token takes 2 FLOPs per parameter forward, 2 backward, and 2 for the gradient of a trained one (Kaplan et al.
    2020). Left out: attention over the row, recomputed activations, and input embeddings, which are looked up.
    """
    peak = peak_flops(device)
    if peak is None:
        return None
    trained, total = count_parameters(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and embedding.weight is not head.weight:
        size = getattr(embedding.weight, "ds_numel", embedding.weight.numel())
        total, trained = total - size, trained - size * embedding.weight.requires_grad
    return (4 * total + 2 * trained) / (peak * world_size)


def peak_memory() -> float:
    """Return the most GiB that this process has held: on its GPU, or without one, in main memory."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)


def summarise(log_history: list[dict]) -> dict:
    """Return the numbers of a run that its log holds, None where it has none: typical speed, most memory, last rest."""

    def values(key: str) -> list[float]:
        return [value for _step, value in points_of(log_history, key)]

    losses, speeds, shares = values("loss"), values("tokens_per_second"), values("mfu")
    last = ("eval_loss", "eval_perplexity", "eval_token_accuracy", "stop_rate", "repetition_rate")
    return {
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        **{name: values(name)[-1] for name in last if values(name)},
        "tokens_per_second": round(statistics.median(speeds), 1) if speeds else None,
        "mfu": statistics.median(shares) if shares else None,
        "peak_memory_gib": max(values("peak_memory_gib"), default=None),
    }


# --- the page -----------------------------------------------------------------------------------------------------


class RunPage(TrainerCallback):
    """Keeps report.html up to date: at evaluations and saves, and at log lines, but not more often than PAGE_SECONDS.

    Adds to the log lines the speed since the last one, without evaluations, saves and replies, and the peak memory; to
    the evaluations, where there is a `reply`, what the model says to the `questions`. `mfu` is that of one token per
    second.
    """

    def __init__(
        self,
        folder: Path,
        record: dict,
        *,
        before: dict | None,
        questions: Sequence[str] = (),
        reply: Callable[[], list[Reply]] | None = None,
        mfu: float | None = None,
    ):
        self.path, self.record, self.before = Path(folder) / PAGE, record, before
        self.questions, self.reply, self.mfu = questions, reply, mfu
        self.training, self.written, self.mark = False, 0.0, (0, 0.0)

    def on_train_begin(self, args, state, control, **kwargs):
        self.training = state.is_world_process_zero
        if self.before and not any("replies" in entry for entry in state.log_history):
            state.log_history.insert(0, self.before)
        self._write(state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        tokens, seconds = self._since_mark(state)
        if not self.training or "loss" not in logs or not tokens:
            return
        measured = {"tokens_per_second": round(tokens / seconds, 1), "peak_memory_gib": peak_memory()}
        state.log_history[-1] |= measured | ({"mfu": tokens / seconds * self.mfu} if self.mfu else {})
        if time.monotonic() - self.written >= PAGE_SECONDS:
            self._write(state)
        self._set_mark(state)

    def on_evaluate(self, args, state, control, **kwargs):
        # The last one is left to the end of the run, when all questions are asked.
        if self.training and self.reply and state.global_step < state.max_steps:
            state.log_history.append(replies_entry(state.global_step, self.questions, self.reply()))
        self._write(state)

    def on_save(self, args, state, control, **kwargs):
        self._write(state)

    def on_train_end(self, args, state, control, **kwargs):
        self.training = False

    def _since_mark(self, state) -> tuple[int, float]:
        tokens, began = self.mark
        return state.num_input_tokens_seen - tokens, max(time.monotonic() - began, 1e-9)

    def _set_mark(self, state) -> None:
        self.mark = (state.num_input_tokens_seen, time.monotonic())

    def _write(self, state) -> None:
        if self.training:
            run = {**self.record, "log_history": state.log_history}
            with suppress(OSError):  # a full disk: no reason to end a run, and its save will say so
                write_text(self.path, render_page(run, self.path.parent, step=state.global_step, steps=state.max_steps))
            self.written = time.monotonic()
        self._set_mark(state)


def render_page(run: dict, folder: Path, *, step: int, steps: int, finished: bool = False) -> str:
    """Return the page of a run as HTML that needs nothing beside it; `run` is what run.json holds, or will hold."""
    history = run["log_history"]
    training, held_out = points_of(history, "loss"), points_of(history, "eval_loss")
    return _template("report.html").render(
        run=run,
        name=name_of(folder),
        progress={"step": step, "steps": steps, "finished": finished, "written": time.strftime("%F %T %z")},
        metrics={**summarise(history), **run.get("metrics", {})},
        charts={
            "loss": chart(training, held_out),
            "learning_rate": chart(points_of(history, "learning_rate"), low=0.0),
            "speed": chart(points_of(history, "tokens_per_second"), low=0.0),
            "replies": chart(points_of(history, "stop_rate"), points_of(history, "repetition_rate"), low=0.0),
        },
        by_source=by_source(history),
        said=list({entry["step"]: entry for entry in history if "replies" in entry}.values()),
    )


def by_source(history: list[dict]) -> list[dict]:
    """Return of the training and the held-out loss by source: key, chart, and rows of number, name, first, last."""
    found, keys = [], ("loss", "eval_loss")
    names = sorted(
        {name.partition("/")[2] for entry in history for name in entry if name.partition("/")[0] in keys} - {""}
    )
    for key in keys:
        lines = {name: points_of(history, f"{key}/{name}") for name in names}
        rows = [(n, name, points[0][1], points[-1][1]) for n, (name, points) in enumerate(lines.items()) if points]
        if rows:
            found.append({"key": key, "chart": chart((), (), *lines.values()), "rows": rows})
    return found


def name_of(folder: Path) -> str:
    """Return the name of a run: the launchers put its model into `NAME/model`."""
    folder = Path(folder).resolve()
    return folder.parent.name if folder.name == "model" else folder.name


def chart(
    line: Sequence[tuple], dots: Sequence[tuple] = (), *more: Sequence[tuple], low: float = math.inf
) -> dict | None:
    """Lay out a line, a line with dots and more lines over common axes, in units of CHART; None without a finite point.

    Points are (step, value); the axis of the values goes down to `low` at least.
    """
    series = [[(x, y) for x, y in points if math.isfinite(y)] for points in (line, dots, *more)]
    if not any(series):
        return None
    xs, ys = zip(*(point for points in series for point in points), strict=True)
    (x0, x1), (y0, y1) = _widen(min(xs), max(xs)), _widen(min(*ys, low), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across = CHART["left"] + (x - x0) / (x1 - x0) * (CHART["right"] - CHART["left"])
        return round(across, 1), round(CHART["bottom"] - (y - y0) / (y1 - y0) * (CHART["bottom"] - CHART["top"]), 1)

    lines = [points[:: max(1, len(points) // MAX_POINTS)] + points[-1:] for points in series]
    return {
        **CHART,
        "lines": [" ".join("{},{}".format(*place(*point)) for point in points) for points in lines],
        "dots": [(*place(x, y), f"{y:.4g}", x) for x, y in series[1]],
        "across": [(place(x, y0)[0], f"{x:,.6g}") for x in ticks(x0, x1) if x == int(x)],
        "up": [(place(x0, y)[1], f"{y:,.6g}") for y in ticks(y0, y1)],
    }


def _widen(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)


def ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers between two: multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= (high - low) / 5)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


@lru_cache
def _template(name: str):
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": short, "fence": fence, "cell": cell, "shell": shlex.join}
    return environment.get_template(name)


# --- the model card -----------------------------------------------------------------------------------------------


def write_card(folder: Path, run: dict) -> bool:
    """Write the model card; return False, and leave the file alone, when somebody else wrote one."""
    path = Path(folder) / CARD
    if path.exists() and OUR_CARD not in path.read_text(encoding="utf-8", errors="replace"):
        return False
    write_text(path, render_card(run, folder=str(folder)))
    return True


def render_card(run: dict, *, folder: str) -> str:
    """Return the model card of a finished run, as Markdown with the head that the Hugging Face hub reads."""
    lora = bool(run["settings"].get("lora"))
    head = ModelCardData(
        base_model=run["model"] if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", run["model"]) else None,
        language=languages(text for reply in run["replies"] for text in reply["answers_in_data"]),
        library_name="peft" if lora else "transformers",
        license="unknown",
        pipeline_tag="text-generation",
        tags=["sft", "conversational", *(["lora"] if lora else [])],
    )
    return _template("model_card.md").render(
        head=head.to_yaml(),
        mark=OUR_CARD,
        run=run,
        lora=lora,
        folder=folder,
        name=name_of(Path(folder)),
        licences=licences(run["data"]["train"]),
    )


def languages(texts: Iterable[str]) -> list[str] | None:
    """Return zh and en as far as texts have Chinese characters, or Latin words alone; None for no text."""
    texts = list(texts)
    chinese = any(map(has_han, texts))
    english = any(re.search(r"[A-Za-z]{2}", text) and text.isascii() for text in texts)
    return [*(["zh"] if chinese else []), *(["en"] if english else [])] or None


def licences(files: Iterable[str]) -> dict[str, str]:
    """Return what is known of the licence of each source, told by its name alone, as `sft.opendata` noted it."""
    names = {}
    for file in files:
        ledger = Path(file).with_name("ledger.json")
        with suppress(OSError, ValueError, AttributeError):
            names |= dict.fromkeys(json.loads(ledger.read_text(encoding="utf-8"))["files"])
        if not ledger.is_file():
            names[file] = None
    sample = {path.name for path in (PROJECT / "data_proj" / "sample").glob("*.json*")}
    return {name: _licence(name, sample) for name in names}


def _licence(name: str, sample: set[str]) -> str:
    if Path(name).name in sample:
        return "the sample of the training toolkit, its own"
    return next((text for key, text in LICENCES.items() if key in name.lower()), "unknown")
