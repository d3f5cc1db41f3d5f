"""Log-probs of given tokens, from logits whose vocabulary is split over tensor-parallel ranks."""

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
    """Collective over `groups.tp`: compute log softmax(logits / temperature)[label] over the true vocabulary.

    Args:
        logits_BSV: [B, S, V / TP], this rank's part of the padded vocabulary.
        labels_BS: int64 [B, S], the token that each position predicts.
        temperature: the temperature of sampling; rollouts and training must use the same.
        vocab_size: the size of the tokenizer; ids from here on are padding.

    Returns:
        float32 [B, S], differentiable.
    """
    # In fp32: bf16 has three digits at most, and the losses take differences of log-probs.
    scaled = logits_BSV.float() / temperature
    first_id = groups.tp.rank() * scaled.shape[-1]
    num_true = max(0, min(scaled.shape[-1], vocab_size - first_id))
    if num_true < scaled.shape[-1]:
        # No sampler can draw the padding, so it must not take probability from the true tokens.
        is_padding = torch.arange(scaled.shape[-1], device=scaled.device) >= num_true
        scaled = scaled.masked_fill(is_padding, torch.finfo(scaled.dtype).min)
    log_probs_BS: torch.Tensor = -vocab_parallel_cross_entropy(scaled, labels_BS)
    return log_probs_BS
