#!/bin/sh
# BLOOM 560m, 1b7, 3b, 7b1 on Belle's data; 8 x 80 GB by default, for the smaller ones one GPU (the README's table).
#
#   python -m sft.opendata --mix belle --output data_proj/belle
#   sh recipes/bloom.sh
#   NUM_GPUS=1 MODEL=bigscience/bloom-560m LEARNING_RATE=2e-5 sh recipes/bloom.sh
#
# Knobs: those of ds_all.sh; flags of train.py at the end override them.
# BELLE-7B, from BLOOMZ-7B1-mt (huggingface.co/BelleGroup/BELLE-7B-1M): 3e-6, batches of 64, 3 epochs, weight decay
#   0.001, warm-up 0.1, linear. Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca): 2e-5, batches of 128, 3 epochs.
# Our judgement: Alpaca's rate for the smaller ones; 8 packed rows for 64 conversations of Belle's, of about 260 tokens.
set -eu
cd "$(dirname "$0")/.."

: "${MODEL:=bigscience/bloom-7b1}" "${DATA:=data_proj/belle}" "${ZERO:=2}"
: "${LEARNING_RATE:=3e-6}" "${EPOCHS:=3}" "${MAX_LENGTH:=2048}" "${BATCH_SIZE:=1}" "${ACCUMULATION:=8}"
export MODEL DATA ZERO LEARNING_RATE EPOCHS MAX_LENGTH BATCH_SIZE ACCUMULATION
exec sh ds_all.sh --gradient_checkpointing \
    --lr_scheduler_type linear --warmup_steps 0.1 --weight_decay 0.001 "$@"
