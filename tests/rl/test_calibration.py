"""The controller by itself: worked out by hand, and against a plant that answers as a policy would."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1v2.rl.calibration import Calibration, CalibrationSettings, Decision, calibrate, interpolate

SETTINGS = {"target": 0.2, "min_coverage": 0.5, "slack": 0.25, "tighten": 0.5, "relax": 0.1, "patience": 2}


def decide(state: Calibration, rate: float | None, coverage: float | None = 1.0, **changes: float):
    return calibrate(state, CalibrationSettings(**(SETTINGS | changes)), rate=rate, coverage=coverage)


def test_a_rate_above_the_target_tightens_quickly() -> None:
    state, decision = decide(Calibration(), 0.21)
    assert (state, decision) == (Calibration(0.5, 0), Decision.TIGHTEN)
    assert decide(state, 0.21) == (Calibration(0.75, 0), Decision.TIGHTEN)


def test_it_lets_go_slowly_and_only_after_a_while() -> None:
    state, decision = decide(Calibration(0.75), 0.1)
    assert (state, decision) == (Calibration(0.75, 1), Decision.HOLD)
    state, decision = decide(state, 0.15)
    assert (state.brake, decision) == (pytest.approx(0.65), Decision.RELAX)
    assert decide(state, 0.0)[0].brake == pytest.approx(0.55)
    assert decide(Calibration(0.05, 2), 0.0) == (Calibration(0.0, 2), Decision.RELAX)
    assert decide(Calibration(0.0, 2), 0.0) == (Calibration(0.0, 2), Decision.HOLD)


@pytest.mark.parametrize("rate", [0.2, 0.16])
def test_between_calm_and_violation_nothing_moves_and_patience_starts_again(rate: float) -> None:
    assert decide(Calibration(0.4, 1), rate) == (Calibration(0.4, 0), Decision.HOLD)


@pytest.mark.parametrize("rate", [None, 0.0, 0.9])
def test_silence_is_a_violation_whatever_the_rate(rate: float | None) -> None:
    assert decide(Calibration(0.2, 2), rate, 0.49) == (Calibration(0.6, 0), Decision.TIGHTEN)


def test_without_a_rate_nothing_is_ever_let_go() -> None:
    assert decide(Calibration(0.2, 2), None, 0.0, min_coverage=0.0) == (Calibration(0.2, 0), Decision.HOLD)
    assert decide(Calibration(0.2, 2), None, None) == (Calibration(0.2, 0), Decision.HOLD)
    assert decide(Calibration(0.2, 2), 0.0, None) == (Calibration(0.2, 0), Decision.HOLD)


def test_a_brake_pulled_all_the_way_is_no_decision() -> None:
    assert decide(Calibration(1.0), 0.9) == (Calibration(1.0), Decision.HOLD)


def test_the_value_lies_between_the_configured_one_and_its_bound() -> None:
    assert interpolate(0.0, 0.8, 0.25) == pytest.approx(0.2)  # tau goes up
    assert interpolate(1.0, 0.2, 0.25) == pytest.approx(0.8)  # a weight goes down
    assert (interpolate(0.3, 0.9, 0.0), interpolate(0.3, 0.9, 1.0)) == (0.3, pytest.approx(0.9))


@given(
    st.lists(st.tuples(st.none() | st.floats(0, 1), st.none() | st.floats(0, 1)), max_size=60),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_the_brake_stays_in_bounds_and_moves_as_it_says(
    measured: list[tuple[float | None, float | None]], tighten: float, relax: float
) -> None:
    state = Calibration()
    for rate, coverage in measured:
        after, decision = decide(state, rate, coverage, tighten=tighten, relax=relax)
        assert 0.0 <= after.brake <= 1.0
        assert decision == (after.brake > state.brake) - (after.brake < state.brake)
        if decision == Decision.RELAX:
            assert rate is not None
            assert coverage is not None
            assert coverage >= SETTINGS["min_coverage"]
            assert rate <= SETTINGS["target"]
        state = after


def simulate(push: Callable[[float], float], *, start: float, steps: int = 400, noise: float = 0.02, **changes: float):
    """Run a policy whose log-odds of a wrong claim drift by `push(weight)` a step, and the calibrator on it.

    Returns:
        The rates and the weights of the reward model at each measurement.
    """
    draw = random.Random(0)
    state, odds = Calibration(), math.log(start / (1 - start))
    rates, weights = [], []
    for _ in range(steps):
        weights.append(interpolate(1.0, 0.0, state.brake))
        odds += push(weights[-1])
        rates.append(1 / (1 + math.exp(-odds)))
        measured = min(1.0, max(0.0, rates[-1] + draw.gauss(0, noise)))
        state, _ = decide(state, measured, **changes)
    return rates, weights


def test_a_policy_rewarded_for_hallucinating_is_held() -> None:
    # The reward model pushes towards wrong claims, the rules away from them: balance at a weight of 0.4.
    free, _ = simulate(lambda weight: 0.1 * (1.0 - 0.4), start=0.1)
    assert free[-1] > 0.99
    held, weights = simulate(lambda weight: 0.1 * (weight - 0.4), start=0.1)
    late = held[100:]
    assert sum(late) / len(late) < 0.2
    assert max(late) < 0.3
    assert 0.2 < sum(weights[100:]) / len(weights[100:]) < 0.5  # it gives no more away than it must


def test_a_harmless_reward_model_keeps_its_weight() -> None:
    _, weights = simulate(lambda weight: -0.05 * weight, start=0.1)
    assert weights == [1.0] * len(weights)


def test_after_the_cause_is_gone_the_weight_comes_back() -> None:
    rates, weights = simulate(lambda weight: -0.05, start=0.6, steps=100)
    assert min(weights) < 0.01
    assert weights[-1] == 1.0
    assert rates[-1] < 0.02
