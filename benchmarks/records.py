"""Shared by the benchmarks: data, a base, fresh processes that report a line of JSON, tables.

Every measured run is a process of its own with one OpenMP thread. Ours runs on this interpreter; a peer on
$PEER_PYTHON, which run_cpu.sh makes. Results are kept in .cache/benchmarks/results.json; results.py writes RESULTS.md
from them.
"""

import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".cache" / "benchmarks"
RESULTS = FOLDER / "results.json"
TOKENS_PER_WORD = 1.6  # of the tokenizer that build_base trains on these texts
NUM_WORDS = 40_000  # words of each language
CONSONANTS = ("b", "br", "c", "ch", "d", "f", "g", "gr", "h", "k", "l", "m", "n", "p", "r", "s", "st", "t", "v", "w")
VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "ou")


def peer_python(peer: str = "trl") -> str:
    """The interpreter of a peer's environment; $PEER_PYTHON names another one for TRL and alpaca."""
    own = FOLDER.parent / "peers" / peer / "bin" / "python"
    return os.path.abspath(os.environ.get("PEER_PYTHON", own)) if peer == "trl" else str(own)


# --- data ---------------------------------------------------------------------------------------------------------


def make_words(random: np.random.Generator) -> tuple[list[str], list[str]]:
    """Return made-up English and Chinese words, the frequent ones first; each tenth English one is a number."""
    syllables = [head + vowel + tail for head in CONSONANTS for vowel in VOWELS for tail in ("", "n", "r", "s", "l")]
    english = ["".join(random.choice(syllables, random.integers(1, 5))) for _ in range(NUM_WORDS)]
    english[9::10] = [str(number) for number in random.integers(0, 100_000, len(english[9::10]))]
    characters = [chr(0x4E00 + index) for index in random.permutation(6000)]
    frequent = np.minimum(random.zipf(1.2, (NUM_WORDS, 4)) - 1, 5999)
    sizes = random.choice([1, 2, 3, 4], NUM_WORDS, p=[0.2, 0.6, 0.15, 0.05])
    chinese = ["".join(characters[i] for i in row[:size]) for row, size in zip(frequent, sizes, strict=True)]
    return english, chinese


def make_texts(num_records: int, seed: int = 0):
    """Yield (instruction, output) pairs; lengths are log-normal with a mean of about 260 tokens and a tail to 2048."""
    english, chinese = make_words(np.random.default_rng(12))
    random = np.random.default_rng([seed, 34])
    for _ in range(num_records):
        words, space = (chinese, "") if random.random() < 0.6 else (english, " ")
        size = int(np.clip(random.lognormal(5.24, 0.85), 12, 1900) / TOKENS_PER_WORD)
        ranks = np.minimum(random.zipf(1.15, size) - 1 + random.integers(0, 40, size), NUM_WORDS - 1)
        ends = random.choice(["", "，" if space == "" else ",", "。" if space == "" else ".", "\n"], size, p=ENDS)
        text = [words[rank] + end for rank, end in zip(ranks, ends, strict=True)]
        cut = max(2, int(size * random.uniform(0.05, 0.35)))
        yield space.join(text[:cut]), space.join(text[cut:]) + "."


ENDS = (0.86, 0.08, 0.05, 0.01)


def write_records(num_records: int) -> Path:
    """Write the records once as canonical conversations (JSON Lines) and return the file."""
    path = FOLDER / f"records-{num_records}.jsonl"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # Checks that run beside each other write it at the same time.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", encoding="utf-8", delete=False) as file:
        for number, (asked, answer) in enumerate(make_texts(num_records)):
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            record = {"id": str(number), "source": path.name, "messages": messages}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    os.replace(file.name, path)
    return path


def build_base(vocab_size: int = 32_000, hidden_size: int = 64, num_layers: int = 2) -> Path:
    """Build a tiny qwen2 base once, its tokenizer trained on records other than the measured ones; save the template.

    `sft.tiny` makes it in a process of its own, and the peers read the folder.
    """
    folder = FOLDER / f"base-{vocab_size}-{hidden_size}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, __file__, str(folder), str(vocab_size), str(hidden_size), str(num_layers)])
    return folder


def _build(folder: str, vocab_size: str, hidden_size: str, num_layers: str) -> None:
    sys.path.insert(0, str(ROOT))
    from sft.format.render import Renderer
    from sft.model.load import load_tokenizer
    from sft.tiny import build_tiny

    texts = [text for pair in make_texts(8000, seed=1) for text in pair]
    sizes = {"hidden_size": int(hidden_size), "num_layers": int(num_layers)}
    build_tiny("qwen2", folder, vocab_size=int(vocab_size), texts=texts, **sizes)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = Renderer(tokenizer, "chatml").chat_template
    tokenizer.save_pretrained(folder)


# --- processes ----------------------------------------------------------------------------------------------------


def run(script: str, *arguments: object, python: str = sys.executable, **environment: str) -> dict:
    """Run a script of this folder in a fresh process; return what its last line reports and its peak memory."""
    settings = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **environment}
    command = [python, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines or not lines[-1].startswith("{"):
        print(f"{' '.join(command)} failed ({done.returncode}): {(done.stderr + done.stdout)[-1500:]}", file=sys.stderr)
        return {}
    return json.loads(lines[-1])


def report(**numbers: object) -> None:
    """Print the numbers and this process's peak memory as the last line of a measured process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("\n" + json.dumps({**numbers, "peak_mib": peak}), flush=True)


class CpuClock:
    """CPU seconds of this process and its ended children since it was made."""

    def __init__(self):
        gc.freeze()  # as train.py does after its imports: a collection would walk through all modules
        self.began = self._now()

    def seconds(self) -> float:
        return self._now() - self.began

    def _now(self) -> float:
        return time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


# --- results ------------------------------------------------------------------------------------------------------


def alternate(section: str, row: str, variants: dict[str, dict], repeats: int) -> dict[str, list[dict]]:
    """Run each variant (the arguments of `run`) in turn, `repeats` times over, and keep what is there after each run.

    A variant that fails is said to have failed, and left out.
    """
    runs: dict[str, list[dict]] = {}
    for _ in range(repeats):
        for name, variant in variants.items():
            found = run(*variant["command"], python=variant.get("python", sys.executable))
            print(f"  {name}: {found}", flush=True)
            if found:
                runs.setdefault(name, []).append(found)
                keep(section, row, runs)
    return runs


def median(runs: list[dict], name: str) -> float:
    return statistics.median(run[name] for run in runs)


def keep(section: str, row: str, runs: dict[str, list[dict]]) -> None:
    """Store the runs of one row of a table; a later run of the same side replaces it."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kept.setdefault(section, {}).setdefault(row, {}).update(runs)
    RESULTS.write_text(json.dumps(kept, indent=1))


if __name__ == "__main__":
    _build(*sys.argv[1:])
