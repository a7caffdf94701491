#!/bin/sh
# Fill a folder with all that run_gpu.sh needs on a machine without a network: the project, and wheels for Python 3.12
# that a CUDA image with torch, transformers and accelerate lacks. At most 60 MiB; needs git and a package registry here.
#
#   sh benchmarks/pack_gpu.sh /tmp/for_gpu                       # copy the folder to the GPU machine, then there:
#   cd for_gpu/project && WHEELS=../wheels sh benchmarks/run_gpu.sh
set -eu
FOLDER=${1:?name a folder to fill}
mkdir -p "$FOLDER/project" "$FOLDER/wheels"
FOLDER=$(cd "$FOLDER" && pwd)
cd "$(dirname "$0")/.."

: "${PYTHON:=python3}" "${CUDA:=130}"
git archive HEAD | tar -x -C "$FOLDER/project"
rm -f "$FOLDER/wheels"/*.whl
# transformers as tested; TRL and what it imports; dill and multiprocess belong to datasets.
"$PYTHON" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 -d "$FOLDER/wheels" \
    -r requirements-gpu.txt transformers==5.23.0 peft==0.21.2 trl==1.16.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 xxhash
"$PYTHON" benchmarks/gpu/slim_wheel.py "$FOLDER"/wheels/bitsandbytes-*.whl "$CUDA"
SIZE=$(du -sk "$FOLDER" | cut -f1)
echo "$FOLDER: $((SIZE / 1024)) MiB"
if [ "$SIZE" -gt 61440 ]; then
    echo "pack_gpu.sh: $FOLDER is larger than 60 MiB" >&2
    exit 1
fi
