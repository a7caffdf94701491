"""Full fine-tuning steps on a GPU: tokens per second, MFU and peak memory of three shapes, ours beside TRL.

    python benchmarks/gpu_step.py            # about eight minutes on one H200; without a GPU, toys that prove it runs

Random weights in fp32 (the masters), computing in bf16, AdamW fused, packed rows of 4096, no gradient checkpointing. A
shape whose weights, gradients, moments and bf16 copy (18 bytes a parameter) would take more than half of the memory
loses layers, and the table says how many are left. MFU is 6·N·T + 6·layers·hidden·sum(length²) FLOP (causal attention,
each document alone; N without the input embedding unless it is the head too) over 989 TFLOP/s.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time

import torch
from records import FOLDER, RESULTS, ROOT, keep, run

PEAK_FLOPS = 989e12
BYTES_PER_PARAMETER = 18
QWEN2 = {"vocab_size": 152_064, "max_position_embeddings": 32_768, "rope_theta": 1e6}
SHAPES = {
    "qwen2.5-7b": ("qwen2", 28, {**QWEN2, "hidden_size": 3584, "intermediate_size": 18_944}
        | {"num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False}),
    "qwen2.5-0.5b": ("qwen2", 24, {**QWEN2, "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864}
        | {"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "bloom-7b1": ("bloom", 30, {"vocab_size": 250_880, "hidden_size": 4096, "n_head": 32}),
}  # fmt: skip
TOY = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 2000, "num_attention_heads": 4, "n_head": 4}


def sizes(family: str, config: dict) -> tuple[int, int]:
    """Return the parameters of one layer and of the embeddings, both matrices if they are not tied."""
    hidden = config["hidden_size"]
    if family == "bloom":
        return 12 * hidden**2, config["vocab_size"] * hidden
    groups = config["num_key_value_heads"] / config["num_attention_heads"]
    layer = hidden**2 * (2 + 2 * groups) + 3 * hidden * config["intermediate_size"]
    return int(layer), config["vocab_size"] * hidden * (1 if config["tie_word_embeddings"] else 2)


def plan(name: str, on_gpu: bool) -> tuple[dict, int]:
    """Return the settings of a shape's measured processes, and the layers of the whole model."""
    family, layers, config = SHAPES[name]
    settings = {"family": family, "bf16": True, "max_length": 4096, "rows": 4 if "0.5b" in name else 2}
    settings |= {"warmup": 3, "steps": 8, "num_examples": 2000}
    whole = layers
    if on_gpu:
        layer, embeddings = sizes(family, config)
        room = 0.5 * torch.cuda.get_device_properties(0).total_memory / BYTES_PER_PARAMETER
        layers = max(2, min(layers, int((room - embeddings) / layer)))
    else:
        config = config | {key: value for key, value in TOY.items() if key in config}
        layers, settings = 2, settings | {"max_length": 256, "steps": 2, "warmup": 1, "num_examples": 100}
    depth = "n_layer" if family == "bloom" else "num_hidden_layers"
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    return settings | {"config": {**config, depth: layers, **ids}}, whole


def flops(settings: dict, found: dict) -> float:
    """FLOP of the measured steps, forward and backward."""
    family, config = settings["family"], settings["config"]
    layers = config["n_layer" if family == "bloom" else "num_hidden_layers"]
    layer, _embeddings = sizes(family, config)
    head = config["vocab_size"] * config["hidden_size"]
    attention = 6 * layers * config["hidden_size"] * found["tokens"] * found["mean_seen"]
    return 6 * (layers * layer + head) * found["tokens"] + attention


def measure(name: str, side: str, on_gpu: bool) -> dict:
    settings, whole = plan(name, on_gpu)
    if side == "trl" and settings["family"] == "bloom":
        settings |= {"packing": False, "rows": settings["rows"] * 8}
    found = run("step_side.py", side, json.dumps(settings), OMP_NUM_THREADS="8" if on_gpu else "1")
    if not found:
        return {}
    found["mfu"] = flops(settings, found) / found["wall_seconds"] / PEAK_FLOPS if on_gpu else 0.0
    if side == "ours":
        found["counted_mib"] = counted(settings, "cuda" if on_gpu else "cpu") / 2**20
    depth = "n_layer" if settings["family"] == "bloom" else "num_hidden_layers"
    return found | {"layers": settings["config"][depth], "whole": whole}


def counted(settings: dict, device: str) -> int:
    """Return the bytes that sft.preview.memory computes for such a step."""
    sys.path.insert(0, str(ROOT))
    from transformers import AutoConfig

    from sft.preview import memory, shape

    config = AutoConfig.for_model(settings["family"], **settings["config"])
    rows, length = settings["rows"], settings["max_length"]
    step = shape.Step(rows, length, rows * length, checkpointing=False, device=device)
    return memory.estimate(shape.read_shape(config), step, shape.Plan())[0][-1].bytes


def sides() -> list[str]:
    importable = subprocess.run([sys.executable, "-c", "import trl"], capture_output=True).returncode == 0
    return ["ours", "trl"] if importable else ["ours"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--minutes", type=float, default=9, help="begin no further process after this")
    args = parser.parse_args()
    began, on_gpu, compared = time.time(), torch.cuda.is_available(), sides()
    device = torch.cuda.get_device_name() if on_gpu else f"no GPU: toy sizes on a CPU ({platform.machine()})"
    print(f"{device}; torch {torch.__version__}; sides: {', '.join(compared)}", flush=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in args.shapes:
        runs = {}
        for side in compared:
            if time.time() - began < 60 * args.minutes and (found := measure(name, side, on_gpu)):
                runs[side] = [{**found, "device": device}]
                print(line(name, side, found), flush=True)
        keep("gpu", name, runs)
    if "OUT" in os.environ:  # a lent machine brings back what lies there
        shutil.copy(RESULTS, os.environ["OUT"])


def line(name: str, side: str, found: dict) -> str:
    speed = found["tokens"] / found["wall_seconds"]
    memory = found.get("gpu_peak_mib", found["peak_mib"]) / 1024
    layers = f"{found['layers']} of {found['whole']} layers"
    said = f" ({found['counted_mib'] / 1024:.1f} counted)" if "counted_mib" in found else ""
    return f"{name:13} {side:5} {layers:16} {speed:10,.0f} tokens/s  MFU {found['mfu']:.3f}  {memory:6.1f} GiB{said}"


if __name__ == "__main__":
    main()
