"""The scalar head of a reward model: one score for each token, in place of the language model's output layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_r1v2.models.norms import mark_sequence_parallel


class ScoreHead(nn.Module):
    """score = w . h, without a bias, which would cancel in every difference of scores and never train."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, *, groups: ProcessGroupCollection, seed: int
    ) -> None:
        """Draw the weight: variance 1 / hidden size, so that scores start at about one.

        Args:
            seed: the seed of the weight, which is the same in every layout.
        """
        super().__init__()
        self.groups = groups
        self.sequence_parallel = config.sequence_parallel
        # A generator of its own: megatron-core's trackers differ between TP ranks, which must hold the same weight.
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(1, hidden_size, generator=generator) / hidden_size**0.5)
        mark_sequence_parallel(self.weight, config)

    def forward(self, hidden_SBH: torch.Tensor) -> torch.Tensor:
        """Collective over `groups.tp` under sequence parallelism: score every token.

        Args:
            hidden_SBH: [S, B, H] after the final norm, or this rank's part of S under sequence parallelism.

        Returns:
            float32 [B, S], all of S on every rank.
        """
        scores_SB = F.linear(hidden_SBH.float(), self.weight.float()).squeeze(-1)
        if self.sequence_parallel:
            # All ranks compute the same loss from all scores, so each takes its own part of the gradient back; a
            # reduce-scatter would add equal gradients. The weight then has the gradient of this rank's tokens only, and
            # its mark makes megatron-core add those of the other ranks.
            scores_SB = gather_from_sequence_parallel_region(
                scores_SB, tensor_parallel_output_grad=False, group=self.groups.tp
            )
        return scores_SB.transpose(0, 1).contiguous()
