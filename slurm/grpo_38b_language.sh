#!/usr/bin/env bash
# GRPO on the 38B model, language model and adapter. Submit from the top folder of the repository:
#   sbatch slurm/grpo_38b_language.sh [section.key=value ...]
# Outside of a job, bash slurm/grpo_38b_language.sh rehearses it on this machine, and ends.
# Resources are here, every other setting in the recipe. Give sbatch --partition and --account as your site asks, and
# --nodes to use more of them: each further node is one more data-parallel rank.
#SBATCH --job-name=r1v2-grpo-language
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@2400
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
source slurm/launch.sh
launch grpo examples/r1v2_38b/grpo_language.yaml "$@"
