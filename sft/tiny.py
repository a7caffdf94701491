"""Builds a tiny random base model, as base_run.sh embeds it, without a download.

    python -m sft.tiny --family qwen2 --output_dir out/qwen2

A base has its family's real class, its kind of tokenizer (trained here, on the sample) and its quirks: more embedding
rows than tokens, half precision on disk. tests/families.py defines the families that only tests and benchmarks need.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from sft.files import write_json
from sft.opendata.conversation import read_conversations
from sft.opendata.files import list_files

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_DIR = Path(__file__).with_name("sample")  # a link to data_proj/sample; files in a wheel

# A fact of the published tokenizer.json files.
QWEN_SPLIT = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)


@dataclass(frozen=True)
class TinyFamily:
    """A family's tokenizer and config; `config` holds only the settings that differ from the common shape."""

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
    added = {str(token_id): token.__getstate__() for token_id, token in tokenizer.get_added_tokens_decoder().items()}
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


# Settings that all families with rotary positions share.
ROTARY = {"intermediate_size": 352, "num_key_value_heads": 2, "max_position_embeddings": 2048}

# The names that the command takes; those beside FAMILIES are built in a clone of the repository.
FAMILY_NAMES = ("bloom", "falcon", "falcon-rw", "qwen2", "qwen3", "yi", "mistral")
FAMILIES: dict[str, TinyFamily] = {
    "qwen2": TinyFamily(
        "qwen2",
        qwen_tokenizer,
        "bfloat16",
        extra_rows=48,
        config={**ROTARY, "tie_word_embeddings": True, "bos_token_id": None},
    ),
}


def sample_texts() -> list[str]:
    """Return every message of the sample's conversations without tools; the tiny tokenizers are trained on them."""
    texts = []
    for conversation, _error, _file, _line in read_conversations(list_files(SAMPLE_DIR)):
        if conversation is not None and "tools" not in conversation:
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
    families: Mapping[str, TinyFamily] = FAMILIES,
) -> Path:
    """Write a random base of `family` into `output_dir` (which must be empty or new) and return the path.

    Raises ValueError for an unknown family or a folder that is not empty.
    """
    if family not in families:
        raise ValueError(f"unknown family {family!r}; use one of {', '.join(families)}")
    folder = Path(output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not an empty folder; name a new --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    families[family].tokenizer(texts or sample_texts(), folder, vocab_size)
    write_model(families[family], folder, hidden_size=hidden_size, num_layers=num_layers, seed=seed)
    return folder


def write_model(family: TinyFamily, folder: Path, *, hidden_size: int, num_layers: int, seed: int) -> None:
    """Initialise a model for the tokenizer in `folder` and save it there, in the family's precision on disk."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    shape = {"hidden_size": hidden_size, "num_hidden_layers": num_layers, "num_attention_heads": 4}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    settings = {"vocab_size": len(tokenizer) + family.extra_rows, **shape, **ids, **family.config}
    config = AutoConfig.for_model(family.model_type, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.to(getattr(torch, family.dtype)).save_pretrained(folder)


def find_families(family: str) -> Mapping[str, TinyFamily]:
    """Return the families that hold `family`: ours, or in a clone of the repository those of tests/families.py."""
    if family in FAMILIES:
        return FAMILIES
    if not (ROOT / "tests" / "families.py").is_file():
        raise ValueError(f"--family {family}: is built in a clone of the repository only; use {', '.join(FAMILIES)}")
    sys.path.insert(0, str(ROOT))
    return import_module("tests.families").FAMILIES


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Build a tiny random base of a family, for a CPU.", argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--family", required=True, choices=FAMILY_NAMES)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--vocab_size", type=int, help="tokens at most (the sample may give fewer)")
    parser.add_argument("--hidden_size", type=int)
    parser.add_argument("--num_layers", type=int)
    parser.add_argument("--seed", type=int)
    options = vars(parser.parse_args(arguments))
    try:
        family = options.pop("family")
        folder = build_tiny(family, options.pop("output_dir"), families=find_families(family), **options)
    except (ValueError, OSError) as error:
        sys.exit(f"sft.tiny: {error}")
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
