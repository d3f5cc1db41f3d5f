"""Holds the hallucination rate below a target: a brake on what may reward hallucination.

R1V2 chooses pairs by a threshold on the reward model's margin and reports that the wrong threshold raises
hallucination; how to set it is left open. Here the rate is measured while training, and what rewards hallucination is
braked by it: tau of MPO goes up, the weight of the reward model in GRPO goes down.

The brake b is in [0, 1]. A violation takes 1 - b down by a factor, a calm measurement takes b down by a constant:
multiplicative decrease and additive increase, which settles at what the policy bears (as congestion control of TCP).
Between the two is a band of rates in which nothing moves, so that the noise of a measurement does not either.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Decision(IntEnum):
    """What a measurement led to."""

    LOOSEN = -1
    HOLD = 0
    TIGHTEN = 1


@dataclass(frozen=True)
class Calibration:
    """What is carried from one measurement to the next."""

    brake: float = 0.0
    """0: the configured value stands; 1: it is at its bound."""
    calm: int = 0
    """Measurements in a row that were well below the target."""


def calibrate(
    state: Calibration,
    rate: float | None,
    coverage: float | None,
    *,
    target: float,
    min_coverage: float,
    slack: float,
    tighten: float,
    loosen: float,
    patience: int,
) -> tuple[Calibration, Decision]:
    """Take one measurement into account.

    A coverage below `min_coverage` is a violation whatever the rate is: a policy that says nothing of the image has no
    contradicted claim, and what made it silent is what the brake is on. Where there are no claims at all, or no facts
    to judge them by, there is no rate, and nothing is ever let go on that ground.

    Args:
        state: after the measurement before.
        rate: contradicted claims over claims; None: no claim was made.
        coverage: responses with claims over responses; None: no prompt has facts.
        target: the rate to stay below, in (0, 1].
        min_coverage: in [0, 1].
        slack: a measurement is calm when the rate is at most (1 - slack) x target.
        tighten: a violation takes 1 - brake to (1 - tighten) x (1 - brake).
        loosen: a calm measurement takes the brake to brake - loosen, but not below 0.
        patience: calm measurements in a row before the brake is let go.

    Returns:
        The new state, and what was decided: LOOSEN and TIGHTEN only where the brake has moved.
    """
    if coverage is not None and (coverage < min_coverage or (rate is not None and rate > target)):
        brake = 1.0 - (1.0 - tighten) * (1.0 - state.brake)
        return Calibration(brake, 0), Decision.TIGHTEN if brake > state.brake else Decision.HOLD
    if rate is None or coverage is None or rate > (1.0 - slack) * target:
        return Calibration(state.brake, 0), Decision.HOLD
    calm = min(state.calm + 1, patience)
    brake = max(0.0, state.brake - loosen) if calm >= patience else state.brake
    return Calibration(brake, calm), Decision.LOOSEN if brake < state.brake else Decision.HOLD


def braked(configured: float, bound: float, brake: float) -> float:
    """Return the value between the configured one and its bound that a brake stands for.

    Args:
        configured: at brake 0.
        bound: at brake 1; above or below.
        brake: in [0, 1].
    """
    return configured + brake * (bound - configured)
