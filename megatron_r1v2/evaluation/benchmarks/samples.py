"""The rows of a benchmark as samples with the paper's prompts: the work of `r1v2 benchmarks`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from megatron_r1v2.data.images import name_images, storable_image
from megatron_r1v2.data.samples import SampleError, ShardSample
from megatron_r1v2.evaluation.benchmarks.files import find_files, read_rows
from megatron_r1v2.evaluation.benchmarks.prompts import CHOICE_INSTRUCTION, OPEN_INSTRUCTION, place_images
from megatron_r1v2.evaluation.benchmarks.readers import READERS, Question, shown_options


def benchmark_samples(name: str, path: Path, images: Path, only: str = "*") -> Iterator[ShardSample]:
    """Read a benchmark.

    Args:
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
