"""The account of what became of every conversation, and of the fields that were not read."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from sft.opendata.fields import list_counts

KEPT_OUTCOMES = ("whole", "turns_dropped", "cut")
LOST_OUTCOMES = ("rejected", "not_chosen", "prompt_too_long", "no_trained_token", "boundary", "template")
# notes
WITH_THOUGHT = "replies_with_a_thought"
WITHOUT_THOUGHT = "replies_without_a_thought"
MAX_WORDS_SHOWN = 5  # of chat formats that refuse conversations


def new_ledger(files: Sequence[str], max_length: int) -> dict:
    """Return an account with nothing in it.

    `rejected` counts the reasons of records that are no conversation, `template_words` why chat formats refused one.
    """
    return {
        "max_length": max_length,
        "files": {file: Counter() for file in files},
        "sources": {},
        "first": {},
        "rejected": Counter(),
        "template_words": Counter(),
        "not_read": {},
        "notes": {},
    }


def count_outcome(
    ledger: dict, file: str, line: int, source: str, outcome: str, num_rows: int = 0, why: str = ""
) -> None:
    """Add what became of the conversation on `line` of `file`, and the rows that it has beyond one."""
    of_source = ledger["sources"].setdefault(source, Counter())
    of_source["in"] += 1
    for counts in (ledger["files"][file], of_source):
        if outcome not in LOST_OUTCOMES:
            counts["kept"] += 1
        if outcome != "whole":
            counts[outcome] += 1
        if num_rows > 1:
            counts["further_rows"] += num_rows - 1
    if outcome == "template":
        ledger["template_words"][why] += 1
    if outcome != "whole":
        ledger["first"].setdefault(outcome, f"{file} line {line}" + (f": {why}" if why else ""))


def merge_ledger(ledger: dict, part: dict) -> None:
    """Add the account of the next part of the data, before `add_up`."""
    for title in ("files", "sources"):
        for name, counts in part[title].items():
            ledger[title].setdefault(name, Counter()).update(counts)
    for reason, place in part["first"].items():
        ledger["first"].setdefault(reason, place)
    ledger["rejected"].update(part["rejected"])
    ledger["template_words"].update(part["template_words"])


def add_up(ledger: dict) -> None:
    """Fill in `total`; each conversation is kept or lost in one way."""
    total = Counter()
    for counts in ledger["files"].values():
        total.update(counts)
    assert total["in"] == total["kept"] + sum(total[reason] for reason in LOST_OUTCOMES), (
        f"the ledger doesn't add up: {total}"
    )
    for part in ("files", "sources"):
        ledger[part] = {name: {"in": 0, "kept": 0, **counts} for name, counts in ledger[part].items()}
    ledger["rejected"] = dict(ledger["rejected"])
    ledger["total"] = {"in": 0, "kept": 0, **total}
    ledger["template_words"] = dict(ledger["template_words"].most_common())


def find_thinking_default(ledger: dict) -> bool | None:
    """Return the default of a template's thinking switch: as in all trained replies, None if they differ.

    The notes count trained replies with and without a thought where the template has a switch.
    """
    notes = sum(map(Counter, ledger["notes"].values()), Counter())
    counts = [notes[name] for name in (WITHOUT_THOUGHT, WITH_THOUGHT)]
    return bool(counts[1]) if sum(map(bool, counts)) == 1 else None


def ledger_lines(ledger: dict) -> list[str]:
    """Say in a few lines what went in, what was kept, and where each kind of loss happened first."""
    total = defaultdict(int, ledger["total"])
    lines = [f"{total['in']:,} conversations in {len(ledger['files'])} files, {total['kept']:,} kept"]
    if further := total["further_rows"]:
        lines.append(f"  {further:,} further rows, as the chat template writes earlier turns anew for later ones")
    for reason in ("turns_dropped", "cut", *LOST_OUTCOMES):
        if total[reason]:
            reasons = f"{list_counts(ledger['rejected'])}; " if reason == "rejected" else ""
            lines.append(f"  {EXPLAINED[reason]}: {total[reason]:,} ({reasons}first: {ledger['first'][reason]})")
    for why, count in list(ledger["template_words"].items())[:MAX_WORDS_SHOWN]:
        lines.append(f"    {count:,} x {why}")
    lines += [f"  {file}: holds no record" for file, counts in ledger["files"].items() if not counts["in"]]
    for file, counts in ledger["not_read"].items():
        lines.append(f"  {Path(file).name}: not read: {list_counts(counts)}")
    notes = sum(map(Counter, ledger["notes"].values()), Counter())
    return lines + ([f"  notes: {list_counts(notes)}"] if notes else [])


EXPLAINED = {
    "turns_dropped": "kept without their last turns, which did not fit max_length",
    "cut": "kept with their only answer cut at max_length (no stop token taught)",
    "rejected": "lost, not a conversation",
    "not_chosen": "left out by --preference chosen",
    "prompt_too_long": "lost, the prompt alone fills max_length",
    "no_trained_token": "lost, no token to train on",
    "boundary": "lost, a token reaches over the start of a reply",
    "template": "lost, the chat format has no place for it",
}


def check_losses(ledger: dict, max_lost: float) -> None:
    """Raise ValueError when nothing is left, or when more than the share `max_lost` of the conversations is lost."""
    total = defaultdict(int, ledger["total"])
    lost = total["in"] - total["kept"] - total["not_chosen"]
    summary = "\n".join(ledger_lines(ledger))
    if thoughts := ledger.get("thoughts_without_a_place"):
        raise ValueError(
            f"{thoughts:,} replies have a thought, for which the chat format has no place; train them without it by "
            "--reasoning drop, or choose a --chat_format with thoughts, such as base"
        )
    if not total["kept"]:
        raise ValueError(f"no conversation to train on in {', '.join(ledger['files']) or 'the given files'}\n{summary}")
    if lost > max_lost * total["in"]:
        raise ValueError(
            f"{lost:,} of {total['in']:,} conversations would be lost, more than --max_lost {max_lost:g}; "
            f"clean the data with sft.opendata, raise --max_length or raise --max_lost\n{summary}"
        )
