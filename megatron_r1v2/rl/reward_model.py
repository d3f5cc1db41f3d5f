"""The Bradley-Terry loss, by which a reward model learns to order two responses.

Skywork-VL Reward report, arXiv 2505.07263; Bradley and Terry, 1952.
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from megatron_r1v2.rl.aggregation import sum_and_count


def bradley_terry_loss(
    chosen_scores_P: torch.Tensor,
    rejected_scores_P: torch.Tensor,
    *,
    denominator: float,
    centring_weight: float = 0.0,
    weights_P: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Compute this microbatch's part of the negative log-likelihood that the better response of each pair wins.

    L = 1/denominator sum_p w_p [ -log sigma(s_c - s_r) + centring_weight (s_c + s_r)^2 ]

    The first term sees differences only, so scores may drift together to any level; the second (Eisenstein et al.,
    arXiv 2312.09244) holds each pair's mean near zero. A sum, as `grpo.grpo_loss`: parts of one batch add up.

    Args:
        chosen_scores_P: float32, score of the better response of each pair.
        rejected_scores_P: float32, score of the worse one.
        denominator: pairs of the global batch.
        centring_weight: weight of the second term; 0: off.
        weights_P: 0 for a pair that only fills a microbatch; None: all 1.

    Returns:
        The loss, a scalar with gradient; and the metrics by name, float64 [2] pairs (sum over pairs, pairs):
        "reward_model/loss" (the first term), "accuracy" (a tie counts half), "margin" (s_c - s_r), "chosen_score" and
        "rejected_score".

    Raises:
        ValueError: On shapes that do not fit, 16-bit scores or a denominator that is not positive.
    """
    _check(chosen_scores_P, rejected_scores_P, denominator, weights_P)
    weights_P = torch.ones_like(chosen_scores_P) if weights_P is None else weights_P
    # Selecting before any arithmetic keeps NaN and infinity in a filler's scores out of the loss and of its gradient.
    counted_P = weights_P > 0
    chosen_P = torch.where(counted_P, chosen_scores_P, 0.0)
    rejected_P = torch.where(counted_P, rejected_scores_P, 0.0)
    margins_P = chosen_P - rejected_P
    losses_P = -logsigmoid(margins_P)
    terms_P = losses_P + centring_weight * (chosen_P + rejected_P).square()
    loss = (weights_P * terms_P).sum() / denominator
    values = {
        "loss": losses_P,
        # A tie counts half: a model that gives every response the same score is as good as a coin.
        "accuracy": (margins_P > 0).float() + 0.5 * (margins_P == 0),
        "margin": margins_P,
        "chosen_score": chosen_P,
        "rejected_score": rejected_P,
    }
    return loss, {f"reward_model/{name}": sum_and_count(value_P, weights_P) for name, value_P in values.items()}


def _check(
    chosen_P: torch.Tensor, rejected_P: torch.Tensor, denominator: float, weights_P: torch.Tensor | None
) -> None:
    if chosen_P.dim() != 1 or rejected_P.shape != chosen_P.shape:
        raise ValueError(
            f"scores must be [P] and equally many, got {list(chosen_P.shape)} chosen, {list(rejected_P.shape)} rejected"
        )
    if weights_P is not None and weights_P.shape != chosen_P.shape:
        raise ValueError(f"weights_P is {list(weights_P.shape)}, the scores are {list(chosen_P.shape)}")
    for name, scores in (("chosen_scores_P", chosen_P), ("rejected_scores_P", rejected_P)):
        if scores.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} is {scores.dtype}; differences of scores need float32")
    if not denominator > 0:
        raise ValueError(f"denominator={denominator} must be the pairs of the global batch, more than 0")
