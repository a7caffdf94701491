"""The base model and its tokenizer, made ready for training."""

from sft.reexport import load_on_use

__getattr__ = load_on_use(__name__, {"load": ("load_model", "load_tokenizer")})
