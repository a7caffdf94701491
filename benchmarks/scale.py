"""Raw records at real scale, step by step: seconds, peak memory and disk, and whether training grows with the data.

    python benchmarks/scale.py 3000000          # 4 GB of alpaca-form JSON, 13 GB of disk; kept in .cache/benchmarks

Each step is a process of its own; its memory is the peak of the sum of proportional set sizes over its process tree.
The texts of 200,000 made-up records (records.py) repeat, each time from another place in the text and with a number in
front, so that none is a duplicate. `train` takes 20 steps from the rows already made, for a tenth of the records and
for all.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from opendata_speed import tree_memory
from records import FOLDER, ROOT, build_base, keep, write_records

TEXTS = 200_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("num_records", type=int, nargs="?", default=3_000_000)
    parser.add_argument("--max_steps", type=int, default=20)
    args = parser.parse_args()
    base = build_base()
    for size in (args.num_records // 10, args.num_records):
        folder = FOLDER / f"scale-{size}"
        raw = write_raw(folder / "raw.json", size)
        data = folder / "opendata"
        runs = {"raw": {"seconds": 0.0, "peak_mib": 0.0, "disk_mib": size_of(raw)}}
        if not data.exists():
            runs["opendata"] = measure("-m", "sft.opendata", raw, "--output", data) | {"disk_mib": size_of(data)}
        flags = ["--model_name_or_path", base, "--data_path", data / "train.json", "--cache_dir", folder / "cache"]
        flags += ["--chat_format", "chatml", "--eval_strategy", "no", "--num_reply_prompts", 1]
        out = folder / f"out-{time.time():.0f}"
        prepared = measure("train.py", *flags, "--output_dir", out / "dry", "--dry_run", "--gpu", "80GB")
        runs["dry run, with tokenising"] = prepared | {"disk_mib": size_of(folder / "cache")}
        steps = ["--max_steps", args.max_steps, "--per_device_train_batch_size", 1, "--save_strategy", "no"]
        runs["train"] = measure("train.py", *flags, *steps, "--output_dir", out / "model") | {"disk_mib": 0.0}
        for name, numbers in runs.items():
            print(
                f"{size:>9,} records, {name:25}", {key: round(value, 1) for key, value in numbers.items()}, flush=True
            )
        keep("scale", str(size), runs)


def write_raw(path: Path, num_records: int) -> Path:
    """Write the records as one JSON array, as hub data sets come, unless they are there."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(write_records(TEXTS), encoding="utf-8") as lines:
        pairs = [[message["content"] for message in json.loads(line)["messages"]] for line in lines]
    staged = path.with_suffix(".part")
    with open(staged, "w", encoding="utf-8") as file:
        for number in range(num_records):
            turn, place = divmod(number, TEXTS)
            asked, answer = pairs[place]
            begin = turn * 7919 % len(answer)
            record = {
                "instruction": f"{number}. {asked}",
                "input": "",
                "output": answer[begin:-1] + answer[:begin] + ".",
            }
            file.write(("[\n" if number == 0 else ",\n") + json.dumps(record, ensure_ascii=False))
        file.write("\n]\n")
    staged.rename(path)
    return path


def size_of(path: Path) -> float:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) / 2**20


def measure(*command: object) -> dict[str, float]:
    """Run Python with `command`; return seconds, and the peak of its memory in MiB."""
    began = time.perf_counter()
    peak = 0
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        peak = max(peak, tree_memory(process.pid))
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"{command} failed ({process.returncode}): {process.stdout.read()[-2000:]}")
    return {"seconds": time.perf_counter() - began, "peak_mib": peak / 2**20}


if __name__ == "__main__":
    main()
