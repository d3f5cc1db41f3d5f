"""Log-probs of given tokens from logits that are split over tensor-parallel ranks."""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy


def token_log_probs(
    logits_BSV: torch.Tensor,
    labels_BS: torch.Tensor,
    *,
    temperature: float,
    vocab_size: int,
    groups: ProcessGroupCollection,
) -> torch.Tensor:
    """Compute log softmax(logits / temperature)[label], over the true vocabulary.

    Args:
        logits_BSV: [B, S, V / TP], this rank's part of the padded vocabulary.
        labels_BS: int64 [B, S].
        temperature: of the sampling distribution; rollouts and training use the same.
        vocab_size: ids from here on are padding: no sampler can draw them, so they get no probability.
        groups: tp holds the other parts.

    Returns:
        float32 [B, S], differentiable.
    """
    scaled = logits_BSV.float() / temperature
    first_id = groups.tp.rank() * scaled.shape[-1]
    num_true = max(0, min(scaled.shape[-1], vocab_size - first_id))
    if num_true < scaled.shape[-1]:
        is_padding = torch.arange(scaled.shape[-1], device=scaled.device) >= num_true
        scaled = scaled.masked_fill(is_padding, torch.finfo(scaled.dtype).min)
    return -vocab_parallel_cross_entropy(scaled, labels_BS)
