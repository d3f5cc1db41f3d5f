"""From the rewards of a group of responses to advantages, and which groups can teach anything."""

from __future__ import annotations

import torch


def group_advantages(rewards_R: torch.Tensor, group_size: int, epsilon: float) -> torch.Tensor:
    """Return how much better than its group each response is, in standard deviations of the group.

    A_i = (r_i - mean_j r_j) / (std_j r_j + epsilon), equation 6 of the R1V2 report (arXiv 2504.16656).

    The standard deviation is the population's (divided by N, not N - 1): equation 6 takes it over the rewards of the
    group itself and estimates nothing beyond it; a group of one then has advantage 0 instead of NaN. Peers that divide
    by N - 1 get values that are sqrt((N - 1) / N) of ours, 6.5 % less at N = 8.

    Args:
        rewards_R: float [R]: total rewards; responses to one prompt are neighbours.
        group_size: Responses to each prompt, N.
        epsilon: Added to the standard deviation, in units of the reward.

    Returns:
        [R], dtype of `rewards_R`: exactly 0 in a group whose rewards are all equal.

    Raises:
        ValueError: When the rewards are no whole number of groups or one of them is not finite.
    """
    groups_RG = _as_groups(rewards_R, group_size).double()
    if not bool(torch.isfinite(groups_RG).all()):
        bad = (~torch.isfinite(rewards_R)).nonzero().flatten().tolist()
        raise ValueError(f"rewards must be finite; responses {bad[:8]} are not: fix the reward that gave them")
    centred_RG = groups_RG - groups_RG.mean(dim=1, keepdim=True)
    deviation_R1 = centred_RG.square().mean(dim=1, keepdim=True).sqrt()
    advantages_RG = centred_RG / (deviation_R1 + epsilon)
    # The mean of equal numbers can be off by a rounding, which a small epsilon would blow up.
    uniform_R1 = groups_RG.amax(dim=1, keepdim=True) == groups_RG.amin(dim=1, keepdim=True)
    return advantages_RG.masked_fill(uniform_R1, 0.0).flatten().to(rewards_R.dtype)


def effective_mask(rule_correct_R: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return which responses belong to a group that is not uniform in rule correctness.

    Correctness and not the total reward decides: with a continuous reward-model score no group is ever exactly uniform
    in the total, though nothing about right and wrong can be learned from it.

    Args:
        rule_correct_R: bool [R]: whether the answer rule found each response right; groups are neighbours.
        group_size: Responses to each prompt, N.

    Returns:
        bool [R]: the same for all responses of a group.

    Raises:
        ValueError: When the responses are no whole number of groups.
    """
    groups_RG = _as_groups(rule_correct_R.bool(), group_size)
    mixed_R1 = groups_RG.any(dim=1, keepdim=True) & ~groups_RG.all(dim=1, keepdim=True)
    return mixed_R1.expand_as(groups_RG).flatten()


def _as_groups(values_R: torch.Tensor, group_size: int) -> torch.Tensor:
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")
    if values_R.dim() != 1 or values_R.shape[0] % group_size:
        raise ValueError(
            f"expected a flat tensor of whole groups of {group_size} responses, got shape {tuple(values_R.shape)}: "
            "pass all responses to a prompt together"
        )
    return values_R.reshape(-1, group_size)
