"""Check weights: those in memory before they are saved, and those of a saved model after they are read again."""

from pathlib import Path


def find_bad_weight(model) -> str | None:
    """Return the name of a weight that is not finite, or None; under ZeRO-3 only this rank's share is read."""
    import torch

    for name, parameter in model.named_parameters():
        weight = getattr(parameter, "ds_tensor", parameter)
        if weight.is_floating_point() and not torch.isfinite(weight).all():
            return name
    return None


def verify_saved(folder: Path, expected: dict[str, tuple[int, ...]] | None = None) -> int:
    """Read saved safetensors again: every tensor is finite, and of the expected shape where `expected` names it.

    Returns the number of parameters. Raises ValueError naming the first tensor that is wrong.
    """
    import torch
    from safetensors import safe_open

    total = 0
    missing = dict(expected or {})
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: no weights were saved (under ZeRO-3, gather them: ds_zero3.json does)")
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is no dict)
                tensor = tensors.get_tensor(name)
                total += tensor.numel()
                if not tensor.numel() or not torch.isfinite(tensor).all():
                    raise ValueError(f"{file}: tensor {name} is empty or not finite; don't use this model")
                shape = missing.pop(name, tuple(tensor.shape))
                if shape != tuple(tensor.shape):
                    raise ValueError(f"{file}: tensor {name} has shape {tuple(tensor.shape)}, expected {shape}")
    if missing:
        raise ValueError(f"{folder}: {len(missing)} tensors are missing, {min(missing)} for one")
    return total


def saved_shapes(model) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes that a full model's files must hold; tied tensors are saved once, under the untied name.

    transformers saves a model under the names of the published checkpoints: fused experts as a tensor for each expert.
    None for an adapter: its names change on saving, so `verify_saved` checks the tensors that it finds.
    """
    if hasattr(model, "peft_config"):
        return None
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}
    without_memory = {name: torch.empty(shape, device="meta") for name, shape in shapes.items() if name not in tied}
    return {name: tuple(weight.shape) for name, weight in revert_weight_conversion(model, without_memory).items()}


def leave_out_tied(state_dict: dict, model) -> dict:
    """Return a state dict without the tensors that are tied to another one in it.

    For DeepSpeed: accelerate 1.15 clones each tensor, so that transformers would save a tied head twice.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: tensor for name, tensor in state_dict.items() if tied.get(name) not in state_dict}
