"""The settings of the calibrator, and what they need of the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from megatron_r1v2.config.schema import RunRecipe

RANGES: Mapping[str, tuple[float | None, float | None]] = {
    "hallucination.target_rate": (0, 1),
    "hallucination.every_steps": (0, None),
    "hallucination.min_coverage": (0, 1),
    "hallucination.slack": (0, 1),
    "hallucination.patience": (1, None),
    "hallucination.tighten": (0, 1),
    "hallucination.loosen": (0, 1),
    "hallucination.max_margin": (0, None),
    "hallucination.min_model_weight": (0, None),
}
"""Inclusive bounds; None: no bound on that side."""


@dataclass
class HallucinationConfig:
    """The calibrator: holds the rate of contradicted visual claims on `data.validation` below a target while training.

    A rate above the target, or too few responses with claims, pulls a brake: tau of MPO (`preference.min_margin`) goes
    up, the weight of the reward model in GRPO (`reward.model_weight`) goes down (`rl/calibration.py`).
    """

    target_rate: float = 0.0
    """The rate of contradicted claims to stay below; 0: off."""
    every_steps: int = 0
    """Steps from one measurement to the next; 0: at the evaluations of evaluation.every_steps alone."""
    min_coverage: float = 0.5
    """Fewer responses with claims than this are as bad as a rate above the target: silence is no cure."""
    slack: float = 0.2
    """The brake is let go only while the rate is below (1 - slack) x target_rate."""
    patience: int = 2
    """Measurements in a row that must be so before the brake is let go."""
    tighten: float = 0.5
    """Each violation pulls the brake by this part of what is left of it."""
    loosen: float = 0.05
    """Each calm measurement lets it go by this part of the whole."""
    max_margin: float = 1.0
    """tau when the brake is pulled all the way; without it tau is preference.min_margin."""
    min_model_weight: float = 0.0
    """Weight of the reward model when the brake is pulled all the way; without it it is reward.model_weight."""


def check_calibration(recipe: RunRecipe, moved: Literal["model_weight", "min_margin"], value: float) -> None:
    """Check what holding the hallucination rate needs, when it is wanted.

    Args:
        recipe: the settings.
        moved: what the calibrator moves in this stage.
        value: what it is in the recipe.

    Raises:
        ValueError: nothing to measure by, or nowhere to move to.
    """
    wanted = recipe.hallucination
    if not wanted.target_rate:
        return
    needed = f"hallucination.target_rate={wanted.target_rate}"
    if not recipe.data.validation or not (wanted.every_steps or recipe.evaluation.every_steps):
        raise ValueError(
            f"{needed} needs a rate to hold: set data.validation to a folder of shards with facts, and "
            "hallucination.every_steps or evaluation.every_steps"
        )
    if not recipe.reward.claim_pattern:
        raise ValueError(f"{needed} needs reward.claim_pattern: without it no claim is found")
    if moved == "model_weight" and value <= wanted.min_model_weight:
        raise ValueError(
            f"{needed} lowers reward.model_weight, but it is {value} and hallucination.min_model_weight="
            f"{wanted.min_model_weight}; raise the first, or set hallucination.target_rate=0"
        )
    if moved == "min_margin" and value >= wanted.max_margin:
        raise ValueError(
            f"{needed} raises preference.min_margin, but it is {value} and hallucination.max_margin="
            f"{wanted.max_margin}; raise the latter, or set hallucination.target_rate=0"
        )
