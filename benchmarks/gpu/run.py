"""Measure training on one GPU and write a table and JSON, row by row; run_gpu.sh calls it.

    python benchmarks/gpu/run.py [--only steps loop lora exact memory replies selftest moe] [--minutes 9]

Random weights in fp32 (the masters), computing in bf16, AdamW fused, packed rows of 4096 tokens. Each row is a process
of its own. Measurements of speed run alone; checks run several at a time. Without a GPU, or with TOY=1, toys prove that
all of it runs. MFU: see shapes.py.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib import metadata, util
from pathlib import Path

import torch
from records import FOLDER, ROOT
from shapes import SHAPES, config_of, mfu

ON_GPU = torch.cuda.is_available()
TOY = not ON_GPU or os.environ.get("TOY") == "1"
FAMILIES = ("qwen2", "bloom", "falcon", "mistral", "yi", "falcon-rw", "qwen3")
PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft", "liger-kernel", "bitsandbytes", "trl")
MAX_FUSED_DISTANCE = 0.05  # relative, in bf16: of gradients with the fused kernels from those without
PART_SECONDS = 150  # after which a part begins no further row
PROCESS_SECONDS = 900 if TOY else 170  # a process that takes longer is broken


class Broken(Exception):
    """A process failed: the set-up is broken, and the rest would waste the GPU's minutes."""


class Results:
    """Rows of the table by part, written to a file after each."""

    def __init__(self, folder: Path, deadline: float):
        self.folder = folder
        self.deadline = deadline
        self.parts = {}
        self.began = time.time()
        self.lock = threading.Lock()
        self.machine = describe_machine()

    def add(self, part: str, row: str, **found) -> None:
        with self.lock:
            self._write(part, row, found)

    def _write(self, part: str, row: str, found: dict) -> None:
        self.parts.setdefault(part, {})[row] = found
        print(f"{time.time() - self.began:4.0f} s  {part:9} {row:34} {shown(found)}", flush=True)
        record = {"machine": self.machine, "date": str(date.today()), "parts": self.parts}
        record["seconds"] = round(time.time() - self.began)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "gpu.json").write_text(json.dumps(record, indent=1))
        (self.folder / "gpu.md").write_text(render_table(record))

    def is_late(self) -> bool:
        return time.time() > self.deadline


def describe_machine() -> str:
    device = torch.cuda.get_device_name() if ON_GPU else f"no GPU ({platform.machine()})"
    versions = [f"{name} {metadata.version(name)}" for name in PACKAGES if has(name)]
    size = ", toy sizes: the numbers mean nothing" if TOY else ""
    return f"{device}{size}; Python {platform.python_version()}, {', '.join(versions)}"


def has(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def shown(found: dict) -> str:
    """A row's numbers in one line."""
    words = []
    for name, value in found.items():
        if value is None:
            continue
        is_large = isinstance(value, float) and abs(value) >= 100
        value = f"{value:,.0f}" if is_large else f"{value:.3g}" if isinstance(value, float) else value
        words.append(f"{name} {value}")
    return ", ".join(words)


def render_table(record: dict) -> str:
    lines = [f"{record['date']}, {record['machine']}. `sh benchmarks/run_gpu.sh`, {record['seconds']} s.", ""]
    for part, rows in record["parts"].items():
        names = list(dict.fromkeys(name for found in rows.values() for name in found))
        lines += ["| " + " | ".join([part, *names]) + " |", "|---" * (len(names) + 1) + "|"]
        for row, found in rows.items():
            cells = [shown({name: found.get(name)}).removeprefix(name).strip() for name in names]
            lines.append("| " + " | ".join([row, *cells]) + " |")
        lines.append("")
    return "\n".join(lines)


# --- processes ----------------------------------------------------------------------------------------------------


def start(script: str, *arguments: object) -> subprocess.Popen:
    """Start a script in a fresh process; step_side.py imports what it needs and waits for `finish`."""
    paths = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "gpu"), os.environ.get("PYTHONPATH", "")]
    threads = "8" if ON_GPU else "1"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads}
    environment |= {"TORCHINDUCTOR_COMPILE_THREADS": "4", "WAIT": "1"}  # several processes compile at a time
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)


def finish(process: subprocess.Popen) -> dict:
    """Let a process go on, and return what its last line reports. Raises Broken with the end of its output."""
    command = " ".join(process.args)
    try:
        out, errors = process.communicate("\n", timeout=PROCESS_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        raise Broken(f"{command} took more than {PROCESS_SECONDS} s") from None
    lines = out.strip().splitlines()
    if process.returncode or not lines or not lines[-1].startswith("{"):
        raise Broken(f"{command} ended with {process.returncode}: {(out + errors)[-3000:]}")
    return json.loads(lines[-1]) | {"printed": lines[:-1]}


def run(script: str, *arguments: object) -> dict:
    return finish(start(script, *arguments))


def settings_of(shape: str, **changes) -> dict:
    """Return what step_side.py measures of a shape."""
    small = shape == "qwen2.5-0.5b"
    settings = {"bf16": True, "max_length": 4096, "rows": 4 if small else 2, "warmup": 3, "steps": 6, "accumulation": 1}
    settings |= {"num_examples": 3000, "fused": "auto", "checkpointing": False, "lora": False}
    settings |= {"four_bit": False, **changes}
    if TOY:
        settings |= {"max_length": 128, "rows": 2, "warmup": 1, "steps": 1, "num_examples": 60}
    return settings | {"config": config_of(shape, toy=TOY, layers=changes.get("layers"))}


def measure(shape: str, side: str, **changes) -> dict:
    """Return tokens per second, MFU and memory of a side's steps."""
    settings = settings_of(shape, **changes)
    return numbers_of_steps(shape, side, settings, run("step_side.py", side, json.dumps(settings)))


def numbers_of_steps(shape: str, side: str, settings: dict, found: dict) -> dict:
    of_step = mfu(shape, settings["config"], found["tokens"], found["mean_seen"], found["wall_seconds"])
    numbers = {"tokens_per_second": found["tokens"] / found["wall_seconds"], "mfu": of_step}
    numbers["allocated_gib"] = found.get("gpu_peak_mib", found["peak_mib"]) / 1024
    if side == "ours":
        numbers["graphs_after_warmup"] = found["graphs_after_warmup"]
        numbers["kernels"] = next((line for line in found["printed"] if line.startswith("fused kernels")), "none")
    return numbers


# --- parts --------------------------------------------------------------------------------------------------------


def measure_steps(results: Results) -> None:
    """Full fine-tuning: three shapes, ours beside TRL as installed and with our attention and Liger's fused loss.

    The rows of most worth come first: those behind the part's time are left out. A row's process imports its packages
    while the one before it is measured.
    """
    accumulated = {"accumulation": 8, "warmup": 1, "steps": 2}
    checkpointed = {"checkpointing": True, "rows": 4, "steps": 4}
    rows = [
        ("7B ours", "qwen2.5-7b", "ours", {}),
        ("7B ours, 8 accumulated", "qwen2.5-7b", "ours", accumulated),
        ("7B TRL strongest", "qwen2.5-7b", "trl_strongest", {"steps": 4}),
        ("7B ours, checkpointing, 4 rows", "qwen2.5-7b", "ours", checkpointed),
        ("0.5B ours", "qwen2.5-0.5b", "ours", {}),
        ("bloom-7b1 ours", "bloom-7b1", "ours", {"warmup": 4, "steps": 4}),
        ("falcon-7b ours", "falcon-7b", "ours", {"steps": 4}),
        ("7B TRL plain", "qwen2.5-7b", "trl", {"steps": 2, "warmup": 2}),
        ("7B ours, not fused", "qwen2.5-7b", "ours", {"fused": "none", "steps": 4}),
        ("0.5B ours, deterministic", "qwen2.5-0.5b", "ours", {"deterministic": True}),
        ("7B ours, compiled", "qwen2.5-7b", "ours", {"fused": "compile", "steps": 4}),
    ]
    if TOY:
        rows = [rows[1], rows[2]]
    began = time.time()
    rows = [row for row in rows if row[2] == "ours" or util.find_spec("trl") is not None]
    settings = [settings_of(shape, **changes) for _name, shape, _side, changes in rows]
    waiting = [start("step_side.py", rows[0][2], json.dumps(settings[0]))]
    try:
        for place, (name, shape, side, _changes) in enumerate(rows):
            if results.is_late() or time.time() - began > PART_SECONDS:
                print(f"steps: {name} and later rows left out, the part's time is over", flush=True)
                return
            if place + 1 < len(rows):
                waiting.append(start("step_side.py", rows[place + 1][2], json.dumps(settings[place + 1])))
            found = numbers_of_steps(shape, side, settings[place], finish(waiting.pop(0)))
            results.add("steps", name, layers=layers_of(shape), **found)
            if found.get("graphs_after_warmup"):
                raise Broken(f"{name}: {found['graphs_after_warmup']} graphs were compiled after the warm-up")
    finally:
        for process in waiting:
            process.kill()
            process.wait()


def layers_of(shape: str) -> str:
    config = config_of(shape, toy=TOY)
    return f"{config.get('n_layer', config.get('num_hidden_layers'))} of {SHAPES[shape][2]}"


def measure_loop(results: Results) -> None:
    """The real train.py on the 0.5B shape, beside the bare step with the same rows."""
    with tempfile.TemporaryDirectory() as folder:
        base = f"{folder}/base"
        run("gpu/checks.py", "base", "qwen2.5-0.5b", base)
        flags = ["--per_device_train_batch_size", "2" if TOY else "4", "--gradient_accumulation_steps", "2"]
        found = run("gpu/checks.py", "train", base, json.dumps(flags))
    results.add("loop", "0.5B train.py, 2 accumulated", **numbers_of_run(found))
    results.add("loop", "0.5B bare step, 2 accumulated", **measure("qwen2.5-0.5b", "ours", accumulation=2))


def numbers_of_run(found: dict) -> dict:
    return {name: found[name] for name in ("tokens_per_second", "mfu", "peak_memory_gib", "kernels")}


def measure_lora(results: Results) -> None:
    """LoRA and QLoRA of all layers of the 7B shape, by train.py."""
    with tempfile.TemporaryDirectory() as folder:
        base = f"{folder}/base"
        run("gpu/checks.py", "base", "qwen2.5-7b", base)
        ways = {"LoRA": [], "QLoRA": ["--load_in_4bit", "true"]}
        for name, more in ways.items():
            if more and not (ON_GPU and has("bitsandbytes")):
                continue
            flags = ["--lora", "true", "--learning_rate", "1e-4", "--per_device_train_batch_size", "1", *more]
            found = run("gpu/checks.py", "train", base, json.dumps(flags))
            results.add("lora", f"7B {name}, all layers", **numbers_of_run(found))


def check_exactness(results: Results) -> None:
    """Equal bits under --full_determinism: run twice, and killed and resumed."""
    families = ("qwen2",) if TOY else ("qwen2", "falcon", "bloom")
    run_together(results, "exact", {family: ("gpu/checks.py", "exact", family) for family in families})
    wrong = [
        name for name, found in results.parts["exact"].items() if not (found["same_twice"] and found["same_resumed"])
    ]
    if wrong:
        print(f"NOT EXACT: {', '.join(wrong)}", flush=True)


MEMORY = [
    # shape, layers, rows, what differs
    ("qwen2.5-0.5b", 24, 4, {}),
    ("qwen2.5-0.5b", 24, 4, {"accumulation": 2}),
    ("qwen2.5-0.5b", 24, 8, {"checkpointing": True}),
    ("qwen2.5-0.5b", 24, 2, {"lora": True}),
    ("qwen2.5-0.5b", 24, 2, {"lora": True, "four_bit": True}),
    ("qwen2.5-7b", 4, 1, {}),
    ("qwen2.5-7b", 4, 2, {"accumulation": 2}),
    ("qwen2.5-7b", 4, 4, {"checkpointing": True}),
    ("qwen2.5-7b", 8, 1, {"lora": True}),
    ("bloom-7b1", 4, 1, {}),
    ("bloom-7b1", 4, 2, {"checkpointing": True}),
    ("bloom-7b1", 8, 1, {"lora": True, "checkpointing": True}),
]


def check_memory(results: Results) -> None:
    """Bytes that the dry run counts beside torch.cuda.max_memory_reserved; three processes at a time."""

    def check(case) -> tuple[str, dict]:
        shape, layers, rows, changes = case
        changes = {"rows": rows, "layers": layers, "warmup": 1, "steps": 2, "fused": "auto", **changes}
        settings = settings_of(shape, **changes)
        found = run("step_side.py", "ours", json.dumps(settings))
        counted = run("gpu/checks.py", "count", json.dumps(settings))["counted_mib"] / 1024
        taken = found.get("gpu_reserved_mib", found["peak_mib"]) / 1024
        numbers = {"counted_gib": counted, "reserved_gib": taken, "ratio": counted / taken}
        return f"{shape}, {layers} layers, {rows} rows {shown({k: v for k, v in case[3].items()})}", numbers

    cases = MEMORY if ON_GPU and has("bitsandbytes") else [case for case in MEMORY if "four_bit" not in case[3]]
    with ThreadPoolExecutor(2 if TOY else 3) as pool, tempfile.TemporaryDirectory() as folder:
        probe = pool.submit(probe_steps, f"{folder}/base")
        for name, numbers in pool.map(check, cases[3:4] if TOY else cases):
            results.add("memory", name, **numbers)
        results.add("memory", "qwen2.5-0.5b, --probe_steps", **probe.result())


def probe_steps(base: str) -> dict:
    """Return what train.py --probe_steps says of the memory of the 0.5B shape."""
    run("gpu/checks.py", "base", "qwen2.5-0.5b", base)
    found = run("gpu/checks.py", "probe", base)
    return {name: found[name] for name in ("probe", "ratio")}


def measure_replies(results: Results) -> None:
    """One reply, and 32 at once, beside transformers' generate."""
    with tempfile.TemporaryDirectory() as folder:
        run("gpu/checks.py", "base", "qwen2.5-0.5b", f"{folder}/base")
        found = run("gpu/checks.py", "replies", f"{folder}/base")
    for count, speeds in found.items():
        if isinstance(speeds, dict):
            ratio = speeds["ours"] / speeds["generate"]
            results.add("replies", f"0.5B, {count} at once", **speeds, ratio=ratio)


def check_families(results: Results) -> None:
    """Packed against alone, logits and gradients, of seven families."""
    families = FAMILIES[1:2] if TOY else FAMILIES
    run_together(results, "selftest", {family: ("gpu/checks.py", "selftest", family) for family in families})
    wrong = [
        name for name, found in results.parts["selftest"].items() if not found["fused_gradients"] < MAX_FUSED_DISTANCE
    ]
    if wrong:
        print(f"FUSED KERNELS GIVE OTHER GRADIENTS: {', '.join(wrong)}", flush=True)


def measure_mixtures(results: Results) -> None:
    """Shapes with experts and with linear attention: do they train, and how fast."""
    # gpt-oss has transformers' eager attention: 15 GB of scores a layer for two rows of 4096.
    changes = {"qwen3-30b-a3b": {}, "gpt-oss-20b": {"rows": 1}, "qwen3.5-4b": {}}
    for shape in list(changes)[:1] if TOY else changes:
        if not results.is_late():
            found = measure(shape, "ours", warmup=2, steps=3, **changes[shape])
            results.add("moe", shape, layers=layers_of(shape), **found)


def run_together(results: Results, part: str, commands: dict[str, tuple]) -> None:
    """Run checks beside each other: none of them measures time."""
    with ThreadPoolExecutor(2 if TOY else len(commands)) as pool:
        for name, found in zip(commands, pool.map(lambda command: run(*command), commands.values()), strict=True):
            numbers = {key: value for key, value in found.items() if key not in ("printed", "peak_mib")}
            results.add(part, name, **numbers)


PARTS = {
    "selftest": check_families,
    "steps": measure_steps,
    "exact": check_exactness,
    "loop": measure_loop,
    "memory": check_memory,
    "lora": measure_lora,
    "replies": measure_replies,
    "moe": measure_mixtures,
}


def run_part(results: Results, name: str) -> None:
    if results.is_late():
        print(f"{name}: left out, the time is over; --only {name} runs it", flush=True)
    else:
        PARTS[name](results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS), metavar="PART")
    parser.add_argument("--minutes", type=float, default=9, help="begin no further part or row of steps after this")
    args = parser.parse_args()
    folder = Path(os.environ.get("OUT") or FOLDER)
    results = Results(folder, time.time() + 60 * args.minutes - 30)
    print(results.machine, flush=True)
    with ThreadPoolExecutor(2 if TOY else 1) as pool:
        try:
            list(pool.map(lambda name: run_part(results, name), args.only))
        except Broken as error:
            pool.shutdown(cancel_futures=True)
            sys.exit(f"run_gpu.sh: {error}")
    print(f"\n{(folder / 'gpu.md').read_text()}\n{folder / 'gpu.json'}", flush=True)


if __name__ == "__main__":
    main()
