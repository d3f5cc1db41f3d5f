"""A comparison of an export with plain transformers: greedy responses and logits, in two processes.

One process answers held-out questions with the rollout engine and computes the logits of each answer with the training
forward. Another one, which imports torch and transformers only, loads the exported folder and does the same.

python -m examples.verify_export --run runs/digits/grpo --export runs/digits/export
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

MAX_RELATIVE_DIFFERENCE = 1e-4
"""Accepted max |a - b| / max |b| of the logits, in fp32."""


def answer_with_ours(run: Path, data: Path, count: int, output: Path) -> None:
    """Write prompts, greedy responses and logits of a run's newest checkpoint, by megatron-core."""
    from megatron_r1v2.config.load import load_recipe
    from megatron_r1v2.generation.engine import Sampling
    from megatron_r1v2.stages.loaded_model import open_model

    recipe = load_recipe(run / "recipe.yaml", [f"model.checkpoint={run}"])
    with open_model(recipe) as loaded:
        prompts = list(loaded.read_prompts(str(data), count))
        rollouts = loaded.engine().generate(
            prompts,
            Sampling(
                num_responses=1,
                policy_version=0,
                temperature=0.0,
                max_response_tokens=recipe.generation.max_response_tokens,
            ),
            features=loaded.feature_cache(),
        )
        items = []
        for prompt, rollout in zip(prompts, rollouts, strict=True):
            ids = torch.tensor([[*prompt.token_ids, *rollout.token_ids]])
            with torch.no_grad():
                logits = loaded.model(ids, torch.arange(ids.shape[1])[None], tiles_TCHW=prompt.tiles_TCHW)
            items.append(
                {
                    "key": prompt.key,
                    "prompt": list(prompt.token_ids),
                    "response": list(rollout.token_ids),
                    "tiles": prompt.tiles_TCHW,
                    "logits": logits[0, :, : loaded.architecture.language.vocab_size].clone(),
                }
            )
        torch.save({"items": items, "max_tokens": recipe.generation.max_response_tokens}, output)


def compare_with_transformers(export: Path, answers: Path) -> int:
    """Load the export with plain transformers, compare, and return the exit code."""
    from transformers import AutoImageProcessor, AutoTokenizer, InternVLForConditionalGeneration

    saved = torch.load(answers, weights_only=True)
    model = InternVLForConditionalGeneration.from_pretrained(export, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(export)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (processor.image_mean, processor.image_std))
    stop = AutoTokenizer.from_pretrained(export).convert_tokens_to_ids("<|im_end|>")
    # Prompts of one length at a time, so that no padding takes part in the comparison.
    by_length: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for item in saved["items"]:
        item["pixels"] = (item["tiles"].float() / 255 - mean) / std
        by_length[len(item["prompt"])].append(item)
    same, worst, largest = 0, 0.0, 0.0
    for items in by_length.values():
        pixels = torch.cat([item["pixels"] for item in items])
        generated = model.generate(
            input_ids=torch.tensor([item["prompt"] for item in items]),
            attention_mask=torch.ones(len(items), len(items[0]["prompt"]), dtype=torch.long),
            pixel_values=pixels,
            do_sample=False,
            max_new_tokens=saved["max_tokens"],
            eos_token_id=stop,
            pad_token_id=stop,
        )
        for item, row in zip(items, generated.tolist(), strict=True):
            theirs = row[len(item["prompt"]) :]
            theirs = theirs[: theirs.index(stop) + 1] if stop in theirs else theirs
            same += theirs == item["response"]
            with torch.no_grad():
                ids = torch.tensor([item["prompt"] + item["response"]])
                logits = model(input_ids=ids, pixel_values=item["pixels"]).logits[0]
            worst = max(worst, float((logits - item["logits"]).abs().max()))
            largest = max(largest, float(logits.abs().max()))
    count, relative = len(saved["items"]), worst / largest
    print(f"greedy responses equal: {same} of {count}; logits: max |a - b| / max |b| = {relative:.2e}")
    return 0 if same == count and relative <= MAX_RELATIVE_DIFFERENCE else 1


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.verify_export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", type=Path, help="folder of the GRPO run")
    parser.add_argument("--export", type=Path, required=True, help="HF folder made by checkpoint_tools.megatron_to_hf")
    parser.add_argument("--data", type=Path, help="held-out shards (default: shards/heldout beside the run)")
    parser.add_argument("--prompts", type=int, default=100, help="number of held-out prompts (default: 100)")
    parser.add_argument("--answers", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answers:
        raise SystemExit(compare_with_transformers(options.export, options.answers))
    if options.run is None:
        parser.error("--run is required")
    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder) / "answers.pt"
        data = options.data or options.run.parent / "shards" / "heldout"
        answer_with_ours(options.run, data, options.prompts, answers)
        command = [sys.executable, "-m", "examples.verify_export"]
        raise SystemExit(
            subprocess.run([*command, "--export", str(options.export), "--answers", str(answers)]).returncode
        )


if __name__ == "__main__":
    main()
