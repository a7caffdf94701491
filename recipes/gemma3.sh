#!/bin/sh
# Gemma 3 with LoRA; one GPU of 24 GB by default.
#
#   sh recipes/gemma3.sh                                      gemma-3-1b-it
#   MODEL=google/gemma-3-4b-it sh recipes/gemma3.sh           text only; or google/gemma-3-12b-it on 80 GB
#
# Knobs: those of ds_all.sh; flags of train.py at the end override them: --load_in_4bit is the guide's QLoRA.
# Google's guide (ai.google.dev/gemma/docs/core/huggingface_text_finetune_qlora): LoRA r 16, alpha 16, dropout 0.05, all
#   matrices; 2e-4, constant, 4 packed rows of 512 tokens, 3 epochs, gradients clipped at 0.3. Its warm-up of 0.03 has
#   no effect under transformers' constant schedule.
set -eu
cd "$(dirname "$0")/.."

: "${MODEL:=google/gemma-3-1b-it}" "${ZERO:=2}" "${NUM_GPUS:=1}"
: "${LEARNING_RATE:=2e-4}" "${EPOCHS:=3}" "${MAX_LENGTH:=512}" "${BATCH_SIZE:=1}" "${ACCUMULATION:=4}"
export MODEL ZERO NUM_GPUS LEARNING_RATE EPOCHS MAX_LENGTH BATCH_SIZE ACCUMULATION
exec sh ds_all.sh --gradient_checkpointing --lora --lora_rank 16 --lora_alpha 16 --lora_dropout 0.05 \
    --lr_scheduler_type constant --warmup_steps 0 --max_grad_norm 0.3 "$@"
