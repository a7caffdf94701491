"""The shapes that run_gpu.sh measures, and the floating-point operations of their steps."""

PEAK_FLOPS = 989e12  # H100 SXM and H200, bf16, dense
QWEN2 = {"vocab_size": 152_064, "max_position_embeddings": 32_768, "rope_theta": 1e6}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# name: (model type, layers measured, layers of the whole model, config)
SHAPES = {
    "qwen2.5-7b": ("qwen2", 13, 28, {**QWEN2, "hidden_size": 3584, "intermediate_size": 18_944}
        | {"num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False}),
    "qwen2.5-0.5b": ("qwen2", 24, 24, {**QWEN2, "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864}
        | {"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "bloom-7b1": ("bloom", 12, 30, {"vocab_size": 250_880, "hidden_size": 4096, "n_head": 32}),
    "falcon-7b": ("falcon", 13, 32, {"vocab_size": 65_024, "hidden_size": 4544, "num_attention_heads": 71}
        | {"multi_query": True, "parallel_attn": True, "bias": False, "alibi": False}
        | {"new_decoder_architecture": False}),
    "qwen3-30b-a3b": ("qwen3_moe", 4, 48, {"vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144}
        | {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128}
        | {"num_experts_per_tok": 8, "moe_intermediate_size": 768, "tie_word_embeddings": False}),
    "gpt-oss-20b": ("gpt_oss", 4, 24, {"vocab_size": 201_088, "hidden_size": 2880, "intermediate_size": 2880}
        | {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32}
        | {"num_experts_per_tok": 4, "tie_word_embeddings": False}),
    "qwen3.5-4b": ("qwen3_5_text", 8, 32, {"vocab_size": 248_320, "hidden_size": 2560, "intermediate_size": 9216}
        | {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True}),
}  # fmt: skip
TOY = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "vocab_size": 1200}
TOY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "n_head": 4, "head_dim": 16, "num_experts": 4}
TOY |= {"num_local_experts": 4, "num_experts_per_tok": 2}


def config_of(name: str, *, toy: bool, layers: int | None = None) -> dict:
    """Return the config of a shape as AutoConfig.for_model takes it, with fewer layers than the whole model has."""
    family, measured, _whole, config = SHAPES[name]
    depth = 2 if toy and family != "qwen3_5_text" else 4 if toy else layers or measured
    if toy:
        config = config | {key: value for key, value in TOY.items() if key in config}
    return {"model_type": family, "n_layer" if family == "bloom" else "num_hidden_layers": depth, **IDS, **config}


def parameters_in_products(name: str, config: dict) -> int | None:
    """Return the parameters that multiply each token, the head's included; None for mixtures of experts and hybrids."""
    hidden = config["hidden_size"]
    family = config["model_type"]
    head = config["vocab_size"] * hidden
    layers = config["n_layer" if family == "bloom" else "num_hidden_layers"]
    if family == "bloom":
        return layers * 12 * hidden**2 + head
    if family == "falcon":
        size = hidden // config["num_attention_heads"]
        return layers * (hidden * (hidden + 2 * size) + hidden**2 + 8 * hidden**2) + head
    if family == "qwen2":
        groups = config["num_key_value_heads"] / config["num_attention_heads"]
        return int(layers * (hidden**2 * (2 + 2 * groups) + 3 * hidden * config["intermediate_size"]) + head)
    return None


def mfu(name: str, config: dict, tokens: int, mean_seen: float, seconds: float) -> float | None:
    """Return model FLOPs utilisation: 6 N + 6 layers x hidden x tokens seen (causal) a token, recompute not counted."""
    products = parameters_in_products(name, config)
    if products is None:
        return None
    layers = config.get("n_layer", config.get("num_hidden_layers"))
    attention = 6 * layers * config["hidden_size"] * mean_seen
    return tokens * (6 * products + attention) / seconds / PEAK_FLOPS
