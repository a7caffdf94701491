#!/bin/sh
# Mistral-7B v0.1 and v0.3; 8 x 80 GB by default.
#
#   sh recipes/mistral.sh                                     v0.3
#   MODEL=mistralai/Mistral-7B-v0.1 sh recipes/mistral.sh
#
# Knobs: those of ds_all.sh; flags of train.py at the end override them.
# Zephyr-7B, from v0.1 (github.com/huggingface/alignment-handbook, recipes/zephyr-7b-beta/sft/config_full.yaml): 2e-5,
#   batches of 16 on each GPU (128 on 8), 2048 tokens, 1 epoch of 200,000 conversations, warm-up 0.1, cosine.
# Our judgement: 16 packed rows for about 128 conversations; Mistral's own format.
set -eu
cd "$(dirname "$0")/.."

: "${MODEL:=mistralai/Mistral-7B-v0.3}" "${ZERO:=2}"
: "${LEARNING_RATE:=2e-5}" "${EPOCHS:=1}" "${MAX_LENGTH:=2048}" "${BATCH_SIZE:=1}" "${ACCUMULATION:=16}"
export MODEL ZERO LEARNING_RATE EPOCHS MAX_LENGTH BATCH_SIZE ACCUMULATION
exec sh ds_all.sh --gradient_checkpointing --chat_format mistral --warmup_steps 0.1 "$@"
