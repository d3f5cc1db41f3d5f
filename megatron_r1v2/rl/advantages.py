"""Advantages relative to the group of responses to one prompt, and the groups that can teach anything."""

from __future__ import annotations

import torch

ADVANTAGE_EPSILON = 1e-6
"""Keeps a group of nearly equal rewards from being divided by nothing; far below any difference of rewards."""
REWARD_TOLERANCE = 0.01
"""Rewards of a group that differ by no more teach nothing: with a continuous score no group is ever exactly uniform."""


def group_advantages(rewards_R: torch.Tensor, group_size: int, epsilon: float) -> torch.Tensor:
    """Compute the advantage of each response over its group, in standard deviations of the group.

    A_i = (r_i - mean_j r_j) / (std_j r_j + epsilon), equation 6 of the R1V2 report (arXiv 2504.16656).

    Args:
        rewards_R: total rewards, finite; the responses to one prompt are neighbours.
        epsilon: added to the standard deviation, in units of the reward.

    Returns:
        [R], dtype of `rewards_R`: exactly 0 in a group whose rewards are all equal.

    Raises:
        ValueError: When R is not a multiple of the group size or a reward is not finite.
    """
    groups_RG = _as_groups(rewards_R, group_size).double()
    if not bool(torch.isfinite(groups_RG).all()):
        bad = (~torch.isfinite(rewards_R)).nonzero().flatten().tolist()
        raise ValueError(f"rewards must be finite; responses {bad[:8]} are not: fix the reward that gave them")
    # The population's deviation (divided by N, not N - 1): equation 6 describes the group itself and estimates nothing
    # beyond it, and a group of one has advantage 0 instead of NaN. Dividing by N - 1 gives 6.5 % less at N = 8.
    centred_RG = groups_RG - groups_RG.mean(dim=1, keepdim=True)
    deviation_R1 = centred_RG.square().mean(dim=1, keepdim=True).sqrt()
    advantages_RG = centred_RG / (deviation_R1 + epsilon)
    # The mean of equal numbers can be off by a rounding, which a small epsilon would blow up.
    uniform_R1 = groups_RG.amax(dim=1, keepdim=True) == groups_RG.amin(dim=1, keepdim=True)
    return advantages_RG.masked_fill(uniform_R1, 0.0).flatten().to(rewards_R.dtype)


def effective_mask(values_R: torch.Tensor, group_size: int, tolerance: float = 0.0) -> torch.Tensor:
    """Return a bool [R] that marks the responses of groups whose values differ by more than the tolerance.

    Args:
        values_R: rule correctness, or total rewards; the responses to one prompt are neighbours.
        tolerance: `REWARD_TOLERANCE` for rewards.

    Raises:
        ValueError: When R is not a multiple of the group size.
    """
    groups_RG = _as_groups(values_R.double(), group_size)
    spread_R1 = groups_RG.amax(dim=1, keepdim=True) - groups_RG.amin(dim=1, keepdim=True)
    return (spread_R1 > tolerance).expand_as(groups_RG).flatten()


def _as_groups(values_R: torch.Tensor, group_size: int) -> torch.Tensor:
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")
    if values_R.dim() != 1 or values_R.shape[0] % group_size:
        raise ValueError(
            f"expected a flat tensor of whole groups of {group_size} responses, got shape {tuple(values_R.shape)}: "
            "pass all responses to a prompt together"
        )
    return values_R.reshape(-1, group_size)
