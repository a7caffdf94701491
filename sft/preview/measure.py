"""A few steps of a run on the real model, of which nothing is kept: `train.py --probe_steps N`.

The first two take the rows that need most memory: AdamW's state is there from the second on, so running out of memory
shows now. The others take the rows that the run would begin with, and are timed.
"""

import copy
import ctypes
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from transformers import PrinterCallback, TrainerCallback, set_seed

from sft.dataset.dataset import TrainingRows
from sft.launch.processes import Guard
from sft.preview.data import heaviest_rows
from sft.preview.dry_run import updates_of
from sft.preview.memory import gib
from sft.preview.report import Report, Section, show_report
from sft.train.setup import Data, Run

NUM_WARM_UP_STEPS = 2
# mallopt's numbers (glibc's malloc.h) and what a probe sets them to while it looks at the memory: freed blocks go back
# at once, so that what is resident is what is allocated. That costs time, so that timed steps take glibc's largest.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
EXACT = 2**16
FAST = 2**25


def measure_steps(report: Report, run: Run, data: Data, guard: Guard, build_trainer: Callable) -> None:
    """Make the steps of --probe_steps, keep nothing of them, and add memory and time to the report."""
    guard.wait_for_all()  # preparing the data may take longer than NCCL waits in the next collective
    trained = data.examples.row_statistics(run.renderer.stop_ids)["trained"]
    heaviest, *_ = heaviest_rows(data.rows, trained)
    measured = _measured_run(run, str(guard.folder))
    rows = _measured_rows(run, data.rows, heaviest)
    set_seed(run.seed)
    watch = Stopwatch()
    trainer = build_trainer(measured, data._replace(rows=rows, held_out=()), guard=guard, fingerprint={})
    trainer.pop_callback(PrinterCallback)
    trainer.add_callback(watch)
    trainer.train()
    peaks = guard.all_gather(watch.peak)
    describe_measured(report, watch.timed(), peaks, steps=report.steps, counted=report.step_bytes)
    show_report(report, run, since=-1)


def _measured_run(run: Run, output_dir: str) -> Run:
    """Return the run cut down to the measured steps, without anything that is written, logged or evaluated."""
    training = copy.copy(run.settings.training)
    training.planned_steps = training.max_steps  # by which the fused kernels are chosen
    training.output_dir = output_dir
    training.max_steps = training.probe_steps
    training.train_sampling_strategy = "sequential"
    for name in ("save_strategy", "eval_strategy", "logging_strategy"):
        setattr(training, name, type(getattr(training, name))("no"))
    training.report_to = []
    training.push_to_hub = False
    training.load_best_model_at_end = False
    return replace(run, settings=replace(run.settings, training=training), output_dir=output_dir)


def _measured_rows(run: Run, rows: TrainingRows, heaviest: np.ndarray) -> "FirstRows":
    training = run.settings.training
    seed = run.seed if training.data_seed is None else training.data_seed
    updates = updates_of(len(rows), training, batch_size=training.train_batch_size, seed=seed)
    steps = training.probe_steps
    return FirstRows(rows, heaviest, updates.order(0), steps=steps, per_update=updates.rows_per_update)


class FirstRows(TrainingRows):
    """The rows of a probe: the `heaviest` of one update, twice, then the first of the run's own order."""

    def __init__(self, rows: TrainingRows, heaviest: np.ndarray, own: np.ndarray, *, steps: int, per_update: int):
        self.__dict__ |= vars(rows)
        own = own[: min((steps - NUM_WARM_UP_STEPS) * per_update, len(own) // per_update * per_update)]
        # Fewer rows than an update takes: each is an epoch of its own.
        order = (
            np.concatenate([*[heaviest[:per_update]] * NUM_WARM_UP_STEPS, own]) if len(own) else heaviest[:per_update]
        )
        self.rows = [rows.rows[number] for number in order.tolist()]

    def pack_for(self, epoch: int) -> None:
        """The same rows again."""


class Stopwatch(TrainerCallback):
    """Notes when each step ends and the tokens seen by then, and what memory was held at the most.

    On a GPU that is what torch allocated. Else it is what is resident in the first steps, beyond what was when the
    watch was made: make it before the model is built.
    """

    def __init__(self):
        self.ends: list[tuple[float, int]] = []
        self.peak = 0
        self.on_gpu = torch.cuda.is_available()
        self.before = _resident_bytes()
        if not self.on_gpu:
            _set_malloc(EXACT)

    def on_train_begin(self, args, state, control, **kwargs):
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            with suppress(OSError):  # the highest resident size starts anew, without what loading took
                Path("/proc/self/clear_refs").write_text("5")

    def on_step_end(self, args, state, control, **kwargs):
        if self.on_gpu:
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated()
        elif len(self.ends) < NUM_WARM_UP_STEPS:
            self.peak = _resident_bytes("VmHWM") - self.before
        if len(self.ends) == NUM_WARM_UP_STEPS - 1 and not self.on_gpu:
            _set_malloc(FAST)
        self.ends.append((time.monotonic(), state.num_input_tokens_seen))

    def timed(self) -> list[tuple[float, int]]:
        """Return (seconds, tokens without padding) of each step after the first ones, of all processes together."""
        ends = self.ends[NUM_WARM_UP_STEPS - 1 :]
        return [(now - then, seen - before) for (then, before), (now, seen) in pairwise(ends)]


def _resident_bytes(name: str = "VmRSS") -> int:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _set_malloc(threshold: int) -> None:
    with suppress(AttributeError):  # another libc
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            ctypes.CDLL(None).mallopt(option, threshold)


def describe_measured(
    report: Report, timed: list[tuple[float, int]], peaks: list[int], *, steps: int, counted: int
) -> None:
    """Add what a probe measured: `peaks` of each process, beside the bytes `counted`; the time of a run of `steps`."""
    seconds = statistics.median(seconds for seconds, _tokens in timed)
    speed = statistics.median(tokens / seconds for seconds, tokens in timed)
    time_of_run = format_duration(steps * seconds)
    peak = max(peaks)
    kind = "allocated on the GPU" if torch.cuda.is_available() else "resident"
    lines = [
        f"{NUM_WARM_UP_STEPS} steps of the rows that take most memory, not timed; "
        f"then {len(timed)} of those the run begins with",
        f"speed: {speed:,.0f} tokens/s without padding, {seconds:.3g} s a step (median)",
        f"the run: {steps:,} steps take about {time_of_run}, without start, evaluations, replies, saves",
        f"peak memory ({kind}, process with most): {gib(peak)}, counted {gib(counted)} ({counted / peak:.2f} of it)",
    ]
    if abs(counted - peak) > max(0.15 * peak, 2**27):
        lines.append("that is far from what was counted, so the other ways to train may be off as well")
    report.sections.append(Section(f"measured on {len(peaks)} processes" if peaks[1:] else "measured", [], lines))


def format_duration(seconds: float) -> str:
    """Return seconds as people say them: 48 s, 12 min, 5.5 h, 3.1 days."""
    for size, name in ((86_400 * 2, "days"), (3600 * 2, "h"), (120, "min")):
        if seconds >= size:
            shown = seconds / {"days": 86_400, "h": 3600, "min": 60}[name]
            return f"{shown:.3g} {name}"
    return f"{seconds:.3g} s"
