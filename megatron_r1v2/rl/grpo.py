"""The GRPO loss: a clipped surrogate with advantages relative to the group, so that no critic is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_r1v2.rl.aggregation import check_loss_inputs, sum_and_count, token_weights

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +- this before exp (verl's bound too): e^20 = 5e8 is far outside any clip range and far
from overflow."""


@dataclass(frozen=True)
class GrpoSettings:
    """The choices of the loss that hold for a whole run."""

    clip_low: float
    """Ratios below 1 - clip_low are clipped."""
    clip_high: float
    """Ratios above 1 + clip_high are clipped."""
    aggregation: str
    """"sequence": each response counts as one; "token": each token does."""
    kl_coefficient: float = 0.0
    """Weight of the KL estimate; above 0 it needs reference log-probs."""


@dataclass(frozen=True)
class GrpoInputs:
    """One microbatch: B responses of at most S tokens. Values outside the response mask do not matter."""

    log_probs_BS: torch.Tensor
    """float32, of the policy in training, with gradient."""
    old_log_probs_BS: torch.Tensor
    """float32, of the training forward when the response was sampled; for a replayed response too."""
    advantages_B: torch.Tensor
    response_mask_BS: torch.Tensor
    """1 at response tokens."""
    weights_B: torch.Tensor | None = None
    """0 for a row that only fills the microbatch; None: all 1."""
    importance_weights_BS: torch.Tensor | None = None
    """From `mismatch.truncated_importance_weights`; None: all 1."""
    reference_log_probs_BS: torch.Tensor | None = None
    """float32, of the reference policy; None: no KL metric and no KL term."""
    replayed_B: torch.Tensor | None = None
    """bool, rows that come from the sample buffer; None: none of them."""


def kl_k3(log_probs: torch.Tensor, reference_log_probs: torch.Tensor) -> torch.Tensor:
    """Estimate KL(policy || reference) at tokens that the policy sampled, in any shape.

    k3 = exp(d) - d - 1, d = log p_reference - log p_policy: unbiased and never negative (J. Schulman, "Approximating
    KL divergence", 2020; used by GRPO, arXiv 2402.03300 equation 4). d is clamped to +- MAX_LOG_RATIO.
    """
    difference = (reference_log_probs - log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return difference.exp() - difference - 1.0


def grpo_loss(
    inputs: GrpoInputs, settings: GrpoSettings, *, denominator: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Compute this microbatch's part of the GRPO loss.

    L = 1/denominator sum_b w_b c_b sum_t [ -i_bt min(rho_bt A_b, clip(rho_bt, 1 - clip_low, 1 + clip_high) A_b)
                                            + kl_coefficient k3_bt ],  rho_bt = exp(log p_bt - log p_old_bt)

    with c_b = 1/|y_b| ("sequence", equation 8 of the R1V2 report) or 1 ("token"), and i_bt the truncated importance
    weights, constants. Equation 8 is an objective to maximise; this is its negative. Two clip ranges: DAPO,
    arXiv 2503.14476. It is a sum: parts of one batch, on any rank, add up to the loss of the whole batch.

    Args:
        denominator: sequences ("sequence") or response tokens ("token") of the global batch, rows that need no compute
            because their advantage is zero included.

    Returns:
        The loss, a scalar with gradient, finite for any finite input and 0 for a row without response tokens; and the
        metrics by name, each a float64 [2] pair (sum, count), see `aggregation.mean_metrics`. The names are the same
        for every microbatch of a run. "ssb/gradient_share_replayed" divides sum |dL/dlog p| over replayed tokens by
        that over all tokens.

    Raises:
        ValueError: On shapes that do not fit, 16-bit log-probs, a KL coefficient without reference.
    """
    check_loss_inputs(denominator, inputs.log_probs_BS.shape, **vars(inputs))
    if settings.kl_coefficient and inputs.reference_log_probs_BS is None:
        raise ValueError(
            f"kl_coefficient is {settings.kl_coefficient} but there are no reference log-probs: pass them or set 0"
        )
    mask_BS = inputs.response_mask_BS.bool()
    # Selecting before any arithmetic keeps NaN and infinity of padding out of the loss and of its gradient.
    policy_BS = torch.where(mask_BS, inputs.log_probs_BS, 0.0)
    log_ratio_BS = policy_BS - torch.where(mask_BS, inputs.old_log_probs_BS, 0.0)
    importance_BS = inputs.importance_weights_BS
    if importance_BS is not None:
        importance_BS = torch.where(mask_BS, importance_BS.detach(), 0.0)
    surrogate = _surrogate(log_ratio_BS, inputs.advantages_B, importance_BS, settings)
    token_loss_BS, gradient_BS = surrogate.loss_BS, surrogate.gradient_BS
    token_weights_BS = token_weights(mask_BS, settings.aggregation, inputs.weights_B)
    # Metrics are means over tokens under either aggregation, so that runs of both kinds can be compared.
    counted_BS = token_weights(mask_BS, "token", inputs.weights_B)
    metrics: dict[str, torch.Tensor] = {}
    if inputs.reference_log_probs_BS is not None:
        reference_BS = torch.where(mask_BS, inputs.reference_log_probs_BS, 0.0)
        kl_BS = kl_k3(policy_BS, reference_BS)
        metrics["actor/kl_loss"] = sum_and_count(kl_BS, counted_BS)
        if settings.kl_coefficient:
            token_loss_BS = token_loss_BS + settings.kl_coefficient * kl_BS
            gradient_BS = gradient_BS + settings.kl_coefficient * _kl_k3_gradient(policy_BS.detach(), reference_BS)
    loss = (token_loss_BS * token_weights_BS).sum() / denominator

    # All of these exist without replayed rows too: ranks and microbatches reduce one list of metrics.
    replayed_BS = counted_BS * (0.0 if inputs.replayed_B is None else inputs.replayed_B.float()[:, None])
    for values_BS, name, name_replayed in (
        (surrogate.clipped_BS, "actor/pg_clipfrac", "ssb/clip_fraction_replayed"),
        (-log_ratio_BS.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), "actor/ppo_kl", "ssb/ppo_kl_replayed"),
        (surrogate.ratio_BS, "actor/ratio_mean", "ssb/ratio_mean_replayed"),
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
    """Tokens without gradient, because the clip decides."""


def _surrogate(
    log_ratio_BS: torch.Tensor,
    advantages_B: torch.Tensor,
    importance_BS: torch.Tensor | None,
    settings: GrpoSettings,
) -> _Surrogate:
    """Compute the policy term of the loss of each token, with its derivative by hand."""
    advantages_BS = advantages_B[:, None]
    # Ratios of padding are exp(0) = 1, and the token weights are 0 there.
    low, high = 1.0 - settings.clip_low, 1.0 + settings.clip_high
    ratio_BS = log_ratio_BS.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    loss_BS = -torch.minimum(ratio_BS * advantages_BS, ratio_BS.clamp(low, high) * advantages_BS)
    # The minimum clips on one side only: a step that makes things worse keeps its gradient however far it went.
    clipped_BS = ((advantages_BS > 0) & (ratio_BS > high)) | ((advantages_BS < 0) & (ratio_BS < low))
    active_BS = ~clipped_BS & (log_ratio_BS.abs() <= MAX_LOG_RATIO)
    # By hand, because autograd would need a backward pass of its own for this metric.
    gradient_BS = (-advantages_BS * ratio_BS * active_BS).detach()
    if importance_BS is not None:
        loss_BS, gradient_BS = importance_BS * loss_BS, importance_BS * gradient_BS
    return _Surrogate(loss_BS, gradient_BS, ratio_BS, clipped_BS)


def _kl_k3_gradient(log_probs: torch.Tensor, reference_log_probs: torch.Tensor) -> torch.Tensor:
    """Return d k3 / d log_probs, 0 where the clamp of `kl_k3` acts."""
    difference = reference_log_probs - log_probs
    inside = difference.abs() <= MAX_LOG_RATIO
    return torch.where(inside, 1.0 - difference.clamp(max=MAX_LOG_RATIO).exp(), 0.0)
