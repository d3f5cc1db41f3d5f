"""Sums of token losses and metrics over rows, microbatches and ranks.

Every loss is a sum over local rows divided by a global denominator, and every metric a pair (sum, count): both add up
over microbatches and ranks, however many rows each of them has. Means of means would depend on the layout.
"""

from __future__ import annotations

import torch


def token_weights(
    response_mask_BS: torch.Tensor, aggregation: str, weights_B: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute the factor of each token's loss in the sum over local rows.

    "sequence": 1/|y_b| for each token of response b, so that a response counts as one (equation 8 of the R1V2 report);
    "token": 1 for each token, so that a long response counts for more.

    Args:
        response_mask_BS: non-zero where a token is trained.
        weights_B: weight of each row, 0 for one that only fills a microbatch; None: all 1.

    Returns:
        float32 [B, S]: 0 outside the mask; a row without response tokens is 0 everywhere.

    Raises:
        ValueError: When `aggregation` is neither of the two.
    """
    weights_BS = response_mask_BS.bool().float()
    if aggregation == "sequence":
        # Not below 1: an empty response must give 0, and 0 / 0 would spread NaN over the batch.
        weights_BS = weights_BS / weights_BS.sum(dim=1, keepdim=True).clamp(min=1.0)
    elif aggregation != "token":
        raise ValueError(f'aggregation must be "sequence" or "token", got {aggregation!r}')
    return weights_BS if weights_B is None else weights_BS * weights_B.float()[:, None]


def sum_and_count(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return a metric as a pair that adds up, (sum of weighted values, sum of weights): float64 [2], detached.

    Args:
        values: of any shape.
        weights: of the same shape; 0 leaves a value out, NaN and infinity included.
    """
    weights = weights.detach().double()
    # 0 x NaN is NaN, so the weight alone does not leave a value out.
    values = values.detach().double().masked_fill(weights == 0, 0.0)
    return torch.stack([(values * weights).sum(), weights.sum()])


def mean_metrics(sums: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the means by name of pairs (sum, count) that were added over all microbatches and ranks.

    A metric with nothing to average (count 0) is left out: a 0 in its place would look measured.
    """
    pairs = {name: pair.tolist() for name, pair in sums.items()}
    return {name: total / count for name, (total, count) in pairs.items() if count}


def check_loss_inputs(denominator: float, shape_BS: torch.Size, **tensors: torch.Tensor | None) -> None:
    """Refuse inputs that would give a wrong loss instead of an error.

    Args:
        denominator: must be above 0.
        shape_BS: the expected shape of tensors [B, S].
        **tensors: by argument name: names ending in "_BS" must be [B, S], those in "_B" [B]; None is skipped.

    Raises:
        ValueError: Names the argument, the value got and the value expected.
    """
    if not denominator > 0:
        raise ValueError(f"denominator must be above 0 (the global number of sequences or tokens), got {denominator}")
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        expected = tuple(shape_BS) if name.endswith("_BS") else (shape_BS[0],)
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name} must have shape {expected}, got {tuple(tensor.shape)}")
        if name.endswith("log_probs_BS") and tensor.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(f"{name} must be float32, got {tensor.dtype}: a ratio of 16-bit log-probs is noise")
