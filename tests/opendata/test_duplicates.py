"""Exact and near duplicates."""

import random

from sft.opendata.duplicates import band_keys
from tests.opendata.make import build, read_lines, write


def test_near_duplicates_are_verified_by_what_they_share(tmp_path):
    base = "".join(random.Random(0).choices("的一是不了在人有我他这个们中来上大为和国", k=200))
    rows = [
        {"instruction": "q", "output": base[::-1] + "。"},
        {"instruction": "q", "output": base + "。"},
        {"instruction": "q", "output": base[:-3] + "好好好。"},
        {"instruction": "q", "output": base[:120] + "。"},
    ]
    ledger = build(write(tmp_path / "a.json", rows), tmp_path / "out", near_duplicates=0.8)
    assert (ledger["total"]["train"], ledger["total"]["near_duplicates"]) == (3, 1)
    assert [row["id"] for row in read_lines(tmp_path / "out/train.json")] == ["a.json:1", "a.json:2", "a.json:4"]


def share_of_candidates(similarity, num_pairs=400):
    """The share of pairs of sets, each pair with exactly this Jaccard similarity, that have a band key in common."""
    found = 0
    for pair in range(num_pairs):
        grams = [f"{pair}-{number}" for number in range(200)]
        num_common = round(200 * similarity)
        half = (200 - num_common) // 2
        left, right = set(grams[: num_common + half]), set(grams[:num_common] + grams[num_common + half :])
        assert len(left & right) / len(left | right) == similarity
        found += bool(set(enumerate(band_keys(left))) & set(enumerate(band_keys(right))))
    return found / num_pairs


def test_the_bands_find_nearly_all_pairs_with_a_similarity_of_eight_tenths_and_few_with_five():
    assert share_of_candidates(0.8) > 0.97
    assert 0.12 < share_of_candidates(0.5) < 0.32
