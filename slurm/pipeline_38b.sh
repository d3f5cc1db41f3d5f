#!/usr/bin/env bash
# Submit the whole 38B chain, each job after the one before has ended well: align, pairs, mpo, grpo, evaluate, export.
# Run it (not with sbatch) in the top folder of the repository; its arguments go to every sbatch:
#   bash slurm/pipeline_38b.sh [--partition=... --account=... ...]
# The model to start from is checkpoints/r1v2-38b-hf, which checkpoint_tools/reassemble.py writes. A job that is put back
# in the queue keeps its number, so those after it wait. R1V2_FROM=STAGE begins the chain later. Nothing is submitted
# where a folder that a later job reads is missing, or one that it writes is in its way.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stages=(align pairs mpo grpo evaluate export)
from=${R1V2_FROM:-align}
if [[ " ${stages[*]} " != *" $from "* ]]; then
  echo "R1V2_FROM=$from; accepted: ${stages[*]}" >&2
  exit 2
fi

submitted=()
for stage in "${stages[@]}"; do
  if [[ ${#submitted[@]} -gt 0 || $stage == "$from" ]]; then submitted+=("$stage"); fi
done

# value_of RECIPE KEY: as the recipe has it, or the one that it begins with; empty for a list.
value_of() {
  local file=examples/r1v2_38b/$1.yaml defaults
  if ! grep -q "^  $2:" "$file"; then
    defaults=$(sed -n 's/^defaults: *//p' "$file")
    [[ -z $defaults ]] || value_of "${defaults%.yaml}" "$2"
    return 0
  fi
  sed -n "s/^  $2: *\([^ #]*\).*/\1/p" "$file" | tr -d "\"'"
}

# reads STAGE: the folders that a job finds or fails.
reads() {
  case $1 in
    evaluate | export)
      value_of grpo output_dir
      value_of grpo hf_path
      sed -n "s/.* evaluation.data=\([^ ]*\).*/\1/p" "slurm/$1_38b.sh" 2>/dev/null || true
      ;;
    pairs) for key in hf_path checkpoint train; do value_of pairs "$key"; done ;;
    *) for key in hf_path checkpoint train validation; do value_of "$1" "$key"; done ;;
  esac
}

# A job that fails days from now leaves those after it waiting for ever.
mistakes=0
known=''
for stage in "${submitted[@]}"; do
  while read -r folder; do
    if [[ -n $folder && " $known " != *" $folder "* && ! -d $folder ]]; then
      echo "$stage reads $folder, which is not here" >&2
      mistakes=1
    fi
    known+=" $folder"  # said once
  done < <(reads "$stage")
  case $stage in
    pairs) taken=$(value_of pairs output_dir) ;;
    export) taken=checkpoints/r1v2-38b-trained ;;
    *) taken='' ;;
  esac
  if [[ -n $taken && -e $taken ]]; then
    echo "$stage writes $taken, which exists already; move it away, or begin later with R1V2_FROM" >&2
    mistakes=1
  fi
  [[ $stage == evaluate || $stage == export ]] || known+=" $(value_of "$stage" output_dir)"
done
((mistakes == 0)) || exit 2

before=''
for stage in "${submitted[@]}"; do
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
