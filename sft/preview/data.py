"""Data and chat format of a run that is not started yet: tables by source, train = serve, leaks, rows to show."""

from collections.abc import Sequence

import numpy as np

from sft.dataset.dataset import Examples, TrainingRows
from sft.dataset.ledger import EXPLAINED, KEPT_OUTCOMES, LOST_OUTCOMES, ledger_lines
from sft.dataset.mixture import mixture_table
from sft.model import adapters
from sft.preview.report import Report, Section
from sft.train.setup import Data, Run, pick_probes
from sft.train.summary import describe_thinking

BARS = " ▁▂▃▄▅▆▇█"
MAX_LEAKED_SHARE = 0.05  # of the held-out questions, in the training data
MAX_SAMPLED_SOURCES = 20


def describe_tokenizer(report: Report, run: Run) -> None:
    """Say what the chat format is, what ends a reply, and on how much of the data train = serve was checked."""
    renderer = run.renderer
    probes = pick_probes(run)
    named = sum(renderer.names_control(probe["messages"], probe.get("tools")) for probe in probes)
    name = renderer.tokenizer.convert_ids_to_tokens
    stops = ", ".join(f"{name(stop)} ({stop})" for stop in renderer.stop_ids)
    pad = renderer.tokenizer.pad_token_id
    lines = [f"chat format {renderer.name}; a reply ends in {stops}; pad is {name(pad)} ({pad})"]
    lines.append(f"chosen because: {renderer.reason}")
    if renderer.writes_date:
        report.notes.append(
            f"the chat template writes the date: training uses {renderer.today}; a server's prompts differ in that line"
        )
    if renderer.thinking is not None:
        lines.append(describe_thinking(renderer))
    lines.append(f"train = serve: checked on {len(probes):,} conversations of the data, and on those that are built in")
    if named:
        report.notes.append(
            f"{named:,} of the {len(probes):,} checked conversations write a control token, which training keeps as "
            "plain text; a server that renders with the saved template may read it as the token"
        )
    if pad in renderer.stop_ids:
        report.notes.append("pad is a stop token, which does no harm here: padding is masked by position")
    unseen = adapters.untrained_ids(renderer.tokenizer, renderer)
    if unseen and run.settings.model.lora:
        rows = ", ".join(map(name, unseen))
        report.notes.append(f"LoRA: the base may never have seen {rows}; their embedding and head rows are trained too")
    report.sections.append(Section("chat format", [], lines))


def describe_all_data(report: Report, data: Data, stop_ids: Sequence[int]) -> np.ndarray:
    """Add the data to train on and the held-out data, with rows; return the statistics of the examples."""
    mixture = data.rows.mixture
    examples = data.examples
    held_out = data.held_out
    ledger = data.ledgers["train"]
    facts = examples.row_statistics(stop_ids)
    eval_facts = held_out.row_statistics(stop_ids)
    describe_data(report, "training data", examples, ledger, facts)
    if not mixture.is_plain:
        report.sections.append(Section("mixture", mixture_table(mixture, examples.lengths)))
    if len(held_out):
        describe_data(report, "held-out data", held_out, data.ledgers["eval"], eval_facts)
    check_stops(report, facts, examples.origins)
    check_leaks(report, examples, held_out, facts, eval_facts)
    pick_samples(report, examples, facts, ledger["source_names"])
    return facts


def describe_data(report: Report, name: str, examples: Examples, ledger: dict, facts: np.ndarray) -> None:
    """Add a table of the sources of `examples`, and the ledger's lines."""
    header = ["source", "in", "kept", "shortened", "lost", "replies", "tokens", "trained", "p5", "median", "p95"]
    section = Section(name, [[*header, "longest", f"lengths to {ledger['max_length']:,}", "end in stop"]])
    numbers = {source: number for number, source in enumerate(ledger["source_names"])}
    for source, counted in ledger["sources"].items():
        chosen = examples.origins["source"] == numbers.get(source, -1)
        if chosen.all():
            chosen = slice(None)  # a view, and no copy
        section.table.append([source, *_to_row(counted, examples.lengths[chosen], facts[chosen], ledger["max_length"])])
    if len(section.table) > 2:
        section.table.append(["all", *_to_row(ledger["total"], examples.lengths, facts, ledger["max_length"])])
    section.lines = ledger_lines(ledger)
    report.sections.append(section)


def _to_row(counted: dict, lengths: np.ndarray, facts: np.ndarray, max_length: int) -> list[str]:
    lost = sum(counted.get(reason, 0) for reason in LOST_OUTCOMES)
    shortened = counted.get("cut", 0) + counted.get("turns_dropped", 0)
    row = [f"{counted['in']:,}", f"{len(lengths):,}", f"{shortened:,}", f"{lost:,}"]
    if not len(lengths):
        return [*row, *[""] * 9]
    tokens = int(lengths.sum())
    edges = np.percentile(lengths, [5, 50, 95])
    row += [f"{facts['replies'].sum():,}", f"{tokens:,}", f"{facts['trained'].sum() / tokens:.0%}"]
    row += [f"{edge:,.0f}" for edge in edges]
    return [*row, f"{lengths.max():,}", draw_histogram(lengths, max_length), f"{facts['stops'].mean():.1%}"]


def draw_histogram(lengths: np.ndarray, max_length: int, bins: int = 12) -> str:
    """Return bars for the lengths from 0 to `max_length` tokens: a blank is none, the lowest bar at least one."""
    counts, _edges = np.histogram(lengths, bins, (0, max_length + 1))
    heights = np.ceil(counts / counts.max() * (len(BARS) - 1)).astype(int)
    return "".join(BARS[height] for height in heights)


def check_stops(report: Report, facts: np.ndarray, origins: np.ndarray) -> None:
    """A whole conversation must end in the stop token; if most are cut, the model learns never to stop."""
    whole = origins["way"] != KEPT_OUTCOMES.index("cut")
    if not facts["stops"][whole].all():
        number = int((~facts["stops"][whole]).sum())
        report.problems.append(f"{number:,} whole rows end without the stop token; choose another --chat_format")
    if len(facts) and facts["stops"].mean() < 0.5:
        share = f"{facts['stops'].mean():.0%}"
        report.problems.append(
            f"only {share} of the rows teach the stop token: the model would not learn to stop; raise --max_length"
        )


def check_leaks(report: Report, train: Examples, held_out: Examples, facts: np.ndarray, eval_facts: np.ndarray) -> None:
    """Find held-out questions that are trained on too: their loss says nothing about new ones."""
    if not len(held_out):
        return
    wanted: dict[bytes, list[int]] = {}
    for index, size in enumerate(eval_facts["prompt"].tolist()):
        wanted.setdefault(held_out[index]["input_ids"][:size].tobytes(), []).append(index)
    whole = {held_out[index]["input_ids"].tobytes() for index in range(len(held_out))}
    asked = set()
    same = 0
    for index in np.flatnonzero(np.isin(facts["prompt"], np.unique(eval_facts["prompt"]))):
        ids = train[index]["input_ids"]
        asked.update(wanted.get(ids[: facts["prompt"][index]].tobytes(), ()))
        same += ids.tobytes() in whole
    line = f"held-out questions that are trained on too: {len(asked):,} of {len(held_out):,} ({same:,} whole rows)"
    report.sections[-1].lines.append(line)
    if len(asked) > MAX_LEAKED_SHARE * len(held_out):
        report.problems.append(f"{line}; the held-out loss would be too good. Split anew with sft.opendata")


def pick_samples(report: Report, examples: Examples, facts: np.ndarray, names: Sequence[str]) -> None:
    """Choose rows to show: the first, the longest, the one of most replies, a shortened one, one of each source."""
    if not len(examples):
        return
    ways = examples.origins["way"]
    sources = examples.origins["source"]
    chosen = {}
    wanted = {"first": 0, "longest": examples.lengths.argmax(), "most replies": facts["replies"].argmax()}
    for title, index in wanted.items():
        chosen[int(index)] = ", ".join(filter(None, [chosen.get(int(index)), title]))
    for way in (1, 2):
        if (ways == way).any():
            chosen.setdefault(int((ways == way).argmax()), EXPLAINED[KEPT_OUTCOMES[way]])
    for number in range(min(len(names), MAX_SAMPLED_SOURCES)):
        chosen.setdefault(int((sources == number).argmax()), "first of its source")
    for index, title in chosen.items():
        row = examples[index]
        source = names[sources[index]]
        title = (
            f"{title}: row {index:,} of {source}, {len(row['input_ids']):,} tokens, {facts['trained'][index]:,} trained"
        )
        report.samples.append((title, row["input_ids"], row["labels"]))


def heaviest_rows(rows: TrainingRows, trained: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows' numbers, those that take most memory first, their tokens and their trained ones, each (rows,).

    Padded, that are the longest; packed rows are about as long as each other, and the loss takes the trained tokens.
    """
    tokens, trained = (
        np.add.reduceat(of[rows.rows.examples], rows.rows.starts[:-1], dtype=np.int64)
        for of in (rows.examples.lengths, trained)
    )
    order = np.lexsort((tokens, trained) if rows.max_length else (trained, tokens))[::-1]
    return order, tokens[order], trained[order]
