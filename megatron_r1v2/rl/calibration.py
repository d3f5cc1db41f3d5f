"""A controller that keeps the hallucination rate below a target, by a brake on what may reward hallucination.

R1V2 chooses pairs by a threshold on the reward model's margin and reports that the wrong threshold raises
hallucination; how to set it is left open. Here the rate is measured during training, and the brake follows it: with
more brake, tau of MPO goes up and the weight of the reward model in GRPO goes down.

The brake b is in [0, 1]. A violation multiplies 1 - b by a factor below 1; measurements well below the target take a
constant off b: multiplicative decrease and additive increase, which settles at the most that the policy bears (TCP's
congestion control). Between the two is a band of rates in which nothing moves, so that the noise of the measurements
moves nothing either.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Decision(IntEnum):
    """The change of the brake after a measurement; its sign is what the metrics show."""

    RELAX = -1
    HOLD = 0
    TIGHTEN = 1


@dataclass(frozen=True)
class CalibrationSettings:
    """The target of a run and how fast the brake moves."""

    target: float
    """The rate to stay below, in (0, 1]."""
    min_coverage: float
    """The least coverage, in [0, 1]."""
    slack: float
    """A rate of at most (1 - slack) x target counts as below the target."""
    tighten: float
    """A violation takes 1 - brake to (1 - tighten) x (1 - brake)."""
    relax: float
    """Relaxing takes the brake to brake - relax, but not below 0."""
    patience: int
    """Measurements below the target in a row before the brake is relaxed."""


@dataclass(frozen=True)
class Calibration:
    """The state between two measurements, kept in the checkpoint."""

    brake: float = 0.0
    """0: the configured value stands; 1: it is at its bound."""
    below_target_streak: int = 0
    """Measurements below the target in a row, counted up to the patience."""


def calibrate(
    state: Calibration, settings: CalibrationSettings, *, rate: float | None, coverage: float | None
) -> tuple[Calibration, Decision]:
    """Update the brake by one measurement.

    Args:
        rate: contradicted claims over claims; None: no claim was made.
        coverage: responses with claims over responses; None: no prompt has facts.

    Returns:
        The new state and the decision: RELAX and TIGHTEN only where the brake has moved.
    """
    # Silence is a violation whatever the rate: a policy that says nothing of the image contradicts nothing, and the
    # reward that made it silent is what the brake acts on.
    silent = coverage is not None and coverage < settings.min_coverage
    too_many = coverage is not None and rate is not None and rate > settings.target
    if silent or too_many:
        brake = 1.0 - (1.0 - settings.tighten) * (1.0 - state.brake)
        return Calibration(brake), Decision.TIGHTEN if brake > state.brake else Decision.HOLD
    # No claims, or no facts to judge them by, are no evidence of a low rate.
    if rate is None or coverage is None or rate > (1.0 - settings.slack) * settings.target:
        return Calibration(state.brake), Decision.HOLD
    streak = min(state.below_target_streak + 1, settings.patience)
    brake = max(0.0, state.brake - settings.relax) if streak >= settings.patience else state.brake
    return Calibration(brake, streak), Decision.RELAX if brake < state.brake else Decision.HOLD


def interpolate(configured: float, bound: float, brake: float) -> float:
    """Return the value at a brake in [0, 1]: the configured one at 0, its bound (above or below) at 1."""
    return configured + brake * (bound - configured)
