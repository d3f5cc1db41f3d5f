"""Questions about real pictures, as JSONL and PNG (`python -m examples.real_weights.make_data --help`).

Half of the pictures are crops of photographs that scikit-image brings along, half are handwritten digits that
scikit-learn brings along. Writes below --output:

    align.jsonl      pictures to learn from, with reference responses: supervised data for the align stage
    grpo.jsonl       pictures to learn from: prompts for GRPO
    heldout.jsonl    evaluation only: crops of the right part of each photograph, which no crop to learn from touches,
                     and digits whose handwriting is in no other file
    images/          square RGB PNGs

`r1v2 prepare` turns each JSONL file into shards.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import skimage
from PIL import Image

from examples import making
from examples.digits import source
from examples.real_weights.convert_vision_tower import TILE
from examples.real_weights.questions import make_row

COUNTS: Mapping[str, int] = {"align": 896, "grpo": 256, "heldout": 120}
"""Questions of each set, half of them about photographs."""

PHOTOGRAPHS: Mapping[str, str] = {
    "bricks": "brick.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "moon": "moon.png",
    "motorcycle": "motorcycle_left.png",
    "page": "page.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "stars": "hubble_deep_field.jpg",
    "tissue": "ihc.png",
}
"""The name of the thing on a photograph, and its file in scikit-image; only those whose right part shows it too."""

LEARNED_PART = 0.6
"""Crops to learn from lie left of this part of a photograph's width, held-out crops right of it."""


def crop(photograph: Image.Image, *, heldout: bool, rng: random.Random) -> Image.Image:
    """Cut a random square out of one part of a photograph.

    Args:
        photograph: any size.
        heldout: from the right part.
        rng: chooses place and size: 0.6 to 0.9 of the largest square that fits into the part.
    """
    width, height = photograph.size
    border = int(LEARNED_PART * width)
    left, right = (border, width) if heldout else (0, border)
    side = int(min(height, right - left) * rng.uniform(0.6, 0.9))
    x, y = rng.randint(left, right - side), rng.randint(0, height - side)
    return photograph.crop((x, y, x + side, y + side))


def pictures(name: str, count: int, rng: random.Random) -> Iterator[tuple[str, str, str, Image.Image]]:
    """Yield kind, answer, origin and picture, a photograph and a digit in turn, every photograph equally often.

    Args:
        name: of the set; "heldout" draws from what no other set sees.
        count: number of pictures.
        rng: chooses crops and digits.
    """
    heldout = name == "heldout"
    folder = Path(skimage.__file__).parent / "data"
    photographs = {answer: Image.open(folder / file).convert("RGB") for answer, file in PHOTOGRAPHS.items()}
    tiles, labels = source.digit_tiles()
    digits = source.split_indices()["heldout" if heldout else "train"]
    answers = list(photographs)
    for number in range(count):
        # In turn, so that any number of rows from the start has both kinds.
        if number % 2:
            chosen = rng.choice(digits)
            yield "digit", str(labels[chosen]), f"load_digits {chosen}", Image.fromarray(tiles[chosen]).convert("RGB")
        else:
            answer = answers[number // 2 % len(answers)]
            yield "photograph", answer, PHOTOGRAPHS[answer], crop(photographs[answer], heldout=heldout, rng=rng)


def rows(name: str, count: int, seed: int, images: Path, tile: int) -> Iterator[dict[str, Any]]:
    """Write the pictures of one set and yield its rows.

    Args:
        name: the set, the start of every key.
        count: number of questions.
        seed: with the name, decides everything.
        images: folder that the PNGs are written to.
        tile: pixels on each side of a picture.
    """
    rng = random.Random(f"{seed}-{name}")
    for number, (kind, answer, origin, picture) in enumerate(pictures(name, count, rng)):
        key = f"{name}-{number:06d}"
        picture.resize((tile, tile), Image.Resampling.BICUBIC).save(images / f"{key}.png")
        yield make_row(kind, key, answer, origin, rng)


def make_data(output: Path, *, seed: int, counts: Mapping[str, int], tile: int) -> None:
    """Write all sets; the folder appears when they are complete."""
    making.write_sets(output, counts, lambda name, count, images: rows(name, count, seed, images, tile))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = making.maker_parser("examples.real_weights.make_data", __doc__, output="folder to make")
    parser.add_argument(
        "--seed", type=int, default=making.SEED, help="decides crops, digits and phrasings (%(default)s)"
    )
    parser.add_argument("--tile", type=int, default=TILE, help="pixels on each side of a picture (%(default)s)")
    making.add_sets(parser, COUNTS)
    options = parser.parse_args(arguments)
    counts = {name: getattr(options, name) for name in COUNTS}
    make_data(options.output, seed=options.seed, counts=counts, tile=options.tile)
    making.print_sets(options.output, counts)


if __name__ == "__main__":
    main()
