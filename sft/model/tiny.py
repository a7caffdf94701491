"""Builds a tiny random base of any supported family: the embedded default, the tests, the benchmarks.

    python -m sft.tiny --family qwen2 --output_dir out/qwen2

Each base has the family's real class, its kind of tokenizer (trained here, on the sample) and its quirks: multi-query
attention, ALiBi, a sliding window, more embedding rows than tokens, a config that disagrees with the tokenizer, half
precision on disk. Nothing is downloaded.
"""

import argparse
import io
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from sft.opendata.conversation import list_files, read_conversations

SAMPLE_DIR = Path(__file__).resolve().parents[2] / "data_proj" / "sample"

# The split patterns are facts of the published tokenizer.json files.
BLOOM_SPLIT = " ?[^(\\s|[.,!?…。，、।۔،])]+"
QWEN_SPLIT = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
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


@dataclass(frozen=True)
class TinyFamily:
    """What makes a family's tokenizer and config its own; `config` holds only what differs from the common shape."""

    model_type: str
    tokenizer: Callable[[list[str], Path, int], None]
    dtype: str
    extra_rows: int = 0
    config: dict = field(default_factory=dict)


def byte_level_bpe(
    texts: Iterable[str], *, vocab_size: int, first: list[str], pre_tokenizer, normalizer=None
) -> Tokenizer:
    """Train a byte-level BPE; the tokens in `first` get the ids from 0 on, every byte gets one after them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=first,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path, **tokenizer_config) -> None:
    """Write tokenizer.json and a tokenizer_config.json with the class name that the family's repositories carry."""
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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


def qwen_tokenizer(texts: list[str], folder: Path, vocab_size: int, plain_added: tuple[str, ...] = ()) -> None:
    pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    size = vocab_size - len(special) - len(plain_added)
    tokenizer = byte_level_bpe(
        texts, vocab_size=size, first=[], pre_tokenizer=pre_tokenizer, normalizer=normalizers.NFC()
    )
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain_added])
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token in special,
        }
        for token in [*special, *plain_added]
    }
    write_tokenizer(
        tokenizer,
        folder,
        tokenizer_class="Qwen2Tokenizer",
        add_prefix_space=False,
        added_tokens_decoder=added,
        bos_token=None,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token=None,
    )


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


ROTARY = {"intermediate_size": 352, "num_key_value_heads": 2, "max_position_embeddings": 2048}

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
    "qwen2": TinyFamily(
        "qwen2",
        qwen_tokenizer,
        "bfloat16",
        extra_rows=48,
        config={**ROTARY, "tie_word_embeddings": True, "bos_token_id": None},
    ),
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


def sample_texts() -> list[str]:
    """Every message of the committed sample, in order: what the tiny tokenizers are trained on."""
    texts = []
    for conversation, _error, _file, _line in read_conversations(list_files(SAMPLE_DIR)):
        if conversation is not None:
            texts.extend(message["content"] for message in conversation["messages"])
    return texts


def build_tiny(
    family: str,
    output_dir: str | Path,
    *,
    vocab_size: int = 2048,
    hidden_size: int = 128,
    num_layers: int = 2,
    seed: int = 0,
    texts: list[str] | None = None,
) -> Path:
    """Write a random base of `family` into `output_dir` (which must be empty or new) and return the path.

    Raises ValueError for an unknown family or a folder that already holds something.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; use one of {', '.join(FAMILIES)}")
    folder = Path(output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not an empty folder; name a new --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    FAMILIES[family].tokenizer(texts or sample_texts(), folder, vocab_size)
    write_model(family, folder, hidden_size=hidden_size, num_layers=num_layers, seed=seed)
    return folder


def write_model(family: str, folder: Path, *, hidden_size: int, num_layers: int, seed: int) -> None:
    """Initialise the model for the tokenizer in `folder` and save it beside it, in the family's precision on disk."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    shape = {"hidden_size": hidden_size, "num_hidden_layers": num_layers, "num_attention_heads": 4}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tiny = FAMILIES[family]
    settings = {"vocab_size": len(tokenizer) + tiny.extra_rows, **shape, **ids, **tiny.config}
    config = AutoConfig.for_model(tiny.model_type, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.to(getattr(torch, tiny.dtype)).save_pretrained(folder)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Build a tiny random base of a family, for a CPU.")
    parser.add_argument("--family", required=True, choices=list(FAMILIES))
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--vocab_size", type=int, default=2048, help="tokens at most (the sample may give fewer)")
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--num_layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args(arguments))
    try:
        folder = build_tiny(options.pop("family"), options.pop("output_dir"), **options)
    except (ValueError, OSError) as error:
        sys.exit(f"sft.tiny: {error}")
    print(f"wrote {folder}")
