#!/bin/sh
# GLM-4-9B-0414 with LoRA; one GPU of 40 GB by default.
#
#   sh recipes/glm4.sh
#
# Knobs: those of ds_all.sh; flags of train.py at the end override them.
# GLM-4's own (github.com/THUDM/GLM-4, finetune/configs/lora.yaml): LoRA r 8, alpha 32, dropout 0.1, on q, k and v; 5e-4,
#   linear, no warm-up, batches of 8 on 8 GPUs, 1024 tokens, 3000 steps.
# Our judgement: adapters on all matrices; 2 packed rows for about 8 conversations; 1 epoch.
set -eu
cd "$(dirname "$0")/.."

: "${MODEL:=zai-org/GLM-4-9B-0414}" "${ZERO:=2}" "${NUM_GPUS:=1}"
: "${LEARNING_RATE:=5e-4}" "${EPOCHS:=1}" "${MAX_LENGTH:=1024}" "${BATCH_SIZE:=1}" "${ACCUMULATION:=2}"
export MODEL ZERO NUM_GPUS LEARNING_RATE EPOCHS MAX_LENGTH BATCH_SIZE ACCUMULATION
exec sh ds_all.sh --gradient_checkpointing --lora --lora_rank 8 --lora_alpha 32 --lora_dropout 0.1 \
    --lr_scheduler_type linear --warmup_steps 0 "$@"
