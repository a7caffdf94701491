"""Numbers that are none stop the run before they reach the weights, with step, rank and rows."""

import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sft.checkpoint.manifest import find_checkpoint
from sft.train.losses import FiniteCheck
from sft.train.trainer import Trainer
from tests.checkpoint import test_resume
from tests.checkpoint.test_resume import logs_of, run

pytestmark = pytest.mark.slow

data = test_resume.data  # a fixture


def spoil(monkeypatch, step: int, how: str) -> None:
    """Make the second batch of an update's loss not finite, or only a gradient."""
    original = Trainer.compute_loss

    def spoiled(self, model, inputs, *arguments, **options):
        result = original(self, model, inputs, *arguments, **options)
        if model.training and self.state.global_step == step and len(self.finite.losses) == 2:
            if how == "loss":
                self.finite.losses[-1] = result = result * math.inf
            if how == "gradient":
                result.register_hook(lambda gradient: gradient * math.nan)
            if how == "one weight":
                self.model.model.layers[0].mlp.up_proj.weight.register_hook(lambda gradient: gradient * math.inf)
        return result

    monkeypatch.setattr(Trainer, "compute_loss", spoiled)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("loss", r"step 6: the loss is inf on rank 0, in {second}; stopped before the update, no model saved"),
        ("gradient", r"step 6: the gradient is not finite on rank 0, in {second}; stopped before the update"),
        ("one weight", r"step 6: the gradient is not finite \(norm (inf|nan)\), every loss is; in {first}, {second}; "),
    ],
)
@pytest.mark.parametrize("packing", [True, False])
def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_update_and_names_the_rows(
    how,
    said,
    packing,
    tiny_base,
    data,
    tmp_path,
    monkeypatch,
):
    place = []
    original = FiniteCheck.describe

    def with_place(self, norm):
        trainer = self.trainer
        place.extend(trainer.updates.batches_at(trainer.progress.epoch, trainer.progress.taken)[0])
        if packing:
            place[:] = [[int(n) for row in batch for n in trainer.train_dataset.rows[row]] for batch in place]
        return original(self, norm)

    monkeypatch.setattr(FiniteCheck, "describe", with_place)
    spoil(monkeypatch, 5, how)
    with pytest.raises(ValueError) as error:
        run(tiny_base("qwen2"), data, tmp_path / "run", packing=packing)
    first, second = (", ".join(rf"example {n} \([^)]*question {n} [^)]*\)" for n in batch) for batch in place)
    assert re.match(said.format(first=first, second=second), str(error.value)), str(error.value)
    assert find_checkpoint(str(tmp_path / "run")) == (str(tmp_path / "run" / "checkpoint-4"), [])
    saved = load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_base_with_a_weight_that_is_not_finite_is_named_at_the_first_step(tiny_base, data, tmp_path):
    base = shutil.copytree(tiny_base("qwen2"), tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][3] = math.nan
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"step 1: the loss is nan on rank 0, .*norm.weight was not finite before"):
        run(base, data, tmp_path / "run")
    assert not list(tmp_path.glob("run/checkpoint-*")) and not list(tmp_path.glob("run/*.safetensors"))


def test_weights_that_are_not_finite_are_never_saved(tiny_base, data, tmp_path, monkeypatch):
    def spoil_weight(self, *arguments, **options):
        with torch.no_grad():
            self.model.model.norm.weight[0] = math.inf
        return original(self, *arguments, **options)

    original = Trainer._save_checkpoint
    monkeypatch.setattr(Trainer, "_save_checkpoint", spoil_weight)
    with pytest.raises(ValueError, match=r"step 4: model.norm.weight is not finite; stopped, not saved"):
        run(tiny_base("qwen2"), data, tmp_path / "run")
    assert not list(tmp_path.glob("run/checkpoint-*"))


def test_the_logged_loss_is_the_mean_over_the_trained_tokens(tiny_base, data, tmp_path):
    """All 30 rows in one update, at a learning rate of nothing: the loss logged is that of the same held-out data."""
    flags = {"learning_rate": 1e-12, "max_steps": 1, "gradient_accumulation_steps": 15, "logging_steps": 1}
    shutil.copy(data / "train.json", tmp_path / "again.json")
    output = run(
        tiny_base("qwen2"), data / "train.json", tmp_path / "run", eval_data_path=tmp_path / "again.json", **flags
    )
    train_loss, eval_loss = (next(e[name] for e in logs_of(output) if name in e) for name in ("loss", "eval_loss"))
    assert train_loss == pytest.approx(eval_loss, rel=1e-5)
