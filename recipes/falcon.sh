#!/bin/sh
# Falcon-7B; 8 x 80 GB by default. falcon-rw-1b takes one GPU.
#
#   sh recipes/falcon.sh
#   NUM_GPUS=1 MODEL=tiiuae/falcon-rw-1b LEARNING_RATE=2e-5 sh recipes/falcon.sh
#
# Knobs: those of ds_all.sh; flags of train.py at the end override them.
# Open-Assistant's Falcon-40B (huggingface.co/OpenAssistant/falcon-40b-sft-mix-1226): 1e-5, batches of 18 on each GPU,
#   2048 tokens, 20 steps of warm-up, no weight decay, 8 epochs.
# Our judgement: the same rate for 7B; for rw-1b the 2e-5 and 3 epochs of Stanford Alpaca
#   (github.com/tatsu-lab/stanford_alpaca), for 7B too, since 8 learn by heart; 16 packed
#   rows for about 128 conversations.
set -eu
cd "$(dirname "$0")/.."

: "${MODEL:=tiiuae/falcon-7b}" "${ZERO:=2}"
: "${LEARNING_RATE:=1e-5}" "${EPOCHS:=3}" "${MAX_LENGTH:=2048}" "${BATCH_SIZE:=1}" "${ACCUMULATION:=16}"
export MODEL ZERO LEARNING_RATE EPOCHS MAX_LENGTH BATCH_SIZE ACCUMULATION
exec sh ds_all.sh --gradient_checkpointing "$@"
