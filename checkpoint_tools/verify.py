"""Check that one checkpoint is undamaged, or that two of any kind hold the same model, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_r1v2.checkpoint import command_line
from megatron_r1v2.checkpoint.comparison import Comparison, Verification, compare, verify
from megatron_r1v2.checkpoint.detection import open_checkpoint

EXAMPLE = """example:
  python -m checkpoint_tools.verify r1v2-38b
  python -m checkpoint_tools.verify r1v2-38b r1v2-38b-megatron
  python -m checkpoint_tools.verify export other-export --logits

Takes Hugging Face folders in either layout, runs, checkpoints and exported parts (with --base). Of one: every tensor is
read; what our tools wrote is compared with its checksums. What others wrote is checked as far as the format allows:
torch_dist has a CRC-32 in every record, safetensors none, so a flipped bit in such a folder stays unseen unless it is
compared with a second copy. Of two: every parameter must have the same shape, dtype and bits. Exit code 0: all is well;
1: it is not."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = command_line.tool_parser("verify", __doc__, EXAMPLE)
    parser.add_argument("first", type=Path, help="folder, run or checkpoint")
    parser.add_argument("second", type=Path, nargs="?", help="what to compare it with")
    parser.add_argument("--base", type=Path, help="model that a checkpoint or exported parts belong to")
    parser.add_argument("--logits", action="store_true", help="also compute both models' logits for one random input")
    parser.add_argument("--workers", type=int, default=2, help="threads (default: 2)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    if options.logits and options.second is None:
        parser.error("--logits needs two checkpoints")
    with command_line.explained_errors(parser):
        found: Verification | Comparison
        if options.second is None:
            found = verify(options.first, options.base, workers=options.workers)
        else:
            first, second = (open_checkpoint(path, options.base)[1] for path in (options.first, options.second))
            found = compare(first, second, workers=options.workers, logits=options.logits)
        print(json.dumps(found.as_json(), indent=2) if options.json else found)
    if isinstance(found, Comparison) and not found.ok:
        parser.exit(1)


if __name__ == "__main__":
    main()
