"""Sampling: from a model's logits to the next token of each request.

Temperature, top k, top p and the repetition penalty mean what they mean to transformers' logits processors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

MIN_TEMPERATURE = 1e-5  # below it greedy search, as in vLLM: scores divided by less overflow, which fails all rows
PENALTIES = (0.01, 100.0)  # the smallest and the largest, for the same reason


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled. The defaults are Blossom's; temperature 0 is greedy search."""

    temperature: float = 0.5
    top_p: float = 0.85
    top_k: int = 50
    repetition_penalty: float = 1.05
    max_new_tokens: int = 512

    @property
    def settings(self) -> tuple[float, float, int, float]:
        """Return temperature, top p, top k (0: all tokens) and repetition penalty; greedy search is top k of 1."""
        if self.temperature < MIN_TEMPERATURE:
            return 1.0, 1.0, 1, self.repetition_penalty
        return self.temperature, self.top_p, self.top_k, self.repetition_penalty


BLOSSOM = Sampling()
GREEDY = Sampling(temperature=0.0, repetition_penalty=1.0)


def rank_candidates(scores, seen, settings: Sequence[tuple]):
    """Return (probabilities, tokens), each (rows, candidates), the likeliest first.

    `scores` (rows, vocabulary) are fp32, `seen` marks the tokens of prompt and reply so far, `settings` holds the
    `Sampling.settings` of each row. The processors are applied in transformers' order.
    """
    import torch

    columns = [torch.tensor(column, device=scores.device)[:, None] for column in zip(*settings, strict=True)]
    temperature, top_p, top_k, penalty = columns
    if any(row[3] != 1 for row in settings):
        scores = scores.where(~seen, scores.where(scores >= 0, scores * penalty * penalty) / penalty)
    vocabulary = scores.shape[1]
    size = max(min(row[2] or vocabulary, vocabulary) for row in settings)
    kept, tokens = (scores / temperature).topk(size)
    # On a tie `topk` may choose another token than `argmax`, which greedy search uses.
    tokens[:, :1] = tokens[:, :1].where(top_k != 1, scores.argmax(1, keepdim=True))
    ranks = torch.arange(size, device=scores.device)
    probabilities = kept.masked_fill((ranks >= top_k) & (top_k > 0), -torch.inf).softmax(1)
    # A token is kept while it and the less likely ones together hold more than 1 - top_p.
    in_nucleus = (probabilities.flip(1).cumsum(1).flip(1) > 1 - top_p) | (ranks == 0)
    probabilities = probabilities * in_nucleus
    return probabilities / probabilities.sum(1, keepdim=True), tokens


def draw_tokens(scores, seen, settings: Sequence[tuple], randoms: Sequence[float]):
    """Sample a token for each row, a tensor (rows,); `randoms` holds a number from [0, 1) for each."""
    import torch

    probabilities, tokens = rank_candidates(scores, seen, settings)
    thresholds = torch.tensor(randoms, device=scores.device)[:, None]
    ranks = (probabilities.cumsum(1) <= thresholds).sum(1, keepdim=True)
    # The sum of the probabilities may stay below 1 by rounding.
    last = (probabilities > 0).sum(1, keepdim=True) - 1
    return tokens.gather(1, ranks.minimum(last))[:, 0]
