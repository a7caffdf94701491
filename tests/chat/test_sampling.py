"""Sampling: transformers' own settings, greedy search and the drawn shares."""

import random

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sft.chat.sampling import GREEDY, Sampling, draw_tokens, rank_candidates


def test_greedy_search_is_a_top_k_of_one():
    assert GREEDY.settings == (1.0, 1.0, 1, 1.0)
    assert Sampling(0.7, 0.9, 40, 1.1).settings == (0.7, 0.9, 40, 1.1)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=1.3, top_p=0.5, top_k=7, repetition_penalty=1.0),
        Sampling(temperature=0.7, top_p=1.0, top_k=0, repetition_penalty=1.4),
        Sampling(temperature=0.2, top_p=0.01, top_k=5, repetition_penalty=0.8),
    ],
)
def test_settings_mean_what_they_mean_in_transformers(sampling):
    scores = torch.randn(1, 500, generator=torch.Generator().manual_seed(1)) * 4
    ids = torch.tensor([[3, 4, 4, 9, 77]])
    steps = [RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)]
    steps += [TemperatureLogitsWarper(sampling.temperature)]
    steps += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    expected = LogitsProcessorList([*steps, TopPLogitsWarper(sampling.top_p)])(ids, scores.clone()).softmax(1)[0]
    seen = torch.zeros(1, 500, dtype=torch.bool)
    seen[0, ids[0]] = True
    row = (sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_penalty)
    # Beside a row with other settings, as in a batch.
    probabilities, tokens = rank_candidates(scores.expand(2, -1), seen.expand(2, -1), [row, (1.0, 1.0, 1, 1.0)])
    found = torch.zeros(500).scatter(0, tokens[0], probabilities[0])
    torch.testing.assert_close(found, expected)
    assert (tokens[1, 0], probabilities[1, 0]) == (scores.argmax(), 1)


def test_drawn_tokens_follow_the_probabilities():
    scores = torch.tensor([[0.5, 0.3, 0.2]]).log().expand(3000, -1)
    randoms = [random.Random(seed).random() for seed in range(3000)]
    drawn = draw_tokens(scores, scores > 0, [(1.0, 1.0, 0, 1.0)] * 3000, randoms).bincount(minlength=3) / 3000
    torch.testing.assert_close(drawn, torch.tensor([0.5, 0.3, 0.2]), atol=0.03, rtol=0)
    assert draw_tokens(scores[:3], scores[:3] > 0, [(1.0, 1.0, 0, 1.0)] * 3, [0.49, 0.51, 0.81]).tolist() == [0, 1, 2]
