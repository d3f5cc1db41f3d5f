"""The mismatch between the engine that samples and the training forward on the same tokens, and its correction.

Both compute the same model in different ways; GRPO is only right as long as they agree. Names and definitions are
verl's (`rollout_corr/*`) and NeMo-RL's (`train/token_mult_prob_error`), so that numbers can be compared. The mask is
the response mask, which never contains image tokens; the log-probs on both sides are those of the sampling distribution
(after the temperature). Each metric exists for all rows, for rows conditioned on an image (`_image`) and for text-only
rows (`_text`).
"""

from __future__ import annotations

import math

import torch

from megatron_r1v2.rl.aggregation import check_loss_inputs, mean_metrics, sum_and_count, token_weights
from megatron_r1v2.rl.grpo import MAX_LOG_RATIO

MEAN_ABSOLUTE_DIFFERENCE = "rollout_corr/log_prob_abs_diff"
"""The metric bounded by `algorithm.max_log_prob_difference`: mean |training - engine| log-prob over tokens."""


def mismatch_sums(
    training_log_probs_BS: torch.Tensor,
    rollout_log_probs_BS: torch.Tensor,
    response_mask_BS: torch.Tensor,
    image_B: torch.Tensor,
    weights_B: torch.Tensor | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Compute the mismatch of local rows in a form that adds up over microbatches and ranks.

    With l = log p_training - log p_rollout of a token, over tokens: kl = mean -l, k3_kl = mean(e^l - l - 1),
    chi2_token = mean e^2l - 1, log_prob_abs_diff = mean |l|, token_mult_prob_error = mean e^|l|. With the mean
    log-probs m_training and m_rollout of a response, over responses: *_log_ppl = mean -m, *_ppl = mean e^-m,
    log_ppl_diff = mean(m_rollout - m_training), log_ppl_abs_diff, ppl_ratio = mean e^(m_rollout - m_training),
    chi2_seq = mean e^(2 sum l) - 1.

    Args:
        training_log_probs_BS: float32, of the training forward with the weights that sampled.
        rollout_log_probs_BS: float32, of the engine.
        response_mask_BS: 1 at response tokens.
        image_B: bool, whether the prompt of the row has an image.
        weights_B: 0 for a row that only fills a microbatch; None: all 1.

    Returns:
        Pairs (sum, count) by name, float64 [2], to be added over all parts; and float64 scalars by name whose maximum
        over all parts is wanted (-inf for a part without rows). Pass both to `mismatch_metrics`.

    Raises:
        ValueError: On shapes that do not fit or 16-bit log-probs.
    """
    check_loss_inputs(
        1.0,
        training_log_probs_BS.shape,
        training_log_probs_BS=training_log_probs_BS,
        rollout_log_probs_BS=rollout_log_probs_BS,
        response_mask_BS=response_mask_BS,
        image_B=image_B,
        weights_B=weights_B,
    )
    mask_BS = response_mask_BS.bool()
    # In double: the differences are a few 1e-6 between log-probs of several nats.
    training_BS = torch.where(mask_BS, training_log_probs_BS.detach().double(), 0.0)
    rollout_BS = torch.where(mask_BS, rollout_log_probs_BS.detach().double(), 0.0)
    tokens_BS = token_weights(mask_BS, "token", weights_B)
    rows_B = mask_BS.any(dim=1).float() * (1.0 if weights_B is None else weights_B.float())
    of_tokens = _token_values(training_BS - rollout_BS)
    of_rows = _row_values(training_BS, rollout_BS, mask_BS)

    sums: dict[str, torch.Tensor] = {}
    maxima: dict[str, torch.Tensor] = {}
    for suffix, selected_B in (
        ("", torch.ones_like(rows_B)),
        ("_image", image_B.float()),
        ("_text", (~image_B).float()),
    ):
        for name, values_BS in of_tokens.items():
            sums[name + suffix] = sum_and_count(values_BS, tokens_BS * selected_B[:, None])
        for name, values_B in of_rows.items():
            sums[name + suffix] = sum_and_count(values_B, rows_B * selected_B)
        difference_B = of_rows["rollout_corr/log_ppl_diff"]
        left_out_B = rows_B * selected_B == 0
        maxima["rollout_corr/log_ppl_diff_max" + suffix] = _largest(difference_B, left_out_B)
        # The maximum of the negative, so that ranks need one kind of reduction only.
        maxima["rollout_corr/log_ppl_diff_min" + suffix] = _largest(-difference_B, left_out_B)
    return sums, maxima


def mismatch_metrics(sums: dict[str, torch.Tensor], maxima: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the numbers to log, by name, from the results of `mismatch_sums` on all microbatches and ranks.

    A metric without rows (for example "..._text" where no prompt is text-only) is left out.

    Args:
        sums: [2] pairs by name, added up.
        maxima: scalars by name, the largest of all parts; "..._min..." are maxima of the negative.
    """
    metrics = mean_metrics(sums)
    for name, value in maxima.items():
        largest = float(value)
        if largest != -math.inf:
            metrics[name] = -largest if "_min" in name else largest
    return metrics


def check_mismatch(metrics: dict[str, float], max_log_prob_difference: float) -> None:
    """Refuse to train when the engine and the training forward disagree.

    Args:
        metrics: from `mismatch_metrics`.
        max_log_prob_difference: largest accepted mean |training - engine| log-prob of a token, in nats.

    Raises:
        ValueError: When it is exceeded, or the difference is not a number.
    """
    # Absent when no fresh response has an advantage: then nothing was computed, so nothing can disagree.
    difference = metrics.get(MEAN_ABSOLUTE_DIFFERENCE, 0.0)
    if math.isnan(difference):
        raise ValueError(
            f"{MEAN_ABSOLUTE_DIFFERENCE} is nan: a log-prob is not finite, so the weights are broken, most likely by "
            "the last update. Delete the newest checkpoint, so that the one before is used, and lower "
            "train.learning_rate or set train.skip_above_grad_norm"
        )
    if not difference <= max_log_prob_difference:
        raise ValueError(
            f"{MEAN_ABSOLUTE_DIFFERENCE} is {difference:.4g}, above algorithm.max_log_prob_difference = "
            f"{max_log_prob_difference:.4g}: generation and training no longer compute the same model. Find out why "
            "(stale weights, image features, precision) before raising the bound"
        )


def truncated_importance_weights(
    old_log_probs_BS: torch.Tensor, rollout_log_probs_BS: torch.Tensor, cap: float
) -> torch.Tensor:
    """Compute token weights that correct for sampling from the engine's distribution instead of the trained one.

    w = min(p_old / p_rollout, cap): truncated importance sampling (Yao et al., "Your efficient RL framework secretly
    brings you off-policy RL training", 2025; Ionides, 2008).

    Args:
        old_log_probs_BS: float32, of the training forward when the response was sampled.
        rollout_log_probs_BS: float32, of the engine.
        cap: the largest weight, above 0.

    Returns:
        float32 [B, S] without gradient, in [0, cap]; any value outside the response mask.

    Raises:
        ValueError: When the cap is not above 0.
    """
    if not cap > 0:
        raise ValueError(f"the cap of importance weights must be above 0, got {cap}: leave the weights out to turn off")
    log_ratio_BS = old_log_probs_BS.detach() - rollout_log_probs_BS.detach()
    # The first clamp keeps exp from overflowing; it is above log(cap), so the second one decides the value.
    return log_ratio_BS.clamp(max=min(math.log(cap) + 1.0, MAX_LOG_RATIO)).exp().clamp(max=cap)


def _token_values(log_ratio_BS: torch.Tensor) -> dict[str, torch.Tensor]:
    bounded_BS = log_ratio_BS.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return {
        "rollout_corr/kl": -log_ratio_BS,
        "rollout_corr/k3_kl": torch.expm1(bounded_BS) - bounded_BS,
        "rollout_corr/chi2_token": torch.expm1(2.0 * bounded_BS),
        MEAN_ABSOLUTE_DIFFERENCE: log_ratio_BS.abs(),
        "train/token_mult_prob_error": bounded_BS.abs().exp(),
    }


def _row_values(training_BS: torch.Tensor, rollout_BS: torch.Tensor, mask_BS: torch.Tensor) -> dict[str, torch.Tensor]:
    lengths_B = mask_BS.sum(dim=1).clamp(min=1)
    training_B = training_BS.sum(dim=1) / lengths_B
    rollout_B = rollout_BS.sum(dim=1) / lengths_B
    difference_B = rollout_B - training_B
    sum_B = (training_BS - rollout_BS).sum(dim=1).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return {
        "rollout_corr/training_ppl": (-training_B).exp(),
        "rollout_corr/training_log_ppl": -training_B,
        "rollout_corr/rollout_ppl": (-rollout_B).exp(),
        "rollout_corr/rollout_log_ppl": -rollout_B,
        "rollout_corr/log_ppl_diff": difference_B,
        "rollout_corr/log_ppl_abs_diff": difference_B.abs(),
        "rollout_corr/ppl_ratio": difference_B.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp(),
        "rollout_corr/chi2_seq": torch.expm1(2.0 * sum_B),
    }


def _largest(values_B: torch.Tensor, left_out_B: torch.Tensor) -> torch.Tensor:
    floor_1 = values_B.new_full((1,), -math.inf)
    return torch.cat([floor_1, values_B.masked_fill(left_out_B, -math.inf)]).amax()
