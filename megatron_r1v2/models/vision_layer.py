"""One layer of an InternViT: megatron-core's TransformerLayer with layer scales, QK norm over all heads, zero heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from megatron_r1v2.models.architecture import VisionArchitecture
from megatron_r1v2.models.norms import JointHeadRMSNorm
from megatron_r1v2.models.sharding import allow_padding


class VisionSelfAttention(SelfAttention):
    """Bidirectional attention whose head count may be padded with zero heads to divide by the TP ranks."""

    def __init__(self, *args: Any, architecture: VisionArchitecture, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.query_norm: nn.Module | None = None
        self.key_norm: nn.Module | None = None
        if architecture.qk_norm:
            self.query_norm = self._joint_norm(architecture)
            self.key_norm = self._joint_norm(architecture)

    def _joint_norm(self, architecture: VisionArchitecture) -> JointHeadRMSNorm:
        return JointHeadRMSNorm(
            self.config,
            local_heads=self.num_attention_heads_per_partition,
            head_size=architecture.head_size,
            width=architecture.hidden_size,
            # transformers leaves the epsilon of these two at its default, whatever the block norms use
            eps=1e-6,
            tp_group=self.pg_collection.tp,
        )

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """Project to queries, keys and values, and normalise the first two jointly over all heads."""
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        return query, key, value

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Describe the parameters; those that carry zero heads may load into another padding."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        unpadded = f"{prefix}linear_proj.bias"
        allow_padding({key: value for key, value in sharded.items() if key != unpadded})
        return sharded


class ScaledTransformerLayer(TransformerLayer):
    """x + attention_scale * attention(norm(x)), then x + mlp_scale * mlp(norm(x))."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        like = self.self_attention.linear_proj.weight
        size = self.config.hidden_size
        self.attention_scale = nn.Parameter(torch.full((size,), 0.1, dtype=like.dtype, device=like.device))
        self.mlp_scale = nn.Parameter(torch.full((size,), 0.1, dtype=like.dtype, device=like.device))
        self.self_attn_bda = self._attention_residual
        self.mlp_bda = self._mlp_residual

    def _attention_residual(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        return lambda output, residual, dropout: _add_scaled(output, residual, self.attention_scale)

    def _mlp_residual(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        return lambda output, residual, dropout: _add_scaled(output, residual, self.mlp_scale)


def _add_scaled(
    output: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    hidden, bias = output
    if bias is not None:
        hidden = hidden + bias
    return residual + scale * hidden
