"""Every causal model type of transformers, tiny and random: packing, loss, LoRA, replies; writes docs/families.md.

    python benchmarks/families.py                    all types, ten minutes on two cores; writes the pages
    python benchmarks/families.py qwen3 gpt_oss      these, on the screen alone

A type is a config's default, shrunk to a few layers of each kind. Distances are those of the gradient of a packed row
from that of its documents alone, in fp32, over all weights. Replies are greedy, to prompts that join a running batch in
turn, longer and shorter than the sliding windows; each is compared with `generate`'s for its prompt alone.
"""

import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

LENGTHS = (21, 90, 3, 40)
MAX_DISTANCE = 1e-6
# No causal language model alone: encoders, encoder-decoders, speech, vision and their decoders.
OTHERS = [
    "bart",
    "bert",
    "bert-generation",
    "big_bird",
    "bigbird_pegasus",
    "blenderbot",
    "blenderbot-small",
    "blt",
    "camembert",
    "cohere_compass_text",
    "cpmant",
    "data2vec-text",
    "electra",
    "emu3",
    "ernie",
    "fuyu",
    "gemma3n",
    "gemma4_assistant",
    "gemma4_unified_assistant",
    "git",
    "got_ocr2",
    "marian",
    "mbart",
    "megatron-bert",
    "mllama",
    "moshi",
    "moss_transcribe_diarize",
    "musicgen",
    "musicgen_melody",
    "mvp",
    "pegasus",
    "phi4_multimodal",
    "plbart",
    "prophetnet",
    "qwen4_exp",
    "reformer",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "trocr",
    "whisper",
    "xlm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xlnet",
    "xmod",
]
# Settings without which a type's default config builds no model, or one without attention.
SETTINGS = {
    "bamba": {"attn_layer_indices": [1, 3], "num_hidden_layers": 4},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 16},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 8, "moe_topk": 2},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp_text": {
        **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256},
        **{"indexer_budget": 2048, "indexer_compress_ratio": 4},
    },
}
PROMPT_LENGTHS = (5, 40, 17, 3)
REPLY_TOKENS = (9, 16, 9, 12)
COLUMNS = ("type", "packing", "gradient", "with checkpointing", "loss", "LoRA covers", "replies", "seconds")
TITLE = "# Model families"
CHINESE = {
    TITLE: "# 模型家族",
    "types of causal language models in transformers": "种因果语言模型类型，transformers",
    "train packed with the gradient of their documents alone": "种打包训练的梯度与各文档单独训练相同",
    "compute their loss in chunks": "种分块计算损失",
    "have LoRA on at least 99% of the layers' weights": "种的 LoRA 覆盖至少 99% 的层权重",
    "give the greedy replies of `generate`": "种的贪心回复与 `generate` 相同",
    "refused": "拒绝",
    "running the model once per document": "整个模型按文档逐段运行",
    "one attention call for each": "每段文档一次注意力调用",
    "transformers' own mask": "transformers 自己的掩码",
    "run once per document": "按文档逐段运行",
    "through the head as it is": "经过原本的输出层",
    "loss in chunks": "分块",
    "loss over the full logits": "完整 logits",
    "logits times": "logits 乘以",
    "soft cap": "软上限",
    "not supported": "不支持",
    "equal, rows join": "相同，行可加入",
    "equal, in turn": "相同，轮流",
    "| type | packing | gradient | with checkpointing | loss | LoRA covers | replies | seconds |": (
        "| 类型 | 打包 | 梯度 | 加检查点 | 损失 | LoRA 覆盖 | 回复 | 秒 |"
    ),
}
NOTES = """
A distance is the one of a packed row's gradient from its documents alone, in fp32, over all weights of a tiny random
model of the type; up to 1e-6 is rounding. On a GPU, linear attention and Mamba use the kernels of
flash-linear-attention, causal-conv1d and mamba-ssm where installed, with the documents' edges. LoRA leaves routers out;
at the start a run names every matrix that it leaves out, and why. `python benchmarks/families.py` writes this page.
"""
CHINESE_NOTES = """
距离是打包行的梯度与各文档单独计算的梯度之差，用该类型的极小随机模型在 fp32 下对全部权重测得；
1e-6 以内是舍入误差。在 GPU 上，线性注意力和 Mamba 在装有 flash-linear-attention、causal-conv1d、mamba-ssm 时
使用其内核，并传入文档边界。LoRA 不含路由器；启动时会列出每个没有适配的矩阵及原因。
`python benchmarks/families.py` 生成本页。
"""


def causal_types() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind not in OTHERS]


def build_model(kind: str, *, seed: int = 7):
    """Return a small random fp32 model of a type, without dropout."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from sft.model.shrink import shrink_config, without_dropout

    config = CONFIG_MAPPING[kind](**SETTINGS.get(kind, {}))
    if kind == "dbrx":  # whose published config has them
        config.attn_config.rope_theta = 10000.0
        config.attn_config.clip_qkv = 8.0
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(without_dropout(shrink_config(config, window=17)), dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.03)
    model.config.use_cache = False  # as in training: rwkv writes into its states
    return model.eval()


def measure(kind: str) -> dict:
    """Measure a type; `refused` says why it can't be trained."""
    import torch

    from sft.model import attention, loss
    from sft.model.adapters import plan_adapters

    torch.set_num_threads(1)
    started = time.monotonic()
    found = {"type": kind}
    try:
        found["share"] = plan_adapters(build_model(kind)).share
        model = build_model(kind)
        found["packing"] = attention.isolate_documents(model).removeprefix("documents are kept apart by ")
        found["distance"] = attention.compare_gradients(model, LENGTHS, seed=3)
        attention.self_test(model)
        found["loss"] = loss.use_chunked_loss(model)
        loss.self_test(model)
        model.train()
        if model.supports_gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            found["checkpointed"] = attention.compare_gradients(model, LENGTHS, seed=3)
        found["replies"] = compare_replies(build_model(kind))
    except Exception as error:  # any error of one type must not end the others
        found["refused"] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    return found | {"seconds": time.monotonic() - started}


def compare_replies(model) -> str:
    """Compare greedy replies of rows that join a running batch with `generate`'s for each prompt alone."""
    import torch

    from sft.chat.batching import Decoder
    from sft.chat.sampling import Sampling

    random = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 400, (length,), generator=random).tolist() for length in PROMPT_LENGTHS]
    decoder = Decoder(model, stop_ids=[])
    requests = []
    for prompt, num_tokens in zip(prompts, REPLY_TOKENS, strict=True):
        greedy = Sampling(temperature=0.0, repetition_penalty=1.0, max_new_tokens=num_tokens)
        requests.append(decoder.add(prompt, greedy))
        for _ in range(4):
            decoder.step()
    decoder.run()
    differing = sum(
        request.error is not None or request.ids != generated(model, prompt, len(request.ids))
        for request, prompt in zip(requests, prompts, strict=True)
    )
    if errors := [request.error for request in requests if request.error]:
        return f"{type(errors[0]).__name__} in {len(errors)} of {len(requests)}"
    if differing:
        return f"{differing} of {len(requests)} differ"
    return "equal, rows join" if decoder.joins_rows else "equal, in turn"


def generated(model, prompt: list[int], num_tokens: int) -> list[int]:
    import torch

    ids = torch.tensor([prompt])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": num_tokens}
    with torch.inference_mode():
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **options)
    return found[0, len(prompt) :].tolist()


def is_right(found: dict) -> bool:
    distances = [found.get("distance", 1.0), found.get("checkpointed", 0.0)]
    return "refused" not in found and max(distances) < MAX_DISTANCE


def row(found: dict) -> str:
    if "refused" in found:
        cells = [found["type"], f"refused: {found['refused']}", *[""] * 5]
    else:
        checkpointed = f"{found['checkpointed']:.0e}" if "checkpointed" in found else "not supported"
        cells = [found["type"], found["packing"], f"{found['distance']:.0e}", checkpointed, found["loss"]]
        cells += [f"{found['share']:.1%}", found["replies"]]
    return f"| {' | '.join([*cells, format(found['seconds'], '.1f')])} |"


def sums(results: list[dict]) -> list[tuple[int, str]]:
    """Return (number, what it counts) of the table."""
    import transformers

    return [
        (len(results), f"types of causal language models in transformers {transformers.__version__}"),
        (sum(map(is_right, results)), "train packed with the gradient of their documents alone"),
        (sum(found.get("loss", "").startswith("loss in chunks") for found in results), "compute their loss in chunks"),
        (sum(found.get("share", 0) >= 0.99 for found in results), "have LoRA on at least 99% of the layers' weights"),
        (
            sum(found.get("replies", "").startswith("equal") for found in results),
            "give the greedy replies of `generate`",
        ),
    ]


def write_page(results: list[dict]) -> str:
    """Return docs/families.md."""
    counts = [f"* {number} {counted}" for number, counted in sums(results)]
    table = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS), *map(row, results)]
    return "\n".join([TITLE, "", "[中文](zh/families.md)", "", *counts, NOTES, *table, ""])


def to_chinese(page: str) -> str:
    page = page.replace("[中文](zh/families.md)", "[English](../families.md)").replace(NOTES, CHINESE_NOTES)
    for english, chinese in CHINESE.items():
        page = page.replace(english, chinese)
    return page


def main() -> None:
    chosen = sys.argv[1:] or causal_types()
    with ProcessPoolExecutor(2) as processes:
        results = list(processes.map(measure, chosen))
    page = write_page(results)
    print(page)
    if not sys.argv[1:]:
        (ROOT / "docs" / "families.md").write_text(page, encoding="utf-8")
        (ROOT / "docs" / "zh" / "families.md").write_text(to_chinese(page), encoding="utf-8")


if __name__ == "__main__":
    main()
