#!/bin/sh
# Blossom v5, second stage, from the first one's model: 10,000 chats of many turns and a tenth of the first stage again,
# 3 times; 8 x 80 GB.
#
#   python -m sft.opendata --mix blossom-v5-stage2 --output data_proj/blossom-v5-stage2
#   sh recipes/blossom-v5-stage2.sh
#
# Or another tenth in each epoch, of the very rows of the first stage:
#   python -m sft.opendata Azure99/blossom-chat-v3@10000 --output data_proj/blossom-v5-chat
#   DATA=data_proj/blossom-v5-chat REPLAY=data_proj/blossom-v5-stage1@0.1x sh recipes/blossom-v5-stage2.sh
#
# Knobs: REPLAY, a second path of data, and those of ds_all.sh; flags of train.py at the end override them.
# Data and epochs: huggingface.co/Azure99/blossom-v5-9b. Its tenth is one of the conversations: 9,000 beside the 10,000.
# Our judgement, for the card names none: rate, length and rows of the first stage, 1e-5 of Yi's report (arXiv 2403.04652).
set -eu
cd "$(dirname "$0")/.."

: "${MODEL:=runs/blossom-v5-stage1/model}" "${DATA:=data_proj/blossom-v5-stage2}"
: "${OUTPUT:=runs/blossom-v5-stage2}" "${ZERO:=2}"
: "${LEARNING_RATE:=1e-5}" "${EPOCHS:=3}" "${MAX_LENGTH:=4096}" "${BATCH_SIZE:=1}" "${ACCUMULATION:=16}"
export MODEL DATA OUTPUT ZERO LEARNING_RATE EPOCHS MAX_LENGTH BATCH_SIZE ACCUMULATION
[ -z "${REPLAY:-}" ] || set -- --data_path "$DATA" "$REPLAY" "$@"
exec sh ds_all.sh --gradient_checkpointing --chat_format blossom "$@"
