"""Turn a trained checkpoint into what a server takes.

    python -m sft.export --model_path runs/my_run/model --to merged --output_dir runs/my_run/merged

`merged` folds a LoRA adapter into its base, in fp32, and checks that the merged model, reopened, gives the same logits.
"""

import argparse
import os
import sys
from pathlib import Path

from sft.chat import load_chat
from sft.checkpoint import saved_shapes, verify_saved
from sft.model import set_generation_config

# Largest difference of logits that rounding explains when fp32 weights are added up in another order.
TOLERANCE = 1e-3


def export_merged(model_path: str, output_dir: str) -> Path:
    """Write the adapter of `model_path` merged into its base to `output_dir`, which must not exist yet.

    Raises ValueError when there is no adapter, or when the merged model's logits differ from the adapter's.
    """
    import torch

    folder = Path(output_dir)
    if folder.exists():
        raise ValueError(f"--output_dir {folder}: exists; name a new folder")
    if not (Path(model_path) / "adapter_config.json").is_file():
        raise ValueError(f"--model_path {model_path}: holds no LoRA adapter; a full model needs no merging")
    chat = load_chat(model_path, device="cpu", dtype="float32")
    ids = torch.tensor([chat.renderer.prompt([{"role": "user", "content": "你好, hello: 1+1=?"}])])
    with torch.inference_mode():
        expected = chat.model(input_ids=ids).logits
    merged = chat.model.merge_and_unload(safe_merge=True)
    set_generation_config(merged, chat.renderer.tokenizer, chat.renderer.stop_ids)
    staged = folder.with_name(f".{folder.name}.{os.getpid()}")
    merged.save_pretrained(staged)
    chat.renderer.tokenizer.save_pretrained(staged)
    verify_saved(staged, saved_shapes(merged))
    with torch.inference_mode():
        found = load_chat(str(staged), device="cpu", dtype="float32").model(input_ids=ids).logits
    difference = (found - expected).abs().max().item()
    if difference > TOLERANCE:
        raise ValueError(f"the merged model's logits differ by {difference:.2g} from the adapter's; kept in {staged}")
    staged.rename(folder)
    return folder


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sft.export", description="Export a trained checkpoint.")
    parser.add_argument("--model_path", required=True, help="a folder that train.py wrote with --lora")
    parser.add_argument("--to", choices=("merged",), default="merged")
    parser.add_argument("--output_dir", required=True, help="a new folder")
    options = parser.parse_args(arguments)
    try:
        print(f"wrote {export_merged(options.model_path, options.output_dir)}")
    except (ValueError, OSError) as error:
        sys.exit(f"sft.export: {error}")


if __name__ == "__main__":
    main()
