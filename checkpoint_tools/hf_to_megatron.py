"""Turn a Hugging Face folder of a whole model into a torch_dist checkpoint of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_r1v2.checkpoint import command_line
from megatron_r1v2.checkpoint.destinations import TorchDistConversion, write_checkpoint
from megatron_r1v2.checkpoint.sources import HfSpec

EXAMPLE = f"""example:
  python -m checkpoint_tools.hf_to_megatron --hf r1v2-38b --output r1v2-38b-megatron

Training reads an InternVL folder directly (model.hf_path): this is for pipelines that want torch_dist. The checkpoint
loads at any layout (TP, PP, DP). No GPU and no process group are needed; one tensor at a time is in memory.
{command_line.INTERRUPTED}"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = command_line.tool_parser("hf_to_megatron", __doc__, EXAMPLE)
    parser.add_argument("--hf", type=Path, required=True, help="folder of a whole model, in either layout")
    command_line.add_run_arguments(parser)
    options = parser.parse_args(arguments)
    with command_line.explained_errors(parser):
        conversion = TorchDistConversion(HfSpec(options.hf), (options.hf,), options.dtype)
        write_checkpoint(conversion, options.output, companions=options.hf, options=command_line.run_options(options))
        print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
