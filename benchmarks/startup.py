"""Wall and CPU seconds from the command to the end of the first optimizer step, on a tiny base: train.py beside TRL.

    python benchmarks/startup.py
    python benchmarks/startup.py --against ../old --repeats 5     # CPU seconds beside another checkout of this project

A thousand records, nothing cached. `ours` is train.py as it comes: it proves its attention and loss on the model and
answers its sixteen questions before the first step. `ours_silent` leaves the answers out (one token for each of the
fixed four), as TRL gives none. Both run where requirements.txt is installed; `ours_same_packages` is `ours_silent` on
the peers' interpreter, without DeepSpeed and PEFT, which transformers and accelerate import wherever they find them.
With --against, each command of COMMANDS runs in both checkouts in turn; `own_seconds` are those without imports.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from records import ROOT, build_base, keep, median, peer_python, write_records

SILENT = ["--num_reply_prompts", "0", "--max_new_tokens", "1"]
COMMANDS = ("train.py --help", "sft.opendata --help", "sft.opendata", "first step", "first step, filled cache")


def commands(base: str, records: str, folder: str) -> dict[str, list[str]]:
    flags = {"model_name_or_path": base, "data_path": records, "chat_format": "chatml", "output_dir": folder}
    flags |= {"cache_dir": f"{folder}/cache", "max_steps": 2, "per_device_train_batch_size": 1, "use_cpu": True}
    train = [sys.executable, "first_step.py", str(ROOT / "train.py")]
    train += [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    peer = [peer_python(), "first_step.py", "trl_script.py", str(base), str(records), folder]
    same = [peer_python(), *train[1:], *SILENT]
    return {"ours": train, "ours_silent": [*train, *SILENT], "ours_same_packages": same, "trl": peer}


def checkout_command(name: str, root: Path, base: Path, records: Path, folder: str) -> list[str]:
    """Return the command of COMMANDS that runs the code in `root`; a later run of one `folder` finds a filled cache."""
    if name == "train.py --help":
        return [sys.executable, str(root / "train.py"), "--help"]
    if name.startswith("sft.opendata"):
        run = [str(records), "--output", f"{folder}/opendata", "--overwrite"]
        return [sys.executable, "-m", "sft.opendata", *(["--help"] if name.endswith("help") else run)]
    command = commands(str(base), str(records), f"{folder}/{time.time()}")["ours"]
    command[command.index(str(ROOT / "train.py"))] = str(root / "train.py")
    cache = f"{folder}/cache" if name.endswith("cache") else f"{folder}/{time.time()}"
    return [*command, "--cache_dir", cache]


def measure(command: list[str], root: Path = ROOT) -> dict[str, float]:
    """Run a command with the code in `root`; return its seconds, CPU seconds and, of a first step, those of its own."""
    settings = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root)}
    began = time.time()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT / "benchmarks", env=settings, capture_output=True, text=True)
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {(done.stdout + done.stderr)[-2000:]}")
    last = (done.stdout.strip().splitlines() or [""])[-1]
    found = json.loads(last) if last.startswith("{") else {}
    seconds = now.ru_utime + now.ru_stime - before.ru_utime - before.ru_stime
    numbers = {"wall_seconds": found.get("at", time.time()) - began, "seconds": seconds}
    if "cpu_seconds" in found:
        numbers["own_seconds"] = found["cpu_seconds"] - found["import_seconds"]
    return numbers


def compare_checkouts(other: Path, repeats: int) -> None:
    """Run each command in the other checkout and in this one in turn, and print the medians."""
    base = build_base().resolve()
    records = write_records(1000).resolve()
    for name in COMMANDS:
        runs: dict[str, list[dict]] = {}
        with tempfile.TemporaryDirectory() as folder:
            for turn in range(repeats + 1):
                for side, root in {"other": other.resolve(), "ours": ROOT}.items():
                    numbers = measure(checkout_command(name, root, base, records, f"{folder}/{side}"), root)
                    if turn:  # the first fills caches
                        runs.setdefault(side, []).append(numbers)
        keep("checkouts", name, runs)
        seconds = {side: median(found, "seconds") for side, found in runs.items()}
        change = seconds["ours"] / seconds["other"] - 1
        line = f"{name:26} {seconds['other']:6.3f} s CPU, ours {seconds['ours']:6.3f} s ({change:+.1%})"
        if "own_seconds" in runs["ours"][0]:
            line += f", {median(runs['ours'], 'own_seconds'):.2f} s without imports"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="compare with this checkout, not with TRL")
    args = parser.parse_args()
    if args.against:
        return compare_checkouts(args.against, args.repeats)
    base = build_base()
    records = write_records(1000)
    runs: dict[str, list[dict]] = {}
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as folder:
            for side, command in commands(base, records, folder).items():
                runs.setdefault(side, []).append(
                    measure([word.replace(folder, f"{folder}/{side}") for word in command])
                )
                print(f"  {side}: {runs[side][-1]}", flush=True)
        keep("startup", "first step", runs)
    for side, found in runs.items():
        print(f"{side:18} {median(found, 'wall_seconds'):6.1f} s wall, {median(found, 'seconds'):6.1f} s CPU")


if __name__ == "__main__":
    main()
