"""One process of run_gpu.sh beside those that measure steps; prints a line of JSON.

python benchmarks/gpu/checks.py base qwen2.5-0.5b FOLDER     # a random base with a tokenizer, in bf16
python benchmarks/gpu/checks.py train BASE '["--lora", "true"]'
python benchmarks/gpu/checks.py exact qwen2 | replies BASE | probe BASE | selftest qwen2 | count '{"shape": ...}'
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from records import ROOT, report, write_records
from shapes import config_of

ON_GPU = torch.cuda.is_available()
TOY = not ON_GPU or os.environ.get("TOY") == "1"
DEVICE = "cuda" if ON_GPU else "cpu"


def build_base(name: str, folder: str) -> dict:
    """Write a random model of a shape, with a small tokenizer, as a base of train.py; all layers of it."""
    from shapes import SHAPES
    from transformers import AutoConfig, AutoModelForCausalLM

    from sft.tiny import build_tiny

    build_tiny("qwen2", folder)
    with torch.device(DEVICE):
        config = AutoConfig.for_model(**config_of(name, toy=TOY, layers=SHAPES[name][2]))
        config.vocab_size = max(config.vocab_size, 2200)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    Path(folder, "model.safetensors").unlink()  # the tiny one; a large model is saved in shards
    model.save_pretrained(folder)
    return {"parameters": sum(parameter.numel() for parameter in model.parameters())}


def start_train(base: str, flags: list[str], output: str, *, records: int = 400) -> subprocess.Popen:
    """Start train.py on made-up records."""
    words = ["--model_name_or_path", base, "--data_path", str(write_records(records)), "--output_dir", output]
    words += [
        "--max_lost",
        "0.99",
        "--chat_format",
        "chatml",
        "--num_reply_prompts",
        "1",
        "--max_new_tokens",
        "4",
        "--eval_replies",
        "false",
    ]
    words += ["--cache_dir", f"{output}-cache", "--logging_steps", "1", "--disable_tqdm", "true", *flags]
    return subprocess.Popen(
        [sys.executable, "train.py", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def read_output(process: subprocess.Popen) -> str:
    """Wait for train.py and return what it printed; if it failed, end this process with the end of that."""
    text, _ = process.communicate()
    if process.returncode:
        sys.exit(f"{' '.join(process.args)} failed:\n{text[-2000:]}")
    return text


def run_loop(base: str, flags: str) -> dict:
    """Train with the real loop; return speed and MFU as run.json has them, the memory, and what was printed of kernels.

    The typical speed is the median of the log lines, of which each is an update.
    """
    sizes = ["--max_length", "256" if TOY else "4096", "--save_strategy", "no", "--max_steps", "3" if TOY else "20"]
    sizes += ["--bf16", "true", *([] if ON_GPU else ["--use_cpu", "true"])]
    with tempfile.TemporaryDirectory() as folder:
        text = read_output(
            start_train(base, [*sizes, *json.loads(flags)], f"{folder}/run", records=60 if TOY else 6000)
        )
        run = json.loads(Path(folder, "run", "run.json").read_text())
    found = run["metrics"]
    kernels = [line for line in text.splitlines() if line.startswith(("fused kernels", "liger-kernel", "weights"))]
    names = ("tokens_per_second", "mfu", "peak_memory_gib")
    return {name: found.get(name) for name in names} | {"kernels": kernels}


def probe(base: str) -> dict:
    """Return the line of memory that train.py --probe_steps prints, and how much of the measured bytes is counted."""
    flags = ["--max_length", "2048" if TOY else "4096", "--bf16", "true", *([] if ON_GPU else ["--use_cpu", "true"])]
    flags += ["--per_device_train_batch_size", "2", "--dry_run", "true", "--probe_steps", "4"]
    with tempfile.TemporaryDirectory() as folder:
        text, _ = start_train(base, flags, f"{folder}/run", records=60 if TOY else 2000).communicate()
    found = re.search(r"peak memory .*\(([\d.]+) of it\)", text)
    if found is None:
        sys.exit(f"train.py --probe_steps printed no memory:\n{text[-2000:]}")
    return {"probe": found[0], "ratio": float(found[1])}


def check_exact(family: str) -> dict:
    """Train three times under --full_determinism, one of them killed and resumed; compare the bytes of the weights."""
    from tests.families import build_tiny

    flags = ["--full_determinism", "true", "--max_length", "128" if TOY else "1024", "--max_steps", "8"]
    flags += ["--save_strategy", "steps", "--save_steps", "4", "--per_device_train_batch_size", "2"]
    flags += ["--bf16", "true"] if ON_GPU else ["--use_cpu", "true"]
    with tempfile.TemporaryDirectory() as folder:
        base = str(build_tiny(family, Path(folder, "base"), hidden_size=64 if TOY else 512, num_layers=2))
        # Beside each other: on a GPU a start takes most of a minute.
        names = ("first", "second", "resumed")
        runs = [start_train(base, flags, f"{folder}/{name}", records=120) for name in names]
        was_killed = kill_after(runs.pop(), Path(folder, "resumed", "checkpoint-4"))
        for run in runs:
            read_output(run)
        read_output(start_train(base, [*flags, "--resume_from_checkpoint", "auto"], f"{folder}/resumed", records=120))
        first, second, resumed = (Path(folder, name, "model.safetensors").read_bytes() for name in names)
    return {"same_twice": first == second, "same_resumed": first == resumed, "killed": was_killed}


def kill_after(process: subprocess.Popen, checkpoint: Path) -> bool:
    """Kill train.py once it has saved a checkpoint; return whether it was still running."""
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.02)
    was_running = process.poll() is None
    process.kill()
    process.wait()
    return was_running


def check_family(family: str) -> dict:
    """Return how far a packed row is from its documents alone: logits and gradients, in fp32 and as it is trained."""
    from transformers import AutoModelForCausalLM

    from sft.model import attention, loss
    from tests.families import build_tiny

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        base = build_tiny(family, Path(folder, "base"), hidden_size=128, num_layers=2)
        for dtype in (torch.float32, torch.bfloat16):
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(DEVICE)
            attention.isolate_documents(model)
            loss.use_chunked_loss(model)
            exact = dtype == torch.float32
            with torch.autocast(DEVICE, dtype=dtype, enabled=not exact):
                loss.self_test(model, exact=exact)
                logits, _reach = attention.self_test(model, exact=exact)
                gradients = attention.compare_gradients(model)
                if not exact:
                    found["fused_gradients"] = compare_fused(model)
            name = str(dtype).removeprefix("torch.")
            found |= {f"{name}_logits": logits, f"{name}_gradients": gradients}
    return found


def compare_fused(model) -> float:
    """Return how far the gradient of two accumulated batches is with the fused kernels from the one without.

    On a CPU only the products of fp32 weights in half precision are fused.
    """
    from sft.model import fusion

    ids = torch.randint(3, 200, (1, 96), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    positions = torch.cat([torch.arange(60), torch.arange(36)])[None].to(DEVICE)

    def gradient() -> torch.Tensor:
        model.zero_grad()
        for _ in range(2):  # the second is added in place
            model(input_ids=ids, labels=ids, position_ids=positions).loss.backward()
        return torch.cat([weight.grad.float().flatten() for weight in model.parameters()])

    model.train()
    plain = gradient()
    facts = {"half": True, "accumulation": 2, "seconds": None if ON_GPU else 0.0}
    fusion.fuse(model, "auto", fusion.Circumstances(on_gpu=True, **facts))
    return ((gradient() - plain).norm() / plain.norm()).item()


def count_memory(text: str) -> dict:
    """Return the bytes that sft.preview.memory counts for a step of step_side.py."""
    from transformers import AutoConfig

    from sft.preview import memory, shape

    settings = json.loads(text)
    rows = settings["rows"]
    length = settings["max_length"]
    step = shape.Step(rows, length, rows * length * 3 // 4, checkpointing=settings["checkpointing"], device=DEVICE)
    step = memory.replace(step, accumulation=settings["accumulation"], half=settings["bf16"])
    if ON_GPU and settings["checkpointing"]:
        step = memory.replace(step, keeps_in=torch.cuda.mem_get_info()[1])
    method = shape.LORA if settings["lora"] else shape.FULL
    plan = shape.Plan(shape.QLORA if settings["four_bit"] else method)
    config = AutoConfig.for_model(**settings["config"])
    return {"counted_mib": memory.estimate_memory(shape.read_shape(config), step, plan)[0][-1].bytes / 2**20}


def compare_replies(base: str) -> dict:
    """Return tokens per second of sft.chat and of transformers' generate: one reply, and 32 at once."""
    from sft.chat.reply import load_chat
    from sft.chat.sampling import Sampling

    chat = load_chat(base, chat_format="chatml", device=DEVICE)
    length = (8, 128)[ON_GPU]
    sampling = Sampling(temperature=0.0, max_new_tokens=(8, 128)[ON_GPU])
    messages = [{"role": "user", "content": "Tell me about the sea. " * 4}]
    prompt = torch.tensor([chat.prompt_ids(messages)], device=chat.model.device)
    found = {}
    for count in (1, 4 if TOY else 32):
        speeds = {"ours": [], "generate": []}
        for _ in range(2):  # the first warms up
            began = time.perf_counter()
            tokens = sum(reply.num_tokens for reply in chat.reply_batch([messages] * count, sampling))
            speeds["ours"].append(tokens / (time.perf_counter() - began))
            began = time.perf_counter()
            rows = prompt.repeat(count, 1)
            output = chat.model.generate(
                rows, attention_mask=torch.ones_like(rows), max_new_tokens=length, do_sample=False, pad_token_id=0
            )
            tokens = (output.shape[1] - rows.shape[1]) * count
            speeds["generate"].append(tokens / (time.perf_counter() - began))
        found[str(count)] = {side: of[-1] for side, of in speeds.items()}
    return found


KINDS = {
    "base": build_base,
    "train": run_loop,
    "exact": check_exact,
    "selftest": check_family,
    "count": count_memory,
    "replies": compare_replies,
    "probe": probe,
}

if __name__ == "__main__":
    report(**KINDS[sys.argv[1]](*sys.argv[2:]))
