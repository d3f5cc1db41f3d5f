import pytest
import torch

from megatron_r1v2.rl.aggregation import check_loss_inputs, mean_metrics, sum_and_count, token_weights

MASK = torch.tensor([[0.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])


def test_a_response_counts_as_one_or_by_its_tokens():
    third = 1.0 / 3.0
    expected = torch.tensor([[0.0, third, third, third], [1.0, 0.0, 0.0, 0.0], [0.0] * 4])
    torch.testing.assert_close(token_weights(MASK, "sequence"), expected)
    assert torch.equal(token_weights(MASK, "token"), MASK)


def test_row_weights_multiply():
    weights = token_weights(MASK, "token", torch.tensor([0.0, 2.0, 1.0]))
    assert torch.equal(weights, torch.tensor([[0.0] * 4, [2.0, 0.0, 0.0, 0.0], [0.0] * 4]))


def test_unknown_aggregation():
    with pytest.raises(ValueError, match="'batch'"):
        token_weights(MASK, "batch")


def test_pairs_add_up_and_nothing_to_average_is_left_out():
    values, weights = torch.tensor([1.0, 5.0, float("nan")]), torch.tensor([3.0, 1.0, 0.0])
    whole = sum_and_count(values, weights)
    assert whole.tolist() == [8.0, 4.0]
    parts = sum_and_count(values[:1], weights[:1]) + sum_and_count(values[1:], weights[1:])
    assert torch.equal(whole, parts)
    assert mean_metrics({"a": whole, "b": torch.zeros(2)}) == {"a": 2.0}


def test_inputs_that_do_not_fit_are_named():
    shape = torch.Size([2, 3])
    check_loss_inputs(1.0, shape, advantages_B=torch.zeros(2), weights_B=None)
    with pytest.raises(ValueError, match=r"advantages_B must have shape \(2,\), got \(3,\)"):
        check_loss_inputs(1.0, shape, advantages_B=torch.zeros(3))
    with pytest.raises(ValueError, match="denominator"):
        check_loss_inputs(0.0, shape)
    with pytest.raises(ValueError, match="old_log_probs_BS must be float32"):
        check_loss_inputs(1.0, shape, old_log_probs_BS=torch.zeros(2, 3, dtype=torch.bfloat16))
