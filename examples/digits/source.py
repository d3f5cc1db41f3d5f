"""scikit-learn's 1,797 handwritten digits, split by handwriting, and the pictures made of them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

TILE = 32
"""Pixels on each side of a tile of the vision tower."""

SPLITS: Mapping[str, float] = {"train": 0.74, "validation": 0.10, "heldout": 0.16}
"""Fraction of the source digits in each split; no stage trains on `heldout`, align stops by `validation`."""

SPLIT_SEED = 20250423
"""Fixed, so that the components, the data and the evaluation always agree on the split of a digit."""


def split_indices() -> dict[str, np.ndarray]:
    """Deal every source digit to exactly one split, in the same proportion for each of the ten digits.

    Returns:
        The name of a split -> sorted int64 indices into `load_digits()`.
    """
    labels = load_digits().target
    generator = np.random.default_rng(SPLIT_SEED)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    for digit in range(10):
        indices = generator.permutation(np.flatnonzero(labels == digit))
        # Rounding the running sum, and not each part, makes the parts add up to all digits.
        bounds = np.round(np.cumsum(list(SPLITS.values())) * len(indices)).astype(int)
        for name, part in zip(SPLITS, np.split(indices, bounds[:-1]), strict=True):
            parts[name].append(part)
    return {name: np.sort(np.concatenate(part)) for name, part in parts.items()}


def digit_tiles() -> tuple[np.ndarray, np.ndarray]:
    """Return every source digit as one grey tile (uint8 [1797, 32, 32]) and its label (int64 [1797])."""
    digits = load_digits()
    grey = np.clip(digits.images * (255.0 / 16.0), 0, 255).astype(np.uint8)
    size = (TILE, TILE)
    tiles = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in grey]
    return np.stack(tiles), digits.target.astype(np.int64)


def pair_image(left: np.ndarray, right: np.ndarray) -> Image.Image:
    """Put two tiles side by side: RGB, 64 x 32 pixels, which the tiling rule cuts back into exactly these two."""
    return Image.fromarray(np.concatenate([left, right], axis=1)).convert("RGB")


def thumbnail(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Squeeze two tiles into one, as the tiling rule does for the overview it appends (uint8 [32, 32])."""
    both = Image.fromarray(np.concatenate([left, right], axis=1))
    return np.asarray(both.resize((TILE, TILE), Image.Resampling.BICUBIC))
