#!/bin/sh
# Fine-tune in several processes under DeepSpeed: one per GPU, or two on a machine without one.
#
#   MODEL=Qwen/Qwen2.5-7B DATA=data_proj/opendata sh ds_all.sh --learning_rate 1e-5     8 x 80 GB, ZeRO-3
#   ZERO=2 NUM_GPUS=4 MODEL=bigscience/bloom-1b7 sh ds_all.sh                           4 x 24 GB
#
# The knobs of base_run.sh, and the same rows per update: all processes share BATCH_SIZE x ACCUMULATION.
#   ZERO      2 shares optimizer and gradients among the GPUs, 3 the weights too; 3
#   OFFLOAD   1 keeps the optimizer's state in the machine's memory, under ZERO=3 the weights too; 0
#   SEQUENCE_PARALLEL  GPUs that share each packed row, for rows that are too long for one; 1
#   NUM_GPUS  processes on this machine; all GPUs, or two CPU processes where there are none
#   GRACE     seconds to save a checkpoint in after TERM, INT, HUP or USR1, before KILL; 60
# Several machines, which see the same folders; MODEL and OUTPUT must be named:
#   HOSTFILE  a line for each machine: "name slots=8"; started from one of them, needs ssh to the others
#   srun sh ds_all.sh under Slurm, one task per machine; or by hand on each, with NNODES, NODE_RANK and MASTER_ADDR
#   MASTER_PORT   where they meet; by hand 29500, under Slurm from the job's number, else a free one
#   NODE_TIMEOUT  seconds to wait for another machine, at the start or when it falls silent; 300
set -eu
cd "$(dirname "$0")"

: "${PYTHON:=python3}"
: "${ZERO:=3}"
case "$ZERO" in 2 | 3) ;; *) echo "ds_all.sh: ZERO=$ZERO: use 2 or 3" >&2; exit 2 ;; esac
case "${OFFLOAD:=0}" in
0) ;;
1) set -- --offload "$@" ;;
*) echo "ds_all.sh: OFFLOAD=$OFFLOAD: use 0 or 1" >&2; exit 2 ;;
esac
previous=
for word in "$@"; do # given as a flag, it counts for the rows of an update too
    case "$previous:$word" in
    --sequence_parallel_size:*) SEQUENCE_PARALLEL=$word ;;
    *:--sequence_parallel_size=*) SEQUENCE_PARALLEL=${word#*=} ;;
    esac
    previous=$word
done
case "${SEQUENCE_PARALLEL:=1}" in
1) ;;
0* | *[!0-9]*) echo "ds_all.sh: SEQUENCE_PARALLEL=$SEQUENCE_PARALLEL: use a whole number from 1" >&2; exit 2 ;;
*) set -- --sequence_parallel_size "$SEQUENCE_PARALLEL" "$@" ;;
esac
if [ -n "${SLURM_JOB_ID:-}" ]; then
    # The same folder on every machine, and again when the job has been put back into the queue.
    : "${OUTPUT:=runs/slurm-$SLURM_JOB_ID}"
    export OUTPUT
fi

NUM_PROCESSES=$("$PYTHON" -m sft.launch --processes)
LAUNCHER="$PYTHON -m sft.launch"
if [ $((NUM_PROCESSES % SEQUENCE_PARALLEL)) -ne 0 ]; then
    echo "ds_all.sh: SEQUENCE_PARALLEL=$SEQUENCE_PARALLEL: $NUM_PROCESSES processes can't be divided by it" >&2
    exit 2
fi
export PYTHON LAUNCHER NUM_PROCESSES SEQUENCE_PARALLEL
exec sh base_run.sh --deepspeed "ds_zero$ZERO.json" "$@"
