"""`torchrun ... -m megatron_r1v2.prefer RECIPE.yaml section.key=value ...` builds preference pairs; see `--help`."""

from __future__ import annotations

import os
import sys

from megatron_r1v2.config.command_line import parse_command_line, quiet_libraries, tell_bad_input

DESCRIPTION = """
Builds preference pairs from the model's own responses to the prompts of data.train: generation.responses_per_prompt
responses to each, scored as in GRPO (section reward), train.prompts_per_step prompts at a time. A right, well-formed
response is chosen over a wrong one ("correctness") or over a right one of lower reward ("margin"); for a part of the
prompts it is also chosen over its own first half continued without the image ("dropout_ntp"). Settings: section pairs.

The shards in pairs.output are what data.train of the mpo stage reads: image, question, answer and facts as they were,
with chosen, rejected, margin and source. pairs.json in that folder counts the pairs, and what made none by reason.
Started again with the same settings after an interruption, the command goes on from the last finished round.

Iterative MPO builds new pairs with the model of the round before:
  python -m megatron_r1v2.prefer recipe.yaml pairs.output=pairs/1
  python -m megatron_r1v2.mpo    recipe.yaml data.train=pairs/1 run.output_dir=runs/mpo-1
  python -m megatron_r1v2.prefer recipe.yaml pairs.output=pairs/2 model.checkpoint=runs/mpo-1
  python -m megatron_r1v2.mpo    recipe.yaml data.train=pairs/2 model.checkpoint=runs/mpo-1 run.output_dir=runs/mpo-2
"""


def main() -> None:
    """Build the pairs."""
    recipe = parse_command_line(sys.argv[1:], "prefer", description=DESCRIPTION)
    quiet_libraries()
    # Imported after the settings are checked: a typo should not take the seconds that megatron-core needs.
    from megatron_r1v2.stages.pairs import run_prefer

    with tell_bad_input():
        output = run_prefer(recipe)
    if os.environ.get("RANK", "0") == "0":
        print(f"pairs: {output}")


if __name__ == "__main__":
    main()
