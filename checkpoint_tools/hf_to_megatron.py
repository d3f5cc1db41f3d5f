"""Turn an InternVL folder into a torch_dist checkpoint of its weights."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from checkpoint_tools.layout import add_layout_arguments, built_model
from megatron_r1v2.config.schema import Part
from megatron_r1v2.models.hf_weights import load_hf_weights
from megatron_r1v2.training.checkpoint import save_weights

EXAMPLE = """example:
  python -m checkpoint_tools.hf_to_megatron --hf r1v2-start --output r1v2-start-megatron
  torchrun --nproc-per-node 8 -m checkpoint_tools.hf_to_megatron --hf r1v2-38b --output r1v2-38b-megatron --tensor 8

Training reads an InternVL folder directly (model.hf_path): this is for pipelines that want torch_dist. A checkpoint
loads at any layout, whatever layout it was made with; more processes only make room for a larger model. Its precision
is the folder's."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m checkpoint_tools.hf_to_megatron",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--hf", type=Path, required=True, help="folder in the layout of transformers' InternVL")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder to make; must not exist")
    add_layout_arguments(parser)
    options = parser.parse_args(arguments)
    try:
        with built_model(options.hf, tensor=options.tensor, pipeline=options.pipeline) as (model, context):
            load_hf_weights(model, options.hf, context)
            save_weights(model, options.output, context, parts=list(Part))
            if context.is_main:
                print(f"wrote {options.output}")
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
