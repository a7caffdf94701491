"""Losses of each step: by source of the data, and whether they and their gradients are finite."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import transformers

from sft.dataset.dataset import Examples, TrainingRows
from sft.dataset.sampler import EMPTY
from sft.format.tokens import IGNORE_INDEX
from sft.launch.processes import UserError
from sft.train.sequence_parallel import cut_tokens

MAX_SOURCES = 9  # for which a loss is shown
MAX_PENDING_BATCHES = 64  # whose losses wait on the GPU until they are read
MAX_NAMED_EXAMPLES = 4  # of a batch that is not finite: by their words; then by number alone
MAX_NUMBERED_EXAMPLES = 40


# --- by source ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sources:
    """Sources by which losses are shown: up to MAX_SOURCES names, and each example's index into them."""

    names: tuple[str, ...]
    train: np.ndarray
    held_out: np.ndarray

    @property
    def held_out_names(self) -> list[str]:
        """The names that the held-out examples have."""
        return [self.names[number] for number in np.unique(self.held_out)]


def group_sources(parts: Sequence[tuple[Examples, Sequence[str]]]) -> Sources | None:
    """Number the sources of (examples, names of their sources), training and held out; None if each has only one.

    Those with fewest examples become one, whose name says how many they are. In the names, all but
    letters, digits, dots, dashes and underscores becomes an underscore, as trackers of experiments require.
    """
    counted = Counter()
    for examples, names in parts:
        for number, name in enumerate(names):
            counted[name] += int((examples.origins["source"] == number).sum())
    most = len(counted) if len(counted) <= MAX_SOURCES else MAX_SOURCES - 1
    shown = {name: re.sub(r"[^\w.-]+", "_", name) or "_" for name, _number in counted.most_common(most)}
    rest = f"{len(counted) - most}_other_sources"
    unique = list(dict.fromkeys([*shown.values(), *([rest] if most < len(counted) else [])]))
    if max(len(names) for _examples, names in parts) < 2 or len(unique) < 2:
        return None
    of_names = [np.array([unique.index(shown.get(name, rest)) for name in names], int) for _examples, names in parts]
    of_parts = [
        of[examples.origins["source"]] if len(of) else np.zeros(0, int)
        for of, (examples, _names) in zip(of_names, parts, strict=True)
    ]
    return Sources(tuple(unique), *of_parts)


class SourceLosses:
    """Sums this rank's losses of each source between two log lines; they stay on the GPU until they are read.

    With `parts` above 1 processes share rows, and this rank has the losses of part number `part`.
    """

    def __init__(self, sources: Sources, *, parts: int = 1, part: int = 0):
        self.sources = sources
        self.parts = parts
        self.part = part
        self.sums: dict[str, list] = {}  # source: [summed loss, trained tokens]
        self._pending: list[tuple[np.ndarray, torch.Tensor]] = []

    def add(self, batches: Sequence[Sequence[int]], losses: Sequence[torch.Tensor], dataset: TrainingRows) -> None:
        """Store the losses by token, (rows, length) or of a part (1, tokens), of each batch of an update's rows."""
        for batch, batch_losses in zip(batches, losses, strict=True):
            of_token = np.full((len(batch), batch_losses.numel() * self.parts // len(batch)), -1)
            for place, row in enumerate(batch):
                members = [] if row == EMPTY else dataset.rows[row]
                found = [
                    np.full(len(dataset.examples[int(number)]["input_ids"]), self.sources.train[number])
                    for number in members
                ]
                of_token[place, : sum(map(len, found))] = np.concatenate([[], *found])
            if self.parts > 1:
                of_token = cut_tokens(of_token, self.parts, self.part)
            self._pending.append((of_token, batch_losses))
        if len(self._pending) > MAX_PENDING_BATCHES:
            self.read_pending()

    def read_pending(self) -> None:
        """Bring the remembered losses to the CPU and add them to the sums."""
        number = len(self.sources.names)
        for of_token, losses in self._pending:
            losses = losses.cpu().numpy().astype(float)
            known = ~np.isnan(losses) & (of_token >= 0)
            sums = np.bincount(of_token[known], losses[known], number), np.bincount(of_token[known], minlength=number)
            for name, added, tokens in zip(self.sources.names, *sums, strict=True):
                before = self.sums.get(name, (0.0, 0))
                self.sums[name] = [before[0] + float(added), before[1] + int(tokens)]
        self._pending = []

    def read_sums(self) -> dict[str, list]:
        """Return the sums, the remembered losses among them."""
        self.read_pending()
        return self.sums

    def take_means(self, gather: Callable[[dict], list[dict]]) -> dict[str, float]:
        """Return the mean losses since the last log line, over all ranks (`gather`), and begin anew."""
        total = sum_by_source(gather(self.read_sums()))
        self.sums = {}
        return _means("loss", total, *zip(*total.values(), strict=True)) if total else {}

    def held_out_means(self, rows: np.ndarray) -> dict[str, float]:
        """Return the mean held-out losses of `rows`, (rows, 3), as `statistics_of_rows` has them."""
        if len(rows) != len(self.sources.held_out):
            return {}
        sums = [np.bincount(self.sources.held_out, rows[:, column], len(self.sources.names)) for column in (0, 2)]
        return _means("eval_loss", self.sources.names, *sums)


def statistics_of_rows(outputs, labels: torch.Tensor) -> torch.Tensor:
    """Return of each row, (rows, 3): its summed loss, right guesses, trained tokens; labels (rows, length), unshifted.

    `outputs`: losses and guesses, each (rows, length), of the loss in chunks; else logits (rows, length, tokens). The
    rest, as the loss of routers, is left out.
    """
    if not isinstance(outputs, tuple) or outputs[0].dim() == 3:
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        losses = torch.nn.functional.cross_entropy(outputs.float().mT, targets, reduction="none")
        outputs = losses, outputs.argmax(-1)
    losses, guesses = (values[:, :-1] for values in outputs[:2])
    in_loss = labels[:, 1:] != IGNORE_INDEX
    right = in_loss & (guesses == labels[:, 1:])
    return torch.stack([losses.where(in_loss, 0.0).double().sum(1), right.sum(1), in_loss.sum(1)], 1)


def sum_by_source(parts: Sequence[dict]) -> dict[str, tuple[float, int]]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: tuple(map(sum, zip(*(part[name] for part in parts if name in part), strict=True))) for name in names}


def _means(key: str, names: Iterable[str], sums: Sequence[float], tokens: Sequence[float]) -> dict[str, float]:
    """Return {key/name: mean} of each source that had a trained token."""
    found = zip(names, sums, tokens, strict=True)
    return {f"{key}/{name}": float(total / number) for name, total, number in found if number}


# --- of routers ---------------------------------------------------------------------------------------------------


class RouterLosses:
    """Sums the load-balancing loss of a mixture's routers, without its weight, between two log lines.

    `sums` is {"router_loss": [sum, labelled batches]} of this rank, and empty where the config asks for no such loss.
    """

    def __init__(self):
        self.sums: dict[str, list] = {}

    def add(self, outputs) -> None:
        found = outputs.get("router_loss", outputs.get("aux_loss"))
        if torch.is_tensor(found):
            total, count = self.sums.get("router_loss", (0.0, 0))
            self.sums["router_loss"] = [total + found.detach().float(), count + 1]

    def read_sums(self) -> dict[str, list]:
        """Return the sums as numbers."""
        return {name: [float(total), count] for name, (total, count) in self.sums.items()}

    def take_mean(self, gather: Callable[[dict], list[dict]]) -> dict[str, float]:
        """Return the mean since the last log line, over all ranks (`gather`), and begin anew.

        Every rank gathers: one that had no row since then has no sum, and the others wait for it.
        """
        total = sum_by_source(gather(self.read_sums()))
        self.sums = {}
        return {name: loss / count for name, (loss, count) in total.items()}


# --- finite -------------------------------------------------------------------------------------------------------


class FiniteCheck:
    """Stops all ranks before an update whose loss or gradient is not finite, and names the rows.

    `losses` and `gradients` are those of the update's batches so far on this rank: the loss, and whether the gradient
    that reaches the embeddings is finite (after the all-reduce no rank can be named). `broken_weight` was not finite
    before the first step.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.losses: list[torch.Tensor] = []
        self.gradients: list[torch.Tensor] = []
        self.broken_weight: str | None = None
        trainer.model.get_input_embeddings().register_forward_hook(self._watch_gradient)

    def _watch_gradient(self, _module, _inputs, output) -> None:
        if self.trainer.is_in_train and torch.is_tensor(output) and output.requires_grad:
            output.register_hook(lambda gradient: self.gradients.append(gradient.isfinite().all()))

    def start_update(self) -> None:
        self.losses = []
        self.gradients = []

    def check(self, *, norm) -> None:
        """Raise UserError on all ranks when the loss of one, or the summed gradient of this `norm`, is not finite."""
        norm = torch.as_tensor(norm, dtype=torch.float32, device=self.trainer.args.device)
        values = [norm.reshape(()), *(loss.float().reshape(()) for loss in self.losses)]
        is_finite = torch.stack(values).isfinite().all()
        if self.trainer.guard.is_set_on_any_rank(not is_finite.item()) or self.broken_weight:
            raise UserError(self.describe(float(norm)))

    def describe(self, norm: float) -> str:
        """Return what is not finite, on which rank, in which rows; called on all ranks together."""
        trainer = self.trainer
        losses = [float(loss) for loss in self.losses]
        gradients = [bool(finite) for finite in self.gradients]
        found = []
        of_ranks = trainer.updates.batches_at(trainer.progress.epoch, trainer.progress.taken)
        parts = trainer.args.sequence_parallel_size
        for rank, (values, finite) in enumerate(trainer.guard.all_gather((losses, gradients))):
            bad = [place for place, value in enumerate(values) if not math.isfinite(value)]
            problem = f"the loss is {values[bad[0]]}" if bad else "the gradient is not finite"
            bad = bad or [place for place, is_finite in enumerate(finite) if not is_finite]
            rows = [row for place in bad for row in of_ranks[rank // parts][place]]
            if bad:
                found.append(f"{problem} on rank {rank}, in {self._name_rows(rows)}")
        if not found:
            rows = [row for batches in of_ranks for batch in batches for row in batch]
            problem = "" if math.isfinite(norm) else f"the gradient is not finite (norm {norm}), every loss is; "
            found = [f"{problem}in {self._name_rows(rows)}"]
        if self.broken_weight:
            found.append(f"{self.broken_weight} was not finite before")
        step = trainer.state.global_step + 1
        return f"step {step}: {'; '.join(found)}; stopped before the update, no model saved"

    def _name_rows(self, rows: list[int]) -> str:
        """Name the examples of rows by number and the words before the reply; they count from 0, as in the files."""
        dataset = self.trainer.train_dataset
        examples = [number for row in rows if row != EMPTY for number in dataset.rows[row].tolist()]
        named = [
            f"example {number} ({self._words_of(dataset.examples[number])!r})"
            for number in examples[:MAX_NAMED_EXAMPLES]
        ]
        more = ", ".join(map(str, examples[MAX_NAMED_EXAMPLES:MAX_NUMBERED_EXAMPLES]))
        return ", ".join(named) + (f" and {more}" if more else "")

    def _words_of(self, example: dict) -> str:
        reply = int((example["labels"] != IGNORE_INDEX).argmax())
        ids = example["input_ids"][max(0, reply - 32) : reply].tolist()
        return " ".join(self.trainer.processing_class.decode(ids).split())[-60:]


# --- once per update ------------------------------------------------------------------------------------------------


class FastTrainer(transformers.Trainer):
    """transformers' Trainer with one wait for the GPU in an update, and one pass less over the gradients."""

    _uncounted: tuple[dict[str, torch.Tensor], ...] = ()  # tokens of the update's batches so far

    def _track_num_input_tokens(self, inputs) -> None:
        """Leave the count to the end of the update: transformers 5.23 waits for the GPU after each batch."""
        tokens = {name: inputs[name].flatten() for name in ("input_ids", "attention_mask") if name in inputs}
        self._uncounted = (*self._uncounted, tokens)

    def _clip_grad_norm(self, model):
        if self.args.fp16 or not self.optimizer or self.args.device.type != "cuda":
            return super()._clip_grad_norm(model)
        norm = clip_in_optimizer(self.optimizer, self.args.max_grad_norm)
        return super()._clip_grad_norm(model) if norm is None else norm

    def _get_grad_norm(self, model, grad_norm=None):
        if self._uncounted:
            names = self._uncounted[0]
            batches = {name: torch.cat([tokens[name] for tokens in self._uncounted]) for name in names}
            super()._track_num_input_tokens(batches)
            self._uncounted = ()
        return super()._get_grad_norm(model, grad_norm=grad_norm)


def clip_in_optimizer(optimizer, max_norm: float) -> torch.Tensor | None:
    """Let torch's fused AdamW clip: it divides the gradients by its `grad_scale` as it reads them.

    Returns their norm before that. None, and nothing is done, for another optimizer. A scaler of fp16 sets `grad_scale`
    itself.
    """
    fused = getattr(optimizer, "optimizer", optimizer)  # of accelerate
    if type(fused) is not torch.optim.AdamW or not fused.defaults.get("fused"):
        return None
    gradients = [weight.grad for group in fused.param_groups for weight in group["params"] if weight.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    fused.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1.0)  # 1e-6 as in torch's clip_grad_norm_
    return norm
