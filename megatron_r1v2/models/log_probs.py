"""Log-probs of given tokens, and the entropy, from logits whose vocabulary is split over tensor-parallel ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

POSITIONS_AT_ONCE = 1024
"""Positions whose probabilities exist at once: those of a long row would be as large as its logits."""


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
    scaled_BSV = _scale(logits_BSV, temperature, vocab_size, groups)
    log_probs_BS: torch.Tensor = -vocab_parallel_cross_entropy(scaled_BSV, labels_BS)
    return log_probs_BS


@torch.no_grad()
def token_entropy(
    logits_BSV: torch.Tensor, *, temperature: float, vocab_size: int, groups: ProcessGroupCollection
) -> torch.Tensor:
    """Collective over `groups.tp`: compute the entropy of softmax(logits / temperature) over the true vocabulary.

    H = log sum_v exp(l_v) - sum_v p_v l_v.

    Args:
        logits_BSV: [B, S, V / TP], this rank's part of the padded vocabulary.
        temperature: the temperature of sampling.
        vocab_size: the size of the tokenizer; ids from here on are padding.

    Returns:
        float32 [B, S] in nats, without a graph.
    """
    parts = []
    for chunk_BSV in torch.split(logits_BSV, POSITIONS_AT_ONCE, dim=1):
        scaled_BSV = _scale(chunk_BSV, temperature, vocab_size, groups)
        largest_BS = scaled_BSV.amax(dim=-1)
        dist.all_reduce(largest_BS, op=dist.ReduceOp.MAX, group=groups.tp)
        # Less the largest: padding, at the most negative number, becomes 0 x (a finite number).
        shifted_BSV = (scaled_BSV - largest_BS[..., None]).clamp(min=-1e4)
        exp_BSV = shifted_BSV.exp()
        sums = torch.stack([exp_BSV.sum(dim=-1), (exp_BSV * shifted_BSV).sum(dim=-1)])
        dist.all_reduce(sums, group=groups.tp)
        parts.append(sums[0].log() - sums[1] / sums[0])
    return torch.cat(parts, dim=1)


def _scale(
    logits_BSV: torch.Tensor, temperature: float, vocab_size: int, groups: ProcessGroupCollection
) -> torch.Tensor:
    """Return the logits of the sampling distribution, those of padding as low as can be."""
    # In fp32: bf16 has three digits at most, and the losses take differences of log-probs.
    scaled_BSV = logits_BSV.float() / temperature
    first_id = groups.tp.rank() * scaled_BSV.shape[-1]
    num_true = max(0, min(scaled_BSV.shape[-1], vocab_size - first_id))
    if num_true < scaled_BSV.shape[-1]:
        # No sampler can draw the padding, so it must not take probability from the true tokens.
        is_padding = torch.arange(scaled_BSV.shape[-1], device=scaled_BSV.device) >= num_true
        scaled_BSV = scaled_BSV.masked_fill(is_padding, torch.finfo(scaled_BSV.dtype).min)
    return scaled_BSV
