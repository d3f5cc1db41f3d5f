import math

import pytest
import torch

from megatron_r1v2.rl.advantages import group_advantages
from megatron_r1v2.rl.prompt_pool import PoolPrompt, filtered_prompt_pool

KEYS = ["easy", "hard", "half", "rare"] * 4
#        easy, hard, half, rare in each of four rounds
CORRECT = [1, 0, 1, 0, 1, 0, 0, 0, 1, 0, 1, 1, 1, 0, 0, 0]


def test_only_mixed_prompts_stay_the_most_telling_first():
    pool = filtered_prompt_pool(KEYS, CORRECT)
    assert pool == [PoolPrompt("half", 0.5, 4, 1.0), PoolPrompt("rare", 0.25, 4, pytest.approx(math.sqrt(3) / 2))]


def test_the_weight_is_the_mean_absolute_advantage():
    advantages = group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0]), 5, 0.0)
    (prompt,) = filtered_prompt_pool(["a"] * 5, [True] + [False] * 4)
    assert prompt.weight == pytest.approx(advantages.abs().mean().item())
    (squared,) = filtered_prompt_pool(["a"] * 5, [True] + [False] * 4, priority_exponent=2.0)
    assert squared.weight == pytest.approx(prompt.weight**2)


def test_the_order_of_rollouts_does_not_matter():
    backwards = filtered_prompt_pool(KEYS[::-1], CORRECT[::-1])
    assert backwards == filtered_prompt_pool(KEYS, CORRECT)
    ties = filtered_prompt_pool(["b", "a", "b", "a"], [1, 0, 0, 1])
    assert [prompt.prompt_key for prompt in ties] == ["a", "b"]


def test_lengths_must_agree_and_nothing_gives_nothing():
    assert filtered_prompt_pool([], []) == []
    with pytest.raises(ValueError, match="2 prompt keys but 1"):
        filtered_prompt_pool(["a", "b"], [True])
