import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1v2.config.schema import RewardConfig
from megatron_r1v2.rewards.model import check_scores, squash


@pytest.mark.parametrize(
    ("score", "centre", "scale", "value"),
    [
        (0.0, 0.0, 1.0, 0.5),
        (math.log(3), 0.0, 1.0, 0.75),
        (-math.log(3), 0.0, 1.0, 0.25),
        (5.0, 3.0, 2.0, 1 / (1 + math.exp(-1))),
        (-1e9, 0.0, 1.0, 0.0),
        (1e9, 0.0, 1.0, 1.0),
    ],
)
def test_squash(score, centre, scale, value):
    assert squash(score, centre=centre, scale=scale) == pytest.approx(value)


def test_the_defaults_spread_the_scores_of_the_released_model():
    settings = RewardConfig()
    low, bad, good, high = (
        squash(score, centre=settings.model_centre, scale=settings.model_scale) for score in (-15.0, -10.36, 5.86, 8.0)
    )
    assert 0.04 < low < 0.1 < bad < 0.2
    assert 0.8 < good < 0.94 < high < 0.96


@given(
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(-1000, 1000),
    st.floats(1e-3, 1e3),
    st.floats(0, 100),
)
def test_squash_is_bounded_and_rises(score, centre, scale, more):
    low, high = squash(score, centre=centre, scale=scale), squash(score + more, centre=centre, scale=scale)
    assert 0.0 <= low <= high <= 1.0


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0], "gave 1 scores for 2 responses"),
        ([1.0, math.nan], r"1 of 2 responses no finite score \(response 1: nan\)"),
        ([-math.inf, math.nan], r"2 of 2 responses no finite score \(response 0: -inf\)"),
    ],
)
def test_what_is_no_score_is_an_error_and_not_a_reward(scores, message):
    with pytest.raises(RuntimeError, match=message):
        check_scores(scores, 2)
