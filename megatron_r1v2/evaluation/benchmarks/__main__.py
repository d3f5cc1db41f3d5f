"""python -m megatron_r1v2.evaluation.benchmarks NAME --input FILE_OR_FOLDER --output SHARDS; see `--help`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_r1v2.data.prepare import name_images, storable_image
from megatron_r1v2.data.samples import SampleError, ShardSample
from megatron_r1v2.data.shards import write_shards
from megatron_r1v2.evaluation.benchmarks.files import find_files, read_rows
from megatron_r1v2.evaluation.benchmarks.prompts import CHOICE_INSTRUCTION, OPEN_INSTRUCTION, place_images
from megatron_r1v2.evaluation.benchmarks.readers import READERS, Question, shown_options

_DESCRIPTION = """\
Turn a benchmark's published files into shards for `python -m megatron_r1v2.evaluate`, with the paper's prompts.

Give the files as downloaded: parquet with the images inside, or JSON and JSONL with the images beside. Every row and
every image is checked first; the output folder appears only when all of it is written.

  aime2024       HuggingFaceH4/aime_2024, Maxwell-Jia/AIME_2024 or math-ai/aime24
  mmmu           MMMU/MMMU: the validation files of all subjects
  mmmu_pro       MMMU/MMMU_Pro: one folder of "standard (4 options)", "standard (10 options)" or "vision"
  mathvista      AI4Math/MathVista: testmini
  mathvision     MathLLMs/MathVision: testmini or test
  olympiadbench  Hothan/OlympiadBench (folders OE_*), lmms-lab/OlympiadBench, or the authors' JSON

Rules compare answers exactly (numbers to 1e-6), or within what MathVista's precision and OlympiadBench's error allow.
Where a benchmark accepts other wordings, let a judge decide (evaluation.judge_url).
"""
_EXAMPLE = """\
example:
  python -m megatron_r1v2.evaluation.benchmarks mmmu --input downloads/MMMU --only 'validation-*' --output data/mmmu
  python -m megatron_r1v2.evaluate recipe.yaml --name mmmu evaluation.data=data/mmmu
"""


def benchmark_samples(name: str, path: Path, images: Path, only: str = "*") -> Iterator[ShardSample]:
    """Read a benchmark.

    Args:
        name: of `READERS`.
        path: file or folder as published.
        images: folder that image paths in the data are relative to.
        only: pattern of the names of the files to read.

    Yields:
        Samples with the paper's prompt, in the order of the files.

    Raises:
        ValueError: no file, one that cannot be read, or a bad row, with its place.
    """
    title, reader = READERS[name]
    files = [file for file in find_files(path) if file.match(only)]
    if not files:
        raise ValueError(f"--only {only!r} matches no data file in {path}")
    keys: dict[str, str] = {}
    for file in files:
        for place, row in read_rows(file):
            try:
                question = reader(row, images)
                if question is None:
                    continue
                sample = to_sample(name, title, question)
                if sample.key in keys:
                    raise SampleError(
                        f"key {sample.key!r} was used by {keys[sample.key]} already; give one split or set (--only)"
                    )
            except SampleError as error:
                raise SampleError(f"{place}: {error}") from error
            keys[sample.key] = place
            yield sample


def to_sample(name: str, title: str, question: Question) -> ShardSample:
    """Ask a question as the paper does.

    Args:
        name: of `READERS`; begins the key.
        title: of the benchmark in tables.
        question: from a reader.
    """
    text, order = place_images(shown_options(question), list(question.images))
    instruction = CHOICE_INSTRUCTION if question.answer_type == "choice" else OPEN_INSTRUCTION
    content = f"{text.rstrip()}\n{instruction}"
    encoded = [storable_image(question.images[number], f"image {number}") for number in order]
    return ShardSample(
        key=f"{name}-{re.sub(r'[^A-Za-z0-9_-]+', '-', question.id)}"[:80],
        messages=({"role": "user", "content": content},),
        answer=question.answer,
        answer_type=question.answer_type,
        images=name_images(encoded),
        alternatives=question.alternatives,
        tolerances=question.tolerances,
        metadata={"benchmark": title, **question.metadata},
        source=name,
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; None: those of the process.

    Returns:
        The exit status: 0, or 1 when the input has an error, which is printed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m megatron_r1v2.evaluation.benchmarks",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=READERS, help="the benchmark")
    parser.add_argument("--input", type=Path, required=True, help="data file, or folder of data files")
    parser.add_argument("--only", default="*", help="read files of this name only, such as 'validation-*'")
    parser.add_argument("--images", type=Path, help="folder of images beside the data; that of --input if not given")
    parser.add_argument("--output", type=Path, required=True, help="folder of shards to make; must not exist yet")
    arguments = parser.parse_args(argv)
    beside = arguments.input if arguments.input.is_dir() else arguments.input.parent
    try:
        samples = benchmark_samples(arguments.name, arguments.input, arguments.images or beside, arguments.only)
        count = write_shards(samples, arguments.output)
    except ValueError as error:
        print(f"error: {error}\nNothing was written.", file=sys.stderr)
        return 1
    print(f"{count} questions written to {arguments.output}; set evaluation.data to it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
