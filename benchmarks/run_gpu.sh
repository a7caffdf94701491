#!/bin/sh
# Measure full fine-tuning steps on one GPU, ours beside TRL where that is importable; under ten minutes on an H200.
# No network. Without a GPU it runs toys on the CPU and says so.
#
#   sh benchmarks/run_gpu.sh
#   PYTHON=python3.12 sh benchmarks/run_gpu.sh --shapes qwen2.5-0.5b
set -eu
cd "$(dirname "$0")/.."

: "${PYTHON:=python3}"
: "${TRITON_CACHE_DIR:=${TMPDIR:-/tmp}/triton}"
export TRITON_CACHE_DIR HF_HUB_OFFLINE=1
exec "$PYTHON" benchmarks/gpu_step.py "$@"
