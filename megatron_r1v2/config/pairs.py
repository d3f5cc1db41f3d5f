"""The settings of the pairs command, and what they need of the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_r1v2.config.schema import RunRecipe

RANGES: Mapping[str, tuple[float | None, float | None]] = {
    "pairs.prompts": (0, None),
    "pairs.max_pairs_per_prompt": (0, None),
    "pairs.min_margin": (0, None),
    "pairs.dropout_ntp_fraction": (0, 1),
}
"""Inclusive bounds; None: no bound on that side."""


@dataclass
class PairsConfig:
    """How the pairs command makes preference pairs of the model's own responses to the prompts of `data.train`."""

    output: str = ""
    """Folder of preference shards to write; it must not exist yet."""
    prompts: int = 0
    """How many prompts, from the start of the shards; 0: all."""
    max_pairs_per_prompt: int = 4
    """Pairs of the responses to one prompt, a DropoutNTP pair not counted."""
    min_margin: float = 0.0
    """Total reward of the chosen response minus that of the rejected one: at least this, and always above 0."""
    reject_ill_formed: bool = False
    """Cut and ill-formed responses may be the rejected one (they are never chosen); false: they are left out."""
    dropout_ntp_fraction: float = 0.25
    """For this part of the prompts with an image and a response fit to be chosen there is one more pair: the rejected
    response is the first half of the chosen one, continued without the image."""


def check_pairs(recipe: RunRecipe) -> None:
    """Check what building preference pairs needs.

    Raises:
        ValueError: output that exists, or settings under which there cannot be a pair.
    """
    pairs, generation = recipe.pairs, recipe.generation
    if Path(pairs.output).exists():
        raise ValueError(f"pairs.output={pairs.output!r} exists already; choose another folder or delete it first")
    if pairs.max_pairs_per_prompt and generation.responses_per_prompt < 2:
        raise ValueError(
            f"generation.responses_per_prompt={generation.responses_per_prompt} leaves nothing to compare; pairs need "
            "2 or more, or set pairs.max_pairs_per_prompt=0 for DropoutNTP pairs alone"
        )
    if not pairs.max_pairs_per_prompt and not pairs.dropout_ntp_fraction:
        raise ValueError(
            "pairs.max_pairs_per_prompt and pairs.dropout_ntp_fraction are both 0: there would be no pairs; raise one"
        )
