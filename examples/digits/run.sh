#!/usr/bin/env bash
# The paper in miniature on real handwriting, on a CPU in minutes. `make demo` runs this; so does
#   source .venv/bin/activate && bash examples/digits/run.sh [section.key=value ...]    settings of grpo.yaml to change
# Each line below is `step NAME` and a command, which runs as it stands from the repository's folder.
set -euo pipefail
OUT=runs/digits
# shellcheck source=examples/steps.sh
source "$(dirname "${BASH_SOURCE[0]}")/../steps.sh"

# Pictures of two handwritten digits and questions about them, in five sets that share no handwriting where it matters.
step data python -m examples.digits.make_data --output runs/digits/data

# The components, as Hugging Face folders: a Qwen2 pretrained on text, an InternViT pretrained on single digits.
export OMP_NUM_THREADS=1
beside language-model python -m examples.digits.make_language_model --output runs/digits/components/language
beside vision-tower python -m examples.digits.make_vision_tower --output runs/digits/components/vision

# Meanwhile rows and images become checked shards, which training reads.
for name in align prefer grpo validation heldout; do
  step "shards-$name" r1v2 prepare "runs/digits/data/$name.jsonl" --images runs/digits/data/images \
    --output "runs/digits/shards/$name"
done
join

# Splice tower and language model; the adapter between them is drawn at random.
step base python -m checkpoint_tools.reassemble --vision runs/digits/components/vision \
  --language runs/digits/components/language --output runs/digits/base

# The adapter learns from reference responses until a little under half of its answers are right. Two data-parallel ranks
# keep two cores busy, here and below.
step align torchrun --standalone --nproc-per-node 2 -m megatron_r1v2 align examples/digits/align.yaml

# Pass@1 on handwriting that no stage trains on; and preference pairs of the model's own responses.
beside evaluate-aligned r1v2 evaluate examples/digits/grpo.yaml --name aligned \
  evaluation.data=runs/digits/shards/heldout model.checkpoint=runs/digits/align
beside pairs r1v2 pairs examples/digits/pairs.yaml
join

# Mixed preference optimization on these pairs.
step mpo torchrun --standalone --nproc-per-node 2 -m megatron_r1v2 mpo examples/digits/mpo.yaml
export OMP_NUM_THREADS=2
step evaluate-mpo r1v2 evaluate examples/digits/grpo.yaml --name mpo \
  evaluation.data=runs/digits/shards/heldout model.checkpoint=runs/digits/mpo

# GRPO with the Selective Sample Buffer, from rewards alone.
export OMP_NUM_THREADS=1
step grpo torchrun --standalone --nproc-per-node 2 -m megatron_r1v2 grpo examples/digits/grpo.yaml "$@"
export OMP_NUM_THREADS=2
step evaluate-grpo r1v2 evaluate examples/digits/grpo.yaml --name grpo \
  evaluation.data=runs/digits/shards/heldout model.checkpoint=runs/digits/grpo

# A folder that plain transformers loads, a page about the run, and the picture of the README.
beside export python -m checkpoint_tools.megatron_to_hf --checkpoint runs/digits/grpo --base runs/digits/base \
  --output runs/digits/export
beside report r1v2 report runs/digits/grpo
join
step picture python -m examples.digits.picture --run runs/digits/grpo --output runs/digits/demo.svg

[[ -n ${LIST_STEPS:-} ]] || python -m examples.results runs/digits --start 0.35 0.60 --goal 0.85
