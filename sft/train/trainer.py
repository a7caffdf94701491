"""transformers' Trainer with verified checkpoints, an exact resume, and a stop before a non-finite update."""

import json
import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate.data_loader import prepare_data_loader
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import ProgressCallback

from sft.checkpoint import zero
from sft.checkpoint.background import BackgroundSaves
from sft.checkpoint.manifest import FINGERPRINT, PROGRESS, read_manifest
from sft.checkpoint.resume import has_other_layout
from sft.checkpoint.save import (
    SAVING,
    check_disk_space,
    estimate_bytes,
    explain_error,
    open_staging,
    publish_model,
    remove_leftovers,
)
from sft.checkpoint.weights import find_bad_weight, leave_out_tied, saved_shapes, verify_saved
from sft.checkpoint.writing import collect_files
from sft.dataset.sampler import Updates, WithEmpty
from sft.files import write_json
from sft.launch.processes import Guard, Stopped, UserError
from sft.report.text import say
from sft.train.callbacks import (
    Progress,
    ProgressWithSpeed,
    Restore,
    check_best_checkpoint,
    find_best_checkpoint,
    has_checkpoint_upload,
)
from sft.train.losses import FastTrainer, FiniteCheck, RouterLosses, SourceLosses, Sources, statistics_of_rows


class EvaluationStopped(Exception):
    """A signal came while the held-out rows were evaluated."""


class Trainer(FastTrainer):
    """`guard` watches the process; `fingerprint` says what the run depends on.

    With `sources`, the loss of each is logged beside the one of all, as `loss/NAME` and `eval_loss/NAME`.
    """

    def __init__(self, *arguments, guard: Guard, fingerprint: dict, sources: Sources | None = None, **options):
        super().__init__(*arguments, compute_metrics=self._metrics, **options)
        parts = self.args.sequence_parallel_size  # processes that share a row, neighbours in rank
        group, part = divmod(self.args.process_index, parts)
        self.source_losses = SourceLosses(sources, parts=parts, part=part) if sources else None
        self.router_losses = RouterLosses()
        self._token_losses: list[torch.Tensor | None] = []  # of the update's batches so far
        self.guard = guard
        self.fingerprint = fingerprint
        self.run = guard.broadcast(uuid.uuid4().hex)
        self.progress = Progress()
        self.shift = 0
        self.changed: set[str] = set()
        # transformers' own rotation deletes every path named checkpoint-N.
        self.keep = self.args.save_total_limit
        self.args.save_total_limit = None
        self._is_evaluating = False
        self._staging: str | None = None
        self.saves = BackgroundSaves(Path(self.args.output_dir), guard, say)
        self.finite = FiniteCheck(self)
        self.updates = Updates(
            len(self.train_dataset),
            batch_size=self.args.train_batch_size,
            accumulation=self.args.gradient_accumulation_steps,
            world_size=self.args.world_size // parts,
            rank=group,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            shuffle=self.args.train_sampling_strategy != "sequential",
            drop_last=self.args.dataloader_drop_last,
            on_epoch=self.train_dataset.pack_for,
        )
        self.add_callback(Restore(self))
        if self.pop_callback(ProgressCallback):
            self.add_callback(ProgressWithSpeed)

    # --- rows: the first one, and the number of updates left ---

    def continue_from(self, folder: str, changed: Sequence[str] = ()) -> None:
        """Resume the run of a checkpoint: its identity, its position in the data, the losses since its last log line.

        Flags in `changed` take effect; without that, optimizer and schedule keep their old ones.
        """
        self.changed = set(changed)
        self.run = read_manifest(Path(folder))["run"]
        self.progress = Progress(**json.loads((Path(folder) / PROGRESS).read_text()))
        if self.progress.num_rows != len(self.train_dataset):  # other data was allowed: the same share of it
            self.progress.taken = self.progress.taken * len(self.train_dataset) // self.progress.num_rows

    def get_train_dataloader(self) -> DataLoader:
        """Batches of `self.updates`; its generator is its own, so that workers draw nothing from the global one."""
        workers = self.args.dataloader_num_workers
        loader = DataLoader(
            WithEmpty(self.train_dataset),
            batch_sampler=self.updates,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            multiprocessing_context=self.args.dataloader_multiprocessing_context if workers else None,
            generator=torch.Generator().manual_seed(self.args.seed),
        )
        return prepare_data_loader(loader, self.args.device, num_processes=1, process_index=0, put_on_device=True)

    def set_initial_training_values(self, args, dataloader):
        """Count epochs and updates from the run's position; another batch or world size changes the number left."""
        epochs, per_epoch, *counts, max_steps = super().set_initial_training_values(args, dataloader)
        progress = self.progress
        self._skipped = self.updates.start_at(progress.epoch, progress.taken)
        if args.max_steps > 0:
            left = max(0, max_steps - progress.updates)
            epochs = progress.epoch + math.ceil((self._skipped + left) / per_epoch)
        else:
            # The schedule goes by the share of the rows: `shift` is what this place counts more than updates made.
            self.shift = progress.epoch * per_epoch + self._skipped - progress.updates
            max_steps = max(progress.updates, max_steps - self.shift)
        return epochs, per_epoch, *counts, max_steps

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume, trial):
        place = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, resume, trial)
        if resume is None:
            return place
        find_best_checkpoint(self)
        self.state.compute_steps(self.args, max_steps)
        if self.state.global_step >= max_steps:
            return num_train_epochs, 0
        return self.progress.epoch, self._skipped * self.args.gradient_accumulation_steps

    def get_total_train_batch_size(self, args) -> int:
        return self.updates.rows_per_update

    def create_scheduler(self, num_training_steps, optimizer=None):
        scheduler = super().create_scheduler(num_training_steps + self.shift, optimizer)
        if self.shift and hasattr(scheduler, "lr_lambdas"):
            shift = self.shift
            scheduler.lr_lambdas = [lambda step, of=of: of(step + shift) for of in scheduler.lr_lambdas]
        return scheduler

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """Load a checkpoint as it is; or take it apart, when another number of processes or ZeRO stage wrote it."""
        if resume_from_checkpoint is None or not has_other_layout(resume_from_checkpoint, self.fingerprint):
            with zero.safe_deepspeed_loading(self.is_deepspeed_enabled):
                return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        folder = Path(resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._load_other_layout(folder)
        zero.load_schedule(self.lr_scheduler, folder / "scheduler.pt")
        return prepared

    def _load_other_layout(self, folder: Path) -> None:
        """Load weights and moments of a checkpoint by their names, from slices of any number of processes."""
        model = self.model_wrapped if self.is_deepspeed_enabled else self.model
        zero.load_checkpoint(folder, model, self.optimizer, decayed=self.get_decay_parameter_names(self.model))

    def _issue_warnings_after_load(self, load_result) -> None:
        """Leave out tied weights, which a checkpoint holds once: transformers 5.23 warns that they are missing."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)

    # --- the end of a step ---

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *rest, **options):
        stop = None
        if self.state.global_step != self.progress.updates:
            self._advance()
            self.saves.finish_if_written()
            stop = self.guard.stop_requested()
        if stop and self.control.should_evaluate:
            self.progress.evaluate = True
            self.control.should_evaluate = False
        self.control.should_save |= bool(stop)
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *rest, **options)
        except EvaluationStopped:
            stop = self.progress.evaluate = True
            self._save_checkpoint(model, trial)
        if stop:
            self.saves.finish()
            raise Stopped(f"stopped at step {self.state.global_step}")

    def _advance(self) -> None:
        progress = self.progress
        if self.source_losses and None not in self._token_losses:
            batches = self.updates.batches_at(progress.epoch, progress.taken)[self.updates.rank]
            self.source_losses.add(batches, self._token_losses, self.train_dataset)
        self._token_losses = []
        self.finite.start_update()
        progress.updates = self.state.global_step
        progress.num_rows = len(self.train_dataset)
        progress.taken += self.updates.rows_per_update
        if self.updates.is_over(progress.taken):
            progress.epoch += 1
            progress.taken = 0

    def _track_num_input_tokens(self, inputs) -> None:
        """Count an update's tokens from its rows; transformers tells padding by its id, which may be eos, too."""
        if self.args.include_num_input_tokens_seen != "non_padding":
            super()._track_num_input_tokens(inputs)
        elif len(self._token_losses) == 1:  # after the first batch of the update
            rows = self.updates.rows_at(self.progress.epoch, self.progress.taken)
            self.state.num_input_tokens_seen += self.train_dataset.count_tokens(rows)

    def evaluate(self, *arguments, **options):
        """Evaluate without a trace in the random state, so that training doesn't depend on when it is done."""
        if self.args.dataloader_num_workers:
            self.saves.finish()
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            return super().evaluate(*arguments, **options)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return of each row, (rows, 3), its loss, right guesses and trained tokens: all that is kept of a batch."""
        if self.is_in_train and self.guard.stop_requested():
            raise EvaluationStopped
        self._is_evaluating = True
        try:
            loss, outputs, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._is_evaluating = False
        if outputs is None or labels is None:
            return loss, outputs, labels
        statistics = statistics_of_rows(outputs, labels)
        return loss, statistics, statistics[:, 2]

    def _metrics(self, prediction) -> dict[str, float]:
        """Sum up the held-out rows, of all and of each source; each row counts once, on any number of processes."""
        rows = prediction.predictions.astype(float)
        loss, right, tokens = rows.sum(0).tolist()
        found = {"loss": loss / tokens, "token_accuracy": right / tokens, "tokens": int(tokens)}
        return found | (self.source_losses.held_out_means(rows) if self.source_losses else {})

    def _get_num_items_in_batch(self, batch_samples, device):
        """In evaluation each rank's loss is the mean over its own tokens: transformers 5.23 divides by all ranks'."""
        return None if self._is_evaluating else super()._get_num_items_in_batch(batch_samples, device)

    def log(self, logs: dict, start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.router_losses.take_mean(self.guard.all_gather)
            logs |= self.source_losses.take_means(self.guard.all_gather) if self.source_losses else {}
        if "train_loss" in logs:  # of all steps; transformers 5.23 divides their sum by those since the resume
            logs["train_loss"] = self._total_loss_scalar / max(1, self.state.global_step)
        if "eval_loss" in logs:
            logs["eval_perplexity"] = math.exp(min(logs["eval_loss"], 700))
        super().log(logs, start_time)
        if not math.isfinite(logs.get("eval_loss", 0.0)):
            raise UserError(
                f"eval_loss is {logs['eval_loss']} at step {self.state.global_step}; stopped, no model saved"
            )

    def compute_loss(self, model, inputs, return_outputs=False, **options):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
        if model.training:
            self.finite.losses.append(loss.detach())
            self._token_losses.append(outputs.get("losses"))
            self.router_losses.add(outputs)
            if self.is_deepspeed_enabled and self.accelerator.sync_gradients:  # its backward makes the update, too
                self.finite.check(norm=0.0)
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        skipped = self.is_deepspeed_enabled and getattr(self.model_wrapped.optimizer, "overflow", False)
        # Under fp16 a gradient that is not finite is no fault: its scale is lowered, and the update left out.
        if self.args.fp16:
            self.finite.check(norm=0.0)
        else:
            self.finite.check(norm=math.inf if skipped else norm)
        return norm

    # --- checkpoints ---

    def _get_output_dir(self, trial) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        """Copy what each rank will write; its thread writes into a temporary folder while training continues."""
        self.saves.finish()
        if bad := self.bad_weight():
            raise UserError(f"step {self.state.global_step}: {bad} is not finite; stopped, not saved")
        output = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        staging = self.open_staging(estimate_bytes(output, self.model, has_masters=self.is_deepspeed_enabled), name)
        self._staging = str(staging)
        began = time.monotonic()
        try:
            with collect_files(staging / name, self.saves.bytes_for_copies()) as files:
                super()._save_checkpoint(model, trial)
            self._write_progress(staging / name)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise explain_error(error, self.args.output_dir) from error
        finally:
            self._staging = None
        of_run = {"run": self.run, "keep": self.keep, "spare": self.state.best_model_checkpoint}
        self.saves.start(staging / name, files, step=self.state.global_step, began=began, **of_run)
        if self.guard.is_set_on_any_rank(has_checkpoint_upload(self.callback_handler.callbacks)):
            self.saves.finish()

    def train(self, *arguments, **options):
        """Train, and complete the last checkpoint, also when an error ends the training."""
        with self.saves:
            try:
                return super().train(*arguments, **options)
            except EvaluationStopped:  # the one that a stopped run has left to its resume: again
                raise Stopped(f"stopped at step {self.state.global_step}") from None

    def _load_best_model(self) -> None:
        self.saves.finish()
        check_best_checkpoint(self)
        if has_other_layout(self.state.best_model_checkpoint, self.fingerprint):
            return self._load_other_layout(Path(self.state.best_model_checkpoint))
        with zero.safe_deepspeed_loading(self.is_deepspeed_enabled):
            return super()._load_best_model()

    def open_staging(self, needed: int, what: str) -> Path:
        """Empty the folder for what is being saved, when the disk has room for `needed` bytes more."""
        output = Path(self.args.output_dir)
        problem = None
        if self.args.should_save:
            try:
                remove_leftovers(output)
                check_disk_space(output, needed, what)
                open_staging(output, self.run)
            except (ValueError, OSError) as error:
                problem = str(error)
        problem = self.guard.broadcast(problem)
        if problem:
            raise UserError(problem)
        return output / SAVING

    def bad_weight(self) -> str | None:
        """Return the name of a weight that is not finite on some rank, the same on all, or None."""
        return next((name for name in self.guard.all_gather(find_bad_weight(self.model)) if name), None)

    def _write_progress(self, folder: Path) -> None:
        progress = {
            "losses": self.guard.all_gather(self._tr_loss.item()),
            "by_source": self.guard.all_gather(self.source_losses.read_sums() if self.source_losses else {}),
            "router": self.guard.all_gather(self.router_losses.read_sums()),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
        }
        is_best = self.guard.broadcast(self.state.best_model_checkpoint == str(folder))
        if is_best:  # on all ranks: each of them loads it at the end
            self.state.best_model_checkpoint = str(Path(self.args.output_dir) / folder.name)
        if not self.args.should_save:
            return
        write_json(folder / PROGRESS, asdict(self.progress) | progress, ensure_ascii=True)
        write_json(folder / FINGERPRINT, self.fingerprint, ensure_ascii=True)
        if is_best:
            self.state.save_to_json(str(folder / "trainer_state.json"))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict and leave_out_tied(state_dict, self.model))

    # --- the final model ---

    def save_final(self) -> None:
        """Save to a temporary folder, read and check every tensor, then move the files into the output folder."""
        folder = Path(self.args.output_dir)
        model = self.model
        model.config.use_cache = True
        shapes = saved_shapes(model)
        sizes = [(getattr(p, "ds_numel", p.numel()) * p.element_size(), p.requires_grad) for p in model.parameters()]
        needed = sum(size for size, trained in sizes if shapes or trained)
        staged = self.open_staging(needed, "the model") / "model"
        try:
            self.save_model(str(staged))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise explain_error(error, self.args.output_dir) from error
        if self.args.should_save:
            verify_saved(staged, shapes)
            model.generation_config.save_pretrained(staged)  # an adapter comes without
            for name in ("training_args.bin", "README.md"):  # a pickle that holds the arguments; peft's empty card
                (staged / name).unlink(missing_ok=True)
            self.guard.stage = "done"  # a few renames: a signal comes too late for them
            publish_model(staged, folder)
            remove_leftovers(folder)
        self.guard.wait_for_all()
        self.guard.stage = "done"

    def push_to_hub(self, *_arguments, **_options) -> None:
        """Leave it to the end of the run: transformers would push half-trained weights, a pickle and its own card."""

    _push_from_checkpoint = push_to_hub
