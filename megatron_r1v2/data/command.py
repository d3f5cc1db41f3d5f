"""The command line of `r1v2 prepare`: JSONL and images to WebDataset shards."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from megatron_r1v2.config.command_line import command_parser
from megatron_r1v2.types import AnswerType

if TYPE_CHECKING:
    from megatron_r1v2.data.samples import ShardSample

_ERRORS_SHOWN = 20
_DESCRIPTION = """\
Turn JSONL and a folder of images into WebDataset shards that training reads.

Every row and every image is checked first; the output folder appears only when all of it is written.
Three kinds of rows are understood, told apart by their fields:

  our own     {"messages": [{"role": "user", "content": "<image>\\nleft + right?"}], "answer": "8",
               "answer_type": "numeric", "images": ["17.png"], "facts": {"left": "3", "right": "5"}}
              optional: key, response (supervised data), chosen, rejected, margin, source,
              alternatives, tolerances and metadata (evaluation)
  MMPR        {"question": "...", "chosen": "...", "rejected": "...", "image": "a.jpg"}
  verl        {"prompt": [{"role": "user", "content": "<image>..."}], "images": [{"path": "a.jpg"}],
               "reward_model": {"ground_truth": "8"}, "data_source": "..."}
"""
_EXAMPLE = """\
example:
  python -m megatron_r1v2 prepare questions.jsonl --images pictures --output data/train --check-only
  python -m megatron_r1v2 prepare questions.jsonl --images pictures --output data/train
then set data.train: data/train in the recipe.
"""


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("prepare", _DESCRIPTION, epilog=_EXAMPLE)
    parser.add_argument("input", type=Path, help="JSONL file, one row a line")
    parser.add_argument("--images", type=Path, default=Path(), help="folder that image paths are relative to")
    parser.add_argument("--output", type=Path, help="folder to make; must not exist yet")
    parser.add_argument("--samples-per-shard", type=int, default=1000, help="samples in one tar file (1000)")
    parser.add_argument(
        "--answer-type",
        choices=get_args(AnswerType),
        default="math",
        help="how answers of MMPR and verl rows are compared (math); our own rows say it themselves",
    )
    parser.add_argument("--check-only", action="store_true", help="check all rows, list what is wrong, write nothing")
    arguments = parser.parse_args(argv)
    if not arguments.check_only and arguments.output is None:
        parser.error("--output is needed unless --check-only is given")
    return arguments


def _with_progress(samples: Iterator[ShardSample], path: Path, verb: str) -> Iterator[ShardSample]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    # A pass over the lines first: the bar needs their number, and reading them costs little compared with the images.
    with path.open("rb") as file:
        total = sum(1 for line in file if line.strip())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield from progress.track(samples, total=total, description=verb)


def main(argv: Sequence[str]) -> int:
    """Write the shards, or only check the rows.

    Returns:
        The exit status: 0, or 1 when the input has an error, which is printed.
    """
    arguments = _arguments(argv)
    # Imported after the arguments are checked: energon and torch take seconds.
    from megatron_r1v2.data.rows import check_inputs, read_rows
    from megatron_r1v2.data.shards import write_shards

    problems: list[str] = []
    try:
        check_inputs(arguments.input, arguments.images)
        samples = read_rows(
            arguments.input,
            arguments.images,
            answer_type=arguments.answer_type,
            report=problems.append if arguments.check_only else None,
        )
        samples = _with_progress(samples, arguments.input, "Checking" if arguments.check_only else "Writing")
        if arguments.check_only:
            count = sum(1 for _ in samples)
        else:
            count = write_shards(samples, arguments.output, arguments.samples_per_shard)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        if not arguments.check_only:
            print("Nothing was written. --check-only lists all bad rows at once.", file=sys.stderr)
        return 1
    for message in problems[:_ERRORS_SHOWN]:
        print(f"error: {message}", file=sys.stderr)
    if len(problems) > _ERRORS_SHOWN:
        print(f"... and {len(problems) - _ERRORS_SHOWN} more", file=sys.stderr)
    print(f"{count} samples are fine" + (f", {len(problems)} are not" if problems else ""))
    if not arguments.check_only:
        print(f"written to {arguments.output}; set data.train to it")
    return 1 if problems else 0
