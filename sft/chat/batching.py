"""One model, many replies: requests join and leave a running batch between two tokens (continuous batching).

    waiting -> prompt read in pieces -> a row of the batch -> out, at a stop token, at its limit, or cancelled

    . . . a b c | d     A row is padded on the left. A new prompt is read alone, then laid beside the others with
    e f g h i j | k     padding for what it is shorter; columns that hold only padding go with the row that needed them.

Each request draws its own tokens, with its own settings and seed. One long prompt or reply holds nobody up.
"""

import inspect
import itertools
import math
import random
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass

MAX_ACTIVE = 32  # rows of the batch
MAX_CACHED = 32_768  # rows x longest row that the batch may grow to, in tokens; a single row may be longer
PAUSE = 0.02  # seconds between two looks of a reader: many who wake at each token would slow it down
PIECE = 512  # tokens of prompts read between two tokens of the others
FORWARD = {"input_ids", "attention_mask", "position_ids", "logits_to_keep", "use_cache", "past_key_values"}


class NotFinite(ValueError):
    """The model's scores hold numbers that are not finite: nothing can be drawn from them."""


class BusyError(Exception):
    """As many requests wait as are let in."""


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens. The defaults are Blossom's; temperature 0 is greedy."""

    temperature: float = 0.5
    top_p: float = 0.85
    top_k: int = 50
    repetition_penalty: float = 1.05
    max_new_tokens: int = 512


class Request:
    """A reply in the making: `ids` grows, a stop token included, until `done`; `error` says why it failed."""

    def __init__(self, prompt: Sequence[int], sampling: Sampling, *, limit: int, seed: int, stop: threading.Event):
        self.prompt, self.sampling, self.limit = list(prompt), sampling, limit
        self.ids: list[int] = []
        self.done, self.error = limit < 1, None
        self.stop, self.random = stop, random.Random(seed)

    def cancel(self) -> None:
        """Leave the batch before its next token."""
        self.stop.set()

    @property
    def settings(self) -> tuple[float, float, int, float]:
        """Return temperature, top p, top k (0: all tokens) and repetition penalty; greedy is the best one alone."""
        sampling = self.sampling
        if sampling.temperature <= 0:
            return 1.0, 1.0, 1, sampling.repetition_penalty
        return sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_penalty


def candidates(scores, seen, settings: Sequence[tuple]):
    """Return (probabilities, tokens), each (rows, candidates), the likeliest first.

    `scores` (rows, vocabulary) are fp32, `seen` marks the tokens of prompt and reply so far, `settings`
    holds each row's; they mean what they mean to transformers' processors, in its order.
    """
    import torch

    columns = [torch.tensor(column, device=scores.device)[:, None] for column in zip(*settings, strict=True)]
    temperature, top_p, top_k, penalty = columns
    if any(row[3] != 1 for row in settings):
        scores = scores.where(~seen, scores.where(scores >= 0, scores * penalty * penalty) / penalty)
    vocabulary = scores.shape[1]
    size = max(min(row[2] or vocabulary, vocabulary) for row in settings)
    kept, tokens = (scores / temperature).topk(size)
    # On a tie `topk` may name another one than `argmax`, which greedy search goes by.
    tokens[:, :1] = tokens[:, :1].where(top_k != 1, scores.argmax(1, keepdim=True))
    places = torch.arange(size, device=scores.device)
    probabilities = kept.masked_fill((places >= top_k) & (top_k > 0), -torch.inf).softmax(1)
    # A token stays while it and those below it hold more than 1 - top_p.
    in_nucleus = (probabilities.flip(1).cumsum(1).flip(1) > 1 - top_p) | (places == 0)
    probabilities = probabilities * in_nucleus
    return probabilities / probabilities.sum(1, keepdim=True), tokens


def draw(scores, seen, requests: Sequence[Request]):
    """Draw each request's next token; a tensor (rows,)."""
    import torch

    probabilities, tokens = candidates(scores, seen, [request.settings for request in requests])
    chances = torch.tensor([[request.random.random()] for request in requests], device=scores.device)
    places = (probabilities.cumsum(1) <= chances).sum(1, keepdim=True)
    # The sum of the probabilities may stay below 1 by rounding.
    last = (probabilities > 0).sum(1, keepdim=True) - 1
    return tokens.gather(1, places.minimum(last))[:, 0]


@dataclass
class Rows:
    """Requests that are computed together; `mask` (rows, length) marks their tokens, `cache` holds what was read.

    `seen` (rows, vocabulary) marks the tokens that each has, once the model has told how large its vocabulary is.
    """

    requests: list[Request]
    ids: object  # (rows, columns) that the model has not read
    mask: object  # (rows, columns read and unread)
    cache: object = None
    seen: object = None
    shared: int = 0  # unread columns that are the same in all rows, and are read once for all

    def keep(self, places: list[int]) -> None:
        """Drop all rows but these, and the columns that only the dropped ones used."""
        import torch

        self.requests = [self.requests[place] for place in places]
        index = torch.tensor(places, device=self.mask.device)
        self.mask, self.ids, self.seen = self.mask[index], self.ids[index], self.seen[index]
        empty = int(self.mask.any(0).int().argmax())
        self.mask = self.mask[:, empty:]
        for layer in self.cache.layers:
            here = index.to(layer.keys.device)  # with device_map the layers lie on several GPUs
            layer.keys, layer.values = layer.keys[here, :, empty:], layer.values[here, :, empty:]

    def join(self, others: "Rows") -> None:
        """Take the others' rows in, the shorter side padded on the left."""
        import torch
        from torch.nn.functional import pad

        length = max(self.mask.shape[1], others.mask.shape[1])
        sides = (self, length - self.mask.shape[1]), (others, length - others.mask.shape[1])
        for ours, theirs in zip(self.cache.layers, others.cache.layers, strict=True):
            pairs = [(layer, missing) for layer, (_, missing) in zip((ours, theirs), sides, strict=True)]
            keys, values = (
                torch.cat([pad(getattr(layer, name), (0, 0, missing, 0)) for layer, missing in pairs])
                for name in ("keys", "values")
            )
            ours.keys, ours.values = keys, values
        self.mask = torch.cat([pad(rows.mask, (missing, 0)) for rows, missing in sides])
        self.ids, self.seen = torch.cat([self.ids, others.ids]), torch.cat([self.seen, others.seen])
        self.requests += others.requests


class Decoder:
    """Runs a model for many requests at once; every method may be called from any thread but `run` and `step`.

    A model whose cache can't be taken apart by rows (state-space and hybrid models, remote code) answers in turns
    instead, a token for each request.
    """

    def __init__(self, model, *, stop_ids: Sequence[int], pad_id: int = 0, window: int | None = None):
        self.model, self.stop_ids, self.pad_id, self.window = model, set(stop_ids), pad_id, window
        self.max_active, self.max_waiting = MAX_ACTIVE, None
        self.waiting: deque[Request] = deque()
        self.batches: list[Rows] = []  # one, or one for each request where rows can't be joined
        self.reading: Rows | None = None  # prompts that are being read
        self.changed = threading.Condition()
        self._worker: threading.Thread | None = None
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        accepted = set(inspect.signature(base.forward).parameters)
        self._accepted = accepted if "input_ids" in accepted else FORWARD
        self.joins_rows = _joins_rows(base)
        # There padding between two tokens would count as distance.
        self._slides = bool(getattr(base.config.get_text_config(decoder=True), "sliding_window", None))

    # --- for those who want a reply ---

    def add(self, prompt: Sequence[int], sampling: Sampling, *, seed: int | None = None, stop=None) -> Request:
        """Put a request at the end of the queue; raises BusyError when `max_waiting` are there already."""
        import torch

        if not all(math.isfinite(value) for value in astuple(sampling)):
            raise ValueError(f"{sampling}: each must be a finite number")  # it would fail the whole batch
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
        """Work in a thread of its own until nothing is left to do."""
        with self.changed:
            if not self._worker:
                self._worker = threading.Thread(target=self._work, name="decoder (work)", daemon=True)
                self._worker.start()

    def follow(self, request: Request) -> Iterator[int]:
        """Yield how many tokens the request has, as they come, at most every PAUSE; raises what the model raised."""
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
                time.sleep(PAUSE)

    def wait(self, request: Request) -> None:
        """Wait until the request is done: has all its tokens, failed, or left the batch."""
        with self.changed:
            self.changed.wait_for(lambda: request.done)

    def place(self, request: Request) -> int:
        """Return how many wait before it; -1 when it doesn't wait any more."""
        with self.changed:
            return self.waiting.index(request) if request in self.waiting else -1

    @property
    def num_active(self) -> int:
        reading = [self.reading] if self.reading else []
        return sum(len(rows.requests) for rows in [*self.batches, *reading])

    # --- the work ---

    def run(self) -> None:
        """Work in this thread until nothing is left to do."""
        while self.step():
            pass

    def _work(self) -> None:
        while True:
            try:
                busy = self.step()
            except BaseException as error:  # whatever it was, nobody may wait for a thread that is gone
                self._fail_all(error)
                raise
            with self.changed:
                if not busy and not self.waiting:
                    self._worker = None
                    return

    def step(self) -> bool:
        """Read a piece of the waiting prompts and give each active request a token; return whether work is left."""
        import torch

        if was_training := self.model.training:
            self.model.eval()
        try:
            with torch.inference_mode():
                self._drop()
                for rows in list(self.batches):
                    self._try(rows, self._advance)
                self._admit()
                if self.reading:
                    self._try(self.reading, self._read_piece)
                self._drop()
        finally:
            if was_training:
                self.model.train()
        return bool(self.waiting or self.batches or self.reading)

    def _try(self, rows: Rows, work) -> None:
        """Hand an exception of the model to those whose tokens it was computing; the others go on."""
        try:
            work(rows)
        except Exception as error:
            self._fail(rows.requests, error)
            self.batches = [other for other in self.batches if other is not rows]
            self.reading = self.reading if self.reading is not rows else None

    def _fail(self, requests: Sequence[Request], error: BaseException) -> None:
        with self.changed:
            for request in requests:
                request.error, request.done = request.error or error, True
            self.changed.notify_all()

    def _fail_all(self, error: BaseException) -> None:
        with self.changed:
            rows = [*self.batches, *([self.reading] if self.reading else [])]
            self._fail([*self.waiting, *(request for part in rows for request in part.requests)], error)
            self.waiting.clear()
            self.batches, self.reading, self._worker = [], None, None

    def _drop(self) -> None:
        """Let those go that are done or were cancelled."""
        with self.changed:
            reading = [self.reading] if self.reading else []
            active = [request for rows in [*self.batches, *reading] for request in rows.requests]
            for request in (*self.waiting, *active):
                request.done |= request.stop.is_set()
            self.waiting = deque(request for request in self.waiting if not request.done)
            self.changed.notify_all()
        if self.reading and all(request.done for request in self.reading.requests):
            self.reading = None
        for rows in self.batches:
            places = [place for place, request in enumerate(rows.requests) if not request.done]
            if not places:
                rows.requests = []
            elif len(places) < len(rows.requests):
                rows.keep(places)
        self.batches = [rows for rows in self.batches if rows.requests]

    def _admit(self) -> None:
        """Take the next prompts out of the queue, as many as are read in one piece and fit into the batch."""
        if self.reading:
            return
        active = [request for rows in self.batches for request in rows.requests]
        taken: list[Request] = []
        with self.changed:
            while self.waiting and len(active) + len(taken) < self.max_active:
                group = [*taken, self.waiting[0]]
                final = max(len(request.prompt) + request.limit for request in active + group)
                longest, shared = max(len(request.prompt) for request in group), self._shared(group)
                if taken and (not self.joins_rows or shared + len(group) * (longest - shared) > PIECE):
                    break
                if active + taken and self.joins_rows and len(active + group) * final > MAX_CACHED:
                    break
                taken.append(self.waiting.popleft())
        try:
            self.reading = self._to_rows(taken) if taken else None
        except Exception as error:  # out of memory: they are in no queue any more
            self._fail(taken, error)

    def _shared(self, requests: Sequence[Request]) -> int:
        """Count the tokens that all prompts begin with, as the header of the chat format; each keeps one of its own."""
        if len(requests) < 2 or not self.joins_rows or self._slides:
            return 0
        columns = zip(*(request.prompt[:-1] for request in requests), strict=False)
        return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))

    def _to_rows(self, requests: list[Request]) -> Rows:
        """Lay prompts beside each other: what they share, then padding on the left of the rest."""
        import torch
        from transformers import DynamicCache

        longest, shared = max(len(request.prompt) for request in requests), self._shared(requests)
        rows, marks = [], []
        for prompt in (request.prompt for request in requests):
            missing = longest - len(prompt)
            rows.append(prompt[:shared] + [self.pad_id] * missing + prompt[shared:])
            marks.append([1] * shared + [0] * missing + [1] * (len(prompt) - shared))
        device = self.model.device
        ids, mask = torch.tensor(rows, device=device), torch.tensor(marks, device=device)
        # Without the config every layer keeps all it has read; the mask still holds a sliding window.
        return Rows(requests, ids, mask, DynamicCache() if self.joins_rows else None, shared=shared)

    def _read_shared(self, rows: Rows) -> None:
        one = Rows(rows.requests[:1], rows.ids[:1], rows.mask[:1], rows.cache)
        self._forward(one, rows.ids[:1, : rows.shared])
        rows.cache.batch_repeat_interleave(len(rows.requests))
        rows.ids, rows.shared = rows.ids[:, rows.shared :], 0

    def _read_piece(self, rows: Rows) -> None:
        if rows.shared:
            self._read_shared(rows)
        size = PIECE if self.joins_rows else rows.ids.shape[1]
        logits = self._forward(rows, rows.ids[:, :size])
        rows.ids = rows.ids[:, size:]
        if rows.ids.shape[1]:
            return
        self._give_tokens(rows, logits)
        self.reading = None
        if self.batches and self.joins_rows:
            self.batches[0].join(rows)
        else:
            self.batches.append(rows)

    def _advance(self, rows: Rows) -> None:
        self._give_tokens(rows, self._forward(rows, rows.ids))

    def _forward(self, rows: Rows, ids):
        """Return the scores (rows, vocabulary) of what follows the last of `ids` (rows, columns)."""
        end = (rows.mask.shape[1] - rows.ids.shape[1]) + ids.shape[1]
        mask = rows.mask[:, :end]
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "logits_to_keep": 1}
        given |= {"use_cache": True, "past_key_values": rows.cache}
        output = self.model(**{name: value for name, value in given.items() if name in self._accepted})
        if not self.joins_rows:
            rows.cache = getattr(output, "past_key_values", None)
        return output.logits[:, -1].float()

    def _give_tokens(self, rows: Rows, logits) -> None:
        import torch

        if not logits.amax().isfinite():
            raise NotFinite("the model gives numbers that are not finite")
        if rows.seen is None:
            rows.seen = torch.zeros_like(logits, dtype=torch.bool)
            for row, request in zip(rows.seen, rows.requests, strict=True):
                row[torch.tensor(request.prompt, device=row.device)] = True
        chosen = draw(logits, rows.seen, rows.requests)
        rows.seen.scatter_(1, chosen[:, None], True)
        column = torch.ones_like(rows.mask[:, :1])
        unread = chosen[:, None] if self.joins_rows or rows.cache is not None else None
        with self.changed:
            for request, token in zip(rows.requests, chosen.tolist(), strict=True):
                request.ids.append(token)
                request.done = token in self.stop_ids or len(request.ids) >= request.limit
            self.changed.notify_all()
        if unread is None:  # a model that keeps nothing reads all of it again
            request = rows.requests[0]
            unread = torch.tensor([request.prompt + request.ids], device=chosen.device)
        rows.ids, rows.mask = unread, torch.cat([rows.mask, column], 1)


def _joins_rows(base) -> bool:
    """Say whether the model's cache is keys and values by row: transformers' own classes with attention alone."""
    config = base.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}
    own = type(base).__module__.startswith("transformers.models.")
    return own and kinds and not getattr(base, "_is_stateful", False) and not config.is_encoder_decoder
