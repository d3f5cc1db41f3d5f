#!/usr/bin/env bash
# GRPO on the 38B model, adapter only, on one GPU of 141 GB. Submit from the top folder of the repository:
#   sbatch slurm/grpo_38b_one_gpu.sh [section.key=value ...]
# Outside of a job, bash slurm/grpo_38b_one_gpu.sh rehearses it on this machine, and ends.
# Resources are here, every other setting in the recipe. Give sbatch --partition and --account as your site asks, and
# --nodes or --gpus-per-node to use more GPUs: each further one is one more data-parallel rank.
#SBATCH --job-name=r1v2-grpo-one-gpu
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=200G
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@2400
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
source slurm/launch.sh
export R1V2_GPU=${R1V2_GPU:-h200}
launch grpo examples/r1v2_38b/grpo_one_gpu.yaml "$@"
