"""The Bradley-Terry loss: values worked out by hand, the sign of its gradient, fillers that count nowhere."""

import math

import pytest
import torch

from megatron_r1v2.rl.reward_model import bradley_terry_loss


def scores(*values: float) -> torch.Tensor:
    return torch.tensor(values, requires_grad=True)


def test_values_worked_out_by_hand():
    # margins ln 3, 0, -ln 4: sigma = 3/4, 1/2, 1/5; losses ln(4/3), ln 2, ln 5
    chosen, rejected = scores(math.log(3), 2.0, 0.0), scores(0.0, 2.0, math.log(4))
    loss, metrics = bradley_terry_loss(chosen, rejected, denominator=3)
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(2) + math.log(5)) / 3)
    expected = {
        "loss": math.log(4 / 3) + math.log(2) + math.log(5),
        "accuracy": 1.5,
        "margin": math.log(3) - math.log(4),
        "chosen_score": math.log(3) + 2,
        "rejected_score": 2 + math.log(4),
    }
    assert {name: pair.tolist() for name, pair in metrics.items()} == {
        f"reward_model/{name}": pytest.approx([value, 3.0]) for name, value in expected.items()
    }
    loss.backward()
    # d/ds_c of -log sigma(s_c - s_r) = -(1 - sigma)
    assert chosen.grad.tolist() == pytest.approx([-1 / 4 / 3, -1 / 2 / 3, -4 / 5 / 3])
    assert rejected.grad.tolist() == pytest.approx([1 / 4 / 3, 1 / 2 / 3, 4 / 5 / 3])


def test_centring_is_off_by_default_and_pulls_the_sum_of_a_pair_to_zero():
    chosen, rejected = scores(2.0), scores(1.0)
    plain, _ = bradley_terry_loss(chosen, rejected, denominator=1)
    centred, metrics = bradley_terry_loss(chosen, rejected, denominator=1, centring_weight=0.01)
    assert (centred - plain).item() == pytest.approx(0.01 * 9, rel=1e-5)
    assert metrics["reward_model/loss"].tolist() == pytest.approx([plain.item(), 1.0])
    (centred - plain).backward()
    assert chosen.grad.item() == pytest.approx(0.06, rel=1e-5)
    assert rejected.grad.item() == pytest.approx(0.06, rel=1e-5)


def test_a_filler_counts_nowhere_whatever_its_scores_are():
    chosen, rejected = scores(1.0, math.nan), scores(0.0, math.inf)
    weights = torch.tensor([1.0, 0.0])
    loss, metrics = bradley_terry_loss(chosen, rejected, denominator=4, weights_P=weights, centring_weight=0.5)
    alone, of_one = bradley_terry_loss(scores(1.0), scores(0.0), denominator=4, centring_weight=0.5)
    assert loss.item() == alone.item()
    assert {name: pair.tolist() for name, pair in metrics.items()} == {n: p.tolist() for n, p in of_one.items()}
    loss.backward()
    assert chosen.grad[1] == rejected.grad[1] == 0
    nothing, metrics = bradley_terry_loss(chosen, rejected, denominator=4, weights_P=torch.zeros(2))
    assert nothing.item() == 0
    assert all(pair.tolist() == [0.0, 0.0] for pair in metrics.values())


def test_parts_of_a_batch_add_up():
    chosen, rejected = torch.randn(5), torch.randn(5)
    whole, _ = bradley_terry_loss(chosen, rejected, denominator=5, centring_weight=0.1)
    parts = [
        bradley_terry_loss(chosen[part], rejected[part], denominator=5, centring_weight=0.1)[0]
        for part in (slice(0, 2), slice(2, 5))
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-6)


def test_large_margins_neither_overflow_nor_lose_their_gradient():
    chosen, rejected = scores(-500.0), scores(500.0)
    loss, _ = bradley_terry_loss(chosen, rejected, denominator=1)
    loss.backward()
    assert loss.item() == 1000.0
    assert chosen.grad.item() == -1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rejected_scores_P": torch.zeros(3)}, r"\[2\] chosen, \[3\] rejected"),
        ({"weights_P": torch.ones(1)}, r"weights_P is \[1\]"),
        ({"chosen_scores_P": torch.zeros(2, dtype=torch.bfloat16)}, "float32"),
        ({"denominator": 0}, "denominator=0"),
    ],
)
def test_wrong_inputs_are_refused(arguments, message):
    given = {"chosen_scores_P": torch.zeros(2), "rejected_scores_P": torch.zeros(2), "denominator": 2} | arguments
    with pytest.raises(ValueError, match=message):
        bradley_terry_loss(given.pop("chosen_scores_P"), given.pop("rejected_scores_P"), **given)
