#!/bin/sh
# One machine: MODEL (a directory; dense, or 4-bit of ours or bitsandbytes'), then NAME=DIRECTORY for every adapter.
# TP=2 splits the model over two processes. Other options of vLLM go into OPTIONS. VLLM is the command in front of MODEL.
set -e
model=$1
shift
exec ${VLLM:-vllm serve} "$model" --quantization lowrank_ops \
    --tensor-parallel-size "${TP:-1}" ${1:+--enable-lora --max-loras "${SLOTS:-8}" --max-lora-rank "${RANK:-16}" --lora-modules "$@"} $OPTIONS
