#!/usr/bin/env bash
# Does it install and run, on another Python or with the oldest packages that pyproject.toml allows? uv makes a new
# environment with a wheel of this tree in a temporary folder (5 GB, removed at the end) and scripts/smoke.py runs there.
#   scripts/smoke.sh python3.13                     # with the newest packages
#   scripts/smoke.sh python3.11 lowest-direct       # with the oldest ones
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
uv venv --quiet --python "$1" env
uv build --quiet --wheel --out-dir . "$root"
uv pip install --quiet --python env/bin/python --resolution "${2:-highest}" --requirements "$root/pyproject.toml"
uv pip install --quiet --python env/bin/python --no-deps ./*.whl
uv pip list --python env/bin/python | grep -E '^(torch|transformers|tokenizers|trl|deepspeed|datasets|peft|accelerate|numpy|pydantic|matplotlib) '
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
env/bin/python -P "$root/scripts/smoke.py"
