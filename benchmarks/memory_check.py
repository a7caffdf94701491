"""Is the arithmetic of sft.preview.memory what a step takes? Peak resident memory of real steps beside it, on a CPU.

    python benchmarks/memory_check.py [qwen2 "one kv head" ...]
    python benchmarks/memory_check.py --table          # the README's table, from public configs; nothing is measured

Each case is a process of its own: a tiny-but-wide random model takes two steps of AdamW, packed or padded,
then the highest resident size (VmHWM) less what Python and its packages had before the model was built is compared.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"bos_token_id": 1, "eos_token_id": 2}
SHAPES = {
    "qwen2": {"model_type": "qwen2", "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 3}
    | {"num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 20_000, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "hidden_size": 1280, "intermediate_size": 3584, "num_hidden_layers": 2}
    | {"num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 8_000},
    "bloom": {"model_type": "bloom", "hidden_size": 768, "n_layer": 3, "n_head": 12, "vocab_size": 30_000},
    "falcon": {"model_type": "falcon", "hidden_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 16}
    | {"multi_query": True, "alibi": False, "bias": False, "parallel_attn": True, "new_decoder_architecture": False}
    | {"vocab_size": 12_000},
    "wide MLP": {"model_type": "llama", "hidden_size": 512, "intermediate_size": 6144, "num_hidden_layers": 3}
    | {"num_attention_heads": 8, "vocab_size": 10_000},
    "one kv head": {"model_type": "qwen3", "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 3}
    | {"num_attention_heads": 12, "num_key_value_heads": 1, "head_dim": 128, "vocab_size": 40_000}
    | {"tie_word_embeddings": True},
    "new falcon": {"model_type": "falcon", "hidden_size": 768, "num_hidden_layers": 4, "num_attention_heads": 12}
    | {"num_kv_heads": 4, "new_decoder_architecture": True, "bias": False, "alibi": False, "vocab_size": 16_000},
    "falcon-rw": {"model_type": "falcon", "hidden_size": 640, "num_hidden_layers": 4, "num_attention_heads": 10}
    | {"multi_query": False, "parallel_attn": False, "bias": True, "alibi": True, "vocab_size": 20_000},
    "large vocabulary": {"model_type": "bloom", "hidden_size": 512, "n_layer": 2, "n_head": 8, "vocab_size": 250_880},
    "deep": {"model_type": "qwen2", "hidden_size": 512, "intermediate_size": 1400, "num_hidden_layers": 12}
    | {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 5_000, "tie_word_embeddings": False},
}
CASES = [
    # shape, rows, length, how, accumulation
    ("qwen2", 2, 512, "checkpointing", 1),
    ("qwen2", 2, 512, "", 1),
    ("qwen2", 2, 512, "bf16", 2),
    ("mistral", 1, 1024, "checkpointing", 2),
    ("mistral", 2, 1024, "", 1),
    ("mistral", 1, 1024, "checkpointing bf16", 1),
    ("bloom", 2, 512, "checkpointing", 1),
    ("bloom", 2, 512, "", 2),
    ("falcon", 2, 512, "", 1),
    ("falcon", 4, 512, "checkpointing bf16", 1),
    ("qwen2", 4, 512, "LoRA", 1),
    ("wide MLP", 1, 768, "", 1),
    ("wide MLP", 3, 333, "padded bf16", 1),
    ("one kv head", 1, 1024, "checkpointing", 1),
    ("one kv head", 3, 400, "padded", 2),
    ("new falcon", 2, 512, "", 1),
    ("new falcon", 3, 400, "padded LoRA", 1),
    ("falcon-rw", 3, 400, "padded", 1),
    ("large vocabulary", 1, 512, "checkpointing", 1),
    ("large vocabulary", 1, 512, "bf16", 2),
    ("large vocabulary", 3, 256, "padded LoRA", 1),
    ("deep", 3, 500, "padded checkpointing", 1),
    ("deep", 2, 1024, "LoRA bf16", 2),
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
        name, rows, length, how, accumulation = case
        label = f"{name} {rows} x {length} {how}, accumulation {accumulation}"
        print(
            f"{label:62} {counted / 2**20:6,.0f} MiB {measured / 2**20:6,.0f} MiB {counted / measured:6.2f}", flush=True
        )


def print_table() -> None:
    """GiB on each GPU: one packed row of 2,048 tokens, gradient checkpointing, 8 updates accumulated, bf16."""
    from sft.preview import memory, shape
    from tests.preview.test_memory import PUBLISHED, shape_of

    plans = [
        shape.Plan(),
        shape.Plan(shape.FULL, shape.ZERO2, gpus=8),
        shape.Plan(shape.FULL, shape.ZERO3, gpus=8),
    ]
    plans += [memory.replace(plans[-1], offload=True), shape.Plan(shape.LORA), shape.Plan(shape.QLORA)]
    print("| model | parameters | one GPU | ZeRO-2, 8 GPUs | ZeRO-3, 8 GPUs | with offload | LoRA, one GPU | QLoRA |")
    print("|---|" + "--:|" * 7)
    for name, (_kind, _shape, parameters) in PUBLISHED.items():
        peaks = [
            memory.estimate_memory(shape_of(name), shape.Step(accumulation=8), plan)[0][-1].bytes for plan in plans
        ]
        print(f"| {name} | {parameters:,} | {' | '.join(f'{peak / memory.GIB:,.0f}' for peak in peaks)} |", flush=True)


def environment() -> dict[str, str]:
    # One arena and no cache of freed blocks: resident memory is then what is allocated.
    malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return os.environ | malloc | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def resident(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measure(name: str, rows: int, length: int, how: str, accumulation: int) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from sft.model import adapters, attention, loss
    from sft.preview import memory, shape

    checkpointing, half, lora, padded = (word in how.split() for word in ("checkpointing", "bf16", "LoRA", "padded"))
    config = AutoConfig.for_model(**SHAPES[name], **SMALL)
    documents = () if padded else (length // 2,) * 2 * rows
    step = shape.Step(rows, length, rows * length // 2, documents, not padded, checkpointing, accumulation)
    step = memory.replace(step, half=half, device="cpu")
    plan = shape.Plan(shape.LORA if lora else shape.FULL)
    model = shape.read_shape(config)
    parts, _host = memory.estimate_memory(model, step, plan)
    for part in parts:
        print(part.name, memory.gib(part.bytes), part.formula)
    torch.ones(2000, 2000) @ torch.ones(2000, 2000)
    before = resident("VmRSS")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if lora:
        for parameter in model.parameters():  # as sft.model loads a frozen base
            parameter.data = parameter.data.to(torch.bfloat16 if half else torch.float32)
        model = adapters.add_lora(model, rank=16, alpha=32, dropout=0.05, gradient_checkpointing=checkpointing)
    if not padded:
        attention.isolate_documents(model)
    loss.use_chunked_loss(model)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew: a tied head is in memory twice while it is built
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    ids = torch.randint(3, config.vocab_size, (rows, length))
    labels = ids.clone()
    labels[:, ::2] = -100
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[1:, -length // 3 :] = 0
    labels[mask == 0] = -100
    place = {"attention_mask": mask} if padded else {"position_ids": torch.arange(length // 2).repeat(rows, 2)}
    for _ in range(2):
        optimizer.zero_grad()
        for _ in range(accumulation):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                value = model(input_ids=ids, labels=labels, **place).loss
            value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    print(json.dumps([parts[-1].bytes, resident("VmHWM") - before]))


if __name__ == "__main__":
    measure(*json.loads(sys.argv[1])) if sys.argv[-1].startswith("[") else main()
