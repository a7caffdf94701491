"""Is the arithmetic of sft.memory what a step really takes? Peak resident memory of real steps beside it, on a CPU.

    python benchmarks/memory_check.py [qwen2 mistral bloom falcon]
    python benchmarks/memory_check.py --table          # the README's table, from public configs; nothing is measured

Each case is a process of its own: a tiny-but-wide random model takes three packed steps of AdamW, then the highest
resident size (VmHWM) less what Python and its packages had before the model was built is compared.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"bos_token_id": 1, "eos_token_id": 2}
SHAPES = {
    "qwen2": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 3, "num_attention_heads": 16}
    | {"num_key_value_heads": 4, "vocab_size": 20_000, "tie_word_embeddings": True},
    "mistral": {"hidden_size": 1280, "intermediate_size": 3584, "num_hidden_layers": 2, "num_attention_heads": 16}
    | {"num_key_value_heads": 8, "vocab_size": 8_000},
    "bloom": {"hidden_size": 768, "n_layer": 3, "n_head": 12, "vocab_size": 30_000},
    "falcon": {"hidden_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 16, "vocab_size": 12_000}
    | {"multi_query": True, "alibi": False, "bias": False, "parallel_attn": True, "new_decoder_architecture": False},
}
CASES = [
    # shape, rows, length, checkpointing, bf16 autocast, lora, accumulation
    ("qwen2", 2, 512, True, False, False, 1),
    ("qwen2", 2, 512, False, False, False, 1),
    ("qwen2", 2, 512, False, True, False, 2),
    ("mistral", 1, 1024, True, False, False, 2),
    ("mistral", 2, 1024, False, False, False, 1),
    ("mistral", 1, 1024, True, True, False, 1),
    ("bloom", 2, 512, True, False, False, 1),
    ("bloom", 2, 512, False, False, False, 2),
    ("falcon", 2, 512, False, False, False, 1),
    ("falcon", 4, 512, True, True, False, 1),
    ("qwen2", 4, 512, False, False, True, 1),
]


def main() -> None:
    if sys.argv[1:] == ["--table"]:
        return print_table()
    chosen = [case for case in CASES if case[0] in (sys.argv[1:] or SHAPES)]
    print(f"{'case':62} {'counted':>10} {'measured':>10} {'ratio':>6}")
    for case in chosen:
        done = subprocess.run(
            [sys.executable, __file__, json.dumps(case)], capture_output=True, text=True, cwd=ROOT, env=environment()
        )
        if done.returncode:
            print(f"{case}: {done.stderr.splitlines()[-1]}")
            continue
        counted, measured = json.loads(done.stdout.splitlines()[-1])
        name, rows, length, checkpointing, half, lora, accumulation = case
        label = f"{name} {rows} x {length}{' checkpointed' * checkpointing}{' bf16' * half}{' LoRA' * lora}"
        label += f", accumulation {accumulation}"
        print(
            f"{label:62} {counted / 2**20:6,.0f} MiB {measured / 2**20:6,.0f} MiB {counted / measured:6.2f}", flush=True
        )


def print_table() -> None:
    """GiB on each GPU: one packed row of 2,048 tokens, gradient checkpointing, 8 updates accumulated, bf16."""
    from sft import memory
    from tests.test_memory import PUBLISHED, shape_of

    plans = [
        memory.Plan(),
        memory.Plan(memory.FULL, memory.ZERO2, gpus=8),
        memory.Plan(memory.FULL, memory.ZERO3, gpus=8),
    ]
    plans += [memory.replace(plans[-1], offload=True), memory.Plan(memory.LORA), memory.Plan(memory.QLORA)]
    print("| model | parameters | one GPU | ZeRO-2, 8 GPUs | ZeRO-3, 8 GPUs | with offload | LoRA, one GPU | QLoRA |")
    print("|---|" + "--:|" * 7)
    for name, (_kind, _shape, parameters) in PUBLISHED.items():
        peaks = [memory.estimate(shape_of(name), memory.Step(accumulation=8), plan)[0][-1].bytes for plan in plans]
        print(f"| {name} | {parameters:,} | {' | '.join(f'{peak / memory.GIB:,.0f}' for peak in peaks)} |", flush=True)


def environment() -> dict[str, str]:
    # One arena and no cache of freed blocks: resident memory is then what is allocated.
    malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return os.environ | malloc | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def resident(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measure(name: str, rows: int, length: int, checkpointing: bool, half: bool, lora: bool, accumulation: int) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from sft import attention, loss, memory
    from sft import model as models

    config = AutoConfig.for_model(name, **SHAPES[name], **SMALL)
    step = memory.Step(rows, length, rows * length // 2, (length // 2,) * 2 * rows, True, checkpointing, accumulation)
    step = memory.replace(step, half=half, device="cpu")
    plan = memory.Plan(memory.LORA if lora else memory.FULL)
    shape = memory.read_shape(config)
    parts, _host = memory.estimate(shape, step, plan)
    for part in parts:
        print(part.name, memory.gib(part.bytes), part.formula)
    torch.ones(2000, 2000) @ torch.ones(2000, 2000)
    before = resident("VmRSS")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if lora:
        model = models.add_lora(model, rank=16, alpha=32, dropout=0.05, gradient_checkpointing=checkpointing)
    attention.isolate_documents(model)
    loss.use_chunked_loss(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    ids = torch.randint(3, config.vocab_size, (rows, length))
    labels = ids.clone()
    labels[:, ::2] = -100
    positions = torch.arange(length // 2).repeat(rows, 2)
    for _ in range(2):
        optimizer.zero_grad()
        for _ in range(accumulation):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                value = model(input_ids=ids, position_ids=positions, labels=labels).loss
            value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    print(json.dumps([parts[-1].bytes, resident("VmHWM") - before]))


if __name__ == "__main__":
    measure(*json.loads(sys.argv[1])) if sys.argv[-1].startswith("[") else main()
