"""Raw files -> cleaned, de-duplicated and split canonical files, and a ledger of it all.

    python -m sft.opendata INPUT... --output data_proj/opendata

An INPUT is a file, a folder, a glob or a data set's name on the hub, with an optional sample size: `belle.json@20000`,
`BelleGroup/train_1M_CN@10%`. It writes train.json and eval.json (JSON Lines), rejects.jsonl and ledger.json; for each
file, in = train + eval + duplicates + near_duplicates + not_sampled + dropped + rejected. The same input and flags give
the same bytes.
"""

import argparse
import os
import signal
import sys
import textwrap
from typing import Any

from sft.opendata.build import COUNTED, build_opendata
from sft.opendata.cleaning import CHANGES, DROPS, RULES
from sft.opendata.fields import list_counts
from sft.opendata.files import MIXES, REJECTS, describe_skipped
from sft.tables import align_columns, display_width


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return 2 for mistakes in it, 1 for data that can't be trusted, 130 when interrupted."""
    args = vars(_parser().parse_args(arguments))
    without = [rule for rule in RULES if not args.pop(rule)]
    inputs = args.pop("inputs") + [text for name in args.pop("mix") for text in MIXES.get(name, (f"--mix {name}",))]
    try:
        ledger = build_opendata(inputs, without=without, **args)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{error.filename or args['output']}: {error.strerror}; nothing was changed", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was changed", file=sys.stderr)
        return 130
    print_ledger(ledger)
    if problem := find_problem(ledger):
        print(f"{problem}; see {os.path.join(args['output'], REJECTS)}", file=sys.stderr)
    return 1 if problem else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sft.opendata",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # build_opendata has the defaults
    )
    add = parser.add_argument
    add("inputs", nargs="*", default=[], metavar="INPUT", help="file, folder, glob or hub data set, maybe @N or @N%%")
    add("--mix", action="append", default=[], help=f"a known mix of data sets: {', '.join(MIXES)}")
    add("--output", required=True, help="folder for train.json, eval.json, rejects.jsonl, ledger.json")
    add("--overwrite", action="store_true", help="replace these four files if they are there")
    add("--report", help="path of the ledger; default ledger.json in --output")
    add("--encoding", help="of files that are not UTF-8, such as gb18030")
    add("--reasoning", help="thoughts: drop them, or keep them as reasoning_content; auto keeps them")
    add("--preference", help="chosen: take the chosen replies of preference data, else it is refused")
    add("--seed", type=int, help="of the samples")
    add("--eval_share", type=float, help="held out, by a hash of the first question")
    add("--near_duplicates", type=float, help="also drop what is this similar, such as 0.8 (needs rensa)")
    add("--max_rejected", type=float, help="exit with 1 above this share of malformed records")
    add(
        "--preprocessing_num_workers",
        "--workers",
        dest="workers",
        type=int,
        metavar="N",
        help="processes that read and clean; by default all cores, and fewer for little data",
    )
    rules = parser.add_argument_group("cleaning rules", "All are on; --no_RULE leaves one out, as in --no_strip_edges.")
    for name, rule in (CHANGES | DROPS).items():
        rules.add_argument(f"--{name}", action="store_true", default=True, help=rule.__doc__.splitlines()[0])
        rules.add_argument(f"--no_{name}", dest=name, action="store_false", help=argparse.SUPPRESS)
    return parser


# --- The ledger as a table


def print_ledger(ledger: dict[str, Any]) -> None:
    """Print a row for each file and the total, and what was lost or changed by which rule; at most 120 columns."""
    head = ["file", "in", "train", "eval", "dupl.", "near", "unsampled", "dropped", "rejected", "p50", "p90", "p99"]
    rows = [head] + [_row(name, row) for name, row in (*ledger["files"].items(), ("total", ledger["total"]))]
    print("\n".join(align_columns(rows)))
    print("p50, p90, p99: characters in a kept conversation")
    for title in ("dropped", "rejected", "changed", "notes"):
        if counts := ledger["total"][title]:
            _print_wrapped(f"{title}: {list_counts(counts)}")
    for reason, first in ledger["first"].items():
        _print_wrapped(f"first {reason}: {first}")
    for name, row in ledger["files"].items():
        if row["not_read"]:
            _print_wrapped(f"{name}: not read: {list_counts(row['not_read'])}")
    for warning in find_warnings(ledger):
        _print_wrapped(warning)


def _print_wrapped(text: str) -> None:
    print(textwrap.fill(text, 120, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False))


MAX_DROPPED_SHARE = 0.1  # of a file's records, by one cleaning rule; above it the last lines name the rule


def find_problem(ledger: dict[str, Any]) -> str | None:
    """Say why the data can't be trusted: too many malformed records, or nothing kept; None if all is well."""
    total = ledger["total"]
    limit = ledger["settings"]["max_rejected"]
    num_rejected = sum(total["rejected"].values())
    num_read = total["in"] - total["not_sampled"]
    if num_rejected > limit * num_read:
        share = f"{num_rejected:,} of {num_read:,} records ({num_rejected / num_read:.1%}) are malformed"
        return f"{share}, more than --max_rejected {limit:g}"
    return None if total["train"] + total["eval"] else "nothing was kept"


def find_warnings(ledger: dict[str, Any]) -> list[str]:
    """Say what the user may not have meant: a rule that drops much, inputs without a record, files that aren't read."""
    lines = []
    for name, row in ledger["files"].items():
        num_read = row["in"] - row["not_sampled"]
        if not row["in"]:
            lines.append(f"{name}: holds no record")
        for reason, num in sorted(row["dropped"].items(), key=lambda item: -item[1]):
            if num > MAX_DROPPED_SHARE * num_read and reason != "not_chosen":
                rule = f"drop_{reason}"
                way = f"--no_{rule} keeps them" if rule in RULES else "look at them in rejects.jsonl"
                lines.append(f"{name}: {reason} dropped {num:,} of {num_read:,} records ({num / num_read:.0%}); {way}")
    lines += describe_skipped(ledger["skipped_files"])
    if ledger["settings"]["eval_share"] and ledger["total"]["train"] and not ledger["total"]["eval"]:
        lines.append("too few conversations to hold any out: eval.json is empty")
    return lines


def _row(name: str, row: dict[str, Any]) -> list[str]:
    lost = [sum(row[title].values()) for title in ("dropped", "rejected")]
    numbers = [*(row[column] for column in ("in", *COUNTED)), *lost, *row["characters"].values()]
    while display_width(name) > 30:
        name = "…" + name[2:]
    return [name, *(f"{number:,}" for number in numbers)]


def _exit_on_signal(number: int, _frame: object) -> None:
    """Exit on SIGTERM or SIGHUP as on Ctrl-C: staged files are removed, and workers end."""
    print(f"stopped by {signal.Signals(number).name}; nothing was changed", file=sys.stderr)
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _exit_on_signal)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, _exit_on_signal)
    sys.exit(main())
