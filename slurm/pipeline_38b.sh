#!/usr/bin/env bash
# Submit the whole 38B chain, each job after the one before has ended well: align, pairs, mpo, grpo, evaluate, export.
# Run it (not with sbatch) in the top folder of the repository; its arguments go to every sbatch:
#   bash slurm/pipeline_38b.sh [--partition=... --account=... ...]
# The model to start from is checkpoints/r1v2-38b-hf, which checkpoint_tools/reassemble.py writes. A job that is put back
# in the queue keeps its number, so those after it wait. R1V2_FROM=STAGE begins the chain later.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stages=(align pairs mpo grpo evaluate export)
from=${R1V2_FROM:-align}
if [[ " ${stages[*]} " != *" $from "* ]]; then
  echo "R1V2_FROM=$from; accepted: ${stages[*]}" >&2
  exit 2
fi

before=''
for stage in "${stages[@]}"; do
  [[ -n $before || $stage == "$from" ]] || continue
  command=("slurm/${stage}_38b.sh")
  if [[ $stage == export ]]; then
    export R1V2_TOOL=megatron_to_hf
    command=(slurm/convert_38b.sh --checkpoint runs/r1v2-38b-grpo --base checkpoints/r1v2-38b-hf
      --output checkpoints/r1v2-38b-trained)
  fi
  before=$(sbatch --parsable ${before:+"--dependency=afterok:$before"} "$@" "${command[@]}")
  before=${before%%;*}  # JOB;CLUSTER on federated systems
  echo "$stage: job $before"
done
