"""Whether a dry run refuses the model types that a run refuses: both, on tiny random bases of the installed types.

    python benchmarks/dry_runs.py                      all types, half an hour on two cores
    python benchmarks/dry_runs.py --lora true -- qwen3 gpt_oss

The run has weights and trains one step; the dry run has config and tokenizer alone. Other flags go to both.
"""

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

FLAGS = {
    **{"--max_steps": "1", "--per_device_train_batch_size": "2", "--max_length": "256", "--num_reply_prompts": "0"},
    **{"--max_new_tokens": "4", "--gradient_checkpointing": "true", "--save_strategy": "steps", "--save_steps": "1"},
    **{"--warmup_steps": "0", "--max_lost": "1", "--use_cpu": "true"},
}
SEEN = "problem: "  # of a dry run's lines


def write_base(kind: str, folder: Path) -> None:
    """Write a tiny random base of a type, with a tokenizer of at most 500 tokens."""
    from benchmarks.families import build_model
    from sft.tiny import qwen_tokenizer, sample_texts

    model = build_model(kind)
    model.save_pretrained(folder)
    qwen_tokenizer(sample_texts(), folder, 500)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": 0}))


def write_data(file: Path) -> None:
    with open(file, "w", encoding="utf-8") as stream:
        for number in range(12):
            turns = [("user", f"What is {number}?"), ("assistant", f"It is {number}. " * (1 + number))]
            messages = [{"role": role, "content": text} for role, text in turns]
            stream.write(json.dumps({"id": str(number), "source": "numbers", "messages": messages}) + "\n")


def find_refusal(words: list[str]) -> tuple[str, float]:
    """Call train.py's main in this process; return its last line when it refuses ("" when not), and CPU seconds."""
    import train

    printed = io.StringIO()
    began = time.process_time()
    refused = ""
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            train.main(words)
        except SystemExit:
            lines = [line for line in printed.getvalue().splitlines() if line.startswith("train.py: ")]
            refused = " | ".join(line.removeprefix("train.py: ").removeprefix(SEEN) for line in lines)
        except Exception as error:  # a type fails in its own ways
            refused = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return refused, time.process_time() - began


def compare(kind: str, extra: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "base")
        data = Path(folder, "train.json")
        write_data(data)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                write_base(kind, base)
        except Exception as error:
            return {"type": kind, "unbuilt": f"{type(error).__name__}: {str(error)[:90]}"}
        flags = FLAGS | {"--data_path": str(data), "--cache_dir": f"{folder}/cache", "--model_name_or_path": str(base)}
        words = [word for pair in flags.items() for word in pair] + extra
        run = find_refusal([*words, "--output_dir", f"{folder}/run"])
        for file in [*base.glob("*.safetensors"), *base.glob("*.index.json")]:
            file.unlink()
        dry = find_refusal([*words, "--output_dir", f"{folder}/dry", "--dry_run"])
        shutil.rmtree(f"{folder}/run", ignore_errors=True)
    same = bool(run[0]) == bool(dry[0])
    return {"type": kind, "run": run[0], "dry": dry[0], "same": same, "seconds": dry[1]}


def main() -> None:
    from benchmarks.families import causal_types

    words = sys.argv[1:]
    place = words.index("--") if "--" in words else len(words)
    extra = words[:place]
    chosen = words[place + 1 :] or causal_types()
    with ProcessPoolExecutor(2) as processes:
        results = []
        for found in processes.map(partial(compare, extra=extra), chosen):
            results.append(found)
            print(json.dumps(found), flush=True)
    tried = [found for found in results if "unbuilt" not in found]
    refused = sum(bool(found["run"]) for found in tried)
    seconds = sorted(found["seconds"] for found in tried)
    print(
        f"{len(tried)} types, {refused} of them refused by the run; same verdict: {sum(f['same'] for f in tried)}; "
        f"CPU seconds of a dry run: median {seconds[len(seconds) // 2]:.1f}, most {seconds[-1]:.1f}"
    )


if __name__ == "__main__":
    main()
