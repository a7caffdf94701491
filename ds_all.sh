#!/bin/sh
# Fine-tune in several processes under DeepSpeed: one per GPU, or two on a machine without one.
#
#   MODEL=Qwen/Qwen2.5-7B DATA=data_proj/opendata sh ds_all.sh --learning_rate 1e-5     8 x 80 GB, ZeRO-3
#   ZERO=2 NUM_GPUS=4 MODEL=bigscience/bloom-1b7 sh ds_all.sh                           4 x 24 GB
#   HOSTFILE=hosts MODEL=01-ai/Yi-34B sh ds_all.sh                                      several machines
#
# The knobs of base_run.sh, and:
#   ZERO      2 shares optimizer and gradients among the GPUs, 3 the weights too; 3
#   NUM_GPUS  processes on this machine; all GPUs, or two CPU processes where there are none
#   HOSTFILE  DeepSpeed's list of machines, a line each: "name slots=8"; needs ssh and the same paths on each
set -eu
cd "$(dirname "$0")"

: "${PYTHON:=python3}"
: "${ZERO:=3}"
case "$ZERO" in 2 | 3) ;; *) echo "ds_all.sh: ZERO=$ZERO: use 2 or 3" >&2; exit 2 ;; esac
if [ -z "${NUM_GPUS:-}" ]; then
    NUM_GPUS=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 2)')
fi

# torchrun takes a free port, and ends the workers when it is ended itself; the deepspeed launcher reaches other machines.
if [ -n "${HOSTFILE:-}" ]; then
    LAUNCHER="$PYTHON -m deepspeed.launcher.runner --hostfile $HOSTFILE"
else
    LAUNCHER="$PYTHON -m torch.distributed.run --standalone --nproc_per_node $NUM_GPUS"
fi
export PYTHON LAUNCHER
exec sh base_run.sh --deepspeed "ds_zero$ZERO.json" "$@"
