"""The MPO loss by hand, its three terms, delta, and the threshold on margins."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1v2.rl.aggregation import mean_metrics
from megatron_r1v2.rl.mpo import (
    MpoInputs,
    MpoSettings,
    RewardShift,
    TermWeights,
    generation_loss,
    mpo_loss,
    preference_loss,
    quality_loss,
    split_by_margin,
)
from megatron_r1v2.types import Preference
from tests.stages.scripted import make_prompt

WEIGHTS = TermWeights(0.8, 0.2, 1.0)
# Two pairs: chosen -3 and -4 over 2 and 1 tokens, rejected -7 and -2 over 2 and 3.
LOG_PROBS = torch.tensor(
    [
        [-1.0, -2.0, math.nan],
        [-3.0, -4.0, -math.inf],
        [-math.inf, -4.0, math.nan],
        [-0.5, -0.5, -1.0],
    ]
)
MASK = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
SUMS = torch.tensor([-3.0, -7.0, -4.0, -2.0], dtype=torch.float64)
REFERENCE = torch.tensor([-5.0, -4.0, -4.0, -6.0], dtype=torch.float64)  # log-ratios 2, -3, 0, 4


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def loss_of(log_probs=LOG_PROBS, mask=MASK, reference=REFERENCE, weights_B=None, **changes):
    settings = MpoSettings(
        weights=changes.pop("weights", WEIGHTS),
        beta=changes.pop("beta", 0.5),
        generation_aggregation=changes.pop("generation_aggregation", "sequence"),
    )
    numbers = {"delta": 0.0, "num_pairs": 2.0, "generation_denominator": 2.0} | changes
    return mpo_loss(MpoInputs(log_probs, reference, mask, weights_B), settings, **numbers)


@pytest.mark.parametrize("delta", [0.0, 0.25, -1.5])
def test_value_by_hand(delta):
    """Rewards are 1, -1.5 for the first pair and 0, 2 for the second."""
    loss, metrics = loss_of(delta=delta)
    preference = [-math.log(sigmoid(2.5)), -math.log(sigmoid(-2.0))]
    quality = [
        -math.log(sigmoid(1 - delta)) - math.log(sigmoid(1.5 + delta)),
        -math.log(sigmoid(-delta)) - math.log(sigmoid(-2 + delta)),
    ]
    generation = [1.5, 4.0]
    expected = (0.8 * sum(preference) + 0.2 * sum(quality) + sum(generation)) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    found = mean_metrics(metrics)
    assert found == pytest.approx(
        {
            "mpo/preference_loss": sum(preference) / 2,
            "mpo/quality_loss": sum(quality) / 2,
            "mpo/generation_loss": 2.75,
            "actor/nll": 7 / 3,
            "rewards/chosen": 0.5,
            "rewards/rejected": 0.25,
            "rewards/margins": 0.25,
            "rewards/accuracies": 0.5,
            "logps/chosen": -3.5,
            "logps/rejected": -4.5,
        }
    )


def test_gradient_by_hand():
    log_probs = LOG_PROBS.clone().requires_grad_()
    loss_of(log_probs, delta=0.25)[0].backward()
    # d/dr: preference -sigmoid(r_r - r_c) for chosen and its opposite for rejected; quality -sigmoid(delta - r_c) and
    # sigmoid(r_r - delta); times beta / pairs. Generation: -1 / |y| / pairs.
    chosen = [
        -0.5 / 2 * (0.8 * sigmoid(-2.5) + 0.2 * sigmoid(-0.75)) - 1 / 2 / 2,
        -0.5 / 2 * (0.8 * sigmoid(2.0) + 0.2 * sigmoid(0.25)) - 1 / 2,
    ]
    rejected = [
        0.5 / 2 * (0.8 * sigmoid(-2.5) + 0.2 * sigmoid(-1.75)),
        0.5 / 2 * (0.8 * sigmoid(2.0) + 0.2 * sigmoid(1.75)),
    ]
    rows = torch.tensor([chosen[0], rejected[0], chosen[1], rejected[1]])
    torch.testing.assert_close(log_probs.grad, MASK * rows[:, None])


def test_each_term_by_itself_is_an_algorithm_of_its_own():
    """DPO, BCO and supervised training; each lowers what it should."""
    for weights, signs in (((1, 0, 0), (-1, 1)), ((0, 1, 0), (-1, 1)), ((0, 0, 1), (-1, 0))):
        log_probs = LOG_PROBS.clone().requires_grad_()
        loss, metrics = loss_of(log_probs, weights=TermWeights(*weights))
        loss.backward()
        assert [math.copysign(1, g) if g else 0 for g in log_probs.grad[:2, 0].tolist()] == list(signs)
        name = ("preference", "quality", "generation")[weights.index(1)]
        assert loss.item() == pytest.approx(mean_metrics(metrics)[f"mpo/{name}_loss"], rel=1e-6)


@pytest.mark.parametrize(("aggregation", "denominator"), [("sequence", 2.0), ("token", 3.0)])
def test_the_loss_of_an_unchanged_policy(aggregation, denominator):
    loss, metrics = loss_of(
        reference=SUMS, beta=0.1, generation_aggregation=aggregation, generation_denominator=denominator
    )
    nll = 2.75 if aggregation == "sequence" else 7 / 3
    assert loss.item() == pytest.approx(0.8318 + nll, abs=1e-4)
    assert mean_metrics(metrics)["mpo/generation_loss"] == pytest.approx(nll)


def test_parts_add_up_and_fillers_count_nowhere():
    whole, metrics = loss_of(delta=0.3)
    parts = [loss_of(LOG_PROBS[at], MASK[at], REFERENCE[at], delta=0.3) for at in (slice(0, 2), slice(2, 4))]
    assert sum(loss for loss, _ in parts).item() == pytest.approx(whole.item(), rel=1e-6)
    for name, pair in metrics.items():
        torch.testing.assert_close(parts[0][1][name] + parts[1][1][name], pair)
    weighted, weighted_metrics = loss_of(delta=0.3, weights_B=torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert weighted.item() == pytest.approx(parts[0][0].item(), rel=1e-6)
    for name, pair in weighted_metrics.items():
        torch.testing.assert_close(pair, parts[0][1][name])


@pytest.mark.parametrize("rows", [0, 2])
def test_nothing_to_train(rows):
    log_probs = torch.full((rows, 3), math.nan, requires_grad=True)
    loss, metrics = loss_of(log_probs, torch.zeros(rows, 3), torch.zeros(rows), weights_B=torch.zeros(rows))
    loss.backward()
    assert loss.item() == 0.0
    assert not log_probs.grad.any()
    assert mean_metrics(metrics) == {}


def test_what_is_no_pair_is_refused():
    with pytest.raises(ValueError, match="3 rows, which are no pairs"):
        loss_of(LOG_PROBS[:3], MASK[:3], REFERENCE[:3])
    with pytest.raises(ValueError, match="reference_sums_B must have shape"):
        loss_of(reference=REFERENCE[:2])
    with pytest.raises(ValueError, match="float32"):
        loss_of(LOG_PROBS.bfloat16())


def test_long_responses_keep_small_differences():
    """A float32 sum of 30,000 log-probs is coarser than what one step changes."""
    torch.manual_seed(0)
    log_probs = -3 * torch.rand(2, 30_000)
    exact = log_probs.double().sum(dim=1)
    _, metrics = loss_of(log_probs, torch.ones(2, 30_000), exact - 1e-5, beta=1.0, num_pairs=1.0)
    assert mean_metrics(metrics)["rewards/chosen"] == pytest.approx(1e-5, rel=1e-3)


@given(st.lists(st.tuples(st.floats(-30, 30), st.floats(-30, 30)), min_size=1, max_size=5), st.floats(-3, 3))
def test_terms_are_what_they_are_for_any_reward(rewards, delta):
    chosen, rejected = (torch.tensor(side, dtype=torch.float64) for side in zip(*rewards, strict=True))
    preference, quality = preference_loss(chosen, rejected), quality_loss(chosen, rejected, delta)
    assert (preference > 0).all() or (chosen - rejected > 30).any()
    torch.testing.assert_close(preference, torch.log1p((rejected - chosen).exp()))
    # What the quality term says of both together bounds the preference term: sigmoid(a) sigmoid(b) < sigmoid(a + b).
    assert (quality >= preference - 1e-9).all()
    torch.testing.assert_close(quality, torch.log1p((delta - chosen).exp()) + torch.log1p((rejected - delta).exp()))


def test_generation_needs_a_known_aggregation():
    with pytest.raises(ValueError, match='"sequence" or "token"'):
        generation_loss(LOG_PROBS[::2], MASK[::2], denominator=1.0, aggregation="pair")


def test_delta_is_the_mean_of_all_rewards_so_far():
    shift = RewardShift().update(0.5, 4, momentum=0.0).update(2.0, 2, momentum=0.0)
    assert shift == RewardShift((4 * 0.5 + 2 * 2.0) / 6, 6)
    assert shift.update(math.nan, 0, momentum=0.0) == shift


def test_delta_is_a_moving_average():
    shift = RewardShift().update(0.5, 4, momentum=0.9).update(2.0, 2, momentum=0.9)
    assert shift.value == pytest.approx(0.9 * 0.05 + 0.1 * 2.0)


def test_pairs_below_the_margin_are_split_off():
    margins = {"a": 0.5, "b": None, "c": -0.2, "d": 0.0}
    prompts = [
        replace(make_prompt(key, tiles=1), preference=Preference("x", "y", margin)) for key, margin in margins.items()
    ]

    def keys(tau):
        return ["".join(prompt.key for prompt in side) for side in split_by_margin(prompts, tau)]

    assert keys(0.0) == ["abd", "c"]
    assert keys(0.5) == ["a", "bcd"]
    assert keys(-1.0) == ["abcd", ""]
    assert keys(0.6) == ["", "abcd"]
