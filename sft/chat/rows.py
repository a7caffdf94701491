"""Rows of a batch: prompts laid beside each other, their KV cache, and a model that computes them.

. . . a b c | d     A row is padded on the left. A new prompt is prefilled alone, then joined to the others, with
e f g h i j | k     padding where it is shorter; a column that holds only padding is removed.
"""

import inspect
import itertools
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from sft.chat.sampling import Sampling, draw_tokens
from sft.model.load import family_model

PREFILL_TOKENS = 512  # of prompts, read between two tokens of the running batch
FORWARD = {"input_ids", "attention_mask", "position_ids", "logits_to_keep", "use_cache", "past_key_values"}


class NotFinite(ValueError):
    """The model's logits are not finite, so that no token can be sampled."""


class Request:
    """A reply in the making: `ids` grows, a stop token included, until `done`; `error` says why it failed."""

    def __init__(self, prompt: Sequence[int], sampling: Sampling, *, limit: int, seed: int, stop: threading.Event):
        self.prompt = list(prompt)
        self.sampling = sampling
        self.limit = limit
        self.ids: list[int] = []
        self.done = limit < 1
        self.error: BaseException | None = None
        self.stop = stop
        self.random = random.Random(seed)

    def cancel(self) -> None:
        """Leave the batch before its next token."""
        self.stop.set()


@dataclass
class Rows:
    """Requests that are computed together; `mask` (rows, length) marks their tokens, `cache` is their KV cache.

    `seen` (rows, vocabulary) marks the tokens of each; it is made with the first logits, which give the vocabulary.
    """

    requests: list[Request]
    ids: object  # (rows, columns) that the model has not read
    mask: object  # (rows, columns read and unread)
    cache: object = None
    seen: object = None
    num_shared: int = 0  # unread columns that are the same in all rows; they are read once for all

    def keep(self, indices: list[int]) -> None:
        """Remove all other rows, and the columns that only they used."""
        import torch

        self.requests = [self.requests[index] for index in indices]
        kept = torch.tensor(indices, device=self.mask.device)
        self.mask = self.mask[kept]
        self.ids = self.ids[kept]
        self.seen = self.seen[kept]
        empty = int(self.mask.any(0).int().argmax())
        self.mask = self.mask[:, empty:]
        for layer in self.cache.layers:
            here = kept.to(layer.keys.device)  # with device_map the layers lie on several GPUs
            layer.keys = layer.keys[here, :, empty:]
            layer.values = layer.values[here, :, empty:]

    def join(self, others: "Rows") -> None:
        """Append the others' rows, the shorter side padded on the left."""
        import torch
        from torch.nn.functional import pad

        length = max(self.mask.shape[1], others.mask.shape[1])
        sides = [(rows, length - rows.mask.shape[1]) for rows in (self, others)]
        for ours, theirs in zip(self.cache.layers, others.cache.layers, strict=True):
            pairs = [(layer, missing) for layer, (_, missing) in zip((ours, theirs), sides, strict=True)]
            keys = torch.cat([pad(layer.keys, (0, 0, missing, 0)) for layer, missing in pairs])
            values = torch.cat([pad(layer.values, (0, 0, missing, 0)) for layer, missing in pairs])
            ours.keys = keys
            ours.values = values
        self.mask = torch.cat([pad(rows.mask, (missing, 0)) for rows, missing in sides])
        self.ids = torch.cat([self.ids, others.ids])
        self.seen = torch.cat([self.seen, others.seen])
        self.requests += others.requests


class RowModel:
    """A model as it computes rows: prompts to rows, rows to logits, logits to tokens."""

    def __init__(self, model, *, pad_id: int):
        self.model = model
        self.pad_id = pad_id
        base = family_model(model)
        accepted = set(inspect.signature(base.forward).parameters)
        self.accepted = accepted if "input_ids" in accepted else FORWARD
        self.joins_rows = _can_join_rows(base) and "past_key_values" in self.accepted
        # With a sliding window, padding between two tokens would count as distance.
        self.has_window = bool(getattr(base.config.get_text_config(decoder=True), "sliding_window", None))

    def num_shared(self, requests: Sequence[Request]) -> int:
        """Count the tokens that all prompts begin with, as a system message; each prompt keeps one of its own."""
        if len(requests) < 2 or not self.joins_rows or self.has_window:
            return 0
        columns = zip(*(request.prompt[:-1] for request in requests), strict=False)
        return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))

    def to_rows(self, requests: list[Request]) -> Rows:
        """Make rows of prompts: the shared tokens first, then padding on the left of the rest."""
        import torch
        from transformers import DynamicCache

        longest = max(len(request.prompt) for request in requests)
        shared = self.num_shared(requests)
        rows = []
        marks = []
        for prompt in (request.prompt for request in requests):
            missing = longest - len(prompt)
            rows.append(prompt[:shared] + [self.pad_id] * missing + prompt[shared:])
            marks.append([1] * shared + [0] * missing + [1] * (len(prompt) - shared))
        device = self.model.device
        ids = torch.tensor(rows, device=device)
        mask = torch.tensor(marks, device=device)
        # Without the config each layer's cache keeps all tokens; the mask still applies a sliding window.
        return Rows(requests, ids, mask, DynamicCache() if self.joins_rows else None, num_shared=shared)

    def prefill(self, rows: Rows):
        """Read the next chunk of the prompts; return the logits after their last token, None before that."""
        if rows.num_shared:
            self._prefill_shared(rows)
        size = PREFILL_TOKENS if self.joins_rows else rows.ids.shape[1]
        logits = self.forward(rows, rows.ids[:, :size])
        rows.ids = rows.ids[:, size:]
        return None if rows.ids.shape[1] else logits

    def _prefill_shared(self, rows: Rows) -> None:
        one = Rows(rows.requests[:1], rows.ids[:1], rows.mask[:1], rows.cache)
        self.forward(one, rows.ids[:1, : rows.num_shared])
        rows.cache.batch_repeat_interleave(len(rows.requests))
        rows.ids = rows.ids[:, rows.num_shared :]
        rows.num_shared = 0

    def forward(self, rows: Rows, ids):
        """Return the logits (rows, vocabulary) of the token after the last of `ids` (rows, columns)."""
        end = (rows.mask.shape[1] - rows.ids.shape[1]) + ids.shape[1]
        mask = rows.mask[:, :end]
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "logits_to_keep": 1}
        # With the routers' loss on, transformers 5.23 takes a mask of the new tokens alone.
        given |= {"use_cache": True, "past_key_values": rows.cache, "output_router_logits": False}
        output = self.model(**{name: value for name, value in given.items() if name in self.accepted})
        if not self.joins_rows:
            rows.cache = getattr(output, "past_key_values", None)
        return output.logits[:, -1].float()

    def sample(self, rows: Rows, logits) -> list[int]:
        """Return the next token of each row, and make it the row's unread column."""
        import torch

        if not logits.amax().isfinite():
            raise NotFinite("the model gives numbers that are not finite")
        if rows.seen is None:
            rows.seen = torch.zeros_like(logits, dtype=torch.bool)
            for row, request in zip(rows.seen, rows.requests, strict=True):
                row[torch.tensor(request.prompt, device=row.device)] = True
        settings = [request.sampling.settings for request in rows.requests]
        chosen = draw_tokens(logits, rows.seen, settings, [request.random.random() for request in rows.requests])
        rows.seen.scatter_(1, chosen[:, None], True)
        rows.mask = torch.cat([rows.mask, torch.ones_like(rows.mask[:, :1])], 1)
        rows.ids = chosen[:, None]
        if not self.joins_rows and rows.cache is None:  # a model without a cache reads everything again
            request = rows.requests[0]
            rows.ids = torch.tensor([[*request.prompt, *request.ids, int(chosen[0])]], device=chosen.device)
        return chosen.tolist()


def _can_join_rows(base) -> bool:
    """Say whether the cache is keys and values by row: transformers' own classes with attention alone."""
    config = base.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}
    own = type(base).__module__.startswith("transformers.models.")
    return own and kinds and not getattr(base, "_is_stateful", False) and not config.is_encoder_decoder
