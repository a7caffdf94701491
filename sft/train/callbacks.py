"""Callbacks of the trainer: proofs before the first step, a resumed run's position, checkpointing, progress bar."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import ProgressCallback, TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from sft.checkpoint.manifest import find_damage
from sft.launch.deepspeed import zero_stage
from sft.launch.processes import UserError
from sft.model import adapters, attention, fusion, loss
from sft.model.kernels import compute_dtype
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
        trainer = self.trainer
        progress = self.trainer.progress
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
        trainer._total_loss_scalar = progress.total_loss
        trainer._globalstep_last_logged = progress.last_logged
        self.take_new_flags(args)
        if progress.evaluate and trainer.eval_dataset is not None:
            progress.evaluate = False
            trainer._determine_best_metric(trainer._evaluate(None, None), None)
            find_best_checkpoint(trainer)

    def on_epoch_begin(self, args, state, control, **kwargs):
        if args.dataloader_num_workers:  # a forked worker would keep the copies of a checkpoint in memory
            self.trainer.saves.finish()

    def take_new_flags(self, args) -> None:
        """Let allowed changes of the optimizer's flags take effect: a checkpoint brings the old ones with it."""
        changed = self.trainer.changed
        scheduler = self.trainer.lr_scheduler
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


def find_best_checkpoint(trainer) -> None:
    """Store the path of the best checkpoint of a resumed run, whose folder may have been moved."""
    best = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.best_global_step}"
    if best.is_dir():
        trainer.state.best_model_checkpoint = str(best)


def check_best_checkpoint(trainer) -> None:
    """Raise UserError on all ranks when the checkpoint that is to become the model differs from its manifest."""
    best = trainer.state.best_model_checkpoint
    if problem := trainer.guard.broadcast(find_damage(Path(best)) if trainer.guard.rank == 0 else None):
        raise UserError(
            f"{best}: is the best checkpoint, but {problem}; no model was saved: put its files back and resume, or "
            "resume without --load_best_model_at_end"
        )


def has_checkpoint_upload(callbacks: Iterable) -> bool:
    """Whether a tracker of transformers 5.23 reads each checkpoint's folder in `on_save`, as WANDB_LOG_MODEL asks."""
    switches = ("_log_model", "_log_artifacts", "_should_upload_checkpoint", "sync_checkpoints")
    values = [getattr(callback, name, None) for callback in callbacks for name in switches]
    return any(value in (True, "all", "checkpoint") for value in values)


class SelfTest(TrainerCallback):
    """Prove on the real model, in its compute type, that packed rows and the loss in chunks are exact."""

    def __init__(self, trainer, notes: list[str], *, packing: bool):
        self.trainer = trainer
        self.notes = notes
        self.packing = packing

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        for note in self.notes:
            say(note)
        if self.trainer.finite.broken_weight:  # the first step stops, and names its rows
            return
        is_low = args.bf16 or args.fp16
        exact = not is_low and all(parameter.dtype == torch.float32 for parameter in model.parameters())
        with autocast_of(args):
            rows = args.per_device_train_batch_size
            if note := fusion.prove_fused(model, num_rows=rows, packing=self.packing):
                say(note)
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


def autocast_of(args) -> torch.autocast:
    """Return the autocast in which a run computes."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16
    return torch.autocast(args.device.type, dtype=dtype, enabled=args.bf16 or args.fp16)


class ProgressWithSpeed(ProgressCallback):
    """The progress bar, with the loss and the tokens per second beside it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=logs, **kwargs)
        if self.training_bar is not None and "loss" in (logs or {}):
            speed = logs.get("train_tokens_per_second", 0)
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}, {speed:,.0f} tokens/s")


# --- what gradient checkpointing keeps ------------------------------------------------------------------------------

KEEP_CHOICES = ("auto", "none")
# The optimizer's state is there, and a step with it took its most memory.
STEPS_BEFORE_KEEPING = 2
MAX_SHARE_OF_GPU = 0.95
# To look at each operation takes a CPU 3 ms a layer with torch 2.13, 7 with 2.11 (dev/LOG.md). The GPU must be busy for
# longer with a layer: where so many are saved, an H200 is for 12 ms.
MIN_FLOPS_TO_KEEP = 1.5e12
ATTENTION_OPERATORS = ("torch_attn::_varlen_attn", "flash_attn::_flash_attn_varlen", "aten::_scaled_dot_product")


def can_keep_outputs(training) -> bool:
    """Whether a run's checkpointing may keep more: not under ZeRO-3, whose shards come and go, nor if memory is short.

    torch keeps parts of a layer only without `use_reentrant`.
    """
    how = getattr(training, "activation_checkpointing_kwargs", None) or training.gradient_checkpointing_kwargs or {}
    is_short = training.activation_offload or bool(how.keys() & {"offload", "context_fn"})
    is_asked = is_checkpointing(training) and training.checkpoint_keep == "auto"
    return is_asked and zero_stage(training) != 3 and not is_short and not how.get("use_reentrant")


def is_checkpointing(training) -> bool:
    """Whether layers are computed again in the backward pass, by either flag (the second is new in transformers 5)."""
    return bool(training.gradient_checkpointing or getattr(training, "activation_checkpointing", False))


class KeepOutputs(TrainerCallback):
    """After two steps let checkpointed layers keep products and attention outputs, as many as the GPU has room for."""

    def __init__(self, model, *, max_length: int):
        self.model = model
        self.max_length = max_length
        self.num_steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.num_steps += 1
        if self.num_steps != STEPS_BEFORE_KEEPING or not can_keep_outputs(args):
            return
        tokens = args.per_device_train_batch_size * self.max_length // args.sequence_parallel_size
        with autocast_of(args):
            if note := keep_outputs(self.model, tokens, room=find_room(args.device)):
                say(note)


def find_room(device: torch.device) -> int:
    """Return the bytes of a GPU that are not in use and not left free for what comes; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    free, whole = torch.cuda.mem_get_info(device)
    return max(0, free - int((1 - MAX_SHARE_OF_GPU) * whole))


def keep_outputs(model, tokens: int, *, room: int) -> str:
    """Let as many checkpointed layers as `room` bytes allow keep what `Kept` says; return a note, or nothing.

    A short step with and without it is compared: call it under the training's autocast.
    """
    layers = find_layers(model)
    token = adapters.embed_token(model)
    hidden = token.shape[-1]
    element_size = compute_dtype(token).itemsize
    sizes = choose_sizes(find_widths(model), hidden=hidden, room=room, tokens=tokens, element_size=element_size)
    chosen = list(zip(layers, sizes, strict=False))
    functions = [layer._gradient_checkpointing_func for layer, _size in chosen]

    def leave() -> None:
        for (layer, _size), function in zip(chosen, functions, strict=True):
            layer._gradient_checkpointing_func = function

    def keep() -> None:
        for (layer, size), function in zip(chosen, functions, strict=True):
            layer._gradient_checkpointing_func = functools.partial(function, context_fn=Kept(hidden, size))

    if not sizes:
        return ""
    try:
        distance = fusion.measure_distance(model, leave, keep)
        problem = "" if distance < fusion.find_max_distance(model) else f"with more, states end {distance:.0e} apart"
    except Exception as error:  # layers with operations that can't be run again in parts fail in many ways
        problem = f"keeping more failed: {fusion.shorten(error)}"
    if problem:
        leave()
        return f"gradient checkpointing: layers keep their inputs alone ({problem})"
    return (
        f"gradient checkpointing: from now on {len(sizes)} of {len(layers)} layers keep wide products and attention "
        f"outputs, {sum(sizes) / 2**30:.1f} GiB; all else is computed again (--checkpoint_keep none: these too)"
    )


def offload_activations(model) -> str:
    """Let what autograd keeps of (batch, length, hidden size) wait on the CPU for the backward pass; return a note.

    With gradient checkpointing that is the input of each layer, and nearly all that is kept. torch's own `save_on_cpu`
    moves everything, also the rotary embeddings, which all layers have in common.
    """
    size = model.config.get_text_config().hidden_size
    contexts = []

    def pack(tensor):
        if tensor.ndim != 3 or tensor.shape[-1] != size:
            return tensor
        on_cpu = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
        return tensor.device, on_cpu.copy_(tensor)

    def unpack(kept):
        return kept if isinstance(kept, torch.Tensor) else kept[1].to(kept[0], non_blocking=True)

    def enter(module, args):
        contexts.append(torch.autograd.graph.saved_tensors_hooks(pack, unpack))
        contexts[-1].__enter__()

    def leave(module, args, output):
        contexts.pop().__exit__(None, None, None)

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave, always_call=True)
    return "the input of each layer waits on the CPU for the backward pass"


def find_layers(model) -> list:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def find_widths(model) -> list[int]:
    """Return how many numbers a token each layer may keep; see `Kept`."""
    hidden = adapters.embed_token(model).shape[-1]
    widths = []
    for layer in find_layers(model):
        products = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        wide = [each.out_features for each in products if _is_wide(each.in_features, each.out_features, hidden)]
        widths.append(hidden + sum(wide))
    return widths


def _is_wide(inputs: int, outputs: int, hidden: int) -> bool:
    return inputs == hidden and outputs >= 2 * hidden


def choose_sizes(widths: Sequence[int], *, hidden: int, room: int, tokens: int, element_size: int) -> list[int]:
    """Return the bytes that each layer, from the first one on, may keep in `room`; none where it is not worth it."""
    sizes = []
    for width in widths:
        size = width * tokens * element_size
        if size > room or 2.0 * tokens * hidden * (width - hidden) < MIN_FLOPS_TO_KEEP:
            break
        room -= size
        sizes.append(size)
    return sizes


@dataclass(frozen=True)
class Kept:
    """Keeps of a layer's forward pass the products that widen the states, as gate and up of an MLP, and attention.

    They are most of the work. Other products can't be kept: Liger's rotary kernel overwrites queries and keys where
    the product has put them. `max_bytes` are those of one forward pass of a layer.
    """

    hidden: int
    max_bytes: int

    def __call__(self) -> tuple:
        kept = {False: 0, True: 0}  # bytes in the forward pass, and when it is run again (torch 2.11 asks then too)

        def choose(context, operator, *args, **kwargs) -> CheckpointPolicy:
            size = self._bytes_of(operator, args)
            if not size or kept[context.is_recompute] + size > self.max_bytes:
                return CheckpointPolicy.PREFER_RECOMPUTE
            kept[context.is_recompute] += size
            return CheckpointPolicy.MUST_SAVE

        return create_selective_checkpoint_contexts(choose)

    def _bytes_of(self, operator, args: tuple) -> int:
        """Return the bytes of what is to be kept of an operator's output; 0 for any other operator."""
        place = _place_of_input(operator)
        if place is None:
            return 0
        states = args[place]
        if operator not in PRODUCTS:
            return states.nbytes  # the queries', as large as the output
        width = args[place + 1].shape[1]
        return states.shape[0] * width * states.element_size() if _is_wide(states.shape[1], width, self.hidden) else 0


PRODUCTS = {torch.ops.aten.mm.default: 0, torch.ops.aten.addmm.default: 1}


@functools.cache
def _place_of_input(operator) -> int | None:
    """Return the place of the states among the arguments of a product or an attention; None for other operators."""
    if operator in PRODUCTS:
        return PRODUCTS[operator]
    return 0 if str(getattr(operator, "_name", "")).startswith(ATTENTION_OPERATORS) else None
