#!/bin/sh
# Measure training on one GPU: steps beside TRL, train.py, LoRA, exactness, memory, replies, the families; under nine
# minutes on an H200. No network. The table and gpu.json lie in $OUT, else .cache/benchmarks. Without a GPU, or with
# TOY=1, toy sizes on the CPU prove that all of it runs.
#
#   sh benchmarks/run_gpu.sh
#   WHEELS=/tmp/wheels sh benchmarks/run_gpu.sh --only steps     # packages that the machine lacks; pack_gpu.sh fills it
#   parts: selftest steps exact loop memory lora replies moe
set -eu
: "${PYTHON:=python3}" "${WHEELS:=}" "${OUT:=}"
if [ -n "$WHEELS" ]; then
    WHEELS=$(cd "$WHEELS" && pwd)
fi
if [ -n "$OUT" ]; then
    mkdir -p "$OUT"
    OUT=$(cd "$OUT" && pwd)
    export OUT
fi
cd "$(dirname "$0")/.."

if [ -n "$WHEELS" ]; then
    SITE=$(mktemp -d)
    trap 'rm -rf "$SITE"' EXIT
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$SITE" "$WHEELS"/*.whl
    PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}"
    export PYTHONPATH
fi
: "${TRITON_CACHE_DIR:=${TMPDIR:-/tmp}/triton}" "${TORCHINDUCTOR_CACHE_DIR:=${TMPDIR:-/tmp}/inductor}"
export TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR HF_HUB_OFFLINE=1
PYTHONPATH="benchmarks:benchmarks/gpu${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" -u benchmarks/gpu/run.py "$@"
