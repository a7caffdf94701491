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
#   PYTHON         the interpreter; python3
#   DRY_RUN        1 shows and checks what the run would do, on any machine, without reading the weights; 0
#   PROBE_STEPS    3 or more: a dry run that then measures memory and time in so many steps, of which nothing is kept
#   LAUNCHER       what runs train.py, and NUM_PROCESSES, which share the steps of an update: set by ds_all.sh
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
    : "${EPOCHS:=60}" "${LEARNING_RATE:=5e-3}" "${BATCH_SIZE:=1}" "${ACCUMULATION:=1}" "${MAX_LENGTH:=512}"
    set -- --chat_format chatml --adam_beta2 0.95 --logging_steps 50 --eval_strategy steps --eval_steps 0.1 "$@"
fi

: "${DATA:=data_proj/opendata}"
: "${BATCH_SIZE:=4}" "${ACCUMULATION:=8}"
# train.py has the defaults of these three; a flag at the end comes later and wins.
[ -z "${MAX_LENGTH:-}" ] || set -- --max_length "$MAX_LENGTH" "$@"
[ -z "${LEARNING_RATE:-}" ] || set -- --learning_rate "$LEARNING_RATE" "$@"
[ -z "${EPOCHS:-}" ] || set -- --num_train_epochs "$EPOCHS" "$@"

# An update takes BATCH_SIZE x ACCUMULATION rows, however many processes there are: each does its part of the steps, of
# smaller ones if need be, and more than its part only where nothing else is left.
case "${SEQUENCE_PARALLEL:-1}:${NUM_PROCESSES:-}" in
1:* | *:?*) ;;
*) echo "base_run.sh: SEQUENCE_PARALLEL=$SEQUENCE_PARALLEL: one process can't share rows; use ds_all.sh" >&2; exit 2 ;;
esac
: "${NUM_PROCESSES:=1}"
num_groups=$((NUM_PROCESSES / ${SEQUENCE_PARALLEL:-1})) # of processes that share their rows (ds_all.sh)
if [ "$num_groups" -gt 1 ]; then
    case "$BATCH_SIZE:$ACCUMULATION" in
    0*:* | *:0* | *[!0-9:]* | :* | *:)
        echo "base_run.sh: BATCH_SIZE=$BATCH_SIZE ACCUMULATION=$ACCUMULATION: use whole numbers from 1" >&2
        exit 2
        ;;
    esac
    rows=$((BATCH_SIZE * ACCUMULATION))
    each=$(((rows + num_groups - 1) / num_groups))
    if [ $((each * num_groups)) -eq "$rows" ]; then
        while [ $((each % BATCH_SIZE)) -ne 0 ]; do BATCH_SIZE=$((BATCH_SIZE - 1)); done
    elif [ "$each" -lt "$BATCH_SIZE" ]; then
        BATCH_SIZE=$each
    fi
    ACCUMULATION=$(((each + BATCH_SIZE - 1) / BATCH_SIZE))
    taken=$((num_groups * BATCH_SIZE * ACCUMULATION))
    if [ "$taken" -ne "$rows" ]; then
        echo "base_run.sh: $num_groups processes can't share $rows rows per update evenly: it takes $taken" >&2
    fi
fi

[ -z "${PROBE_STEPS:-}" ] || set -- --probe_steps "$PROBE_STEPS" "$@"
case "${DRY_RUN:=0}" in
0) ;;
1)
    case " $* " in *" --probe_steps"[\ =]*) ;; *) LAUNCHER=$PYTHON ;; esac # only a probe needs all processes
    set -- --dry_run "$@"
    ;;
*) echo "base_run.sh: DRY_RUN=$DRY_RUN: use 0 or 1" >&2; exit 2 ;;
esac

# LAUNCHER is a command line: its words are split on purpose.
# shellcheck disable=SC2086
exec $LAUNCHER train.py \
    --model_name_or_path "$MODEL" \
    --data_path "$DATA" \
    --output_dir "$OUTPUT/model" \
    --per_device_train_batch_size "$BATCH_SIZE" \
    --per_device_eval_batch_size "$BATCH_SIZE" \
    --gradient_accumulation_steps "$ACCUMULATION" \
    "$@"
