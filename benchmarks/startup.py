"""Wall and CPU seconds from the command to the end of the first optimizer step, on a tiny base: train.py beside TRL.

    python benchmarks/startup.py

A thousand records, nothing cached. `ours` is train.py as it comes: it proves its attention and loss on the model and
answers its sixteen questions before the first step. `ours_silent` leaves the answers out (one token for each of the
fixed four), as TRL gives none. Both run where requirements.txt is installed; `ours_same_packages` is `ours_silent` on
the peers' interpreter, without DeepSpeed and PEFT, which transformers and accelerate import wherever they find them.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time

from records import ROOT, build_base, keep, median, peer_python, write_records

SILENT = ["--num_reply_prompts", "0", "--max_new_tokens", "1"]


def commands(base: str, records: str, folder: str) -> dict[str, list[str]]:
    flags = {"model_name_or_path": base, "data_path": records, "chat_format": "chatml", "output_dir": folder}
    flags |= {"cache_dir": f"{folder}/cache", "max_steps": 2, "per_device_train_batch_size": 1, "use_cpu": True}
    train = [sys.executable, "first_step.py", str(ROOT / "train.py")]
    train += [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    peer = [peer_python(), "first_step.py", "trl_script.py", str(base), str(records), folder]
    same = [peer_python(), *train[1:], *SILENT]
    return {"ours": train, "ours_silent": [*train, *SILENT], "ours_same_packages": same, "trl": peer}


def measure(command: list[str]) -> dict[str, float]:
    settings = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    cpu, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    done = subprocess.run(command, cwd=ROOT / "benchmarks", env=settings, capture_output=True, text=True)
    if not done.stdout.strip().endswith("}"):
        raise SystemExit(f"{' '.join(command)} failed: {(done.stdout + done.stderr)[-2000:]}")
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    wall = json.loads(done.stdout.strip().splitlines()[-1])["at"] - began
    return {"wall_seconds": wall, "seconds": now.ru_utime + now.ru_stime - cpu.ru_utime - cpu.ru_stime}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    base, records = build_base(), write_records(1000)
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
