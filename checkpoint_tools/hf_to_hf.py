"""Rewrite a Hugging Face folder of a whole model: the other layout, another dtype, other shard sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_r1v2.checkpoint import command_line
from megatron_r1v2.checkpoint.destinations import HfConversion, HfFormat, write_hf
from megatron_r1v2.checkpoint.sources import HfSpec

EXAMPLE = f"""example:
  python -m checkpoint_tools.hf_to_hf --hf Skywork-R1V2-38B --layout transformers --output r1v2-38b
  python -m checkpoint_tools.hf_to_hf --hf r1v2-38b --layout chat --dtype bf16 --output as-published

Skywork's and OpenGVLab's folders come with code that transformers would have to run; no code of a folder is run here,
and the result in the layout of transformers needs none. A model of the first pixel shuffle (ps_version v1) can be held
by the layout chat only. vLLM and transformers read the layout of transformers as it is written; the layout chat is for
tools that run the publishers' own code.
{command_line.INTERRUPTED}"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = command_line.tool_parser("hf_to_hf", __doc__, EXAMPLE)
    parser.add_argument("--hf", type=Path, required=True, help="folder of a whole model, in either layout")
    command_line.add_run_arguments(parser)
    command_line.add_hf_arguments(parser, default="transformers")
    options = parser.parse_args(arguments)
    with command_line.explained_errors(parser):
        form = HfFormat(options.layout, options.dtype, options.shard_size)
        conversion = HfConversion(HfSpec(options.hf), (options.hf,), form)
        write_hf(conversion, options.output, companions=options.hf, options=command_line.run_options(options))
        print(f"wrote {options.output} in the layout {options.layout}")


if __name__ == "__main__":
    main()
