#!/bin/sh
# Yi 6B, 9B, 34B and 1.5; 8 x 80 GB by default, 34B with ZeRO-3 and offload to 580 GiB of the machine's memory.
#
#   sh recipes/yi.sh                                          Yi-9B
#   ZERO=3 OFFLOAD=1 MODEL=01-ai/Yi-34B sh recipes/yi.sh      or 01-ai/Yi-6B, 01-ai/Yi-1.5-9B
#
# Knobs: those of ds_all.sh; flags of train.py at the end override them.
# Yi's report (arXiv 2403.04652, finetuning): 1e-5, constant; batches of 64, 4096 tokens, weight decay 0.1, beta2 0.999;
#   300 steps, about 2 epochs of less than 10,000 conversations. Its NEFTune noise is left out.
# Our judgement: 8 packed rows for the 64 conversations, if those have 512 tokens.
set -eu
cd "$(dirname "$0")/.."

: "${MODEL:=01-ai/Yi-9B}" "${ZERO:=2}"
: "${LEARNING_RATE:=1e-5}" "${EPOCHS:=2}" "${MAX_LENGTH:=4096}" "${BATCH_SIZE:=1}" "${ACCUMULATION:=8}"
export MODEL ZERO LEARNING_RATE EPOCHS MAX_LENGTH BATCH_SIZE ACCUMULATION
exec sh ds_all.sh --gradient_checkpointing \
    --lr_scheduler_type constant --warmup_steps 0 --weight_decay 0.1 "$@"
