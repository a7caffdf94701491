"""Peak memory of each rank while a wide base is loaded, under ZeRO-2 and ZeRO-3, two processes on a CPU.

    python benchmarks/zero3_memory.py --work /tmp/zero3_memory

Prints how much memory each rank takes at most for that, in MiB, without what is mapped from files.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sft.tiny import build_tiny  # noqa: E402


def measure(zero: str, base: Path, work: Path) -> list[float]:
    """Return by how much each rank's anonymous memory grows at most, in MiB, from its start until training begins."""
    settings = {
        "ZERO": zero,
        "NUM_GPUS": "2",
        "MODEL": str(base),
        "DATA": str(work / "data.jsonl"),
        "MAX_LENGTH": "256",
    }
    settings |= {"OUTPUT": str(work / f"zero{zero}"), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    settings["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # freed memory is returned at once, else it is counted
    command = ["sh", "ds_all.sh", "--max_steps", "1", "--save_strategy", "no", "--num_reply_prompts", "0"]
    command += ["--cache_dir", str(work / "cache"), "--max_new_tokens", "1"]
    log = work / f"zero{zero}.log"
    with open(log, "w") as stream:
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **settings}, stdout=stream, stderr=stream)
    largest = [0.0, 0.0]
    before = [0.0, 0.0]
    while process.poll() is None and "parameters:" not in log.read_text():
        now = [_anonymous(work / f"zero{zero}" / "model" / ".ranks" / str(rank)) for rank in (0, 1)]
        before = [first or size for first, size in zip(before, now, strict=True)]
        largest = [max(pair) for pair in zip(largest, now, strict=True)]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.wait()
    return [size - first for size, first in zip(largest, before, strict=True)]


def _anonymous(path: Path) -> float:
    try:
        status = Path(f"/proc/{json.loads(path.read_text())['pid']}/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) / 1024
    except (OSError, ValueError, IndexError):
        return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--hidden_size", type=int, default=2048)
    parser.add_argument("--num_layers", type=int, default=12)
    options = parser.parse_args()
    options.work.mkdir(parents=True)
    rows = [json.dumps({"prompt": f"question {i}", "completion": "answer"}) + "\n" for i in range(8)]
    (options.work / "data.jsonl").write_text("".join(rows))
    base = build_tiny("qwen2", options.work / "base", hidden_size=options.hidden_size, num_layers=options.num_layers)
    weights = 2 * sum(path.stat().st_size for path in base.glob("*.safetensors")) / 2**20  # bf16 there, fp32 here
    for zero in ("2", "3"):
        ranks = ", ".join(f"rank {rank} {size:,.0f}" for rank, size in enumerate(measure(zero, base, options.work)))
        print(f"weights in fp32 {weights:,.0f} MiB, ZeRO-{zero}: {ranks} MiB")


if __name__ == "__main__":
    main()
