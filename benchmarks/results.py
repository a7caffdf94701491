"""Write benchmarks/RESULTS.md from .cache/benchmarks/results.json: tables with ratios, bars, spread, machine, versions.

    python benchmarks/results.py            # run_cpu.sh calls it last

The text under NOTES is kept as it is: a person writes there why a bar is missed.
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
PACKAGES = ("torch", "transformers", "tokenizers", "fastokens", "datasets", "accelerate", "numpy")
# (numerator, denominator, bar): how many times as many tokens per CPU second.
PREPARE = [
    ("ours_tokenizers", "trl", 2.3),
    ("ours_tokenizers", "alpaca", 2.5),
    ("ours_tokenizers", "floor_tokenizers", 0.85),
    ("ours_tokenizers", "llamafactory", 1.7),
    ("ours", "trl", 20),
    ("ours", "llamafactory", 15),
    ("ours", "alpaca", None),
    ("ours", "floor_fastokens", None),
]
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
    for size, sides in sorted(rows.items(), key=lambda row: int(row[0])):
        text += (
            f"{int(size):,} records, {median(next(iter(sides.values())), 'tokens') / int(size):.0f} tokens each:\n\n"
        )
        found = [
            [side, f"{speed(runs) / 1e6:.2f}", spread(runs), f"{median(runs, 'peak_mib'):,.0f}"]
            for side, runs in sides.items()
        ]
        text += table(["side", "M tokens per CPU second", "spread", "peak MiB"], found) + "\n"
        ratios = [
            [f"{one} / {other}", f"{(ratio := speed(sides[one]) / speed(sides[other])):.2f}", verdict(ratio, bar)]
            for one, other, bar in PREPARE
            if one in sides and other in sides
        ]
        text += table(["speed", "ratio", "bar"], ratios) + "\n" if ratios else ""
    return text + memory_of_preparing(rows)


def memory_of_preparing(rows: dict) -> str:
    """Peak at 200K records beside TRL's, and its growth from 50K."""
    small, large = (rows.get(size, {}) for size in ("50000", "200000"))
    lines = []
    if "ours" in large and "trl" in large:
        ratio = median(large["ours"], "peak_mib") / median(large["trl"], "peak_mib")
        lines.append(["peak memory at 200K, ours / TRL", f"{ratio:.2f}", verdict(ratio, 1 / 8, at_most=True)])
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


def gpu_section() -> str:
    """The table that run_gpu.sh wrote, or that RESULTS.md has already."""
    table = FOLDER / "gpu.md"
    if table.exists():
        return f"## On a GPU\n\n{table.read_text(encoding='utf-8')}\n"
    before = FILE.read_text(encoding="utf-8") if FILE.exists() else ""
    found = re.search(r"^## On a GPU\n.*?(?=^## )", before, re.MULTILINE | re.DOTALL)
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
    "prepare": prepare_section,
    "step": step_section,
    "startup": startup_section,
    "scale": scale_section,
}


def main() -> None:
    kept = json.loads(RESULTS.read_text())
    notes = FILE.read_text(encoding="utf-8").partition(NOTES)[2] if FILE.exists() else ""
    text = "# Results\n\n" + machine() + "".join(SECTIONS[name](kept[name]) for name in SECTIONS if name in kept)
    text += gpu_section()
    FILE.write_text(text + NOTES + notes, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
