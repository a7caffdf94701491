# A box with CUDA: the toolkit in /sft, its packages in /opt/venv.
#
#   docker build -t chat-sft .
#   docker run --gpus all -v "$PWD/runs:/sft/runs" chat-sft                                    the embedded default
#   docker run --gpus all --shm-size 16g -v "$PWD/runs:/sft/runs" -v "$PWD/data:/data" \
#       -e MODEL=Qwen/Qwen2.5-7B -e DATA=/data chat-sft sh ds_all.sh --gradient_checkpointing
#
# The devel image has nvcc, with which DeepSpeed compiles its kernels.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

ENV VENV=/opt/venv PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 DEBIAN_FRONTEND=noninteractive
WORKDIR /sft

# The packages first: they change less often than the code.
COPY .ci/install .ci/install
COPY requirements.txt requirements-gpu.txt ./
RUN sh .ci/install && pip install -q -r requirements-gpu.txt

COPY . .
RUN pip install -q --no-deps --editable .

EXPOSE 7860
CMD ["sh", "base_run.sh"]
