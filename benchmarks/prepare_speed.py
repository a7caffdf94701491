"""Preparing (read, render, tokenise, label, pack): tokens per CPU second and peak memory, ours beside the peers.

    python benchmarks/prepare_speed.py 20000                      # all sides, three times each
    python benchmarks/prepare_speed.py 200000 --sides ours trl --repeats 1
    python benchmarks/prepare_speed.py 10000 --chat_template qwen3.jinja --sides ours ours_chatml trl

All sides read the same file of canonical conversations and end with rows of at most 2048 tokens. `ours` uses gigatoken;
for `ours_tokenizers` the imports of fast encoders are blocked in the process, as on a machine that lacks them. `floor`
is the raw encoder of the same name on the rendered texts. `alpaca` is stanford_alpaca's method (it does not pack);
`trl` is SFTTrainer with packing and assistant_only_loss, one process, with our saved template; `llamafactory` is its
get_dataset with packing, in an environment of its own, as it needs older packages. CPU seconds begin after the imports.

With --chat_template the base carries that template, and `ours` trains it as it is (`--chat_format base`); `ours_chatml`
stays with chatml. TRL takes the template too, and replaces those that it has a training template for.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from records import CpuClock, alternate, build_base, median, peer_python, report, write_records

MAX_LENGTH = 2048
CARRIED = "own-template-"  # a base's folder whose tokenizer has the template of --chat_template
SIDES = (
    "ours",
    "ours_tokenizers",
    "ours_chatml",
    "floor_gigatoken",
    "floor_tokenizers",
    "trl",
    "alpaca",
    "llamafactory",
)


def ours(base: str, records: str, fast: bool, chat_format: str | None = None) -> None:
    if not fast:
        sys.modules |= {"gigatoken": None, "fastokens": None}
    from sft.dataset.dataset import TrainingRows, prepare
    from sft.format.render import Renderer
    from sft.model.load import load_tokenizer

    tokenizer = load_tokenizer(base)
    carried = Path(base).name.startswith(CARRIED)
    renderer = Renderer(tokenizer, chat_format or ("base" if carried else "chatml"))
    with tempfile.TemporaryDirectory() as folder:
        clock = CpuClock()
        options = {"cache_dir": folder, "num_workers": 1, "say": lambda text: None}
        examples, _ledger = prepare([records], renderer, max_length=MAX_LENGTH, **options)
        rows = TrainingRows(examples, MAX_LENGTH, seed=0)
        report(seconds=clock.seconds(), tokens=int(examples.lengths.sum()), fill=rows.fill, encoder=renderer.encoder)


def floor(base: str, records: str, fast: bool) -> None:
    """Only encode the finished texts, a thousand at a time."""
    from sft.dataset.tokenise import batches
    from sft.format.render import Renderer
    from sft.model.load import load_tokenizer
    from sft.opendata.conversation import read_conversations

    renderer = Renderer(load_tokenizer(base), "chatml")
    texts = [renderer.text(conversation["messages"]) for conversation, *_ in read_conversations([records])]
    tokenizer = renderer.tokenizer.backend_tokenizer
    if fast:
        from gigatoken.gigatoken_rs import load_hf_json

        tokenizer = load_hf_json(tokenizer.to_str())
    clock = CpuClock()
    tokens = 0
    for batch in batches(texts, 1000):
        if fast:
            tokens += sum(len(tokenizer.encode(text)) for text in batch)
        else:
            tokens += sum(len(found) for found in tokenizer.encode_batch_fast(batch, add_special_tokens=False))
    report(seconds=clock.seconds(), tokens=tokens)


def trl(base: str, records: str) -> None:
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"max_length": MAX_LENGTH, "packing": True, "assistant_only_loss": True}
        arguments = SFTConfig(output_dir=folder, use_cpu=True, report_to="none", disable_tqdm=True, **settings)
        clock = CpuClock()
        rows = load_dataset("json", data_files=records, split="train", cache_dir=folder).select_columns(["messages"])
        trainer = SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
        seconds = clock.seconds()
        tokens = sum(map(len, trainer.train_dataset.with_format("arrow")["input_ids"].to_pylist()))
        report(seconds=seconds, tokens=tokens, fill=tokens / MAX_LENGTH / len(trainer.train_dataset))


def alpaca(base: str, records: str) -> None:
    """Tokenise prompt + answer, then the prompt alone for its length, one text at a time; all rows stay in lists."""
    import json

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    settings = {"return_tensors": "pt", "max_length": MAX_LENGTH, "truncation": True, "add_special_tokens": False}
    clock = CpuClock()
    with open(records, encoding="utf-8") as file:
        conversations = [json.loads(line)["messages"] for line in file]
    prompts = [tokenizer.apply_chat_template(c[:-1], add_generation_prompt=True, tokenize=False) for c in conversations]
    texts = [p + c[-1]["content"] + "<|im_end|>" for p, c in zip(prompts, conversations, strict=True)]
    input_ids = [tokenizer(text, **settings).input_ids[0] for text in texts]
    prompt_lengths = [tokenizer(prompt, **settings).input_ids.shape[1] for prompt in prompts]
    labels = [ids.clone() for ids in input_ids]
    for row, length in zip(labels, prompt_lengths, strict=True):
        row[:length] = -100
    report(seconds=clock.seconds(), tokens=sum(map(len, input_ids)))


def llamafactory(base: str, records: str) -> None:
    import importlib.machinery
    import json
    import os
    import types

    # For sound and pictures only; its wheel on PyPI needs CUDA's libraries.
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments, ModelArguments
    from transformers import AutoTokenizer, Seq2SeqTrainingArguments

    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    form = {"file_name": os.path.basename(records), "formatting": "sharegpt", "columns": {"messages": "messages"}}
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(os.path.abspath(records), os.path.join(folder, form["file_name"]))
        with open(f"{folder}/dataset_info.json", "w", encoding="utf-8") as file:
            json.dump({"records": {**form, "tags": tags}}, file)
        data = DataArguments(
            template="qwen", dataset="records", dataset_dir=folder, cutoff_len=MAX_LENGTH, packing=True
        )
        model = ModelArguments(model_name_or_path=base, cache_dir=folder)
        arguments = Seq2SeqTrainingArguments(output_dir=folder, use_cpu=True, report_to="none", do_train=True)
        tokenizer = AutoTokenizer.from_pretrained(base)
        clock = CpuClock()
        template = get_template_and_fix_tokenizer(tokenizer, data)
        rows = get_dataset(template, model, data, arguments, "sft", tokenizer)["train_dataset"]
        seconds = clock.seconds()
        pad = tokenizer.pad_token_id  # in the texts it does not occur
        tokens = sum(len(ids) - ids.count(pad) for ids in rows.with_format("arrow")["input_ids"].to_pylist())
        report(seconds=seconds, tokens=tokens, fill=tokens / MAX_LENGTH / len(rows))


def measure(side: str, base: str, records: str) -> None:
    name, _, encoder = side.partition("_")
    options = {"fast": encoder != "tokenizers"} if name in ("ours", "floor") else {}
    if side == "ours_chatml":
        options["chat_format"] = "chatml"
    sides = {"ours": ours, "floor": floor, "trl": trl, "alpaca": alpaca, "llamafactory": llamafactory}
    sides[name](base, records, **options)


def carry(base: Path, template: Path) -> Path:
    """Copy a base beside it, with another chat template; return the copy."""
    folder = base.with_name(f"{CARRIED}{template.stem}")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder)
    (folder / "chat_template.jinja").write_text(template.read_text(encoding="utf-8"), encoding="utf-8")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("num_records", type=int, nargs="?", default=20_000)
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--chat_template", type=Path, metavar="FILE", help="the base's own template, which ours trains")
    parser.add_argument("--measure", nargs=3, metavar=("SIDE", "BASE", "RECORDS"), help="be one measured process")
    args = parser.parse_args()
    if args.measure:
        return measure(*args.measure)
    base = build_base()
    records = write_records(args.num_records)
    if args.chat_template:
        base = carry(base, args.chat_template)
    variants = {side: {"command": ("prepare_speed.py", "--measure", side, base, records)} for side in args.sides}
    for side in {"trl", "alpaca"} & set(variants):
        variants[side]["python"] = peer_python()
    if "llamafactory" in variants:
        variants["llamafactory"]["python"] = peer_python("llamafactory")
    row = f"{args.num_records} {args.chat_template.stem}" if args.chat_template else f"{args.num_records}"
    runs = alternate("prepare", row, variants, args.repeats)
    for side, found in runs.items():
        speed = median(found, "tokens") / median(found, "seconds")
        print(f"{side:17} {speed / 1e6:8.2f} M tokens per CPU second, {median(found, 'peak_mib'):7,.0f} MiB")


if __name__ == "__main__":
    main()
