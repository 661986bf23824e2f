#!/usr/bin/env bash
# Does it work and how fast is it, on the GPU of this machine? Offline, ten minutes at most; docs/gpu.md gets the table.
#
#   scripts/gpu_check.sh                      # the GPU, or small sizes on the CPU where there is none
#   scripts/gpu_check.sh --write /dev/stdout  # print the table and leave docs/gpu.md as it is
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 PYTHONPATH="$PWD"
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec timeout 600 "$python" scripts/gpu_check.py "$@"
