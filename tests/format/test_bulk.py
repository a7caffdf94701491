"""A bulk encoder is used only where it gives the rows of the plain way, also of conversations that must be cut."""

import numpy as np
import pytest

from sft.format import bulk
from sft.format.render import Renderer


@pytest.fixture
def renderer(tokenizer_of) -> Renderer:
    return Renderer(tokenizer_of("qwen2"), "chatml")


def test_an_encoder_that_proves_equal_is_used(renderer):
    assert renderer.use_bulk_encoder(num_bytes=1000) == "tokenizers"


def test_an_encoder_that_gives_other_ids_is_refused(renderer, monkeypatch):
    def encode_reversed(texts):
        encoded = [renderer._backend.encode(text, add_special_tokens=False).ids[::-1] for text in texts]
        return np.concatenate(encoded).astype("int32"), np.array([len(ids) for ids in encoded])

    monkeypatch.setattr(bulk, "bulk_encoders", lambda backend, num_bytes: [("reversed", encode_reversed)])
    assert renderer.use_bulk_encoder() == "tokenizers, with offsets"


def test_an_encoder_that_cuts_inside_a_character_is_refused(renderer, monkeypatch):
    """Without PROOF_EXTRA_TOKENS nothing of the proof is cut, and the wrong cut would go unnoticed."""
    monkeypatch.setattr(bulk, "text_around_by_decoding", lambda *_: lambda length: ("x", "x"))
    assert renderer.use_bulk_encoder(num_bytes=1000) == "tokenizers, with offsets"
    monkeypatch.setattr(bulk, "PROOF_EXTRA_TOKENS", ())
    assert renderer.use_bulk_encoder(num_bytes=1000) == "tokenizers"
