import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1v2.rl.advantages import REWARD_TOLERANCE, effective_mask, group_advantages


def test_values_by_hand():
    # Group 1: mean 0.25, population std sqrt(3)/4. Group 2: mean 2, std 1.
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 3.0, 1.0, 3.0, 1.0])
    expected = [math.sqrt(3.0)] + [-1.0 / math.sqrt(3.0)] * 3 + [1.0, -1.0, 1.0, -1.0]
    torch.testing.assert_close(group_advantages(rewards, 4, 0.0), torch.tensor(expected))


def test_epsilon_is_added_to_the_deviation():
    advantages = group_advantages(torch.tensor([2.0, 0.0]), 2, 0.5)
    torch.testing.assert_close(advantages, torch.tensor([1.0 / 1.5, -1.0 / 1.5]))


@given(st.floats(-100.0, 100.0), st.integers(1, 16))
def test_a_uniform_group_has_exactly_zero_advantage(reward, group_size):
    rewards = torch.tensor([reward] * group_size, dtype=torch.float64)
    assert group_advantages(rewards, group_size, 0.0).tolist() == [0.0] * group_size
    assert group_advantages(rewards.float(), group_size, 1e-12).tolist() == [0.0] * group_size


@given(st.lists(st.floats(-5.0, 5.0), min_size=12, max_size=12))
def test_groups_do_not_see_each_other_and_have_mean_zero(values):
    rewards = torch.tensor(values, dtype=torch.float64)
    together = group_advantages(rewards, 4, 1e-6)
    apart = torch.cat([group_advantages(rewards[start : start + 4], 4, 1e-6) for start in (0, 4, 8)])
    assert torch.equal(together, apart)
    assert together.reshape(3, 4).mean(dim=1).abs().max() < 1e-6


def test_effective_groups_are_those_with_both_right_and_wrong():
    correct = torch.tensor([True, True, False, False, True, False, False, True])
    assert effective_mask(correct, 2).tolist() == [False, False, False, False, True, True, True, True]
    assert effective_mask(correct[:1], 1).tolist() == [False]


def test_effective_groups_by_reward_are_those_that_differ_by_more_than_the_tolerance():
    rewards = torch.tensor([0.5, 0.5 + 2**-7, 0.5, 0.52, 0.1, 0.1], dtype=torch.float64)
    assert effective_mask(rewards, 2, REWARD_TOLERANCE).tolist() == [False, False, True, True, False, False]
    assert effective_mask(rewards, 2).tolist() == [True, True, True, True, False, False]
    assert effective_mask(rewards, 6, REWARD_TOLERANCE).all()


def test_no_responses():
    empty = torch.zeros(0)
    assert group_advantages(empty, 8, 1e-6).shape == (0,)
    assert effective_mask(empty.bool(), 8).shape == (0,)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="whole groups of 4"):
        group_advantages(torch.zeros(6), 4, 1e-6)
    with pytest.raises(ValueError, match=r"responses \[1\] are not"):
        group_advantages(torch.tensor([0.0, math.nan]), 2, 1e-6)
    with pytest.raises(ValueError, match="group_size"):
        effective_mask(torch.zeros(6), 0)
