"""The command line of `r1v2 benchmarks`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_r1v2.config.command_line import command_parser

_DESCRIPTION = """\
Turn a benchmark's published files into shards for `python -m megatron_r1v2 evaluate`, with the paper's prompts.

Give the files as downloaded: parquet with the images inside, or JSON and JSONL with the images beside. Every row and
every image is checked first; the output folder appears only when all of it is written.

  aime2024       HuggingFaceH4/aime_2024, Maxwell-Jia/AIME_2024 or math-ai/aime24
  mmmu           MMMU/MMMU: the validation files of all subjects
  mmmu_pro       MMMU/MMMU_Pro: one folder of "standard (4 options)", "standard (10 options)" or "vision"
  mathvista      AI4Math/MathVista: testmini
  mathvision     MathLLMs/MathVision: testmini or test
  olympiadbench  Hothan/OlympiadBench (folders OE_*), lmms-lab/OlympiadBench, or the authors' JSON

Rules compare answers (docs/rewards.md), numbers within what the authors of MMMU, MathVista and OlympiadBench allow.
Where a benchmark accepts other wordings, let a judge decide (evaluation.judge_url).
"""
_EXAMPLE = """\
example:
  python -m megatron_r1v2 benchmarks mmmu --input downloads/MMMU --only 'validation-*' --output data/mmmu
  python -m megatron_r1v2 evaluate recipe.yaml --name mmmu evaluation.data=data/mmmu
"""


def main(argv: Sequence[str]) -> int:
    """Write the shards, and return the exit status: 1 when the input has an error, which is printed."""
    parser = command_parser("benchmarks", _DESCRIPTION, epilog=_EXAMPLE)
    parser.add_argument("name", metavar="NAME", help="the benchmark, one of those above")
    parser.add_argument("--input", type=Path, required=True, help="data file, or folder of data files")
    parser.add_argument("--only", help="read files of this name only, such as 'validation-*'")
    parser.add_argument("--images", type=Path, help="folder of images beside the data; that of --input if not given")
    parser.add_argument("--output", type=Path, required=True, help="folder of shards to make; must not exist yet")
    arguments = parser.parse_args(argv)
    # Imported after the arguments are checked: energon and torch take seconds.
    from megatron_r1v2.data.shards import write_shards
    from megatron_r1v2.evaluation.benchmarks.files import check_one_split, find_files
    from megatron_r1v2.evaluation.benchmarks.readers import READERS
    from megatron_r1v2.evaluation.benchmarks.samples import benchmark_samples

    if arguments.name not in READERS:
        parser.error(f"NAME is {arguments.name!r}; accepted: {', '.join(READERS)}")
    beside = arguments.input if arguments.input.is_dir() else arguments.input.parent
    try:
        if arguments.only is None:
            check_one_split(find_files(arguments.input))
        samples = benchmark_samples(arguments.name, arguments.input, arguments.images or beside, arguments.only or "*")
        count = write_shards(samples, arguments.output)
    except ValueError as error:
        print(f"error: {error}\nNothing was written.", file=sys.stderr)
        return 1
    print(f"{count} questions written to {arguments.output}; set evaluation.data to it")
    return 0
