#!/bin/sh
# Llama 3.1 and 3.2, all weights; 8 x 80 GB by default.
#
#   sh recipes/llama3.sh                                      Llama-3.1-8B
#   NUM_GPUS=4 MODEL=meta-llama/Llama-3.2-3B sh recipes/llama3.sh
#
# Knobs: those of ds_all.sh; flags of train.py at the end override them. An -Instruct model keeps its own template.
# Tülu 3 8B, from Llama-3.1-8B (github.com/allenai/open-instruct, docs/tulu3.md): 5e-6, batches of 128, 4096 tokens,
#   2 epochs, warm-up 0.03, linear, no weight decay.
# Our judgement: the same numbers for 3.2-3B; 8 packed rows of 4096 tokens for about 128 conversations.
set -eu
cd "$(dirname "$0")/.."

: "${MODEL:=meta-llama/Llama-3.1-8B}" "${ZERO:=2}"
: "${LEARNING_RATE:=5e-6}" "${EPOCHS:=2}" "${MAX_LENGTH:=4096}" "${BATCH_SIZE:=1}" "${ACCUMULATION:=8}"
export MODEL ZERO LEARNING_RATE EPOCHS MAX_LENGTH BATCH_SIZE ACCUMULATION
exec sh ds_all.sh --gradient_checkpointing --lr_scheduler_type linear --warmup_steps 0.03 "$@"
