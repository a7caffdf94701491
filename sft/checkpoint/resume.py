"""Compare the settings of a run with those of its checkpoint: some must be equal, others are reported."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from sft.checkpoint.manifest import FINGERPRINT

MAX_VALUE_CHARACTERS = 300  # of a value in a message


def make_fingerprint(flags: dict, *, versions: dict, **exact) -> dict:
    """Return what a run depends on: `flags` and `exact` must be equal on resume, changed `versions` are printed."""
    flags = {name: getattr(value, "value", value) for name, value in flags.items()}
    if flags.get("max_steps", 0) > 0:
        flags["num_train_epochs"] = None  # not used then
    return json.loads(json.dumps({"exact": {**flags, **exact}, "told": versions}))


def compare_fingerprints(old: dict, new: dict, allowed: Sequence[str]) -> tuple[list[str], list[str]]:
    """Compare two fingerprints; return a line for each change that refuses a resume, and for each that doesn't.

    A fingerprint has two dictionaries by field; a changed field of `exact` must be `allowed`, the others are reported.
    """
    fields = old["exact"].keys() | new["exact"].keys()
    if set(allowed) - fields:
        return [
            f"--allow_changed {min(set(allowed) - fields)}: no such field; there are {', '.join(sorted(fields))}"
        ], []
    refused = []
    lines = []
    for field in sorted(fields):
        before = old["exact"].get(field)
        now = new["exact"].get(field)
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
            before, now = ({key: value.get(key) for key in keys} for value in (before, now))
        change = f"{field} was {_shorten_value(before)} and is {_shorten_value(now)}"
        if field in allowed:
            lines.append(f"allowed: {change}; from here on the run is not bit-identical to one that never stopped")
        else:
            refused.append(f"{change}; give the old one again, or add --allow_changed {field}")
    for field in sorted(old["told"].keys() | new["told"].keys()):
        if old["told"].get(field) != new["told"].get(field):
            before = _shorten_value(old["told"].get(field))
            now = _shorten_value(new["told"].get(field))
            lines.append(f"{field} was {before} and is {now}; results may differ in the last bits")
    return refused, lines


def check_unchanged(checkpoint: str | None, new: dict, allow_changed: str | None, say: Callable) -> list[str]:
    """Print how the run differs from its checkpoint and return the fields; ValueError for a change not allowed."""
    if checkpoint is None:
        return []
    old = read_fingerprint(checkpoint)
    old["exact"].pop("base", None)  # of an older version; sft.base compares the base now
    allowed = [name.strip() for name in (allow_changed or "").split(",") if name.strip() not in ("", "base")]
    sizes = ("world_size", "per_device_train_batch_size", "gradient_accumulation_steps")
    rows, rows_then = (
        math.prod(of["exact"][name] for name in sizes) // of["exact"].get("sequence_parallel_size", 1)
        for of in (new, old)
    )
    shares = {"world_size", "sequence_parallel_size"}
    if shares & set(allowed) and rows == rows_then:  # as ds_all.sh does it: the same rows per update
        allowed = [*allowed, *sizes[1:]]
    refused, lines = compare_fingerprints(old, new, allowed)
    if refused:
        raise ValueError("\n".join(f"{checkpoint}: {line}" for line in refused))
    for line in lines:
        say(line)
    return [name for name in allowed if old["exact"].get(name) != new["exact"].get(name)]


def describe_resume(changed: Sequence[str], *, on_gpu: bool, deterministic: bool) -> str:
    """Return how equal a resumed run will be to one that never stopped."""
    if changed:
        return f"the resumed run will differ from one that never stopped: changed {', '.join(changed)}"
    if on_gpu and not deterministic:
        return (
            "the resumed run will equal one that never stopped but for rounding: on a GPU attention sums gradients in "
            "any order; runs with --full_determinism are equal to the bit"
        )
    return "the resumed run will equal one that never stopped to the bit"


def has_other_layout(checkpoint: str, now: dict) -> bool:
    """Whether ZeRO writes, or wrote, a checkpoint in other slices than the run of the fingerprint `now` does."""
    then = read_fingerprint(checkpoint)["exact"]
    is_same = all(then[name] == now["exact"][name] for name in ("zero_stage", "world_size"))
    return not is_same and bool(then["zero_stage"] or now["exact"]["zero_stage"])


def read_fingerprint(checkpoint: str) -> dict:
    return json.loads((Path(checkpoint) / FINGERPRINT).read_text(encoding="utf-8"))


def _shorten_value(value) -> str:
    if value is None:
        return "not given"
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
    return text if len(text) <= MAX_VALUE_CHARACTERS else text[:MAX_VALUE_CHARACTERS] + "..."
