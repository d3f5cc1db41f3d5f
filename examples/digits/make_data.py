"""The demo's questions about handwritten digits, as JSONL and PNG (`python -m examples.digits.make_data --help`).

Writes below --output:

    align.jsonl         images of training digits with reference responses: supervised data for the align stage
    prefer.jsonl        images of training digits: prompts from whose responses preference pairs are built
    grpo.jsonl          images of training digits: prompts for GRPO
    validation.jsonl    images of validation digits: align stops by these
    heldout.jsonl       images of held-out digits: evaluation only; their handwriting is in no other file
    text.jsonl          the same questions with a written note in the place of the image
    images/             64 x 32 RGB PNGs

`r1v2 prepare` turns each JSONL file into shards.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from examples import making
from examples.digits import questions, source

COUNTS: Mapping[str, int] = {"align": 1024, "prefer": 512, "grpo": 2048, "validation": 256, "heldout": 300, "text": 256}
"""Questions of each set. The name of a set is part of its seed: a renamed set gets other questions."""

HANDWRITING: Mapping[str, str] = {
    "align": "train",
    "prefer": "train",
    "grpo": "train",
    "validation": "validation",
    "heldout": "heldout",
}
"""The split of source digits that each image set draws from."""


def image_rows(
    name: str, count: int, seed: int, tiles: np.ndarray, labels: np.ndarray, indices: np.ndarray, images: Path
) -> Iterator[dict[str, Any]]:
    """Write the images of one set and yield its rows.

    Args:
        name: the set, the start of every key.
        count: number of questions.
        seed: with the name, decides everything.
        tiles: uint8 [1797, 32, 32], all source digits.
        labels: int64 [1797], the digits on them.
        indices: the source digits that this set may use.
        images: folder that the PNGs are written to.
    """
    # A generator for each set, so that the size of one does not change the questions of another.
    rng = random.Random(f"{seed}-{name}")
    for number in range(count):
        left, right = rng.choice(indices), rng.choice(indices)
        problem = questions.make_problem(int(labels[left]), int(labels[right]), rng)
        key = f"{name}-{number:06d}"
        source.pair_image(tiles[left], tiles[right]).save(images / f"{key}.png")
        row = _row(key, f"<image>\n{problem.question}", problem)
        yield row | {
            "facts": problem.facts,
            "images": [f"{key}.png"],
            "source": f"load_digits {left} {right}",
        }


def text_rows(name: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield questions with a note in the place of the image; without an image there is nothing to hallucinate."""
    rng = random.Random(f"{seed}-{name}")
    for number in range(count):
        problem = questions.make_problem(rng.randrange(10), rng.randrange(10), rng)
        note = questions.make_note(problem.left, problem.right, rng, filler=0.3, wrong=0.1)
        yield _row(f"{name}-{number:06d}", f"{note}\n{problem.question}", problem) | {"facts": {}, "images": []}


def make_data(output: Path, *, seed: int, counts: Mapping[str, int]) -> None:
    """Write all sets; the folder appears when they are complete."""
    tiles, labels = source.digit_tiles()
    splits = source.split_indices()

    def make_rows(name: str, count: int, images: Path) -> Iterator[dict[str, Any]]:
        if name in HANDWRITING:
            return image_rows(name, count, seed, tiles, labels, splits[HANDWRITING[name]], images)
        return text_rows(name, count, seed)

    making.write_sets(output, counts, make_rows)


def _row(key: str, content: str, problem: questions.Problem) -> dict[str, Any]:
    return {
        "schema": 1,
        "key": key,
        "messages": [{"role": "user", "content": content}],
        "answer": problem.answer,
        "answer_type": "numeric",
        "response": problem.response,
    }


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = making.maker_parser("examples.digits.make_data", __doc__, output="folder to make; left alone if it exists")
    parser.add_argument("--seed", type=int, default=making.SEED, help="decides pairs, operations and phrasings")
    making.add_sets(parser, COUNTS)
    options = parser.parse_args(arguments)
    if making.report_if_made("data", options.output):
        return
    counts = {name: getattr(options, name) for name in COUNTS}
    make_data(options.output, seed=options.seed, counts=counts)
    making.print_sets(options.output, counts)


if __name__ == "__main__":
    main()
