#!/usr/bin/env bash
# Several nodes without DeepSpeed's launcher: run this on every node, with the first node's address.
#   scripts/train_torchrun.sh NODES GPUS_PER_NODE FIRST_NODE --config configs/trado_8b_math_tracerl.yaml key=value ...
set -euo pipefail
nodes=$1 gpus=$2 first=$3
shift 3
exec torchrun --nnodes "$nodes" --nproc_per_node "$gpus" --rdzv_backend c10d --rdzv_endpoint "$first:${MASTER_PORT:-29500}" \
  scripts/train.py "$@"
