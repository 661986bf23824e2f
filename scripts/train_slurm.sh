#!/usr/bin/env bash
# sbatch scripts/train_slurm.sh --config configs/trado_8b_math_tracerl.yaml key=value ...
#SBATCH --job-name=denoise-rl
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --requeue
# Five minutes before the time limit the ranks get SIGTERM: they finish their step, write a checkpoint and end.
#SBATCH --signal=TERM@300
set -euo pipefail
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
resume=false
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || resume=true
srun scripts/train_torchrun.sh "$SLURM_NNODES" "$SLURM_GPUS_ON_NODE" "$first" "$@" "run.resume=$resume"
