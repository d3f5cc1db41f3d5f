#!/usr/bin/env bash
# Turn a Hugging Face folder of the 38B model into a torch_dist checkpoint, or with R1V2_TOOL one of the other tools of
# checkpoint_tools/ (reassemble, megatron_to_hf, verify). Submit from the top folder of the repository:
#   sbatch slurm/convert_38b.sh --hf checkpoints/r1v2-38b-hf --output checkpoints/r1v2-38b-megatron
# Resources are here, everything else is an argument of the tool. It needs no GPU; a conversion that was interrupted goes
# on with what is missing. Give sbatch --partition and --account as your site asks.
#SBATCH --job-name=r1v2-convert
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=128G
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}"
source slurm/launch.sh
check_bound
mapfile -t container < <(container_options)
trap 'put_back "out of time"' USR1
srun --ntasks=1 "${container[@]}" python -m "checkpoint_tools.${R1V2_TOOL:-hf_to_megatron}" "$@" &
wait "$!"
