"""The command line of `r1v2 filter-prompts`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_r1v2.config.command_line import command_parser

_DESCRIPTION = """\
Keep the prompts of a data set that a model answers sometimes rightly and sometimes wrongly: the filtered prompt pool
of the R1V2 report, its Selective Sample Buffer run beforehand. GRPO learns nothing from the others at first.

Responses come from `python -m megatron_r1v2 evaluate` on the training data, in process or on an endpoint, with as many
runs as GRPO will sample; right is what the answer rules found right, whatever a judge said. pool.json in the output
counts the prompts that were dropped and lists those that are kept, the most telling first: pass rate, responses, and
the weight 2 sqrt(p (1 - p)) that the buffer's priority would give them.
"""
_EXAMPLE = """\
example:
  python -m megatron_r1v2 evaluate recipe.yaml --name pool evaluation.data=data/train evaluation.runs=8
  python -m megatron_r1v2 filter-prompts runs/r1v2/evaluation-pool.rollouts.jsonl \\
      --data data/train --output data/pool
  python -m megatron_r1v2 grpo recipe.yaml data.train=data/pool
"""


def main(argv: Sequence[str]) -> int:
    """Write the pool, and return the exit status: 1 when the input has an error, which is printed."""
    parser = command_parser("filter-prompts", _DESCRIPTION, epilog=_EXAMPLE)
    parser.add_argument("rows", type=Path, nargs="+", metavar="ROWS", help="evaluation-NAME.rollouts.jsonl")
    parser.add_argument("--data", type=Path, required=True, help="the data set that was evaluated")
    parser.add_argument("--output", type=Path, required=True, help="folder of shards to make; must not exist yet")
    parser.add_argument("--most", type=int, default=0, help="keep so many, the most telling; 0 (default): all")
    arguments = parser.parse_args(argv)
    if arguments.most < 0:
        parser.error(f"--most is {arguments.most}; accepted is 0 (all) or more")
    # Imported after the arguments are checked: energon and torch take seconds.
    from megatron_r1v2.evaluation.filter_prompts import read_results, write_pool

    try:
        record = write_pool(read_results(arguments.rows), arguments.data, arguments.output, most=arguments.most)
    except ValueError as error:
        print(f"error: {error}\nNothing was written.", file=sys.stderr)
        return 1
    for name, value in record.items():
        print(f"{name + ':':19}{len(value) if isinstance(value, list) else value:>8}")
    print(f"written to {arguments.output}; set data.train to it")
    return 0
