import math

import pytest
import torch

from megatron_r1v2.rl.aggregation import mean_metrics
from megatron_r1v2.rl.supervised import supervised_loss

LOG_PROBS = torch.tensor([[-1.0, -2.0, math.nan], [-4.0, -math.inf, -8.0]])
MASK = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]])


def test_value_and_gradient_by_hand():
    log_probs = LOG_PROBS.clone().requires_grad_()
    loss, metrics = supervised_loss(log_probs, MASK, denominator=4.0)
    loss.backward()
    assert loss.item() == (1.0 + 2.0 + 4.0 + 8.0) / 4.0
    # Descent raises every log-prob inside the mask, and padding gets nothing.
    assert torch.equal(log_probs.grad, -MASK / 4.0)
    assert mean_metrics(metrics) == {"actor/nll": 15.0 / 4.0}


def test_rows_add_up_and_fillers_count_nowhere():
    loss, metrics = supervised_loss(LOG_PROBS, MASK, denominator=2.0, weights_B=torch.tensor([1.0, 0.0]))
    alone, alone_metrics = supervised_loss(LOG_PROBS[:1], MASK[:1], denominator=2.0)
    assert loss.item() == alone.item() == 1.5
    assert torch.equal(metrics["actor/nll"], alone_metrics["actor/nll"])


@pytest.mark.parametrize("rows", [0, 2])
def test_nothing_to_train(rows):
    log_probs = torch.zeros(rows, 3, requires_grad=True)
    loss, metrics = supervised_loss(log_probs, torch.zeros(rows, 3), denominator=1.0)
    loss.backward()
    assert loss.item() == 0.0
    assert mean_metrics(metrics) == {}


def test_half_precision_is_refused():
    with pytest.raises(ValueError, match="float32"):
        supervised_loss(LOG_PROBS.bfloat16(), MASK, denominator=1.0)
