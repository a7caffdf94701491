#!/bin/sh
# Qwen3 with LoRA, dense or the mixture of experts 30B-A3B; one GPU of 24 GB by default, 30B-A3B on 80 GB.
#
#   sh recipes/qwen3.sh                                       Qwen3-8B
#   MODEL=Qwen/Qwen3-30B-A3B sh recipes/qwen3.sh              or Qwen/Qwen3-4B-Instruct-2507
#
# Knobs: those of ds_all.sh; flags of train.py at the end override them. All weights of a dense one: recipes/qwen.sh.
# ms-swift's guide for Qwen3-8B (github.com/modelscope/ms-swift, docs/source_en/BestPractices/Qwen3-Best-Practice.md):
#   LoRA r 8, alpha 32, all matrices; 1e-4, batches of 16, 2048 tokens, 1 epoch, warm-up 0.05.
# Our judgement: 2 packed rows for about 16 conversations; the same numbers for 30B-A3B, with adapters on its experts.
set -eu
cd "$(dirname "$0")/.."

: "${MODEL:=Qwen/Qwen3-8B}" "${ZERO:=2}" "${NUM_GPUS:=1}"
: "${LEARNING_RATE:=1e-4}" "${EPOCHS:=1}" "${MAX_LENGTH:=2048}" "${BATCH_SIZE:=1}" "${ACCUMULATION:=2}"
export MODEL ZERO NUM_GPUS LEARNING_RATE EPOCHS MAX_LENGTH BATCH_SIZE ACCUMULATION
exec sh ds_all.sh --gradient_checkpointing --lora --lora_rank 8 --lora_alpha 32 --warmup_steps 0.05 "$@"
