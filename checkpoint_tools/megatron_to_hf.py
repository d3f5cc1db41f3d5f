"""Turn a checkpoint of a run into a Hugging Face folder that is complete: weights, config, tokenizer, processor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_r1v2.checkpoint import command_line
from megatron_r1v2.checkpoint.export import export_checkpoint

EXAMPLE = f"""example:
  python -m checkpoint_tools.megatron_to_hf --checkpoint runs/digits-grpo --base base-model --output export
  python -m checkpoint_tools.megatron_to_hf --checkpoint runs/r1v2 --base r1v2-38b --layout transformers --output vllm

A checkpoint of a run holds the parts that were trained. The others, config.json, tokenizer and processor come from
--base: the folder that the run started from; default: model.hf_path of its recipe, where that folder is there. A
checkpoint that hf_to_megatron made needs none.
A base that is not the model that the run was trained on is refused, by the checksums that training noted of it.
The padding of vocabulary and heads, which depends on the layout of the run, is cut off.
{command_line.INTERRUPTED}"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = command_line.tool_parser("megatron_to_hf", __doc__, EXAMPLE)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run (its newest checkpoint) or a checkpoint")
    parser.add_argument("--base", type=Path, help="Hugging Face folder that the run started from, in either layout")
    command_line.add_run_arguments(parser)
    command_line.add_hf_arguments(parser, default=None)
    options = parser.parse_args(arguments)
    with command_line.explained_errors(parser):
        origin = export_checkpoint(
            options.checkpoint,
            options.output,
            base=options.base,
            layout=options.layout,
            dtype=options.dtype,
            max_shard_bytes=options.shard_size,
            options=command_line.run_options(options),
        )
        print(f"wrote {options.output} ({origin})")


if __name__ == "__main__":
    main()
