"""The difference between the engine's log-probs and the training forward's, over all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_r1v2.parallel import objects
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.rl.mismatch import mismatch_metrics, mismatch_sums
from megatron_r1v2.training.policy import add_pairs
from megatron_r1v2.types import TrainingBatch


def compute_mismatch(
    batches: Sequence[TrainingBatch], log_probs: Sequence[torch.Tensor], context: ParallelContext
) -> dict[str, float]:
    """Collective over the world: compare engine and training forward on fresh samples.

    Args:
        batches: this replica's microbatches; tokens with old log-probs, of the buffer or of earlier segments, do not
            count.
        log_probs: float32 [B, S] for each, by the training forward with the weights that sampled.

    Returns:
        Metrics by name, on every rank; empty when no rank has a sample.
    """
    parts = [
        mismatch_sums(
            log_probs_BS,
            batch.rollout_log_probs_BS,
            batch.response_mask_BS * fresh_BS,
            batch.has_image_B,
            batch.weights_B * fresh_BS.any(dim=1),
        )
        for batch, log_probs_BS in zip(batches, log_probs, strict=True)
        # Other weights sampled the rest, so there the two differ rightly.
        for fresh_BS in (batch.old_log_probs_BS.isnan(),)
    ]
    sums = {name: pair.cpu() for name, pair in add_pairs([pairs for pairs, _ in parts]).items()}
    maxima = {name: value.cpu() for name, value in _largest([values for _, values in parts]).items()}
    # All ranks of a replica have the same values: one of them counts.
    gathered = objects.all_gather((sums, maxima) if context.is_replica_leader else ({}, {}))
    return mismatch_metrics(add_pairs([pairs for pairs, _ in gathered]), _largest([values for _, values in gathered]))


def _largest(parts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    largest: dict[str, torch.Tensor] = {}
    for part in parts:
        for name, value in part.items():
            largest[name] = torch.maximum(largest[name], value) if name in largest else value
    return largest
