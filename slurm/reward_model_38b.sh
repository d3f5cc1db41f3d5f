#!/usr/bin/env bash
# A reward model on the pairs of pairs_38b.sh: the 38B model with a scalar head. Submit from the top folder of the
# repository:
#   sbatch slurm/reward_model_38b.sh [section.key=value ...]
# Outside of a job, bash slurm/reward_model_38b.sh rehearses it on this machine, and ends.
# Resources are here, every other setting in the recipe. Give sbatch --partition and --account as your site asks, and
# --nodes to use more of them: each further node is one more data-parallel rank.
#SBATCH --job-name=r1v2-reward-model
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@1200
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
source slurm/launch.sh
launch reward-model examples/r1v2_38b/reward_model.yaml "$@"
