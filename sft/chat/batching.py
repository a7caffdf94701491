"""Continuous batching: requests join and leave a running batch between two tokens.

    queue -> prompt prefilled in chunks -> a row of the batch -> removed at a stop token, at its limit, or cancelled

Each request has its own sampling settings and seed. A long prompt delays the others by one chunk at a time.
"""

import math
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import astuple

from sft.chat.rows import PREFILL_TOKENS, Request, RowModel, Rows
from sft.chat.sampling import PENALTIES, Sampling

MAX_ACTIVE = 32  # rows of the batch
MAX_WAITING = 20  # requests in the queue of a server
MAX_CACHED_TOKENS = 32_768  # rows x longest row of the batch; a single row may be longer
READ_INTERVAL_SECONDS = 0.02  # of the reader of a stream: many that wake at each token would slow the model down


class BusyError(Exception):
    """The queue is full."""


class Decoder:
    """Decodes many requests at once; every method may be called from any thread but `run` and `step`.

    A model whose cache can't be split by rows (state-space and hybrid models, remote code) decodes the requests in
    turn, a token of each.
    """

    def __init__(self, model, *, stop_ids: Sequence[int], pad_id: int = 0, window: int | None = None):
        self.model = model
        self.row_model = RowModel(model, pad_id=pad_id)
        self.stop_ids = set(stop_ids)
        self.num_tokens = getattr(model.config.get_text_config(), "vocab_size", sys.maxsize)
        self.window = window
        self.max_active = MAX_ACTIVE
        self.max_waiting: int | None = None
        self.waiting: deque[Request] = deque()
        self.batches: list[Rows] = []  # one, or one for each request where rows can't be joined
        self.prefilling: Rows | None = None
        self.changed = threading.Condition()
        self._worker: threading.Thread | None = None

    @property
    def joins_rows(self) -> bool:
        return self.row_model.joins_rows

    # --- the readers' side ---

    def add(self, prompt: Sequence[int], sampling: Sampling, *, seed: int | None = None, stop=None) -> Request:
        """Append a request to the queue; raises BusyError when `max_waiting` are in it already."""
        import torch

        if not all(math.isfinite(value) for value in astuple(sampling)):
            raise ValueError(f"{sampling}: each must be a finite number")  # it would fail the whole batch
        if not PENALTIES[0] <= sampling.repetition_penalty <= PENALTIES[1]:
            raise ValueError(f"{sampling}: the repetition penalty must be from {PENALTIES[0]} to {PENALTIES[1]:g}")
        if max(prompt, default=0) >= self.num_tokens:  # so would this
            raise ValueError(
                f"the prompt has a token of id {max(prompt)}, but the model has {self.num_tokens} embedding rows; the "
                "tokenizer in its folder is not the model's own"
            )
        limit = min(sampling.max_new_tokens, (self.window or 2**62) - len(prompt))
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        request = Request(prompt, sampling, limit=limit, seed=seed, stop=stop or threading.Event())
        with self.changed:
            free = max(self.max_active - self.num_active, 0)
            if self.max_waiting is not None and len(self.waiting) - free >= self.max_waiting:
                raise BusyError(f"{len(self.waiting)} requests are waiting")
            if not request.done:
                self.waiting.append(request)
        return request

    def start(self) -> None:
        """Decode in a background thread until all requests are done."""
        with self.changed:
            if not self._worker:
                self._worker = threading.Thread(target=self._work, name="decoder (work)", daemon=True)
                self._worker.start()

    def follow(self, request: Request) -> Iterator[int]:
        """Yield the request's number of tokens as it grows; raises the model's exception."""
        count = 0
        while True:
            with self.changed:
                while not request.done and len(request.ids) == count:
                    self.changed.wait()
                if len(request.ids) == count:
                    if request.error:
                        raise request.error
                    return
                count = len(request.ids)
            yield count
            if not request.done:
                time.sleep(READ_INTERVAL_SECONDS)

    def wait(self, request: Request) -> None:
        """Wait until the request is done: complete, failed or cancelled."""
        with self.changed:
            self.changed.wait_for(lambda: request.done)

    def queue_position(self, request: Request) -> int:
        """Return how many requests are before it in the queue; -1 when it is not in the queue."""
        with self.changed:
            return self.waiting.index(request) if request in self.waiting else -1

    @property
    def num_active(self) -> int:
        return len(self._active_requests())

    def _active_requests(self) -> list[Request]:
        prefilling = [self.prefilling] if self.prefilling else []
        return [request for rows in [*self.batches, *prefilling] for request in rows.requests]

    # --- the model's side ---

    def run(self) -> None:
        """Decode in this thread until all requests are done."""
        while self.step():
            pass

    def _work(self) -> None:
        while True:
            try:
                busy = self.step()
            except BaseException as error:  # fail all requests: this thread is about to exit
                self._fail_all(error)
                raise
            with self.changed:
                if not busy and not self.waiting:
                    self._worker = None
                    return

    def step(self) -> bool:
        """Prefill a chunk and decode a token of each active request; return whether work is left."""
        import torch

        if was_training := self.model.training:
            self.model.eval()
        try:
            with torch.inference_mode():
                self._remove_done()
                for rows in list(self.batches):
                    self._try(rows, self._decode)
                self._admit_waiting()
                if self.prefilling:
                    self._try(self.prefilling, self._prefill)
                self._remove_done()
        finally:
            if was_training:
                self.model.train()
        return bool(self.waiting or self.batches or self.prefilling)

    def _try(self, rows: Rows, work) -> None:
        """Fail the rows' requests when the model raises; other requests continue."""
        try:
            work(rows)
        except Exception as error:
            self._fail(rows.requests, error)
            self.batches = [other for other in self.batches if other is not rows]
            self.prefilling = self.prefilling if self.prefilling is not rows else None

    def _fail(self, requests: Sequence[Request], error: BaseException) -> None:
        with self.changed:
            for request in requests:
                request.error = request.error or error
                request.done = True
            self.changed.notify_all()

    def _fail_all(self, error: BaseException) -> None:
        with self.changed:
            self._fail([*self.waiting, *self._active_requests()], error)
            self.waiting.clear()
            self.batches = []
            self.prefilling = None
            self._worker = None

    def _remove_done(self) -> None:
        """Remove the requests that are complete or cancelled."""
        with self.changed:
            for request in (*self.waiting, *self._active_requests()):
                request.done |= request.stop.is_set()
            self.waiting = deque(request for request in self.waiting if not request.done)
            self.changed.notify_all()
        if self.prefilling and all(request.done for request in self.prefilling.requests):
            self.prefilling = None
        for rows in self.batches:
            left = [index for index, request in enumerate(rows.requests) if not request.done]
            if not left:
                rows.requests = []
            elif len(left) < len(rows.requests):
                rows.keep(left)
        self.batches = [rows for rows in self.batches if rows.requests]

    def _admit_waiting(self) -> None:
        """Take requests from the queue, as many as one chunk of prefill and the batch have room for."""
        if self.prefilling:
            return
        active = self._active_requests()
        taken: list[Request] = []
        with self.changed:
            while self.waiting and len(active) + len(taken) < self.max_active:
                if not self._has_room(active, taken, self.waiting[0]):
                    break
                taken.append(self.waiting.popleft())
        try:
            self.prefilling = self.row_model.to_rows(taken) if taken else None
        except Exception as error:  # out of memory: they have left the queue already
            self._fail(taken, error)

    def _has_room(self, active: list[Request], taken: list[Request], request: Request) -> bool:
        group = [*taken, request]
        if not self.joins_rows:
            return not taken
        longest = max(len(request.prompt) for request in group)
        shared = self.row_model.num_shared(group)
        if taken and shared + len(group) * (longest - shared) > PREFILL_TOKENS:
            return False
        final_length = max(len(request.prompt) + request.limit for request in active + group)
        is_first = not active and not taken
        return is_first or len(active + group) * final_length <= MAX_CACHED_TOKENS

    def _prefill(self, rows: Rows) -> None:
        logits = self.row_model.prefill(rows)
        if logits is None:
            return
        self._append_tokens(rows, logits)
        self.prefilling = None
        if self.batches and self.joins_rows:
            self.batches[0].join(rows)
        else:
            self.batches.append(rows)

    def _decode(self, rows: Rows) -> None:
        self._append_tokens(rows, self.row_model.forward(rows, rows.ids))

    def _append_tokens(self, rows: Rows, logits) -> None:
        tokens = self.row_model.sample(rows, logits)
        with self.changed:
            for request, token in zip(rows.requests, tokens, strict=True):
                request.ids.append(token)
                request.done = token in self.stop_ids or len(request.ids) >= request.limit
            self.changed.notify_all()
