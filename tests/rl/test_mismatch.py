import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1v2.rl.mismatch import (
    check_mismatch,
    mismatch_metrics,
    mismatch_sums,
    truncated_importance_weights,
)

TRAINING = torch.tensor([[-1.0, -2.0, 7.0], [-0.5, 7.0, 7.0]])
ROLLOUT = torch.tensor([[-1.5, -1.0, math.nan], [-0.5, 7.0, -math.inf]])
MASK = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
IMAGE = torch.tensor([True, False])


def test_values_by_hand():
    # Log-ratios: row 1 (image): 0.5, -1; row 2 (text): 0.
    metrics = mismatch_metrics(*mismatch_sums(TRAINING, ROLLOUT, MASK, IMAGE))
    expected = {
        "rollout_corr/kl": 0.5 / 3,
        "rollout_corr/k3_kl": (math.exp(0.5) - 1.5 + math.exp(-1.0)) / 3,
        "rollout_corr/chi2_token": (math.exp(1.0) + math.exp(-2.0) + 1.0) / 3 - 1.0,
        "rollout_corr/log_prob_abs_diff": 0.5,
        "train/token_mult_prob_error": (math.exp(0.5) + math.e + 1.0) / 3,
        "rollout_corr/training_log_ppl": (1.5 + 0.5) / 2,
        "rollout_corr/training_ppl": (math.exp(1.5) + math.exp(0.5)) / 2,
        "rollout_corr/rollout_log_ppl": (1.25 + 0.5) / 2,
        "rollout_corr/rollout_ppl": (math.exp(1.25) + math.exp(0.5)) / 2,
        "rollout_corr/log_ppl_diff": 0.25 / 2,
        "rollout_corr/log_ppl_abs_diff": 0.25 / 2,
        "rollout_corr/ppl_ratio": (math.exp(0.25) + 1.0) / 2,
        "rollout_corr/chi2_seq": (math.exp(-1.0) + 1.0) / 2 - 1.0,
        "rollout_corr/log_ppl_diff_max": 0.25,
        "rollout_corr/log_ppl_diff_min": 0.0,
    }
    whole = {name: value for name, value in metrics.items() if not name.endswith(("_image", "_text"))}
    assert whole == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_image_and_text_rows_are_told_apart():
    metrics = mismatch_metrics(*mismatch_sums(TRAINING, ROLLOUT, MASK, IMAGE))
    assert metrics["rollout_corr/log_prob_abs_diff_image"] == pytest.approx(0.75)
    assert metrics["rollout_corr/log_prob_abs_diff_text"] == 0.0
    assert metrics["train/token_mult_prob_error_text"] == 1.0
    assert metrics["rollout_corr/log_ppl_diff_min_image"] == pytest.approx(0.25)
    only_images = mismatch_metrics(*mismatch_sums(TRAINING, ROLLOUT, MASK, torch.tensor([True, True])))
    assert not [name for name in only_images if name.endswith("_text")]
    assert only_images["rollout_corr/kl_image"] == only_images["rollout_corr/kl"]


def test_equal_log_probs_give_no_mismatch():
    metrics = mismatch_metrics(*mismatch_sums(TRAINING, TRAINING, MASK, IMAGE))
    ones = {"train/token_mult_prob_error", "rollout_corr/ppl_ratio"}
    for name, value in metrics.items():
        base = name.removesuffix("_image").removesuffix("_text")
        if not base.endswith("ppl"):
            assert value == (1.0 if base in ones else 0.0), name


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 6))
def test_parts_of_a_batch_combine_to_the_whole(seed, cut):
    generator = torch.Generator().manual_seed(seed)
    training = torch.randn(6, 5, generator=generator)
    rollout = training + 0.1 * torch.randn(6, 5, generator=generator)
    mask = (torch.rand(6, 5, generator=generator) < 0.6).float()
    image = torch.rand(6, generator=generator) < 0.5
    weights = (torch.rand(6, generator=generator) < 0.7).float()
    whole = mismatch_metrics(*mismatch_sums(training, rollout, mask, image, weights))
    parts = [
        mismatch_sums(training[part], rollout[part], mask[part], image[part], weights[part])
        for part in (slice(cut), slice(cut, 6))
    ]
    sums = {name: parts[0][0][name] + parts[1][0][name] for name in parts[0][0]}
    maxima = {name: torch.maximum(parts[0][1][name], parts[1][1][name]) for name in parts[0][1]}
    assert mismatch_metrics(sums, maxima) == pytest.approx(whole, rel=1e-9, abs=1e-12)


def test_no_rows_and_empty_rows_give_nothing():
    for rows in (0, 2):
        zeros = torch.zeros(rows, 3)
        assert mismatch_metrics(*mismatch_sums(zeros, zeros, zeros, torch.zeros(rows, dtype=torch.bool))) == {}


def test_extreme_differences_stay_finite():
    low = torch.full((1, 3), -1000.0)
    for training, rollout in ((low, torch.zeros(1, 3)), (torch.zeros(1, 3), low)):
        metrics = mismatch_metrics(*mismatch_sums(training, rollout, torch.ones(1, 3), torch.tensor([True])))
        finite = {name: value for name, value in metrics.items() if not name.endswith(("_ppl", "_ppl_image"))}
        assert all(math.isfinite(value) for value in finite.values())


def test_training_stops_above_the_bound():
    metrics = mismatch_metrics(*mismatch_sums(TRAINING, ROLLOUT, MASK, IMAGE))
    check_mismatch(metrics, 0.5001)
    check_mismatch({}, 0.1)
    with pytest.raises(ValueError, match="max_log_prob_difference"):
        check_mismatch(metrics, 0.4999)
    with pytest.raises(ValueError, match="nan"):
        check_mismatch({"rollout_corr/log_prob_abs_diff": math.nan}, 1.0)


def test_truncated_importance_weights_by_hand():
    old = torch.tensor([[math.log(0.5), math.log(0.6), 0.0, -math.inf]], requires_grad=True)
    rollout = torch.tensor([[math.log(0.4), math.log(0.1), -1e30, -1.0]])
    weights = truncated_importance_weights(old, rollout, 2.0)
    torch.testing.assert_close(weights, torch.tensor([[1.25, 2.0, 2.0, 0.0]]))
    assert not weights.requires_grad
    with pytest.raises(ValueError, match="above 0"):
        truncated_importance_weights(old, rollout, 0.0)
