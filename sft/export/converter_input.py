"""The model folder that llama.cpp's converter reads: a copy with links to the weights.

The copy corrects four things that the converter gets wrong: the name of the pre-tokenizer, merge ranks that it can't
read from tokenizer.json, falcon's number of key-value heads, and context lengths.
"""

import json
import re
from pathlib import Path

from sft.base import CONFIG
from sft.chat.reply import Chat
from sft.files import write_json
from sft.format.table import is_bos_added
from sft.tiny import QWEN_SPLIT

# The split pattern of the published bloom tokenizer.json.
BLOOM_SPLIT = " ?[^(\\s|[.,!?…。，、।۔،])]+"


def write_converter_input(chat: Chat, folder: Path, source: Path) -> Path:
    """Write a new folder `source` for the converter from the model in `folder`, which `chat` has loaded."""
    source.mkdir()
    for path in folder.glob("*.safetensors*"):
        (source / path.name).symlink_to(path.resolve())
    if not list(source.iterdir()):
        raise ValueError(f"{folder}: no safetensors in this folder; download a hub model first (hf download)")
    tokenizer = chat.renderer.tokenizer
    tokenizer.save_pretrained(source)  # not the folder's tokenizer.model, which lacks the added tokens
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings |= {"add_bos_token": is_bos_added(tokenizer), "add_eos_token": False}  # else llama.cpp adds its family's
    if has_byte_fallback(tokenizer):
        settings["add_prefix_space"] = has_prefix_space(tokenizer)
        write_sentencepiece(tokenizer, source / "tokenizer.model")
    write_json(source / "tokenizer_config.json", settings)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    write_json(source / CONFIG, converter_config(config))
    return source


def converter_config(config: dict) -> dict:
    """Return config.json with the values that the converter expects."""
    config = dict(config)
    if config["model_type"] == "falcon" and config.get("multi_query") and not config.get("new_decoder_architecture"):
        config["num_kv_heads"] = 1  # transformers 5 saves the number of all heads
    if config["model_type"] == "bloom":
        config.setdefault("seq_length", 2048)  # without it the converter takes the hidden size
    if config["model_type"] == "mistral" and config.get("sliding_window"):
        # llama.cpp computes Mistral without its window, so a longer context would give other logits than transformers
        config["max_position_embeddings"] = min(config["max_position_embeddings"], config["sliding_window"])
    return config


# --- the tokenizer ------------------------------------------------------------------------------------------------


def has_byte_fallback(tokenizer) -> bool:
    return bool(_backend_spec(tokenizer)["model"].get("byte_fallback"))


def has_prefix_space(tokenizer) -> bool:
    return tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens[0].startswith("▁")


def _backend_spec(tokenizer) -> dict:
    return json.loads(tokenizer.backend_tokenizer.to_str())


def write_sentencepiece(tokenizer, path: Path) -> None:
    """Write the tokenizer as a sentencepiece model, in which a piece's score is the rank of its merge.

    From tokenizer.json the converter gives every piece the same score, and llama.cpp then merges in another order.
    """
    from sentencepiece import sentencepiece_model_pb2 as sentencepiece

    model = _backend_spec(tokenizer)["model"]
    ranks = _merge_ranks(model["merges"])
    proto = sentencepiece.ModelProto()
    proto.trainer_spec.model_type = sentencepiece.TrainerSpec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.normalizer_spec.add_dummy_prefix = has_prefix_space(tokenizer)
    added = tokenizer.added_tokens_decoder
    pieces = {token_id: text for text, token_id in model["vocab"].items()}
    pieces |= {token_id: str(token) for token_id, token in added.items()}
    if sorted(pieces) != list(range(len(pieces))):
        raise ValueError("the tokenizer's ids have gaps; llama.cpp's converter needs ids without gaps")
    unknown = model.get("unk_token") or tokenizer.unk_token
    for token_id, text in sorted(pieces.items()):
        kind = _piece_type(text, unknown, added.get(token_id), sentencepiece.ModelProto.SentencePiece)
        proto.pieces.add(piece=text, score=-ranks.get(text, len(ranks)), type=kind)
    path.write_bytes(proto.SerializeToString())


def _merge_ranks(merges: list) -> dict[str, int]:
    """Return {merged piece: rank of the first merge that makes it}; a merge is a pair, or a text with a space."""
    ranks = {}
    for rank, merge in enumerate(merges):
        pair = merge if isinstance(merge, list) else merge.split(" ")
        ranks.setdefault("".join(pair), rank)
    return ranks


def _piece_type(text: str, unknown: str, added_token, types) -> int:
    if text == unknown:
        return types.UNKNOWN
    if added_token is not None:
        return types.CONTROL if added_token.special else types.USER_DEFINED
    return types.BYTE if re.fullmatch("<0x[0-9A-F]{2}>", text) else types.NORMAL


def name_pre_tokenizer(tokenizer) -> str | None:
    """Return llama.cpp's name of the pre-tokenizer that splits as this tokenizer does; None if it has none.

    The converter finds published tokenizers by a hash of ids, which a tokenizer with another vocabulary never has. The
    names and patterns are in llama.cpp's src/llama-vocab.cpp.
    """
    spec = json.dumps(_backend_spec(tokenizer)["pre_tokenizer"])
    names = {
        json.dumps(QWEN_SPLIT): "qwen2",
        json.dumps(BLOOM_SPLIT): "bloom",
        '"type": "Punctuation", "behavior": "Contiguous"': "falcon",
        '"type": "Digits", "individual_digits": true}, {"type": "ByteLevel"': "smollm",
        '"use_regex": true': "gpt-2",
    }
    return next((name for mark, name in names.items() if mark in spec), None)
