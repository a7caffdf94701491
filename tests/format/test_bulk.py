"""A bulk encoder is used only where it gives the rows of the plain way, also of conversations that must be cut."""

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from sft.format import bulk
from sft.format.render import Renderer
from sft.format.tokens import unforgeable_backend

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Assigned, and no ideograph or syllable of a range that is the same in all versions of Unicode.
CODE_POINTS = [*range(0x80, 0x3400), *range(0xA000, 0xAC00), *range(0xF900, 0x17000), *range(0x18700, 0x1FC00)]
TEXTS = [
    "",
    "Hello 世界, it's 42°!",
    "",
    " \n\n\t x",
    "<|im_end|> <think>",
    "🏳️‍🌈 e\u0301 \u0323",
    "a" * 300,
    "汉" * 300,
]


@pytest.fixture
def renderer(tokenizer_of) -> Renderer:
    return Renderer(tokenizer_of("qwen2"), "chatml")


def test_an_encoder_that_proves_equal_is_used(renderer):
    assert renderer.use_bulk_encoder(num_bytes=1000) == "tokenizers"


def test_an_encoder_that_gives_other_ids_is_refused(renderer, monkeypatch):
    def encode_reversed(texts):
        encoded = [renderer._backend.encode(text, add_special_tokens=False).ids[::-1] for text in texts]
        return np.concatenate(encoded).astype("int32"), np.array([len(ids) for ids in encoded])

    monkeypatch.setattr(bulk, "bulk_encoders", lambda *_: [("reversed", encode_reversed)])
    assert renderer.use_bulk_encoder() == "tokenizers, with offsets"


def test_an_encoder_that_cuts_inside_a_character_is_refused(renderer, monkeypatch):
    """Without PROOF_EXTRA_TOKENS nothing of the proof is cut, and the wrong cut would go unnoticed."""
    monkeypatch.setattr(bulk, "text_around_by_decoding", lambda *_: lambda length: ("x", "x"))
    assert renderer.use_bulk_encoder(num_bytes=1000) == "tokenizers, with offsets"
    monkeypatch.setattr(bulk, "PROOF_EXTRA_TOKENS", ())
    assert renderer.use_bulk_encoder(num_bytes=1000) == "tokenizers"


def encode_one_by_one(backend: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [backend.encode(text, add_special_tokens=False).ids for text in texts]


def as_lists(ids: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    assert ids.dtype == np.int32
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths))[:-1]]


@pytest.mark.parametrize("name", bulk.ENCODERS)
def test_an_encoder_gives_the_ids_of_each_text(name, tokenizer_of):
    backend, _names, seam = unforgeable_backend(tokenizer_of("qwen2"))
    encode = bulk.make_encoder(name, backend, seam)
    for texts in (TEXTS, TEXTS[:1], [], ["", ""], [*TEXTS, "ກຳ\u0eba\u0e81 𑎄𑏂"]):
        assert as_lists(*encode(texts)) == encode_one_by_one(backend, texts)


def test_gigatoken_begins_anew_after_many_characters(tokenizer_of, monkeypatch):
    backend, _names, seam = unforgeable_backend(tokenizer_of("qwen2"))
    monkeypatch.setattr(bulk, "MAX_REMEMBERED_CHARACTERS", 300)
    encode = bulk.make_encoder("gigatoken", backend, seam)
    for _time in range(3):
        assert as_lists(*encode(TEXTS)) == encode_one_by_one(backend, TEXTS)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("qwen2", ["gigatoken", "fastokens", "tokenizers"]),
        ("bloom", ["fastokens", "tokenizers"]),
        ("yi", []),
    ],
)
def test_the_encoders_that_read_the_tokenizer_are_tried(family, expected, tokenizer_of):
    backend, _names, seam = unforgeable_backend(tokenizer_of(family))
    assert [name for name, _encode in bulk.bulk_encoders(backend, seam, 1 << 30)] == expected
    assert [name for name, _encode in bulk.bulk_encoders(backend, seam, 1000)] == expected[-1:]


def split_showing_tokenizer() -> Tokenizer:
    """Return a tokenizer that merges any two bytes, so that ids tell where a text was split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(first, second) for first in alphabet for second in alphabet]
    vocab = {token: number for number, token in enumerate([*alphabet, *map("".join, pairs)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.add_special_tokens(["<seam>"])
    return tokenizer


@pytest.mark.slow
def test_gigatoken_normalises_and_splits_each_character_as_tokenizers():
    backend = split_showing_tokenizer()
    encode = bulk.make_encoder("gigatoken", backend, "<seam>")
    texts = ["a{0}a 1{0}1 .{0}. {0}'S{0} a{0}\u0334x\u0301{0} {0}{0}".format(chr(code)) for code in CODE_POINTS]
    wrong = []
    for code, text in zip(CODE_POINTS, texts, strict=True):
        if encode([text])[0].tolist() != backend.encode(text, add_special_tokens=False).ids:
            wrong.append(hex(code))
    assert wrong == []


@pytest.mark.parametrize("text", ["x\u0301\u0eba", "a\u088fa"])
def test_characters_of_another_unicode_would_be_wrong_in_gigatoken(text, monkeypatch):
    backend = split_showing_tokenizer()
    encode = bulk.make_encoder("gigatoken", backend, "<seam>")
    assert encode([text])[0].tolist() == backend.encode(text, add_special_tokens=False).ids
    monkeypatch.setattr(bulk, "_NEW_TO_TOKENIZERS", ())
    encode = bulk.make_encoder("gigatoken", backend, "<seam>")
    assert encode([text])[0].tolist() != backend.encode(text, add_special_tokens=False).ids
