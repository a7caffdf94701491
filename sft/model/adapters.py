"""LoRA adapters: which modules they adapt, and which token rows are trained with them."""

from collections.abc import Sequence


def add_lora(
    model,
    *,
    rank: int,
    alpha: int,
    dropout: float,
    untrained_ids: Sequence[int] = (),
    gradient_checkpointing: bool = False,
):
    """Put LoRA on all linear layers, in fp32, and make the embedding and head rows of `untrained_ids` trainable.

    ChatML's `<|im_end|>` has an untrained row in base Qwen and Yi: with frozen embeddings the model might never stop.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    if getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=gradient_checkpointing)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear",
        trainable_token_indices=_token_rows(model, untrained_ids) or None,
    )
    TrainableTokensLayer._collect_token_weights = _gathered_rows
    model = get_peft_model(model, config)
    if gradient_checkpointing:
        model.enable_input_require_grads()
    return model


def _gathered_rows(_layer, weight, rows: Sequence[int], _size: int):
    """Rows of a weight that ZeRO-3 has shared out. peft 0.21's own wants a CUDA device, also where there is none."""
    from peft.utils.integrations import gather_params_ctx

    with gather_params_ctx([weight], modifier_rank=None):
        return weight[rows].clone()


def _token_rows(model, token_ids: Sequence[int]) -> dict[str, list[int]]:
    if not token_ids:
        return {}
    names = {id(module): name for name, module in model.named_modules()}
    modules = [model.get_input_embeddings()]
    if not model.config.get_text_config().tie_word_embeddings:
        modules.append(model.get_output_embeddings())
    return {names[id(module)].split(".")[-1]: sorted(token_ids) for module in modules}


def untrained_ids(tokenizer, renderer) -> list[int]:
    """The format's control tokens that a base may never have seen: all but its own bos and eos."""
    seen = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    return sorted(renderer.control_ids - seen)
