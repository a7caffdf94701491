#!/bin/sh
# Qwen1.5, Qwen2.5, Qwen3; 8 x 80 GB by default.
#
#   sh recipes/qwen.sh                                        Qwen2.5-7B
#   MODEL=Qwen/Qwen1.5-14B sh recipes/qwen.sh                 or Qwen/Qwen1.5-4B, Qwen/Qwen3-8B-Base
#
# Knobs: those of ds_all.sh; flags of train.py at the end override them.
# Qwen's own script (github.com/QwenLM/Qwen, finetune/finetune_ds.sh): 1e-5, batches of 16 on each GPU (128 on 8),
#   weight decay 0.1, beta2 0.95, warm-up 0.01, cosine, 5 epochs.
# Qwen2.5's report (arXiv 2412.15115, 4.1): 2 epochs of a million conversations, 7e-6 to 7e-7, weight decay 0.1.
# Our judgement: the script's rate and the report's epochs; 16 packed rows for about 128 conversations; ChatML, whose
#   tokens these bases have, and with all weights in training their rows are learned.
set -eu
cd "$(dirname "$0")/.."

: "${MODEL:=Qwen/Qwen2.5-7B}" "${ZERO:=2}"
: "${LEARNING_RATE:=1e-5}" "${EPOCHS:=2}" "${MAX_LENGTH:=2048}" "${BATCH_SIZE:=1}" "${ACCUMULATION:=16}"
export MODEL ZERO LEARNING_RATE EPOCHS MAX_LENGTH BATCH_SIZE ACCUMULATION
exec sh ds_all.sh --gradient_checkpointing --chat_format chatml \
    --weight_decay 0.1 --adam_beta2 0.95 --warmup_steps 0.01 "$@"
