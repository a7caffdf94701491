#!/bin/sh
# Fine-tune in one process, on a GPU or on a plain CPU.
#
#   sh base_run.sh                 the embedded default: sample data, a tiny base, replies; about two minutes on 2 CPU cores
#   MODEL=Qwen/Qwen2.5-0.5B DATA=data_proj/opendata sh base_run.sh --learning_rate 1e-5 --gradient_checkpointing
#
# Knobs by environment; flags of train.py at the end override them:
#   MODEL          local folder or hub model            DATA           file, folder or glob; data_proj/opendata
#   OUTPUT         folder of the run; runs/<time>       EPOCHS         times through the data; 3
#   LEARNING_RATE  peak; 1e-5                           MAX_LENGTH     tokens per row; 2048
#   BATCH_SIZE     rows per process and step; 4         ACCUMULATION   steps per update; 8
#   PYTHON         the interpreter; python3             LAUNCHER       what runs train.py; set by ds_all.sh
set -eu
cd "$(dirname "$0")"

: "${PYTHON:=python3}"
: "${LAUNCHER:=$PYTHON}"
: "${OUTPUT:=runs/$(date +%Y%m%d-%H%M%S)}"

if [ -z "${MODEL:-}" ]; then
    # The embedded default: a base that learns the sample by heart, so that every step of the way can be seen at work.
    if [ -z "${DATA:-}" ]; then
        "$PYTHON" -m sft.opendata data_proj/sample --output "$OUTPUT/opendata"
        DATA="$OUTPUT/opendata"
    fi
    "$PYTHON" -m sft.tiny --family qwen2 --vocab_size 3072 --output_dir "$OUTPUT/base"
    MODEL="$OUTPUT/base"
    : "${EPOCHS:=60}" "${LEARNING_RATE:=5e-3}" "${BATCH_SIZE:=2}" "${ACCUMULATION:=1}" "${MAX_LENGTH:=256}"
    set -- --chat_format chatml --adam_beta2 0.95 --logging_steps 50 --eval_strategy steps --eval_steps 0.1 "$@"
fi

: "${DATA:=data_proj/opendata}"
: "${EPOCHS:=3}" "${LEARNING_RATE:=1e-5}" "${BATCH_SIZE:=4}" "${ACCUMULATION:=8}" "${MAX_LENGTH:=2048}"

# LAUNCHER is a command line: its words are split on purpose.
# shellcheck disable=SC2086
exec $LAUNCHER train.py \
    --model_name_or_path "$MODEL" \
    --data_path "$DATA" \
    --output_dir "$OUTPUT/model" \
    --num_train_epochs "$EPOCHS" \
    --learning_rate "$LEARNING_RATE" \
    --max_length "$MAX_LENGTH" \
    --per_device_train_batch_size "$BATCH_SIZE" \
    --per_device_eval_batch_size "$BATCH_SIZE" \
    --gradient_accumulation_steps "$ACCUMULATION" \
    "$@"
