"""One measured process of the step benchmarks: a random model, one side's data path, a few steps under its Trainer.

    python benchmarks/step_side.py ours '{"family": "qwen2", "vocab_size": 32000, ...}'

`ours` is train.py's own assembly: packed rows, isolate_documents, use_chunked_loss, fused kernels, Collator. `trl` is
SFTTrainer, packed or padded; `trl_strongest` gets our attention, and Liger with its fused loss if it is installed and
supports the family. `alpaca` is transformers' Trainer on padded batches with full logits. All get the same examples
(random tokens, log-normal lengths, the first quarter without loss), the same model, arguments and fused AdamW. Prints
wall seconds, CPU seconds and non-pad tokens of the measured steps.
"""

import importlib
import json
import os
import sys
import tempfile
import time

import numpy as np
import torch
from records import report
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

SETTINGS = {
    "family": "qwen2",
    "config": {},
    "bf16": False,
    "packing": True,
    "max_length": 2048,
    "rows": 1,  # packed rows per batch, or examples per padded batch
    "accumulation": 1,
    "warmup": 1,
    "steps": 2,
    "num_examples": 400,
    "seed": 0,
    "fused": "auto",
    "checkpointing": False,
    "deterministic": False,
    "lora": False,
    "four_bit": False,
}
# Imported before the process waits, where WAIT=1: the process before it still has the GPU.
IMPORTS = {"ours": ("sft.model.adapters", "sft.train.callbacks"), "alpaca": ()}
IMPORTS |= dict.fromkeys(("trl", "trl_strongest"), ("sft.model.attention", "datasets", "trl"))


class Examples(list):
    """Rows of {"input_ids", "labels"} as arrays, with the `lengths` that packing asks for."""

    @property
    def lengths(self) -> np.ndarray:
        return np.asarray([len(row["input_ids"]) for row in self])


def make_examples(num_examples: int, vocab_size: int, max_length: int, seed: int) -> Examples:
    random = np.random.default_rng(seed)
    examples = Examples()
    for _ in range(num_examples):
        length = int(np.clip(random.lognormal(5.2, 0.85), 12, max_length))
        ids = random.integers(10, min(vocab_size, 30_000), length, dtype=np.int32)
        labels = np.where(np.arange(length) < length // 4, np.int32(-100), ids)
        examples.append({"input_ids": ids, "labels": labels})
    return examples


class Clock(TrainerCallback):
    """Notes the time at each step's end; the collator adds the tokens of its batches."""

    def __init__(self):
        self.times = []
        self.tokens = []
        self.graphs = []
        self.collate = None

    def count(self, batch: dict) -> dict:
        """Count tokens that are not padding; a packed row's padding is left in, as less than a hundredth."""
        mask = batch.get("attention_mask")
        self.tokens.append(int(mask.sum()) if mask is not None else batch["input_ids"].numel())
        return batch

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.graphs.append(compiled_graphs())
        self.times.append((time.perf_counter(), time.process_time()))


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    if "torch._dynamo" not in sys.modules:
        return 0
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def build_model(settings: dict):
    """A random model in fp32, made on the device, as transformers gives it with its default attention."""
    config = AutoConfig.for_model(**{"model_type": settings.get("family"), **settings["config"]})
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.config.use_cache = False
    return model


def arguments_for(settings: dict, arguments_class: type, folder: str, **more):
    return arguments_class(
        output_dir=folder,
        use_cpu=not torch.cuda.is_available(),
        bf16=settings["bf16"],
        per_device_train_batch_size=settings["rows"],
        gradient_accumulation_steps=settings["accumulation"],
        max_steps=settings["warmup"] + settings["steps"],
        optim="adamw_torch_fused",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        gradient_checkpointing=settings["checkpointing"],
        full_determinism=settings["deterministic"],
        **more,
    )


def ours(settings: dict, model, examples: Examples, folder: str) -> Trainer:
    from sft.dataset.collate import Collator
    from sft.dataset.dataset import TrainingRows
    from sft.model import fusion
    from sft.model.attention import isolate_documents
    from sft.model.kernels import make_determinism_fast
    from sft.model.loss import use_chunked_loss
    from sft.train.callbacks import KeepOutputs
    from sft.train.losses import FastTrainer

    if settings["four_bit"]:
        model = load_in_4_bit(model, folder)
    if settings["lora"]:
        model = add_adapters(model, settings)
    print(isolate_documents(model), use_chunked_loss(model), sep="; ")
    on_gpu = torch.cuda.is_available()
    facts = {"half": settings["bf16"], "lora": settings["lora"], "accumulation": settings["accumulation"]}
    for note in fusion.fuse(model, settings["fused"], fusion.Circumstances(on_gpu=on_gpu, **facts)):
        print(note)
    rows = TrainingRows(examples, settings["max_length"], seed=0)
    arguments = arguments_for(settings, TrainingArguments, folder)
    # As train.py does it: on a GPU one length for all packed rows.
    collate = Collator(0, packed_length=settings["max_length"] if on_gpu else None)
    trainer = FastTrainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)
    if settings["checkpointing"]:
        # Flags of train.py that its callback looks at.
        vars(arguments).update(checkpoint_keep="auto", activation_offload=False, sequence_parallel_size=1)
        trainer.add_callback(KeepOutputs(model, max_length=settings["max_length"]))
    if settings["deterministic"]:
        make_determinism_fast()  # the trainer has set transformers' own settings
    return trainer


def load_in_4_bit(model, folder: str):
    """Save the model in bf16 and load it as train.py does under --load_in_4bit; its memory is counted from then on."""
    from sft.model.load import load_model

    model.to(torch.bfloat16).save_pretrained(f"{folder}/base")
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)
    torch.cuda.empty_cache()
    loaded = load_model(f"{folder}/base", compute="bfloat16", lora=True, load_in_4bit=True)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return loaded


def add_adapters(model, settings: dict):
    """LoRA on a frozen base in the type of the computing, as sft.model.load loads it."""
    from sft.model import adapters

    for parameter in () if settings["four_bit"] else model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16 if settings["bf16"] else torch.float32)
    options = {"rank": 16, "alpha": 32, "dropout": 0.05}
    return adapters.add_lora(model, gradient_checkpointing=settings["checkpointing"], **options)


def trl(settings: dict, model, examples: Examples, folder: str) -> Trainer:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    options = {"max_length": settings["max_length"], "packing": settings["packing"]}
    rows = Dataset.from_list([{name: ids.tolist() for name, ids in row.items()} for row in examples])
    arguments = arguments_for(settings, SFTConfig, folder, use_liger_kernel=settings.get("liger", False), **options)
    return SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=stub_tokenizer())


def trl_strongest(settings: dict, model, examples: Examples, folder: str) -> Trainer:
    """TRL with our attention, which its padding-free batches need, and Liger with its fused loss."""
    from sft.model.attention import isolate_documents
    from sft.model.load import has_liger

    isolate_documents(model)
    return trl(settings | {"liger": has_liger(model)}, model, examples, folder)


def stub_tokenizer():
    """A tokenizer that TRL asks for and never uses: the examples are tokens already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, "<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def alpaca(settings: dict, model, examples: Examples, folder: str) -> Trainer:
    def pad(rows: list[dict]) -> dict[str, torch.Tensor]:
        padded = {
            name: torch.nn.utils.rnn.pad_sequence(
                [torch.from_numpy(row[name]).long() for row in rows], batch_first=True, padding_value=value
            )
            for name, value in (("input_ids", 0), ("labels", -100))
        }
        return padded | {"attention_mask": padded["input_ids"].ne(0).long()}

    arguments = arguments_for(settings, TrainingArguments, folder)
    return Trainer(model=model, args=arguments, train_dataset=examples, data_collator=pad)


SIDES = {"ours": ours, "trl": trl, "trl_strongest": trl_strongest, "alpaca": alpaca}


def main() -> None:
    settings = SETTINGS | json.loads(sys.argv[2])
    if os.environ.get("WAIT") == "1":
        for name in IMPORTS[sys.argv[1]]:
            importlib.import_module(name)
        sys.stdin.readline()
    model = build_model(settings)
    sizes = [settings[name] for name in ("num_examples", "max_length", "seed")]
    examples = make_examples(sizes[0], model.config.vocab_size, *sizes[1:])
    with tempfile.TemporaryDirectory() as folder:
        trainer = SIDES[sys.argv[1]](settings, model, examples, folder)
        clock = Clock()
        collate = trainer.data_collator
        trainer.data_collator = lambda rows: clock.count(collate(rows))
        trainer.add_callback(clock)
        trainer.train()
        clock.graphs.append(compiled_graphs())
    mean_seen = float((examples.lengths**2).sum() / examples.lengths.sum())
    report(**numbers(settings, clock), parameters=sum(p.numel() for p in model.parameters()), mean_seen=mean_seen)


def numbers(settings: dict, clock: Clock) -> dict:
    """Sum up the measured steps; on a GPU with its peak memory."""
    per_step = np.reshape(clock.tokens[: len(clock.times) * settings["accumulation"]], (len(clock.times), -1)).sum(1)
    first = clock.times[settings["warmup"] - 1]
    last = clock.times[-1]
    found = {
        "tokens": int(per_step[settings["warmup"] :].sum()),
        "wall_seconds": last[0] - first[0],
        "seconds": last[1] - first[1],
        "graphs_after_warmup": clock.graphs[-1] - clock.graphs[settings["warmup"] - 1],
    }
    if torch.cuda.is_available():
        found["gpu_peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        found["gpu_reserved_mib"] = torch.cuda.max_memory_reserved() / 2**20
    return found


if __name__ == "__main__":
    main()
