"""Write benchmarks/RESULTS.md from .cache/benchmarks/results.json: tables with ratios, bars, spread, machine, versions.

    python benchmarks/results.py            # run_cpu.sh calls it last

A section without new results is kept, and so is the text under NOTES: a person writes there why a bar is missed.
"""

import json
import os
import platform
import re
import subprocess
from datetime import date
from importlib import metadata
from pathlib import Path

from records import FOLDER, RESULTS, median, peer_python

FILE = Path(__file__).with_name("RESULTS.md")
NOTES = "## Notes\n"
PACKAGES = ("torch", "transformers", "tokenizers", "gigatoken", "fastokens", "datasets", "accelerate", "numpy")
# (numerator, denominator, bar): how many times as many tokens per CPU second.
PREPARE = [
    ("ours_tokenizers", "trl", 2.3),
    ("ours_tokenizers", "alpaca", 2.5),
    ("ours_tokenizers", "floor_tokenizers", 0.85),
    ("ours_tokenizers", "llamafactory", 1.7),
    ("ours", "trl", None),
    ("ours", "llamafactory", 15),
    ("ours", "alpaca", None),
    ("ours", "floor_gigatoken", None),
]
FAST_BESIDE_TRL = {10_000: 12, 200_000: 20}  # the bars of ours / trl, by the number of records
STEP = {"qwen2-32k": (4, 3.3), "qwen2-152k": (6, 4), "bloom-251k": (8, 3.5), "falcon-65k": (8, 3.5)}


def speed(runs: list[dict], seconds: str = "seconds") -> float:
    return sorted(run["tokens"] / run[seconds] for run in runs)[len(runs) // 2]


def spread(runs: list[dict], seconds: str = "seconds") -> str:
    speeds = [run["tokens"] / run[seconds] for run in runs]
    return f"±{(max(speeds) - min(speeds)) / 2 / speed(runs):.0%} of {len(runs)}" if len(runs) > 1 else "one run"


def verdict(ratio: float, bar: float | None, at_most: bool = False) -> str:
    if bar is None:
        return ""
    met = ratio <= bar if at_most else ratio >= bar
    return f"{'≤' if at_most else '≥'} {bar:g}: {'met' if met else '**missed**'}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def prepare_section(rows: dict) -> str:
    text = "## Preparing: read, render, tokenise, label, pack\n\n"
    for row, sides in sorted(rows.items(), key=lambda row: (int(row[0].split()[0]), row[0])):
        size, _, template = row.partition(" ")
        size = int(size)
        tokens = median(next(iter(sides.values())), "tokens") / size
        named = f", the base's own template {template}" if template else ""
        text += f"{size:,} records, {tokens:.0f} tokens each{named}:\n\n"
        found = [
            [side, f"{speed(runs) / 1e6:.2f}", spread(runs), f"{median(runs, 'peak_mib'):,.0f}"]
            for side, runs in sides.items()
        ]
        text += table(["side", "M tokens per CPU second", "spread", "peak MiB"], found) + "\n"
        ratios = []
        for one, other, bar in PREPARE:
            if one in sides and other in sides:
                ratio = speed(sides[one]) / speed(sides[other])
                bar = FAST_BESIDE_TRL.get(size) if (one, other) == ("ours", "trl") and not template else bar
                ratios.append([f"{one} / {other}", f"{ratio:.2f}", verdict(ratio, bar)])
        text += table(["speed", "ratio", "bar"], ratios) + "\n" if ratios else ""
    return text + memory_of_preparing(rows)


def memory_of_preparing(rows: dict) -> str:
    """Peak at 200K records beside TRL's, and its growth from 50K."""
    small, large = (rows.get(size, {}) for size in ("50000", "200000"))
    lines = []
    if "ours" in large and "trl" in large:
        ratio = median(large["ours"], "peak_mib") / median(large["trl"], "peak_mib")
        lines.append(["peak memory at 200K, ours / TRL", f"{ratio:.2f}", verdict(ratio, 1 / 5, at_most=True)])
    if "ours" in large and "ours" in small:
        ratio = median(large["ours"], "peak_mib") / median(small["ours"], "peak_mib")
        lines.append(["ours, 200K / 50K", f"{ratio:.2f}", verdict(ratio, 1.2, at_most=True)])
    return table(["memory", "ratio", "bar"], lines) + "\n" if lines else ""


def step_section(rows: dict) -> str:
    head = ["row", "ours", "TRL", "alpaca", "ours / TRL", "ours / alpaca", "MiB ours, TRL, alpaca", "spread of ours"]
    lines = []
    for row, sides in rows.items():
        bars = STEP[row.rsplit("-", 1)[0]]
        speeds = {side: speed(runs) for side, runs in sides.items()}
        ratios = [speeds["ours"] / speeds[peer] if peer in speeds else None for peer in ("trl", "alpaca")]
        judged = [f"{r:.2f} ({verdict(r, b)})" if r else "-" for r, b in zip(ratios, bars, strict=True)]
        memory = ", ".join(f"{median(sides[side], 'peak_mib'):,.0f}" for side in sides)
        shown = [f"{speeds[side]:,.0f}" if side in speeds else "-" for side in ("ours", "trl", "alpaca")]
        lines.append([row, *shown, *judged, memory, spread(sides["ours"])])
    return "## The step: non-pad tokens per CPU second\n\n" + table(head, lines) + "\n"


def startup_section(rows: dict) -> str:
    runs = rows["first step"]
    lines = [
        [side, *(f"{median(found, name):.1f}" for name in ("wall_seconds", "seconds")), str(len(found))]
        for side, found in runs.items()
    ]
    text = "## From the command to the first optimizer step\n\n"
    text += table(["side", "wall seconds", "CPU seconds", "runs"], lines) + "\n"
    for side in [side for side in runs if side != "trl"]:
        wall, cpu = (median(runs[side], name) / median(runs["trl"], name) for name in ("wall_seconds", "seconds"))
        text += f"{side} / trl: {wall:.2f} in wall seconds ({verdict(wall, 0.65, at_most=True)}), {cpu:.2f} in CPU.\n\n"
    return text


def checkouts_section(rows: dict) -> str:
    lines = []
    for command, sides in rows.items():
        seconds = {side: median(runs, "seconds") for side, runs in sides.items()}
        change = seconds["ours"] / seconds["other"] - 1
        own = f"{median(sides['ours'], 'own_seconds'):.2f}" if "own_seconds" in sides["ours"][0] else ""
        lines.append([command, *(f"{seconds[side]:.3f}" for side in ("other", "ours")), f"{change:+.1%}", own])
    head = ["command", "CPU seconds before", "now", "change", "without imports"]
    return "## Start-up beside an earlier checkout\n\n" + table(head, lines) + "\n"


def workers_section(rows: dict) -> str:
    names = ("wall_seconds", "seconds", "parent_seconds", "peak_mib", "worker_mib")
    lines = []
    for row, sides in rows.items():
        first = median(next(iter(sides.values())), "seconds")
        for side, runs in sides.items():
            numbers = [f"{median(runs, name):,.1f}" for name in names]
            lines.append([row, side, *numbers, f"{median(runs, 'seconds') / first - 1:+.1%}"])
    head = [
        "work",
        "by",
        "wall seconds",
        "CPU seconds",
        "of which the parent",
        "its peak MiB",
        "of a worker",
        "more CPU",
    ]
    return "## One worker and several\n\n" + table(head, lines) + "\n"


def gpu_section() -> str:
    """The table that run_gpu.sh wrote, or that RESULTS.md has already."""
    table = FOLDER / "gpu.md"
    if table.exists():
        return f"## On a GPU\n\n{table.read_text(encoding='utf-8')}\n"
    return find_section("## On a GPU")


def find_section(title: str) -> str:
    """Return the section of RESULTS.md that begins with a title."""
    before = FILE.read_text(encoding="utf-8") if FILE.exists() else ""
    found = re.search(rf"^{title}.*?(?=^## )", before, re.MULTILINE | re.DOTALL)
    return found[0] if found else ""


def scale_section(rows: dict) -> str:
    lines = []
    for size, steps in sorted(rows.items(), key=lambda row: int(row[0])):
        for step, found in steps.items():
            numbers = [f"{found[name]:,.0f}" if found[name] else "" for name in ("seconds", "peak_mib", "disk_mib")]
            lines.append([f"{int(size):,}", step, *numbers])
    head = ["records", "step", "seconds", "peak MiB of all its processes", "MiB on disk"]
    return "## Raw records to rows to steps, at scale\n\n" + table(head, lines) + "\n"


def machine() -> str:
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    peer = subprocess.run(
        [peer_python(), "-c", "from importlib.metadata import version as v; print(v('trl'), v('transformers'))"],
        capture_output=True,
        text=True,
    ).stdout.split()
    return (
        f"{date.today()}, {platform.machine()}, {len(cpu)} cores of {cpu[0].split(':')[1].strip()}, load {load} when "
        f"this was written. Python {platform.python_version()}, {versions}; peers: trl {peer[0]} on transformers "
        f"{peer[1]}. One OpenMP thread on all sides; medians of separate processes, alternating.\n\n"
    )


SECTIONS = {
    "prepare": ("## Preparing", prepare_section),
    "workers": ("## One worker", workers_section),
    "step": ("## The step", step_section),
    "startup": ("## From the command", startup_section),
    "checkouts": ("## Start-up", checkouts_section),
    "scale": ("## Raw records", scale_section),
}


def main() -> None:
    kept = json.loads(RESULTS.read_text())
    notes = FILE.read_text(encoding="utf-8").partition(NOTES)[2] if FILE.exists() else ""
    text = "# Results\n\n" + machine()
    for name, (title, write) in SECTIONS.items():
        text += write(kept[name]) if name in kept else find_section(title)
    text += gpu_section()
    FILE.write_text(text + NOTES + notes, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
