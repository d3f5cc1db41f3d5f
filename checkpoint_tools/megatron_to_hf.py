"""Turn a checkpoint of a run into an InternVL folder that transformers loads."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from checkpoint_tools.layout import add_layout_arguments, built_model
from megatron_r1v2.models.hf_weights import load_hf_weights, save_hf
from megatron_r1v2.training.checkpoint import load_weights, resolve_checkpoint

EXAMPLE = """example:
  python -m checkpoint_tools.megatron_to_hf --checkpoint runs/digits-grpo --base base-model --output export
  torchrun --nproc-per-node 8 -m checkpoint_tools.megatron_to_hf ... --tensor 8

A checkpoint holds the parts that were trained. The others, config.json, tokenizer and processor come from --base: the
folder that the run started from (its model.hf_path)."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m checkpoint_tools.megatron_to_hf",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run (its newest checkpoint) or a checkpoint")
    parser.add_argument("--base", type=Path, required=True, help="InternVL folder that the run started from")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder if it exists")
    add_layout_arguments(parser)
    options = parser.parse_args(arguments)
    try:
        checkpoint = resolve_checkpoint(options.checkpoint)
        with built_model(options.base, tensor=options.tensor, pipeline=options.pipeline) as (model, context):
            load_hf_weights(model, options.base, context)
            parts = load_weights(model, checkpoint)
            save_hf(model, options.output, base=options.base, context=context, overwrite=options.overwrite)
            if context.is_main:
                named = ", ".join(part.value for part in parts)
                print(f"wrote {options.output} ({named} from {checkpoint}, the rest from {options.base})")
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
