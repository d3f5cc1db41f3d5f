"""The supervised loss: that of the align stage, and the generation term of MPO."""

from __future__ import annotations

import torch

from megatron_r1v2.rl.aggregation import check_loss_inputs, sum_and_count, token_weights


def supervised_loss(
    log_probs_BS: torch.Tensor,
    response_mask_BS: torch.Tensor,
    *,
    denominator: float,
    weights_B: torch.Tensor | None = None,
    aggregation: str = "token",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Compute this microbatch's part of the negative log-likelihood of the reference responses.

    L = 1/denominator sum_b w_b c_b sum_t -log p_bt with c_b = 1 ("token": the mean over all response tokens of the
    global batch, as in the supervised training of InternVL and Qwen) or 1/|y_b| ("sequence": the mean of per-response
    means). A sum, as `grpo.grpo_loss`: parts of one batch add up.

    Args:
        log_probs_BS: float32, of the labels.
        response_mask_BS: 1 at response tokens; elsewhere the log-probs do not matter.
        denominator: response tokens ("token") or responses ("sequence") of the global batch.
        weights_B: 0 for a row that only fills a microbatch; None: all 1.
        aggregation: "token" or "sequence".

    Returns:
        The loss, a scalar with gradient; and the metrics by name: "actor/nll", a float64 [2] pair (sum over tokens,
        tokens).

    Raises:
        ValueError: On shapes that do not fit or 16-bit log-probs.
    """
    check_loss_inputs(
        denominator,
        log_probs_BS.shape,
        log_probs_BS=log_probs_BS,
        response_mask_BS=response_mask_BS,
        weights_B=weights_B,
    )
    # Selecting before any arithmetic keeps NaN and infinity of padding out of the loss and of its gradient.
    nll_BS = -torch.where(response_mask_BS.bool(), log_probs_BS, 0.0)
    loss = (nll_BS * token_weights(response_mask_BS, aggregation, weights_B)).sum() / denominator
    return loss, {"actor/nll": sum_and_count(nll_BS, token_weights(response_mask_BS, "token", weights_B))}
