"""Checkpoints: which one a run continues from, and the final model: written beside, verified, moved into place."""

import json
import os
import shutil
import zipfile
from pathlib import Path

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


def check_output_dir(output_dir: str, *, resume: bool) -> str | None:
    """Return why `output_dir` can't be written to, or None. A folder with something in it is only for resuming."""
    folder = Path(output_dir).expanduser()
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return f"--output_dir {output_dir}: {existing} can't be written to"
    if folder.is_dir() and any(folder.iterdir()) and not resume:
        return (
            f"--output_dir {output_dir}: is not empty, and nothing in it will be overwritten; name a new folder, or "
            "continue the run in it with --resume_from_checkpoint auto"
        )
    return None


def find_checkpoint(output_dir: str) -> tuple[str | None, list[str]]:
    """Return the newest complete checkpoint, and one line for each newer one that was skipped, with the reason."""
    numbered = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        step = folder.name.removeprefix("checkpoint-")
        if folder.is_dir() and step.isdigit():
            numbered.append((int(step), folder))
    skipped = []
    for _step, folder in sorted(numbered, reverse=True):
        problem = incomplete(folder)
        if problem is None:
            return str(folder), skipped
        skipped.append(f"{folder}: skipped, {problem}")
    return None, skipped


def incomplete(folder: Path) -> str | None:
    """Return what a checkpoint lacks for an exact resume, or None; transformers restarts silently without some."""
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "trainer_state.json is missing or cut"
    deepspeed = any(folder.glob("global_step*/*"))
    if not deepspeed and not any((folder / name).is_file() for name in WEIGHTS):
        return "the weights are missing"
    for name in ["scheduler.pt"] + ([] if deepspeed else ["optimizer.pt"]):
        if not (folder / name).is_file():
            return f"{name} is missing"
    if not any(folder.glob("rng_state*.pth")):
        return "the random state is missing"
    cut = [path for path in folder.rglob("*.pt*") if not zipfile.is_zipfile(path)]
    cut += [path for path in folder.glob("*.safetensors") if not _opens(path)]
    return f"{cut[0].relative_to(folder)} is cut" if cut else None


def _opens(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            return True
    except (SafetensorError, OSError):
        return False


def verify_saved(folder: Path, expected: dict[str, tuple[int, ...]] | None = None) -> int:
    """Reopen saved safetensors: every tensor finite, and with the expected shape where `expected` names it.

    Returns the number of parameters. Raises ValueError naming the first tensor that is wrong.
    """
    import torch
    from safetensors import safe_open

    total, missing = 0, dict(expected or {})
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
    """Shapes that a full model's file must hold; tied tensors are saved once, under the name that is not tied.

    None for an adapter: its names change on saving, so `verify_saved` checks what is there.
    """
    if hasattr(model, "peft_config"):
        return None
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}
    return {name: shape for name, shape in shapes.items() if name not in tied}


def move_into_place(staged: Path, folder: Path) -> None:
    """Move every file of `staged` into `folder`, the weights last, and remove `staged`."""
    names = sorted(os.listdir(staged), key=lambda name: (name.endswith((".safetensors", ".index.json")), name))
    for name in names:
        with open(staged / name, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(staged / name, folder / name)
    shutil.rmtree(staged)
