"""The peer of startup.py: what a user of TRL writes to fine-tune on messages, packed, on assistant turns alone."""

import sys

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

base, records, folder = sys.argv[1:]
arguments = SFTConfig(
    output_dir=folder,
    max_length=2048,
    packing=True,
    assistant_only_loss=True,
    per_device_train_batch_size=1,
    max_steps=2,
    use_cpu=True,
    report_to="none",
)
rows = load_dataset("json", data_files=records, split="train", cache_dir=folder)
SFTTrainer(model=base, args=arguments, train_dataset=rows).train()
