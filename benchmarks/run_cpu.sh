#!/bin/sh
# Measure preparing, the step and start-up beside the peers on a CPU, and write benchmarks/RESULTS.md; about 30 minutes
# on two quiet cores. The first run installs the peers into .cache/peers.
#
#   sh benchmarks/run_cpu.sh
#   PYTHON=.venv/bin/python REPEATS=1 NUM_RECORDS=5000 sh benchmarks/run_cpu.sh
#
# LLaMA-Factory has an environment of its own, for it asks for transformers<=5.6.0 and datasets<=4.0.0; only its
# preparing is measured.
set -eu
cd "$(dirname "$0")/.."

: "${PYTHON:=python3}" "${REPEATS:=3}" "${NUM_RECORDS:=20000}"
: "${TORCH:=torch==2.13.0}"   # a machine without the CPU wheel on its index: TORCH=torch==2.13.0+cpu
: "${PEER_PYTHON:=.cache/peers/trl/bin/python}"
export PEER_PYTHON OMP_NUM_THREADS=1

if [ ! -x "$PEER_PYTHON" ]; then
    "$PYTHON" -m venv .cache/peers/trl
    .cache/peers/trl/bin/pip install -q "$TORCH" trl==1.16.0 transformers==5.23.0 datasets==5.2.0 accelerate==1.15.0
fi
if [ ! -x .cache/peers/llamafactory/bin/python ]; then
    "$PYTHON" -m venv .cache/peers/llamafactory
    .cache/peers/llamafactory/bin/pip install -q "$TORCH" llamafactory==0.9.5
    .cache/peers/llamafactory/bin/pip uninstall -q -y torchvision torchaudio  # CUDA builds, which transformers fails on
fi

"$PYTHON" benchmarks/prepare_speed.py "$NUM_RECORDS" --repeats "$REPEATS"
"$PYTHON" benchmarks/prepare_speed.py 50000 --sides ours --repeats 1
"$PYTHON" benchmarks/prepare_speed.py 200000 --sides ours trl --repeats 1
"$PYTHON" benchmarks/step_speed.py --repeats "$REPEATS"
"$PYTHON" benchmarks/startup.py --repeats "$REPEATS"
"$PYTHON" benchmarks/results.py
