"""Rewrite a tokenizer that transformers 5 saved so that transformers 4 loads it, with the same ids."""

import json
from pathlib import Path

from sft.export.gguf_check import TEXTS
from sft.export.output import stage_output
from sft.files import write_json
from sft.model.load import load_tokenizer

UNKNOWN_TO_VERSION_4 = ("backend", "is_local", "local_files_only")


def export_tokenizer(model_path: str, output_dir: str) -> None:
    """Write the tokenizer to the new folder `output_dir`; ValueError when the rewritten one gives other ids."""
    tokenizer = load_tokenizer(model_path)
    with stage_output(output_dir) as staged:
        tokenizer.save_pretrained(staged)
        path = staged / "tokenizer_config.json"
        write_json(path, version_4_settings(tokenizer, json.loads(path.read_text(encoding="utf-8"))))
        (staged / "chat_template.jinja").unlink(missing_ok=True)  # older than 4.43 reads it from the settings alone
        _check_ids(tokenizer, staged, model_path)


def version_4_settings(tokenizer, settings: dict) -> dict:
    """Return tokenizer_config.json as transformers 4 reads it.

    4.57 fails on three things that 5 writes: a class that it doesn't have, no `added_tokens_decoder`, and extra special
    tokens as a list. PreTrainedTokenizerFast takes tokenizer.json unchanged in both versions; a family's own class may
    rebuild it, with other ids.
    """
    settings = {name: value for name, value in settings.items() if name not in UNKNOWN_TO_VERSION_4}
    settings["added_tokens_decoder"] = {
        str(token_id): token.__getstate__() for token_id, token in sorted(tokenizer.added_tokens_decoder.items())
    }
    settings["additional_special_tokens"] = list(settings.pop("extra_special_tokens", []))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["chat_template"] = tokenizer.chat_template
    return settings


def _check_ids(tokenizer, folder: Path, model_path: str) -> None:
    written = load_tokenizer(str(folder))
    for text in (*TEXTS, *tokenizer.get_added_vocab()):
        if written(text)["input_ids"] != tokenizer(text)["input_ids"]:
            raise ValueError(f"{model_path}: the rewritten tokenizer gives other ids for {text!r}; not written")
