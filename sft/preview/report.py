"""The report of a dry run: sections, rows to show, problems and notes; printed, and written as a page."""

import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sft.files import write_text
from sft.report.provenance import without_secrets
from sft.report.templates import load_template
from sft.report.text import paint, say, split_by_loss
from sft.tables import align_columns
from sft.train.arguments import fail
from sft.train.setup import Run

MAX_PRINTED_TOKENS = 400  # of a row, in a terminal


@dataclass
class Section:
    """A part of the report: a table, its first row the header, and lines below."""

    title: str
    table: list[list[str]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


@dataclass
class Report:
    """Results of a dry run. `problems`: the run would fail, or train badly without an error. `notes`: to be checked."""

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


def show_report(report: Report, run: Run, *, since: int = 0) -> None:
    """Print the report, or its sections `since` one; write it as a page; exit 2 when it has a problem."""
    page = Path(f"{run.output_dir.rstrip('/')}.dry_run.html")
    tokenizer = run.renderer.tokenizer
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


def as_text(report: Report, tokenizer, *, since: int = 0) -> str:
    """Return the report for a terminal, from a section on; long rows are cut in the middle."""
    lines = []
    for title, ids, labels in report.samples if not since else ():
        lines += [f"== {title}", *_paint_ends(tokenizer, ids, labels), ""]
    for section in report.sections[since:]:
        lines += [f"== {section.title}", *align_columns(section.table), *section.lines, ""]
    lines += [f"note: {note}" for note in report.notes if not since]
    return "\n".join(lines)


def _paint_ends(tokenizer, ids: np.ndarray, labels: np.ndarray) -> list[str]:
    half = MAX_PRINTED_TOKENS // 2
    if len(ids) <= 2 * half:
        return [paint(tokenizer, ids, labels)]
    left_out = f"[… {len(ids) - 2 * half:,} tokens …]"
    return [paint(tokenizer, ids[:half], labels[:half]), left_out, paint(tokenizer, ids[-half:], labels[-half:])]


def write_page(report: Report, tokenizer, path: Path) -> None:
    """Write the report as one HTML file that needs nothing else."""
    samples = [(title, split_by_loss(tokenizer, ids, labels)) for title, ids, labels in report.samples]
    path.parent.mkdir(parents=True, exist_ok=True)
    page = load_template("dry_run.html", Path(__file__).parent)
    write_text(path, page.render(report=report, samples=samples))
