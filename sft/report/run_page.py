"""The run page, report.html: curves, replies and settings, during a run and after its end."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from transformers import TrainerCallback

from sft.chat.reply import Reply
from sft.checkpoint.save import PAGE
from sft.files import write_text
from sft.report.charts import lay_out_chart, points_of
from sft.report.measures import peak_memory, replies_entry, summarise_log
from sft.report.templates import load_template

PAGE_SECONDS = 30  # between two pages that are written at log lines


@dataclass(eq=False)
class RunPage(TrainerCallback):
    """Keeps report.html up to date: at evaluations and saves, and at log lines, but not more often than PAGE_SECONDS.

    Adds to the log lines the speed since the last one, without evaluations, saves and replies, and the peak memory; to
    the evaluations, where there is a `reply`, what the model says to the `questions`. `mfu` is that of one token per
    second.
    """

    folder: Path
    record: dict
    _: KW_ONLY
    before: dict | None
    questions: Sequence[str] = ()
    reply: Callable[[], list[Reply]] | None = None
    mfu: float | None = None
    training: bool = False
    written: float = 0.0
    tokens_seen: int = 0  # when the speed was last measured
    began: float = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.training = state.is_world_process_zero
        if self.before and not any("replies" in entry for entry in state.log_history):
            state.log_history.insert(0, self.before)
        self._write(state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        tokens = state.num_input_tokens_seen - self.tokens_seen
        seconds = max(time.monotonic() - self.began, 1e-9)
        if not self.training or "loss" not in logs or not tokens:
            return
        measured = {"tokens_per_second": round(tokens / seconds, 1), "peak_memory_gib": peak_memory()}
        state.log_history[-1] |= measured | ({"mfu": tokens / seconds * self.mfu} if self.mfu else {})
        if time.monotonic() - self.written >= PAGE_SECONDS:
            self._write(state)
        self._restart_clock(state)

    def on_evaluate(self, args, state, control, **kwargs):
        # The last one is left to the end of the run, when all questions are asked.
        if self.training and self.reply and state.global_step < state.max_steps:
            state.log_history.append(replies_entry(state.global_step, self.questions, self.reply()))
        self._write(state)

    def on_save(self, args, state, control, **kwargs):
        self._write(state)

    def on_train_end(self, args, state, control, **kwargs):
        self.training = False

    def _restart_clock(self, state) -> None:
        self.tokens_seen = state.num_input_tokens_seen
        self.began = time.monotonic()

    def _write(self, state) -> None:
        if self.training:
            run = {**self.record, "log_history": state.log_history}
            with suppress(OSError):  # a full disk: no reason to end a run, and its save will say so
                page = render_page(run, self.folder, step=state.global_step, steps=state.max_steps)
                write_text(self.folder / PAGE, page)
            self.written = time.monotonic()
        self._restart_clock(state)


def render_page(run: dict, folder: Path, *, step: int, steps: int, finished: bool = False) -> str:
    """Return the page of a run as HTML that needs nothing beside it; `run` is what run.json holds, or will hold."""
    history = run["log_history"]
    training = points_of(history, "loss")
    held_out = points_of(history, "eval_loss")
    return load_template("report.html").render(
        run=run,
        name=name_of(folder),
        progress={"step": step, "steps": steps, "finished": finished, "written": time.strftime("%F %T %z")},
        metrics={**summarise_log(history), **run.get("metrics", {})},
        charts={
            "loss": lay_out_chart(training, held_out),
            "learning_rate": lay_out_chart(points_of(history, "learning_rate"), low=0.0),
            "speed": lay_out_chart(points_of(history, "tokens_per_second"), low=0.0),
            "replies": lay_out_chart(points_of(history, "stop_rate"), points_of(history, "repetition_rate"), low=0.0),
        },
        by_source=by_source(history),
        said=list({entry["step"]: entry for entry in history if "replies" in entry}.values()),
    )


def by_source(history: list[dict]) -> list[dict]:
    """Return of the training and the held-out loss by source: key, chart, and rows of number, name, first, last."""
    found = []
    keys = ("loss", "eval_loss")
    names = sorted(
        {name.partition("/")[2] for entry in history for name in entry if name.partition("/")[0] in keys} - {""}
    )
    for key in keys:
        lines = {name: points_of(history, f"{key}/{name}") for name in names}
        rows = [(n, name, points[0][1], points[-1][1]) for n, (name, points) in enumerate(lines.items()) if points]
        if rows:
            found.append({"key": key, "chart": lay_out_chart((), (), *lines.values()), "rows": rows})
    return found


def name_of(folder: Path) -> str:
    """Return the name of a run: the launchers put its model into `NAME/model`."""
    folder = Path(folder).resolve()
    return folder.parent.name if folder.name == "model" else folder.name
