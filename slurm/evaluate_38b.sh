#!/usr/bin/env bash
# Pass@1 of the 38B run of grpo_38b.sh, or of another by model.checkpoint and run.output_dir. Submit from the top folder of the repository:
#   sbatch slurm/evaluate_38b.sh [section.key=value ...]
# Resources are here, every other setting in the recipe. Give sbatch --partition and --account as your site asks, and
# --nodes to use more of them: each further node is one more data-parallel rank.
#SBATCH --job-name=r1v2-evaluate
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
launch evaluate examples/r1v2_38b/grpo.yaml model.checkpoint=runs/r1v2-38b-grpo \
  evaluation.data=data/multimodal-math/test "$@"
