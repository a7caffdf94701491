#!/bin/sh
# GLM-4.7-Flash, a mixture of experts, with LoRA; one GPU of 80 GB.
#
#   sh recipes/glm4.7-flash.sh
#
# Knobs: those of ds_all.sh; flags of train.py at the end override them.
# Axolotl's example (github.com/axolotl-ai-cloud/axolotl, examples/glm47-flash/lora.yaml): LoRA r 32, alpha 16, no
#   dropout, on q, k, v and o; 2e-4, cosine, warm-up 0.1, 8 packed rows of 2048 tokens, 1 epoch.
# Our judgement: adapters on all matrices, the experts too.
set -eu
cd "$(dirname "$0")/.."

: "${MODEL:=zai-org/GLM-4.7-Flash}" "${ZERO:=2}" "${NUM_GPUS:=1}"
: "${LEARNING_RATE:=2e-4}" "${EPOCHS:=1}" "${MAX_LENGTH:=2048}" "${BATCH_SIZE:=1}" "${ACCUMULATION:=8}"
export MODEL ZERO NUM_GPUS LEARNING_RATE EPOCHS MAX_LENGTH BATCH_SIZE ACCUMULATION
exec sh ds_all.sh --gradient_checkpointing --lora --lora_rank 32 --lora_alpha 16 --lora_dropout 0 \
    --warmup_steps 0.1 "$@"
