"""Callbacks of the trainer: proofs before the first step, the position of a resumed run, the progress bar."""

from dataclasses import dataclass, field

import torch
from transformers import ProgressCallback, TrainerCallback

from sft.model import adapters, attention, fusion, loss
from sft.report.text import say
from sft.train import sequence_parallel
from sft.train.losses import sum_by_source


@dataclass
class Progress:
    """Position of a run between two updates: it has taken `taken` rows of `epoch`, and made `updates` in all."""

    epoch: int = 0
    taken: int = 0
    updates: int = 0
    num_rows: int = 0
    losses: list[float] = field(default_factory=list)  # summed since the last log line, of each rank
    total_loss: float = 0.0
    last_logged: int = 0
    by_source: list[dict] = field(default_factory=list)  # as `losses`: {source: [sum, trained tokens]} of each rank
    router: list[dict] = field(default_factory=list)  # as `by_source`: {"router_loss": [sum, batches]} of each rank
    evaluate: bool = False  # an evaluation was due, and cut off by a signal


class Restore(TrainerCallback):
    """Before the first step, check the weights; in a resumed run, restore open log lines and a due evaluation."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer, progress = self.trainer, self.trainer.progress
        trainer.finite.broken_weight = trainer.bad_weight()
        if not progress.updates:
            return
        mine = progress.losses
        same = len(mine) == args.world_size
        trainer._tr_loss += mine[args.process_index] if same else sum(mine) / len(mine)
        if trainer.source_losses and progress.by_source:
            total = {} if args.process_index else sum_by_source(progress.by_source)
            trainer.source_losses.sums = progress.by_source[args.process_index] if same else total
        if progress.router:
            total = {} if args.process_index else sum_by_source(progress.router)
            trainer.router_losses.sums = progress.router[args.process_index] if same else total
        trainer._total_loss_scalar, trainer._globalstep_last_logged = progress.total_loss, progress.last_logged
        self.take_new_flags(args)
        if progress.evaluate and trainer.eval_dataset is not None:
            progress.evaluate = False
            trainer._evaluate(None, None)

    def take_new_flags(self, args) -> None:
        """Let allowed changes of the optimizer's flags take effect: a checkpoint brings the old ones with it."""
        changed, scheduler = self.trainer.changed, self.trainer.lr_scheduler
        for group in self.trainer.optimizer.param_groups:
            if "learning_rate" in changed:
                group["lr"] = group["initial_lr"] = args.learning_rate
            if "weight_decay" in changed and group.get("weight_decay"):
                group["weight_decay"] = args.weight_decay
            if changed & {"adam_beta1", "adam_beta2"} and "betas" in group:
                group["betas"] = (args.adam_beta1, args.adam_beta2)
            if "adam_epsilon" in changed and "eps" in group:
                group["eps"] = args.adam_epsilon
        if "learning_rate" in changed and hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs = [args.learning_rate] * len(scheduler.base_lrs)
        if changed and hasattr(scheduler, "lr_lambdas"):
            for group, base, of in zip(
                self.trainer.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=False
            ):
                group["lr"] = base * of(scheduler.last_epoch)


class SelfTest(TrainerCallback):
    """Prove on the real model, in its compute type, that packed rows and the loss in chunks are exact."""

    def __init__(self, trainer, notes: list[str], *, packing: bool):
        self.trainer, self.notes, self.packing = trainer, notes, packing

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        for note in self.notes:
            say(note)
        if self.trainer.finite.broken_weight:  # the first step stops, and names its rows
            return
        low = args.bf16 or args.fp16
        exact = not low and all(parameter.dtype == torch.float32 for parameter in model.parameters())
        dtype = torch.bfloat16 if args.bf16 else torch.float16
        with torch.autocast(args.device.type, dtype=dtype, enabled=low):
            rows = args.per_device_train_batch_size
            if compiled := fusion.prove_compiled(model, num_rows=rows, packing=self.packing):
                say(compiled)
            try:
                loss.self_test(model, exact=exact)
            except ValueError as error:
                say(loss.use_full_logits(model, str(error)))
            if hasattr(model, "peft_config") and not state.global_step:
                adapters.self_test(model, exact=exact)
            if self.packing:
                apart, _reach = attention.self_test(model, exact=exact, say=say)
                say(f"self-test: logits of a packed row are within {apart:.0e} of its documents alone")
            if args.sequence_parallel_size > 1:
                apart = sequence_parallel.self_test(model, exact=exact)
                say(f"self-test: logits of a shared row are within {apart:.0e} of the whole row")


class ProgressWithSpeed(ProgressCallback):
    """The progress bar, with the loss and the tokens per second beside it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=logs, **kwargs)
        if self.training_bar is not None and "loss" in (logs or {}):
            speed = logs.get("train_tokens_per_second", 0)
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}, {speed:,.0f} tokens/s")
