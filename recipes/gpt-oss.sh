#!/bin/sh
# gpt-oss-20b with LoRA; one GPU of 80 GB.
#
#   sh recipes/gpt-oss.sh
#
# Knobs: those of ds_all.sh; flags of train.py at the end override them. The MXFP4 weights are loaded in bf16.
# OpenAI's cookbook (github.com/openai/openai-cookbook, articles/gpt-oss/fine-tune-transfomers.ipynb): LoRA r 8, alpha 16,
#   attention and the experts of 3 layers; 2e-4, batches of 16, 2048 tokens, 1 epoch, warm-up 0.03, cosine to a tenth.
# Our judgement: adapters on the experts of all layers; 2 packed rows for about 16 conversations.
set -eu
cd "$(dirname "$0")/.."

: "${MODEL:=openai/gpt-oss-20b}" "${ZERO:=2}" "${NUM_GPUS:=1}"
: "${LEARNING_RATE:=2e-4}" "${EPOCHS:=1}" "${MAX_LENGTH:=2048}" "${BATCH_SIZE:=1}" "${ACCUMULATION:=2}"
export MODEL ZERO NUM_GPUS LEARNING_RATE EPOCHS MAX_LENGTH BATCH_SIZE ACCUMULATION
exec sh ds_all.sh --gradient_checkpointing --lora --lora_rank 8 --lora_alpha 16 \
    --lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs '{"min_lr_rate": 0.1}' --warmup_steps 0.03 "$@"
