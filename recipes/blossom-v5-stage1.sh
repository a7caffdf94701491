#!/bin/sh
# Blossom v5, first stage: 40,000 Wizard, 40,000 Orca and 10,000 math conversations, once; 8 x 80 GB.
#
#   python -m sft.opendata --mix blossom-v5-stage1 --output data_proj/blossom-v5-stage1
#   sh recipes/blossom-v5-stage1.sh && sh recipes/blossom-v5-stage2.sh
#
# Knobs: those of ds_all.sh; flags of train.py at the end override them. MODEL is any base: 01-ai/Yi-9B as in Blossom
# v5-9b, 01-ai/Yi-1.5-9B as in v5.1-9b; Yi-34B needs ZERO=3 OFFLOAD=1.
# Data and epochs: huggingface.co/Azure99/blossom-v5-9b.
# Our judgement, for the card names none: rate and length of Yi's report (arXiv 2403.04652), 16 packed rows per update.
set -eu
cd "$(dirname "$0")/.."

: "${MODEL:=01-ai/Yi-9B}" "${DATA:=data_proj/blossom-v5-stage1}" "${OUTPUT:=runs/blossom-v5-stage1}" "${ZERO:=2}"
: "${LEARNING_RATE:=1e-5}" "${EPOCHS:=1}" "${MAX_LENGTH:=4096}" "${BATCH_SIZE:=1}" "${ACCUMULATION:=16}"
export MODEL DATA OUTPUT ZERO LEARNING_RATE EPOCHS MAX_LENGTH BATCH_SIZE ACCUMULATION
exec sh ds_all.sh --gradient_checkpointing --chat_format blossom "$@"
