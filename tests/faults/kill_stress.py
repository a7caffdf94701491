"""Kill a run again and again, at random times, in random ways; then compare it byte for byte with one never touched.

    python tests/faults/kill_stress.py --zero 3 --kills 10 --seed 1 --work /tmp/stress

A script, not a test: it takes about ten seconds for each kill. Exits with 1 at the first difference, at a process that
lives on, or at a run that doesn't end.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from sft.tiny import build_tiny  # noqa: E402

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGHUP, signal.SIGUSR1)
TARGETS = ("launcher", "rank 0", "rank 1", "all ranks")
STAGES = ("starting", "training", "saving", "ending")


def prepare(work: Path) -> dict[str, str]:
    """Build a tiny base and 60 conversations; return the knobs of ds_all.sh."""
    work.mkdir(parents=True)
    lines = [{"prompt": f"question {i}", "completion": "answer " * (1 + i * 7 % 23)} for i in range(60)]
    (work / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    build_tiny("qwen2", work / "base", hidden_size=64, num_layers=2)
    knobs = {"MODEL": str(work / "base"), "DATA": str(work / "data.jsonl"), "MAX_LENGTH": "128", "BATCH_SIZE": "2"}
    return knobs | {"ACCUMULATION": "2", "LEARNING_RATE": "1e-3", "NUM_GPUS": "2", "PYTHON": sys.executable}


def start(output: Path, knobs: dict[str, str], log: Path, *flags: str) -> subprocess.Popen:
    command = ["sh", "ds_all.sh", "--max_steps", "60", "--save_steps", "5", "--logging_steps", "3", "--max_new_tokens"]
    command += ["4", "--cache_dir", str(output.parent / "cache"), *flags]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **knobs, "OUTPUT": str(output)}
    with open(log, "a") as stream:
        return subprocess.Popen(command, cwd=ROOT, env=settings, stdout=stream, stderr=stream)


def ranks_of(output: Path) -> list[int]:
    found = []
    for path in sorted((output / "model" / ".ranks").glob("[0-9]*")):
        try:
            found.append(json.loads(path.read_text())["pid"])
        except (OSError, ValueError):
            return []
    return found


def wait_for(stage: str, process: subprocess.Popen, output: Path, log: Path, chance: random.Random) -> None:
    """Return at a random moment of a stage, or when the process has ended."""
    if stage == "starting":
        time.sleep(chance.uniform(0, 5))
        return
    size = log.stat().st_size
    signs = {
        "training": lambda: "self-test" in log.read_text()[size:],
        "saving": lambda: any((output / "model" / ".saving").glob("checkpoint-*")),
        "ending": lambda: "'train_loss'" in log.read_text()[size:],
    }
    while process.poll() is None and not signs[stage]():
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.03 if stage == "saving" else 1.0))


def kill(process: subprocess.Popen, target: str, number: int, ranks: list[int]) -> bool:
    pids = {"launcher": [process.pid], "all ranks": ranks, "rank 0": ranks[:1], "rank 1": ranks[1:2]}[target]
    if process.poll() is not None or not pids:
        return False
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return False
    return True


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def digest(output: Path) -> tuple[str, list]:
    """A hash of the final weights, and the losses that were logged."""
    weights = hashlib.sha256((output / "model" / "model.safetensors").read_bytes()).hexdigest()
    history = json.loads((output / "model" / "run.json").read_text())["log_history"]
    return weights, [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zero", default="2", choices=("2", "3"))
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True)
    arguments = parser.parse_args()
    chance, knobs = random.Random(arguments.seed), prepare(arguments.work) | {"ZERO": arguments.zero}
    whole, log = arguments.work / "whole", arguments.work / "log"
    assert start(whole, knobs, log).wait(timeout=300) == 0, log.read_text()[-3000:]
    kills, tries = 0, 0
    while kills < arguments.kills:
        output, tries, ended = arguments.work / f"killed{tries}", tries + 1, None
        while ended != 0:
            process = start(output, knobs, log, "--resume_from_checkpoint", "auto")
            stage, target, number = chance.choice(STAGES), chance.choice(TARGETS), chance.choice(SIGNALS)
            if kills < arguments.kills:
                wait_for(stage, process, output, log, chance)
            ranks = ranks_of(output)
            hit = kills < arguments.kills and kill(process, target, number, ranks)
            began = time.monotonic()
            ended = process.wait(timeout=150)
            seconds, kills = time.monotonic() - began, kills + hit
            alive = ranks
            while (alive := [pid for pid in alive if lives(pid)]) and time.monotonic() - began < seconds + 15:
                time.sleep(0.1)
            newest = max((int(p.name[11:]) for p in (output / "model").glob("checkpoint-*")), default=0)
            what = f"{signal.Signals(number).name} to {target}, {stage}" if hit else "not touched"
            print(f"kill {kills}: {what}: exit code {ended} after {seconds:.1f} s, checkpoint-{newest}", flush=True)
            if alive or ended in (1, 2):
                print(f"processes {alive} live on" if alive else log.read_text()[-3000:])
                return 1
        if digest(output) != digest(whole):
            print(f"{output} differs from {whole}")
            return 1
        print(f"{output}: weights and {len(digest(whole)[1])} logged losses are those of the run never touched")
    return 0


if __name__ == "__main__":
    sys.exit(main())
