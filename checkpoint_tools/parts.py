"""Take the trained parts of a run out of its checkpoint, and put them over the model that they were trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_r1v2.checkpoint import command_line
from megatron_r1v2.checkpoint.destinations import HfFormat
from megatron_r1v2.checkpoint.hf.config import folder_layout
from megatron_r1v2.checkpoint.trained_parts import apply_parts, export_parts

EXAMPLE = """example:
  python -m checkpoint_tools.parts export --checkpoint runs/r1v2 --output r1v2-adapter
  python -m checkpoint_tools.parts apply --parts r1v2-adapter --base r1v2-38b --output r1v2-trained

A run that trains the adapter changes 184 MB of 77 GB: the rest needs no second copy. `export` writes the parts under
their Hugging Face names, with a checksum of the architecture and all other weights of the model that the run started
from, after it was held against what training noted of them; `apply` computes that checksum of its --base, in whatever
layout it is, and refuses another model (reading all of it takes a while).
reassemble --adapter takes exported adapters too."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = command_line.tool_parser("parts", __doc__, EXAMPLE)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write the trained parts of a run")
    export.add_argument("--checkpoint", type=Path, required=True, help="a run (its newest checkpoint) or a checkpoint")
    export.add_argument(
        "--base", type=Path, help="model that the run started from; default: its recipe's model.hf_path"
    )
    command_line.add_run_arguments(export)
    apply = commands.add_parser("apply", help="write the whole model, the parts over a base")
    apply.add_argument("--parts", type=Path, required=True, help="folder that export made")
    apply.add_argument("--base", type=Path, required=True, help="the model that the parts were trained on")
    command_line.add_run_arguments(apply)
    command_line.add_hf_arguments(apply, default=None)
    options = parser.parse_args(arguments)
    with command_line.explained_errors(parser):
        run, output = command_line.run_options(options), options.output
        if options.command == "export":
            parts, base = export_parts(options.checkpoint, output, base=options.base, dtype=options.dtype, options=run)
            print(f"wrote {output} ({', '.join(parts.parts)} after step {parts.step}, trained on {base})")
        else:
            form = HfFormat(options.layout or folder_layout(options.base), options.dtype, options.shard_size)
            parts = apply_parts(options.parts, output, base=options.base, form=form, options=run)
            print(f"wrote {output} ({', '.join(parts.parts)} from {options.parts}, the rest from {options.base})")


if __name__ == "__main__":
    main()
