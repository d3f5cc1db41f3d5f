"""The GRPO loss: a clipped surrogate with advantages relative to the group."""

from __future__ import annotations

from typing import NamedTuple

import torch

from megatron_r1v2.rl.aggregation import check_loss_inputs, sum_and_count, token_weights

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +- this before exp: e^20 = 5e8 is far outside any clip range and far from overflow."""


def kl_k3(log_probs: torch.Tensor, reference_log_probs: torch.Tensor) -> torch.Tensor:
    """Estimate KL(policy || reference) at tokens that the policy sampled.

    k3 = exp(d) - d - 1, d = log p_reference - log p_policy: unbiased and never negative (J. Schulman, "Approximating
    KL divergence", 2020; used by GRPO, arXiv 2402.03300 equation 4). d is clamped to +- MAX_LOG_RATIO.

    Args:
        log_probs: float32, any shape.
        reference_log_probs: The same shape.

    Returns:
        The same shape.
    """
    difference = (reference_log_probs - log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return difference.exp() - difference - 1.0


def grpo_loss(
    log_probs_BS: torch.Tensor,
    old_log_probs_BS: torch.Tensor,
    advantages_B: torch.Tensor,
    response_mask_BS: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    denominator: float,
    aggregation: str,
    weights_B: torch.Tensor | None = None,
    importance_weights_BS: torch.Tensor | None = None,
    reference_log_probs_BS: torch.Tensor | None = None,
    kl_coefficient: float = 0.0,
    replayed_B: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return this microbatch's part of the GRPO loss.

    L = 1/denominator sum_b w_b c_b sum_t [ -i_bt min(rho_bt A_b, clip(rho_bt, 1 - clip_low, 1 + clip_high) A_b)
                                            + kl_coefficient k3_bt ],  rho_bt = exp(log p_bt - log p_old_bt)

    with c_b = 1/|y_b| ("sequence", equation 8 of the R1V2 report) or 1 ("token"), and i_bt the truncated importance
    weights, constants. Equation 8 is an objective to maximise; this is its negative. Two clip ranges: DAPO,
    arXiv 2503.14476. It is a sum: parts of one batch, on any rank, add up to the loss of the whole batch.

    Args:
        log_probs_BS: float32 [B, S]: of the policy in training.
        old_log_probs_BS: float32 [B, S]: those of the training forward when the response was sampled, also if replayed.
        advantages_B: float32 [B].
        response_mask_BS: [B, S]: 1 at response tokens. What the other tensors hold elsewhere does not matter.
        clip_low: Ratios below 1 - clip_low are clipped.
        clip_high: Ratios above 1 + clip_high are clipped.
        denominator: Sequences ("sequence") or response tokens ("token") of the global batch, rows that need no compute
            because their advantage is zero included.
        aggregation: "sequence" or "token".
        weights_B: float32 [B]: 0 for a row that only fills a microbatch; None: all 1.
        importance_weights_BS: float32 [B, S]: see mismatch.truncated_importance_weights; None: all 1.
        reference_log_probs_BS: float32 [B, S]: of the reference policy; None: no KL.
        kl_coefficient: Weight of the KL estimate.
        replayed_B: bool [B]: rows that come from the buffer; None: none.

    Returns:
        The loss, a scalar with gradient, finite for any finite input and 0 for a row without response tokens; and the
        metrics by name, each a float64 [2] pair (sum, count), see `aggregation.mean_metrics`. The names are the same
        for every microbatch of a run. "ssb/gradient_share_replayed" divides sum |dL/dlog p| over replayed tokens by
        that over all tokens.

    Raises:
        ValueError: On shapes that do not fit, 16-bit log-probs, a KL coefficient without reference.
    """
    check_loss_inputs(
        denominator,
        log_probs_BS.shape,
        log_probs_BS=log_probs_BS,
        old_log_probs_BS=old_log_probs_BS,
        advantages_B=advantages_B,
        response_mask_BS=response_mask_BS,
        weights_B=weights_B,
        importance_weights_BS=importance_weights_BS,
        reference_log_probs_BS=reference_log_probs_BS,
        replayed_B=replayed_B,
    )
    if kl_coefficient and reference_log_probs_BS is None:
        raise ValueError(f"kl_coefficient is {kl_coefficient} but there are no reference log-probs: pass them or set 0")
    mask_BS = response_mask_BS.bool()
    # Selecting before any arithmetic keeps NaN and infinity of padding out of the loss and of its gradient.
    policy_BS = torch.where(mask_BS, log_probs_BS, 0.0)
    log_ratio_BS = policy_BS - torch.where(mask_BS, old_log_probs_BS, 0.0)
    importance_BS = None if importance_weights_BS is None else torch.where(mask_BS, importance_weights_BS.detach(), 0.0)
    terms = _surrogate(log_ratio_BS, advantages_B, importance_BS, clip_low, clip_high)
    token_loss_BS, gradient_BS = terms.loss_BS, terms.gradient_BS
    token_weights_BS = token_weights(mask_BS, aggregation, weights_B)
    counted_BS = token_weights(mask_BS, "token", weights_B)
    metrics: dict[str, torch.Tensor] = {}
    if reference_log_probs_BS is not None:
        reference_BS = torch.where(mask_BS, reference_log_probs_BS, 0.0)
        kl_BS = kl_k3(policy_BS, reference_BS)
        metrics["actor/kl_loss"] = sum_and_count(kl_BS, counted_BS)
        if kl_coefficient:
            token_loss_BS = token_loss_BS + kl_coefficient * kl_BS
            gradient_BS = gradient_BS + kl_coefficient * _kl_k3_gradient(policy_BS.detach(), reference_BS)
    loss = (token_loss_BS * token_weights_BS).sum() / denominator

    replayed_BS = counted_BS * (0.0 if replayed_B is None else replayed_B.float()[:, None])
    for values_BS, name, name_replayed in (
        (terms.clipped_BS, "actor/pg_clipfrac", "ssb/clip_fraction_replayed"),
        (-log_ratio_BS.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), "actor/ppo_kl", "ssb/ppo_kl_replayed"),
        (terms.ratio_BS, "actor/ratio_mean", "ssb/ratio_mean_replayed"),
    ):
        metrics[name] = sum_and_count(values_BS, counted_BS)
        metrics[name_replayed] = sum_and_count(values_BS, replayed_BS)
    share_BS = gradient_BS.abs() * token_weights_BS
    metrics["ssb/gradient_share_replayed"] = sum_and_count((replayed_BS > 0).double(), share_BS)
    return loss, metrics


class _Surrogate(NamedTuple):
    loss_BS: torch.Tensor
    """The clipped surrogate of each token, negative, with importance weights."""
    gradient_BS: torch.Tensor
    """d loss / d log-prob of each token, without graph."""
    ratio_BS: torch.Tensor
    clipped_BS: torch.Tensor
    """Where the clip decides, so that the token has no gradient."""


def _surrogate(
    log_ratio_BS: torch.Tensor,
    advantages_B: torch.Tensor,
    importance_BS: torch.Tensor | None,
    clip_low: float,
    clip_high: float,
) -> _Surrogate:
    """Return the policy term of the loss of each token, with its derivative by hand."""
    advantages_BS = advantages_B[:, None]
    ratio_BS = log_ratio_BS.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped_ratio_BS = ratio_BS.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss_BS = -torch.minimum(ratio_BS * advantages_BS, clipped_ratio_BS * advantages_BS)
    too_high_BS = (advantages_BS > 0) & (ratio_BS > 1.0 + clip_high)
    too_low_BS = (advantages_BS < 0) & (ratio_BS < 1.0 - clip_low)
    clipped_BS = too_high_BS | too_low_BS
    active_BS = ~clipped_BS & (log_ratio_BS.abs() <= MAX_LOG_RATIO)
    gradient_BS = (-advantages_BS * ratio_BS * active_BS).detach()
    if importance_BS is not None:
        loss_BS, gradient_BS = importance_BS * loss_BS, importance_BS * gradient_BS
    return _Surrogate(loss_BS, gradient_BS, ratio_BS, clipped_BS)


def _kl_k3_gradient(log_probs: torch.Tensor, reference_log_probs: torch.Tensor) -> torch.Tensor:
    """Return d k3 / d log_probs, 0 where the clamp of `kl_k3` holds."""
    difference = reference_log_probs - log_probs
    inside = difference.abs() <= MAX_LOG_RATIO
    return torch.where(inside, 1.0 - difference.clamp(max=MAX_LOG_RATIO).exp(), 0.0)
