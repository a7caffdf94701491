"""One worker beside several: seconds, CPU seconds and peak memory of preparing and of sft.opendata; equal bytes.

    python benchmarks/workers.py                        # 200,000 records, one worker and two
    python benchmarks/workers.py 20000 --workers 1 2 4

Wall seconds say something on a quiet machine alone; CPU seconds are those of the process and its workers.
"""

import argparse
import hashlib
import os
import re
import tempfile
import threading
import time
from pathlib import Path

import psutil
from records import CpuClock, alternate, build_base, median, report, write_records

COMMANDS = ("prepare", "opendata")


def run_prepare(records: str, folder: str, workers: int) -> None:
    from sft.dataset.dataset import prepare
    from sft.format.render import Renderer
    from sft.model.load import load_tokenizer

    renderer = Renderer(load_tokenizer(build_base()), "chatml")
    options = {"max_length": 2048, "cache_dir": folder, "say": lambda text: None}
    measure(lambda: prepare([records], renderer, num_workers=workers, **options), folder)


def run_opendata(records: str, folder: str, workers: int) -> None:
    from sft.opendata.build import build_opendata

    measure(lambda: build_opendata([records], output=os.path.join(folder, "out"), workers=workers), folder)


def measure(function, folder: str) -> None:
    """Report what a call took, and a digest of the files that it left in `folder`."""
    peaks = [0.0]
    threading.Thread(target=watch_workers, args=(peaks,), daemon=True).start()
    clock = CpuClock()
    own = time.process_time()
    began = time.time()
    function()
    numbers = {"wall_seconds": time.time() - began, "seconds": clock.seconds()}
    numbers["parent_seconds"] = time.process_time() - own
    numbers["worker_mib"] = max(peaks)
    digest = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    report(**numbers, digest=digest.hexdigest())


def watch_workers(peaks: list[float]) -> None:
    """Add the peak memory of each worker in MiB, again and again."""
    while True:
        for process in psutil.Process().children():
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:  # it has ended
                continue
            peaks += [int(number) / 1024 for number in re.findall(r"VmHWM:\s+(\d+)", status)]
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("num_records", type=int, nargs="?", default=200_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", nargs=3, metavar=("COMMAND", "RECORDS", "WORKERS"), help="be one measured process")
    args = parser.parse_args()
    if args.measure:
        command, records, workers = args.measure
        with tempfile.TemporaryDirectory() as folder:
            return {"prepare": run_prepare, "opendata": run_opendata}[command](records, folder, int(workers))
    records = write_records(args.num_records)
    for command in COMMANDS:
        variants = {
            f"{workers} workers": {"command": ("workers.py", "--measure", command, records, workers)}
            for workers in args.workers
        }
        runs = alternate("workers", f"{command}, {args.num_records:,} records", variants, args.repeats)
        first = next(iter(runs.values()))
        for name, found in runs.items():
            wall = median(found, "wall_seconds")
            seconds = median(found, "seconds")
            print(
                f"{command:9} {name}: {wall:6.1f} s wall ({median(first, 'wall_seconds') / wall:.2f} x as fast), "
                f"{seconds:6.1f} s CPU ({seconds / median(first, 'seconds') - 1:+.1%}), of which the parent "
                f"{median(found, 'parent_seconds'):.1f}; peak {median(found, 'peak_mib'):,.0f} MiB, "
                f"workers {median(found, 'worker_mib'):,.0f} MiB"
            )
        assert len({run["digest"] for found in runs.values() for run in found}) == 1, "the bytes differ"


if __name__ == "__main__":
    main()
