"""Every causal model type of the installed transformers, tiny and random: packing, loss, LoRA; writes FAMILIES.md.

    python benchmarks/families.py                    all types, a few minutes on two cores
    python benchmarks/families.py qwen3 gpt_oss      these, on the screen alone

A type is a config's default, shrunk to a few layers of each kind. Distances are those of the gradient of a packed row
from that of its documents alone, in fp32, over all weights.
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
HEADER = (
    "| type | packing | gradient | with checkpointing | loss | LoRA covers | seconds |\n|---|---|---|---|---|---|---|"
)


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
    started, found = time.monotonic(), {"type": kind}
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
    except Exception as error:  # any error of one type must not end the others
        found["refused"] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    return found | {"seconds": time.monotonic() - started}


def is_right(found: dict) -> bool:
    distances = [found.get("distance", 1.0), found.get("checkpointed", 0.0)]
    return "refused" not in found and max(distances) < MAX_DISTANCE


def row(found: dict) -> str:
    if "refused" in found:
        return f"| {found['type']} | refused: {found['refused']} | | | | | {found['seconds']:.1f} |"
    checkpointed = f"{found['checkpointed']:.0e}" if "checkpointed" in found else "not supported"
    cells = [found["type"], found["packing"], f"{found['distance']:.0e}", checkpointed]
    cells += [found["loss"], f"{found['share']:.1%}", f"{found['seconds']:.1f}"]
    return f"| {' | '.join(cells)} |"


def sums(results: list[dict]) -> str:
    right, covered = sum(map(is_right, results)), sum(found.get("share", 0) >= 0.99 for found in results)
    chunked = sum(found.get("loss", "").startswith("loss in chunks") for found in results)
    return (
        f"Of {len(results)} types {right} train packed with the gradient of their documents alone (fp32, to "
        f"{MAX_DISTANCE:.0e}); {chunked} compute their loss in chunks; LoRA covers at least 99% of the layers' weights "
        f"in {covered}."
    )


def main() -> None:
    chosen = sys.argv[1:] or causal_types()
    with ProcessPoolExecutor(2) as processes:
        results = list(processes.map(measure, chosen))
    lines = [sums(results), "", HEADER, *map(row, results)]
    print("\n".join(lines))
    if not sys.argv[1:]:
        import transformers

        title = (
            f"# Model families\n\nWritten by `python benchmarks/families.py` (transformers {transformers.__version__})."
        )
        text = "\n".join([title, "", *lines, ""])
        (ROOT / "benchmarks" / "FAMILIES.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
