"""Which rows each process takes at each update: a function of seed, epoch and the rows already taken, of nothing else.

So a run resumes with another number of processes, or another batch, without repeating or losing a row.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass

import numpy as np

from sft.format.tokens import IGNORE_INDEX

EMPTY = -1  # the number of a row with nothing to learn


@dataclass(eq=False)
class Updates:
    """Batch sampler of one process: `accumulation` batches of row numbers for each update, over one epoch.

    An update takes the next `batch_size * accumulation * world_size` rows of the epoch's order, a batch for each
    process, then the next for each. The last one may have fewer, shared out evenly; a batch without a row gets an EMPTY
    one, so that all do the same steps and no row is seen twice. Two processes, batches of 1, accumulation 2, 5 rows:

        rank 0: [a] [c]   [e] [-]
        rank 1: [b] [d]   [-] [-]

    A run that resumes in `first_epoch` after `taken` rows has its remaining rows in that epoch's last updates.
    """

    num_rows: int
    _: KW_ONLY
    batch_size: int
    accumulation: int
    world_size: int
    rank: int
    seed: int
    shuffle: bool = True
    drop_last: bool = False
    on_epoch: Callable[[int], None] | None = None

    def __post_init__(self):
        self.rows_per_update = self.batch_size * self.accumulation * self.world_size
        self.drop_last &= self.num_rows >= self.rows_per_update
        self.per_epoch = self._updates_in(self.num_rows)
        self.epoch = 0
        self.first_epoch = 0
        self.taken = 0
        self._ordered = None
        self._rows = np.arange(self.num_rows)

    def _updates_in(self, rows: int) -> int:
        return rows // self.rows_per_update if self.drop_last else -(-rows // self.rows_per_update)

    def in_all(self, epochs: float, max_steps: int = -1) -> int:
        """How many updates a run makes: `max_steps` when that is above 0, else those of so many epochs."""
        return max_steps if max_steps > 0 else math.ceil(self.per_epoch * epochs)

    def left(self, epochs: float, max_steps: int, *, epoch: int, taken: int, made: int) -> int:
        """How many a run has left that made `made` updates, and is in `epoch` after `taken` of its rows."""
        behind = made if max_steps > 0 else epoch * self.per_epoch + self.start_at(epoch, taken)
        return max(0, self.in_all(epochs, max_steps) - behind)

    def set_epoch(self, epoch: int) -> None:
        if self.on_epoch and epoch != self.epoch:
            self.on_epoch(epoch)
        self.epoch = epoch

    def start_at(self, epoch: int, taken: int) -> int:
        """Begin in `epoch` after `taken` of its rows; return how many of its updates that stands for."""
        self.first_epoch = epoch
        self.taken = taken
        return self.per_epoch - self._updates_in(self.num_rows - taken)

    def is_over(self, taken: int) -> bool:
        """Whether an epoch has no update left after `taken` rows."""
        return self._updates_in(self.num_rows - min(taken, self.num_rows)) == 0

    def __len__(self) -> int:
        return self.per_epoch * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        taken = self.taken if self.epoch == self.first_epoch else 0
        left = self._updates_in(self.num_rows - taken)
        for _skipped in range(self.per_epoch - left):
            yield from [[EMPTY]] * self.accumulation
        for number in range(left):
            yield from self.batches_at(self.epoch, taken + number * self.rows_per_update)[self.rank]

    def batches_at(self, epoch: int, taken: int) -> list[list[list[int]]]:
        """Return the batches of the update after `taken` rows of `epoch`, for each rank."""
        num_batches = self.accumulation * self.world_size
        batches = [part.tolist() or [EMPTY] for part in np.array_split(self.rows_at(epoch, taken), num_batches)]
        return [batches[rank :: self.world_size] for rank in range(self.world_size)]

    def rows_at(self, epoch: int, taken: int) -> np.ndarray:
        """Return the row numbers of the update after `taken` rows of `epoch`, of all ranks."""
        return self.order(epoch)[taken : taken + self.rows_per_update]

    def order(self, epoch: int) -> np.ndarray:
        """Return the row numbers of an epoch as they are taken, (rows,)."""
        if self.shuffle and self._ordered != epoch:
            self._ordered = epoch
            self._rows = np.random.default_rng([self.seed, epoch, 1]).permutation(self.num_rows)
        return self._rows


class WithEmpty:
    """A dataset that has also a row EMPTY: one token, without a label."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if index != EMPTY:
            return self.rows[index]
        first = {name: values[:1].copy() for name, values in self.rows[0].items()}
        first["labels"][:] = IGNORE_INDEX
        return first
