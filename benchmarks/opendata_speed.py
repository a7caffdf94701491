"""Speed and memory of sft.opendata beside datasets.load_dataset("json") + map + to_json doing the same conversion.

    python benchmarks/opendata_speed.py                      # 100,000 records
    python benchmarks/opendata_speed.py 1000000 --only ours  # only sft.opendata

The records are like Belle's: Chinese, with log-normal lengths. Each run is a process of its own; its memory is the peak
of the sum over its process tree. `convert` is ours without cleaning, as load_dataset does none; `clean` is with it.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
CHARACTERS = "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里"
PEER = """
import datasets, sys
source, output = sys.argv[1:]
def convert(row, number):
    asked = row["instruction"] + ("\\n" + row["input"] if row["input"] else "")
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
    return {"id": f"data.json:{number + 1}", "source": "data.json", "messages": messages}
rows = datasets.load_dataset("json", data_files=source, split="train", cache_dir=output + "/cache")
rows = rows.map(convert, with_indices=True, remove_columns=rows.column_names, num_proc=2)
rows.to_json(output + "/train.json", force_ascii=False)
"""
RULES = "strip_edges cut_at_empty_turn fix_roles drop_self_identity drop_cut_off drop_language_mismatch drop_role_words"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("num_records", type=int, nargs="?", default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=("ours", "peer"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for form in ("lines", "array"):
            source = os.path.join(folder, "data.json")
            write_records(source, args.num_records, as_array=form == "array")
            print(
                f"{args.num_records:,} records as {form}, {os.path.getsize(source) >> 20} MiB, median of {args.repeats}"
            )
            compare(source, folder, args)


def write_records(path: str, num_records: int, *, as_array: bool) -> None:
    """Write alpaca records with log-normal lengths: questions of about 30 characters, answers of about 150."""
    rng = random.Random(0)
    text = "".join(rng.choices(CHARACTERS, k=1 << 20))

    def words(median: int, sigma: float) -> str:
        length = max(1, int(rng.lognormvariate(0, sigma) * median))
        start = rng.randrange(len(text) - length)
        return text[start : start + length]

    with open(path, "w", encoding="utf-8") as file:
        file.write("[\n" if as_array else "")
        for number in range(num_records):
            record = {"instruction": f"{number}、{words(30, 0.6)}？", "input": "", "output": f"{words(150, 0.9)}。"}
            file.write(json.dumps(record, ensure_ascii=False))
            file.write(",\n" if as_array and number < num_records - 1 else "\n")
        file.write("]\n" if as_array else "")


def compare(source: str, folder: str, args: argparse.Namespace) -> None:
    python = sys.executable
    commands = {
        "clean": [python, "-m", "sft.opendata", source],
        "convert": [
            python,
            "-m",
            "sft.opendata",
            source,
            "--eval_share",
            "0",
            *(f"--no_{rule}" for rule in RULES.split()),
        ],
        "load_dataset": [python, "-c", PEER, source],
    }
    chosen = {"ours": ("clean", "convert"), "peer": ("load_dataset",), None: tuple(commands)}[args.only]
    results = {}
    for name in chosen:
        runs = [measure(commands[name], folder, name) for _ in range(args.repeats)]
        seconds, peak = (statistics.median(run[i] for run in runs) for i in (0, 1))
        results[name] = seconds, peak
        print(f"  {name:13} {args.num_records / seconds:9,.0f} records/s {seconds:7.1f} s {peak:7,.0f} MiB")
    if "load_dataset" in results and "convert" in results:
        seconds, peak = results["convert"]
        peer_seconds, peer_peak = results["load_dataset"]
        print(f"  convert is {peer_seconds / seconds:.2f} times as fast with {peak / peer_peak:.2f} times the memory")


def measure(command: list[str], folder: str, name: str) -> tuple[float, float]:
    """Seconds, and the peak memory of the process tree in MiB (shared pages once, where the system can tell)."""
    with tempfile.TemporaryDirectory(dir=folder) as output:
        command = command + (["--output", output] if "sft.opendata" in command else [output])
        began = time.perf_counter()
        peak = 0
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None:
            peak = max(peak, tree_memory(process.pid))
            time.sleep(0.05)
        if process.returncode:
            raise SystemExit(f"{name} failed: {process.stderr.read().decode()[-2000:]}")
        return time.perf_counter() - began, peak / 2**20


def tree_memory(pid: int) -> int:
    """Proportional set sizes, summed over a process and its children, in bytes."""
    total = 0
    try:
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            total += process.memory_full_info().pss
    except psutil.Error:
        pass
    return total


if __name__ == "__main__":
    main()
