"""The tiny families that tests and benchmarks build, beside the one that `base_run.sh` embeds."""

import functools
import io
from pathlib import Path

from tokenizers import Regex, normalizers, pre_tokenizers, processors

from sft import tiny
from sft.export.converter_input import BLOOM_SPLIT
from sft.files import write_json
from sft.tiny import ROTARY, TinyFamily, byte_level_bpe, qwen_tokenizer, write_tokenizer

FALCON_FIRST_TOKENS = [
    f">>{name}<<"
    for name in [
        "TITLE",
        "ABSTRACT",
        "INTRODUCTION",
        "SUMMARY",
        "COMMENT",
        "ANSWER",
        "QUESTION",
        "DOMAIN",
        "PREFIX",
        "SUFFIX",
        "MIDDLE",
    ]
] + ["<|endoftext|>"]


def bloom_tokenizer(texts: list[str], folder: Path, vocab_size: int) -> None:
    pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(BLOOM_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    first = ["<unk>", "<s>", "</s>", "<pad>"]
    tokenizer = byte_level_bpe(texts, vocab_size=vocab_size, first=first, pre_tokenizer=pre_tokenizer)
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), first, strict=True))
    write_tokenizer(tokenizer, folder, tokenizer_class="BloomTokenizerFast", padding_side="left", **names)


def falcon_tokenizer(texts: list[str], folder: Path, vocab_size: int) -> None:
    pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation(behavior="contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), behavior="isolated"),
        ]
    )
    tokenizer = byte_level_bpe(texts, vocab_size=vocab_size, first=FALCON_FIRST_TOKENS, pre_tokenizer=pre_tokenizer)
    write_tokenizer(tokenizer, folder, tokenizer_class="PreTrainedTokenizerFast", eos_token="<|endoftext|>")


def gpt2_tokenizer(texts: list[str], folder: Path, vocab_size: int) -> None:
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = byte_level_bpe(texts, vocab_size=vocab_size - 1, first=[], pre_tokenizer=pre_tokenizer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    write_tokenizer(tokenizer, folder, tokenizer_class="GPT2Tokenizer", add_prefix_space=False, **names)


def qwen3_tokenizer(texts: list[str], folder: Path, vocab_size: int) -> None:
    qwen_tokenizer(texts, folder, vocab_size, plain_added=("<think>", "</think>"))


def sentencepiece_model(texts: list[str], folder: Path, vocab_size: int, **options) -> None:
    """Train a sentencepiece BPE with byte fallback, as llama-like families do, and write tokenizer.model."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        pad_id=-1,
        **options,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def yi_tokenizer(texts: list[str], folder: Path, vocab_size: int) -> None:
    options = {
        "unk_piece": "<unk>",
        "bos_piece": "<|startoftext|>",
        "eos_piece": "<|endoftext|>",
        "control_symbols": ["<|Human|>", "<|Assistant|>", "<|System|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>"],
        "add_dummy_prefix": False,
    }
    sentencepiece_model(texts, folder, vocab_size, **options)
    names = {"unk_token": "<unk>", "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<unk>"}
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "add_prefix_space": False, **names},
    )


def mistral_tokenizer(texts: list[str], folder: Path, vocab_size: int) -> None:
    """As in Mistral's repositories: a tokenizer.model, and beside it a tokenizer.json that adds the prefix space."""
    from transformers import LlamaTokenizer

    sentencepiece_model(texts, folder, vocab_size)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = LlamaTokenizer.from_pretrained(folder, **names).backend_tokenizer
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = None
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": True, **names}
    write_tokenizer(tokenizer, folder, **config)


FAMILIES: dict[str, TinyFamily] = {
    "bloom": TinyFamily(
        "bloom",
        bloom_tokenizer,
        "float16",
        extra_rows=56,
        config={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3},
    ),
    "falcon": TinyFamily(
        "falcon",
        falcon_tokenizer,
        "bfloat16",
        config={"multi_query": True, "parallel_attn": True, "bias": False, "bos_token_id": 11, "eos_token_id": 11},
    ),
    # falcon-rw-1b's config names ids 1 and 2, which its GPT-2 tokenizer does not use as such.
    "falcon-rw": TinyFamily(
        "falcon",
        gpt2_tokenizer,
        "bfloat16",
        config={
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
            "alibi": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    **tiny.FAMILIES,
    "qwen3": TinyFamily(
        "qwen3",
        qwen3_tokenizer,
        "bfloat16",
        extra_rows=48,
        config={**ROTARY, "tie_word_embeddings": False, "head_dim": 48, "bos_token_id": None},
    ),
    "yi": TinyFamily("llama", yi_tokenizer, "bfloat16", config={**ROTARY, "pad_token_id": 0}),
    "mistral": TinyFamily("mistral", mistral_tokenizer, "bfloat16", config={**ROTARY, "sliding_window": 256}),
}

build_tiny = functools.partial(tiny.build_tiny, families=FAMILIES)
