"""A sample of benchmarks/families.py: one type for each way of keeping documents apart, and each kind of mixer."""

import pytest

from benchmarks.families import causal_types, is_right, measure

PACKING = {
    "qwen3": "one attention call for each",
    "gpt_oss": "transformers' own mask (eager)",
    "qwen3_5_text": "transformers' own mask (sdpa); Qwen3_5GatedDeltaNet run once per document",
    "lfm2": "one attention call for each; Lfm2ShortConv run once per document",
    "bamba": "transformers' own mask (sdpa); BambaMixer run once per document",
    "minimax": "one attention call for each; MiniMaxLightningAttention run once per document",
    "inkling_text": "running the model once per document",
    "doge": "transformers' own mask (sdpa)",
}


@pytest.mark.parametrize("kind", PACKING)
def test_a_packed_row_has_the_gradient_of_its_documents_alone_also_with_checkpointing(kind):
    found = measure(kind)
    assert is_right(found), found
    assert found["packing"] == PACKING[kind]


def test_types_that_are_causal_language_models_are_measured():
    assert {"qwen3", "bloom", "mamba2", "gpt_oss"} <= set(causal_types())
    assert len(causal_types()) >= 115
