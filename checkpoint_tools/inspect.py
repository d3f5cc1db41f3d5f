"""Show the content of a checkpoint: parts, shapes, dtypes, bytes, layout, step. Reads headers only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_r1v2.checkpoint import command_line
from megatron_r1v2.checkpoint.inspection import inspect_checkpoint

EXAMPLE = """example:
  python -m checkpoint_tools.inspect runs/r1v2
  python -m checkpoint_tools.inspect r1v2-38b --tensors
  python -m checkpoint_tools.inspect InternViT-6B-448px-V2_5 --json

Takes Hugging Face folders (whole models in either layout, components, exported parts), single safetensors files, runs
and checkpoints. No weight is read and no code of a folder is run; use verify to look for damage."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = command_line.tool_parser("inspect", __doc__, EXAMPLE)
    parser.add_argument("path", type=Path, help="folder, file, run or checkpoint")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    with command_line.explained_errors(parser):
        found = inspect_checkpoint(options.path)
        if options.json:
            print(json.dumps(found.as_json(tensors=options.tensors), indent=2))
        else:
            found.show(tensors=options.tensors)


if __name__ == "__main__":
    main()
