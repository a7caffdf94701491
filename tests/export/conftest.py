"""Folders as train.py saves them, written without training."""

import pytest
import torch

from sft.format.render import Renderer
from sft.model.adapters import add_lora
from sft.model.load import load_model, load_tokenizer, set_generation_config


@pytest.fixture(scope="package")
def trained(tiny_base, tmp_path_factory):
    """Return a function that gives the folder of a full model of a family."""
    folder, made = tmp_path_factory.mktemp("trained"), {}

    def save(family: str, chat_format: str = "auto") -> str:
        name = f"{family}-{chat_format}"
        if name not in made:
            tokenizer = load_tokenizer(str(tiny_base(family)))
            renderer = Renderer(tokenizer, chat_format)
            tokenizer.chat_template = renderer.chat_template
            model = load_model(str(tiny_base(family)))
            model.config.use_cache = True
            set_generation_config(model, tokenizer, renderer.stop_ids)
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
            made[name] = folder / name
        return str(made[name])

    return save


@pytest.fixture(scope="package")
def adapter(tiny_base, tmp_path_factory) -> str:
    """Return the folder of a LoRA adapter with weights other than zero."""
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    base = str(tiny_base("qwen2"))
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = Renderer(tokenizer, "blossom").chat_template
    model = add_lora(load_model(base), rank=2, alpha=4, dropout=0.0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
