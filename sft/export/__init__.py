"""Merged weights, GGUF and Modelfile of a checkpoint."""

from sft.reexport import load_on_use

__getattr__ = load_on_use(
    __name__,
    {
        "gguf": ("export_gguf",),
        "merge": ("export_merged",),
        "modelfile": ("export_modelfile",),
        "tokenizer": ("export_tokenizer",),
    },
)
