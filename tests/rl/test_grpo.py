import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1v2.rl.aggregation import mean_metrics
from megatron_r1v2.rl.grpo import GrpoInputs, GrpoSettings, grpo_loss, kl_k3

CLIP = {"clip_low": 0.2, "clip_high": 0.3}


def loss_of(*inputs, denominator, aggregation, kl_coefficient=0.0, **more_inputs):
    """Compute the loss of the tensors of `GrpoInputs` under the clip ranges of this file."""
    settings_ = GrpoSettings(**CLIP, aggregation=aggregation, kl_coefficient=kl_coefficient)
    return grpo_loss(GrpoInputs(*inputs, **more_inputs), settings_, denominator=denominator)


def random_batch(seed, rows=5, tokens=6, spread=0.5):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(0, tokens + 1, (rows,), generator=generator)
    old = normal(rows, tokens) - 1.0
    return {
        "log_probs_BS": old + spread * normal(rows, tokens),
        "old_log_probs_BS": old,
        "advantages_B": normal(rows),
        "response_mask_BS": (torch.arange(tokens)[None] < lengths[:, None]).double(),
        "weights_B": (torch.rand(rows, generator=generator) < 0.8).double(),
        "importance_weights_BS": normal(rows, tokens).exp().clamp(max=2.0),
        "reference_log_probs_BS": old + 0.3 * normal(rows, tokens),
        "replayed_B": torch.rand(rows, generator=generator) < 0.5,
    }


def test_values_by_hand():
    # Row 1: A = 2, ratios 1.1 (inside) and 2 (clipped to 1.3). Row 2: A = -1, ratio 0.5 clipped to 0.8.
    log_ratios = torch.tensor([[math.log(1.1), math.log(2.0)], [math.log(0.5), 99.0]])
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    arguments = (log_ratios - 1.0, torch.full((2, 2), -1.0), torch.tensor([2.0, -1.0]), mask)
    loss, metrics = loss_of(*arguments, denominator=2.0, aggregation="sequence")
    assert loss.item() == pytest.approx((-(2.2 + 2.6) / 2 + 0.8) / 2, rel=1e-6)
    loss, _ = loss_of(*arguments, denominator=3.0, aggregation="token")
    assert loss.item() == pytest.approx((-(2.2 + 2.6) + 0.8) / 3, rel=1e-6)
    means = mean_metrics(metrics)
    assert means["actor/pg_clipfrac"] == pytest.approx(2 / 3)
    assert means["actor/ratio_mean"] == pytest.approx((1.1 + 2.0 + 0.5) / 3)
    assert means["actor/ppo_kl"] == pytest.approx(-math.log(1.1 * 2.0 * 0.5) / 3, rel=1e-6)
    assert "ssb/clip_fraction_replayed" not in means


def test_metrics_of_replayed_rows_by_hand():
    ratios = torch.tensor([[1.0, 1.2], [1.0, 2.0]])
    _, metrics = loss_of(
        ratios.log(),
        torch.zeros(2, 2),
        torch.tensor([1.0, 3.0]),
        torch.ones(2, 2),
        denominator=2.0,
        aggregation="sequence",
        replayed_B=torch.tensor([False, True]),
    )
    means = mean_metrics(metrics)
    assert means["ssb/clip_fraction_replayed"] == 0.5
    assert means["ssb/ratio_mean_replayed"] == pytest.approx(1.5)
    # |d loss / d log p| x 4: fresh 1 + 1.2; replayed 3, and nothing for the clipped token.
    assert means["ssb/gradient_share_replayed"] == pytest.approx(3.0 / 5.2, rel=1e-6)


def test_one_clip_range_for_each_side():
    def value_of(ratio, advantage):
        log_prob = torch.tensor([[math.log(ratio)]])
        zero, one = torch.zeros(1, 1), torch.ones(1, 1)
        arguments = (log_prob, zero, torch.tensor([advantage]), one)
        return loss_of(*arguments, denominator=1.0, aggregation="token")[0].item()

    assert value_of(5.0, 1.0) == pytest.approx(-1.3)
    assert value_of(0.1, -1.0) == pytest.approx(0.8)
    # The pessimistic side is never clipped.
    assert value_of(5.0, -1.0) == pytest.approx(5.0)
    assert value_of(0.1, 1.0) == pytest.approx(-0.1)


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_descent_raises_the_log_probs_of_good_responses(aggregation):
    log_probs = torch.full((2, 3), -1.0, requires_grad=True)
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    advantages = torch.tensor([1.5, -0.5])
    loss, _ = loss_of(log_probs, log_probs.detach(), advantages, mask, denominator=2.0, aggregation=aggregation)
    loss.backward()
    # On policy the ratio is 1: the gradient is -A / (length or 1) / denominator.
    lengths = mask.sum(dim=1, keepdim=True) if aggregation == "sequence" else 1.0
    torch.testing.assert_close(log_probs.grad, -advantages[:, None] * mask / lengths / 2.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_outside_the_mask_does_not_matter(bad):
    mask = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    junk = torch.full((2, 2), bad)
    good = torch.full((2, 2), -0.5)
    log_probs = torch.where(mask.bool(), good, junk).requires_grad_()
    loss, metrics = loss_of(
        log_probs,
        torch.where(mask.bool(), good, junk),
        torch.tensor([1.0, 1.0]),
        mask,
        denominator=1.0,
        aggregation="sequence",
        importance_weights_BS=torch.where(mask.bool(), torch.ones(2, 2), junk),
        reference_log_probs_BS=torch.where(mask.bool(), good, junk),
        kl_coefficient=0.1,
        replayed_B=torch.tensor([False, True]),
    )
    loss.backward()
    assert loss.item() == -1.0
    assert log_probs.grad.tolist() == [[-1.0, 0.0], [0.0, 0.0]]
    assert all(torch.isfinite(pair).all() for pair in metrics.values())


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_train_is_zero_with_a_gradient(rows):
    log_probs = torch.zeros(rows, 4, requires_grad=True)
    zeros = torch.zeros(rows, 4)
    loss, metrics = loss_of(log_probs, zeros, torch.ones(rows), zeros, denominator=8.0, aggregation="sequence")
    loss.backward()
    assert loss.item() == 0.0
    assert log_probs.grad.abs().sum() == 0.0
    assert all(pair.tolist() == [0.0, 0.0] for pair in metrics.values())


@pytest.mark.parametrize("log_ratio", [-1e30, -200.0, 200.0, 1e30])
@pytest.mark.parametrize("advantage", [-3.0, 3.0])
def test_extreme_ratios_stay_finite(log_ratio, advantage):
    log_probs = torch.tensor([[log_ratio]], requires_grad=True)
    loss, metrics = loss_of(
        log_probs,
        torch.zeros(1, 1),
        torch.tensor([advantage]),
        torch.ones(1, 1),
        denominator=1.0,
        aggregation="sequence",
        reference_log_probs_BS=torch.zeros(1, 1),
        kl_coefficient=0.1,
    )
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(log_probs.grad).all()
    assert all(torch.isfinite(pair).all() for pair in metrics.values())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["sequence", "token"]), st.sampled_from([0.0, 0.2]), st.integers(0, 5))
def test_parts_of_a_batch_add_up_to_the_whole(seed, aggregation, kl_coefficient, cut):
    batch = random_batch(seed)
    settings_ = {"denominator": 7.0, "aggregation": aggregation, "kl_coefficient": kl_coefficient}
    whole, metrics = loss_of(**batch, **settings_)
    parts = [loss_of(**{k: v[part] for k, v in batch.items()}, **settings_) for part in (slice(cut), slice(cut, 5))]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole)
    for name, pair in metrics.items():
        torch.testing.assert_close(parts[0][1][name] + parts[1][1][name], pair)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["sequence", "token"]), st.sampled_from([0.0, 0.2]))
def test_gradient_share_equals_that_of_autograd(seed, aggregation, kl_coefficient):
    batch = random_batch(seed)
    batch["log_probs_BS"].requires_grad_()
    arguments = {"denominator": 3.0, "aggregation": aggregation, "kl_coefficient": kl_coefficient}
    loss, metrics = loss_of(**batch, **arguments)
    loss.backward()
    gradient = batch["log_probs_BS"].grad.abs() * 3.0
    expected = torch.stack([gradient[batch["replayed_B"]].sum(), gradient.sum()])
    torch.testing.assert_close(metrics["ssb/gradient_share_replayed"], expected, rtol=1e-6, atol=1e-9)


def test_filler_rows_count_nowhere():
    batch = random_batch(3)
    batch["weights_B"] = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0]).double()
    settings_ = {"denominator": 3.0, "aggregation": "sequence"}
    with_filler = loss_of(**batch, **settings_)
    without = loss_of(**{name: value[[0, 1, 3]] for name, value in batch.items()}, **settings_)
    torch.testing.assert_close(with_filler[0], without[0])
    for name, pair in without[1].items():
        torch.testing.assert_close(with_filler[1][name], pair)


def test_importance_weights_scale_the_loss_and_carry_no_gradient():
    log_probs = torch.zeros(1, 2, requires_grad=True)
    importance = torch.tensor([[0.5, 2.0]], requires_grad=True)
    loss, _ = loss_of(
        log_probs,
        torch.zeros(1, 2),
        torch.ones(1),
        torch.ones(1, 2),
        denominator=1.0,
        aggregation="token",
        importance_weights_BS=importance,
    )
    loss.backward()
    assert loss.item() == -2.5
    assert log_probs.grad.tolist() == [[-0.5, -2.0]]
    assert importance.grad is None


def test_kl_by_hand_and_never_negative():
    assert kl_k3(torch.tensor(-1.0), torch.tensor(-1.0)).item() == 0.0
    assert kl_k3(torch.tensor(-1.0), torch.tensor(-2.0)).item() == pytest.approx(math.exp(-1.0))
    assert kl_k3(torch.tensor(-2.0), torch.tensor(-1.0)).item() == pytest.approx(math.e - 2.0)
    assert (kl_k3(torch.linspace(-50.0, 0.0, 200), torch.full((200,), -7.0)) >= 0).all()


def test_kl_estimates_the_divergence():
    policy, reference = torch.tensor([0.6, 0.3, 0.1]).double(), torch.tensor([0.2, 0.3, 0.5]).double()
    expected = (policy * (policy / reference).log()).sum()
    torch.testing.assert_close((policy * kl_k3(policy.log(), reference.log())).sum(), expected)


def test_kl_pulls_towards_the_reference():
    log_probs = torch.tensor([[-1.0, -3.0]], requires_grad=True)
    loss, metrics = loss_of(
        log_probs,
        log_probs.detach(),
        torch.zeros(1),
        torch.ones(1, 2),
        denominator=1.0,
        aggregation="token",
        reference_log_probs_BS=torch.full((1, 2), -2.0),
        kl_coefficient=0.5,
    )
    loss.backward()
    assert log_probs.grad[0, 0] > 0 > log_probs.grad[0, 1]
    assert loss.item() == pytest.approx(0.5 * (math.exp(-1.0) + math.e - 2.0))
    assert mean_metrics(metrics)["actor/kl_loss"] == pytest.approx((math.exp(-1.0) + math.e - 2.0) / 2)


def test_kl_without_reference_is_refused():
    batch = random_batch(0)
    del batch["reference_log_probs_BS"]
    with pytest.raises(ValueError, match=r"kl_coefficient is 0\.1"):
        loss_of(**batch, denominator=1.0, aggregation="token", kl_coefficient=0.1)
